#!/bin/sh
# triton 3.8.0 (3.6.0 too): a Python number that a kernel multiplies a bfloat16 tensor with is rounded to six decimals
# first, not to the nearest bfloat16: 2**-20 is taken as 0.000001, 4.7 % too much, and 2**-30 as 0, without a word.
# bfloat16 itself goes down to 2**-133. float16 and float32 constants of the same kernel are right.
#
# Expected: the bits 0x3580 of 2**-20 and 0x3080 of 2**-30 in the compiled code.
# Seen:     {'bf16': ['9.983770e-07', '0.000000e+00'], 'fp32': ['9.53674316E-7', '9.31322574E-10']}
# Takes a Python of 3.12 or later (PYTHON=...) and some GB, of torch; compiles for a GPU that need not be there.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/constants.py" <<'PY'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def multiply(x, y):
    o = tl.arange(0, 128)
    value = tl.load(x + o)
    tl.store(y + o, value * 2.0**-20)
    tl.store(y + 128 + o, value * 2.0**-30)


found = {}
for dtype in ("bf16", "fp32"):
    source = ASTSource(multiply, {"x": f"*{dtype}", "y": f"*{dtype}"}, {})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    numbers = re.findall(r"arith\.constant dense<(\S*[.]\S*)> : tensor<128xb?f\d+>", code)
    found[dtype] = sorted(numbers, key=float, reverse=True)
print(f"triton {triton.__version__}: {found}")
near = {dtype: [abs(float(n) / x - 1) < 2**-8 for n, x in zip(ns, (2.0**-20, 2.0**-30))] for dtype, ns in found.items()}
sys.exit(near != {"bf16": [False, False], "fp32": [True, True]} or float(found["bf16"][1]) != 0)
PY
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.8.0 torch==2.14.1 numpy==2.5.5
if "$folder/venv/bin/python" "$folder/constants.py"; then
    echo "as described"
else
    echo "changed: see above"
    exit 1
fi
