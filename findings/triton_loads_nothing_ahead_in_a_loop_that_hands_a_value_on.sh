#!/bin/sh
# triton 3.8.0 (3.6.0 too): `tl.range(n, num_stages=3)` lets a loop's loads run ahead, by asynchronous copies. If the loop
# hands a value that it got from the step before on to the next one as it is (before, last = last, now, as a convolution
# over tokens does), num_stages is passed over without a word: no load runs ahead. The same loop that changes the value
# by anything on its way, be it by a `mov` in inline assembly, has its copies.
#
# Expected: asynchronous copies in both loops' code.
# Seen:     {'handed_on': 0, 'changed': 6}
# Takes a Python of 3.12 or later (PYTHON=...) and some GB, of torch; compiles for a GPU that need not be there.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/loops.py" <<'PY'
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SIGNATURE = {"x": "*fp32", "y": "*fp32", "n": "i32", "D": "constexpr"}
ALIGNED = {(i,): [["tt.divisibility", 16]] for i in range(2)}


@triton.jit
def handed_on(x, y, n, D: tl.constexpr):
    o = tl.arange(0, D)
    before, last = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for i in tl.range(n, num_stages=3):
        now = tl.load(x + i * D + o)
        tl.store(y + i * D + o, before + last + now)
        before, last = last, now


@triton.jit
def changed(x, y, n, D: tl.constexpr):
    o = tl.arange(0, D)
    before, last = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for i in tl.range(n, num_stages=3):
        now = tl.load(x + i * D + o)
        tl.store(y + i * D + o, before + last + now)
        before, last = last * 0.5, now


found = {}
for kernel in (handed_on, changed):
    compiled = triton.compile(ASTSource(kernel, SIGNATURE, {"D": 1024}, ALIGNED), target=GPUTarget("cuda", 90, 32))
    found[kernel.__name__] = sum(compiled.asm["ptx"].count(f"cp.async.{way}") for way in ("ca.", "cg."))
print(f"triton {triton.__version__}, asynchronous copies: {found}")
sys.exit(found["handed_on"] != 0 or found["changed"] == 0)
PY
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.8.0 torch==2.14.1 numpy==2.5.5
if "$folder/venv/bin/python" "$folder/loops.py"; then
    echo "as described"
else
    echo "changed: see above"
    exit 1
fi
