#!/bin/sh
# triton 3.8.0 (3.6.0 too): where a compile-time `if` is taken and returns, the compiler goes on with what follows it, of
# which a `tl.load(bias + i)` with bias=None is an error. The same function passes with TRITON_INTERPRET=1, and with an
# `else` it compiles. So an optional argument that a first line takes care of, and that tests on a CPU leave out, fails
# on the first GPU.
#
# Expected: [1, 1, 1, 1] + no bias = [1, 1, 1, 1] both ways, compiled and interpreted.
# Seen:     compiled, with a return: CompilationError; interpreted, and with an else: as expected
# Takes a Python of 3.12 or later (PYTHON=...) and some GB, of torch; compiles for a GPU that need not be there.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/optional.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def returned(bias, i):
    if bias is None:
        return 0.0
    return tl.load(bias + i)


@triton.jit
def chosen(bias, i):
    if bias is None:
        found = 0.0
    else:
        found = tl.load(bias + i)
    return found


@triton.jit
def with_return(x, bias):
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + i) + returned(bias, i))


@triton.jit
def with_else(x, bias):
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + i) + chosen(bias, i))


KERNELS = with_return, with_else
if sys.argv[1] == "compile":
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.errors import CompilationError

    found = {}
    for kernel in KERNELS:
        source = ASTSource(kernel, {"x": "*fp32", "bias": "constexpr"}, {"bias": None})
        try:
            triton.compile(source, target=GPUTarget("cuda", 90, 32))
            found[kernel.__name__] = "compiles"
        except CompilationError as error:
            found[kernel.__name__] = type(error).__name__
    print(f"triton {triton.__version__}, compiled: {found}")
    sys.exit(found != {"with_return": "CompilationError", "with_else": "compiles"})

found = {}
for kernel in KERNELS:
    x = torch.ones(4)
    kernel[(4,)](x, None)
    found[kernel.fn.__name__] = x.tolist()
print(f"triton {triton.__version__}, interpreted: {found}")
sys.exit(any(x != [1.0] * 4 for x in found.values()))
PY
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.8.0 torch==2.14.1 numpy==2.5.5
if "$folder/venv/bin/python" "$folder/optional.py" compile && TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/optional.py" interpret; then
    echo "as described"
else
    echo "changed: see above"
    exit 1
fi
