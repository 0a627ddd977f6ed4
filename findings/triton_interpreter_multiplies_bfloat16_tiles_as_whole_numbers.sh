#!/bin/sh
# triton 3.8.0 (3.6.0 alike): with TRITON_INTERPRET=1, tl.dot of two bfloat16 tiles multiplies the 16 bits of their
# numbers as whole numbers, without an error: ones times ones, 16 of them, is 4228120576 instead of 16. Sums, differences
# and products of bfloat16 tiles by elements are of these bits as well. float16 and float32 are right, and bfloat16 that
# a kernel converts to float32 before it calculates.
#
# Expected: 16.0 for each dtype.
# Seen:     {'bfloat16': 4228120576.0, 'float16': 16.0, 'float32': 16.0}
# Takes a Python of 3.12 or later (PYTHON=...) and some GB, of torch.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/products.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def multiply(x, y, out):
    o = tl.arange(0, 16)
    tile = o[:, None] * 16 + o[None, :]
    tl.store(out + tile, tl.dot(tl.load(x + tile), tl.load(y + tile)))


found = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    ones, out = torch.ones(16, 16, dtype=dtype), torch.empty(16, 16)
    multiply[(1,)](ones, ones, out)
    found[str(dtype).removeprefix("torch.")] = out[0, 0].item()
print(f"triton {triton.__version__}: {found}")
sys.exit(found["bfloat16"] == 16 or found["float16"] != 16 or found["float32"] != 16)
PY
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.8.0 torch==2.14.1 numpy==2.5.5
if TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/products.py"; then
    echo "as described"
else
    echo "changed: see above"
    exit 1
fi
