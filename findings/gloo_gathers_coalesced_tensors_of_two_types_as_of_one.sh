#!/bin/sh
# torch 2.14.1, gloo: all_gather_into_tensor of a 16-bit tensor and then of a float32 one within _coalescing_manager, as
# Megatron's distributed optimizer gathers parameters, treats all as float32 and gives wrong numbers, without an error and
# with a single rank already. In the other order, of one type, and without coalescing
# the numbers are right; so a test of distributed training on CPUs fails, or passes, by the order of its parameters.
#
# Expected: [1.0, 2.0, 3.0, 4.0] and the same.
# Seen:     bfloat16 [0.0, 1.0, 0.0, 2.0], float32 [0.0, 3.0, 0.0, 4.0]
# Takes a Python of 3.10 or later (PYTHON=...) and some GB, of torch.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/gather.py" <<'PY'
import sys

import torch
import torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def gathered(*dtypes, coalesced=True):
    given = [torch.arange(1, 5, dtype=dtype) for dtype in dtypes]
    got = [torch.zeros(4, dtype=dtype) for dtype in dtypes]
    if coalesced:
        with dist.distributed_c10d._coalescing_manager(async_ops=True) as work:
            for whole, part in zip(got, given):
                dist.all_gather_into_tensor(whole, part)
        work.wait()
    else:
        for whole, part in zip(got, given):
            dist.all_gather_into_tensor(whole, part)
    return [tensor.tolist() for tensor in got]


narrow_first = gathered(torch.bfloat16, torch.float32)
others = [
    gathered(torch.float32, torch.bfloat16),
    gathered(torch.float32, torch.float32),
    gathered(torch.bfloat16, torch.float32, coalesced=False),
]
print(f"torch {torch.__version__}: bfloat16, float32: {narrow_first}; the other orders and ways: {others}")
right = [[1.0, 2.0, 3.0, 4.0]] * 2
sys.exit(not (narrow_first == [[0.0, 1.0, 0.0, 2.0], [0.0, 3.0, 0.0, 4.0]] and all(found == right for found in others)))
PY
if "$folder/venv/bin/python" -W ignore "$folder/gather.py"; then
    echo "as described"
else
    echo "changed: see above"
    exit 1
fi
