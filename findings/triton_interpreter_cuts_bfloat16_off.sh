#!/bin/sh
# triton 3.8.0 (3.6.0 alike): with TRITON_INTERPRET=1, x.to(tl.bfloat16) of a float32 tile cuts the lower 16 bits off
# instead of rounding to the nearest, which is what a GPU does and torch.Tensor.to. Every value loses up to a whole unit
# in the last place, always towards zero: errors of a kernel tested in the interpreter are twice those on a GPU, and have
# a bias that adds up in sums. Tolerances found in the one are wrong for the other. float16 is rounded.
#
# Expected: 1.0078125, 4.0, 101.0 of 1.0078, 3.999, 100.9, as torch has them.
# Seen:     1.0, 3.984375, 100.5
# Takes a Python of 3.12 or later (PYTHON=...) and some GB, of torch.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.8.0 torch==2.14.1 numpy==2.5.5
cat > "$folder/narrow.py" <<'PY'
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def narrow(x, y, N: tl.constexpr):
    places = tl.arange(0, N)
    tl.store(y + places, tl.load(x + places).to(y.dtype.element_ty))


exact = torch.tensor([1.0078, 3.999, 100.9, -1.0078])
found = {}
for dtype in (torch.bfloat16, torch.float16):
    out = torch.empty(4, dtype=dtype)
    narrow[(1,)](exact, out, 4)
    found[dtype] = out.tolist()
    print(f"triton {triton.__version__}, {dtype}: {found[dtype]}, torch {exact.to(dtype).tolist()}")
cut = found[torch.bfloat16] == [1.0, 3.984375, 100.5, -1.0]
sys.exit(not (cut and found[torch.float16] == exact.to(torch.float16).tolist()))
PY
if "$folder/venv/bin/python" "$folder/narrow.py"; then
    echo "as described"
else
    echo "changed: see above"
    exit 1
fi
