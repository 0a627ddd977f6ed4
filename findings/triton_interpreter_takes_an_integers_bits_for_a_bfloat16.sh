#!/bin/sh
# triton 3.8.0 (3.6.0 alike): with TRITON_INTERPRET=1, x.to(tl.bfloat16) of a tile of integers or of a mask takes the
# lower 16 bits of each integer for those of a bfloat16, where a GPU converts the value. A mask turned into ones, for a
# product that sums up rows, is of numbers as small as 9e-41 there, without an error. To float16 and float32 integers are
# converted; by way of float32 they become bfloat16 as well.
#
# Expected: 0.0, 1.0, 2.0, 16256.0 and, of the mask, 0.0, 1.0, 1.0, 1.0, as torch has them.
# Seen:     0.0, 9.2e-41, 1.8e-40, 1.0 and, of the mask, 0.0, 9.2e-41, 9.2e-41, 9.2e-41
# Takes a Python of 3.12 or later (PYTHON=...) and some GB, of torch.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.8.0 torch==2.14.1 numpy==2.5.5
cat > "$folder/convert.py" <<'PY'
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def convert(x, whole, mask, N: tl.constexpr):
    places = tl.arange(0, N)
    numbers = tl.load(x + places)
    tl.store(whole + places, numbers.to(whole.dtype.element_ty))
    tl.store(mask + places, (numbers > 0).to(mask.dtype.element_ty))


numbers = torch.tensor([0, 1, 2, 16256], dtype=torch.int32)
found = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    whole, mask = torch.empty(4, dtype=dtype), torch.empty(4, dtype=dtype)
    convert[(1,)](numbers, whole, mask, 4)
    found[dtype] = whole, mask
    print(f"triton {triton.__version__}, {dtype}: {whole.tolist()}, mask {mask.tolist()}; torch {numbers.to(dtype).tolist()}")
whole, mask = found.pop(torch.bfloat16)
bits = numbers.to(torch.int16).view(torch.bfloat16)
described = torch.equal(whole, bits) and torch.equal(mask, (numbers > 0).to(torch.int16).view(torch.bfloat16))
right = all(torch.equal(w, numbers.to(d)) and torch.equal(m, (numbers > 0).to(d)) for d, (w, m) in found.items())
sys.exit(not (described and right))
PY
if "$folder/venv/bin/python" "$folder/convert.py"; then
    echo "as described"
else
    echo "changed: see above"
    exit 1
fi
