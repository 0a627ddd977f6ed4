"""The kernels compile for the GPUs that they are built for, and fit there, seen on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support/compile_for_hopper.py"
# Of one program on a Hopper SM, 227 KiB.
SHARED_MEMORY = 227 * 1024
CHUNK = {
    "decay", "steep_scores", "chunk_output", "gradient_operands", "chunk_value_gradient", "steep_gradient",
    "chunk_key_gradient",
}  # fmt: skip
KERNELS = {
    "gdn2": CHUNK | {"chunk_operands", "chunk_state", "chunk_state_gradient", "gdn2"},
    "carve": CHUNK | {"carve_operands", "carve_state", "carve_state_gradient", "carve_token"},
}
RECIPES = [("gdn2", "bfloat16", 128), ("carve", "bfloat16", 128)]
OTHERS = [
    ("gdn2", "bfloat16", 256), ("gdn2", "float16", 256), ("gdn2", "float32", 256), ("gdn2", "float32", 32),
    ("carve", "bfloat16", 256), ("carve", "float16", 128), ("carve", "float32", 128), ("carve", "bfloat16", 32),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "dtype", "width"), [*RECIPES, *(pytest.param(*case, marks=pytest.mark.long) for case in OTHERS)]
)
def test_kernels_fit_a_hopper_gpu(op: str, dtype: str, width: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, op, dtype, str(width)],
        capture_output=True, text=True, env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {row["kernel"].removesuffix("_kernel") for row in rows} == KERNELS[op]
    assert all(row["shared"] <= SHARED_MEMORY for row in rows), rows
    if (op, dtype, width) in RECIPES:  # larger tiles have too few registers for either
        loops = [row for row in rows if "_state" in row["kernel"]]
        # CARVE's state has a launch for chunks before the first steep row, and one for the others
        assert len(loops) == {"gdn2": 2, "carve": 3}[op] and all(row["products"] > 0 for row in loops), rows
        # a compiler that finds sums touched while a product runs makes all products of a kernel wait for each other
        assert all(row["waits"] <= row["products"] / 2 for row in rows), rows
        # beside so much shared memory an SM's cache has room for few spilled registers
        assert loops[0]["spilled"] <= 300 and all(row["spilled"] <= 700 for row in loops), rows
