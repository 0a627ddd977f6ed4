#!/bin/sh
# triton 3.5.1 to 3.7.1 (3.6.0 and 3.7.0 too): an inner loop that begins at a variable which its own body moves on
# (at = i + 2) begins, in the compiled code, at that variable's first value in every turn of the outer loop. The variable
# is carried through both loops in the IR that the front end makes (TTIR), and gone from the IR of the GPU (TTGIR): wrong
# code, without a word. The interpreter (TRITON_INTERPRET=1) and triton 3.8.0 go on where the loop before ended, as Python
# does. Seen by compiling for compute capability 9.0, which needs no GPU.
#
# Expected: the loops carry the variable in TTIR and in TTGIR.
# Seen:     3.7.1: TTIR carries it True, TTGIR carries it False; 3.8.0: TTIR carries it True, TTGIR carries it True
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
cat > "$folder/try.py" <<'PY'
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def each_second_place_once(out, n, step):
    at = tl.program_id(0)
    for block in range(0, n, step):
        for i in range(at, block + step, 2):
            tl.store(out + i, block)
            at = i + 2


kernel = triton.compile(
    ASTSource(each_second_place_once, {"out": "*i32", "n": "i32", "step": "i32"}), target=GPUTarget("cuda", 90, 32)
)
carried = [
    all("iter_args(" in line for line in kernel.asm[stage].splitlines() if "scf.for" in line)
    for stage in ("ttir", "ttgir")
]
print(f"{triton.__version__}: TTIR carries it {carried[0]}, TTGIR carries it {carried[1]}")
sys.exit(carried != [True, triton.__version__ == "3.8.0"])
PY
for version in 3.5.1 3.7.1 3.8.0; do
    "$folder/venv/bin/pip" install --quiet "triton==$version"
    if ! TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/try.py"; then
        echo "changed: see above"
        exit 1
    fi
done
echo "as described"
