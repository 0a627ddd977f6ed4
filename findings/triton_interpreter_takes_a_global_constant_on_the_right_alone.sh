#!/bin/sh
# triton 3.8.0: a global tl.constexpr times a tensor, with the constant on the left, compiles and is right on a GPU; with
# TRITON_INTERPRET=1 it is a TypeError. On the right of the tensor, or as an argument of the kernel, the interpreter takes
# it. So a kernel that has always run on GPUs can fail its first test without one, with a message that names the tensor
# as what cannot be made a tensor.
#
# Expected: 2 * [1, 1, 1, 1] = [2, 2, 2, 2] in both orders, as compiled.
# Seen:     cannot convert [2. 2. 2. 2.] of type <class 'triton.language.core.tensor'> to tensor
# Takes a Python of 3.12 or later (PYTHON=...) and some GB, of torch; compiles for a GPU that need not be there.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/scale.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl

TWO = tl.constexpr(2.0)


@triton.jit
def left(x, y, N: tl.constexpr):
    places = tl.arange(0, N)
    tl.store(y + places, TWO * tl.load(x + places))


@triton.jit
def right(x, y, N: tl.constexpr):
    places = tl.arange(0, N)
    tl.store(y + places, tl.load(x + places) * TWO)


if sys.argv[1] == "compile":
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel in (left, right):
        source = ASTSource(kernel, {"x": "*fp32", "y": "*fp32", "N": "constexpr"}, {"N": 4})
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(f"triton {triton.__version__}: both compile")
    sys.exit()

found = {}
for kernel in (left, right):
    out = torch.zeros(4)
    try:
        kernel[(1,)](torch.ones(4), out, 4)
        found[kernel.fn.__name__] = out.tolist()
    except Exception as error:
        found[kernel.fn.__name__] = str(error)
print(f"triton {triton.__version__}, interpreted: {found}")
sys.exit(not ("cannot convert" in found["left"] and found["right"] == [2.0, 2.0, 2.0, 2.0]))
PY
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.8.0 torch==2.14.1 numpy==2.5.5
if "$folder/venv/bin/python" "$folder/scale.py" compile && TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/scale.py" interpret; then
    echo "as described"
else
    echo "changed: see above"
    exit 1
fi
