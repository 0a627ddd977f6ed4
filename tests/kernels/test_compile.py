"""The kernels compile for the GPUs that they are built for, and fit there, seen on a machine without one."""

import json
import math
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
}  # fmt: skip
PARALLEL_CHUNK = CHUNK | {"chunk_operands", "chunk_state", "entering_states"}
CONTENT = {
    "content_terms", "content_rows", "content_operands", "steep_content_operands", "content_operands_in_turn",
    "content_gradient",
}  # fmt: skip
# Those that go from chunk to chunk.
LOOPS = "content_terms", "content_gradient"
KERNELS = {
    "gdn2": PARALLEL_CHUNK | {"chunk_state_gradient", "chunk_key_gradient", "gdn2", "attend"},
    "diagonal": PARALLEL_CHUNK | CONTENT | {"erasing_gradient", "carve_token"},
    "delta": CHUNK | {"delta_operands", "delta_state", "delta_state_gradient", "chunk_key_gradient", "carve_token"},
    "dynamic": {"dynamic_forward", "dynamic_token_gradient", "dynamic_tap_gradient", "dynamic_sum"},
}
KERNELS["token"] = {"mixer_token", "product", "norm", "swiglu"}
KERNELS["heads"] = KERNELS["dynamic"] | {"forward", "backward"}
ERASE = {"previous": "diagonal", "decayed": "diagonal"} | {form: form for form in KERNELS if form != "diagonal"}
RECIPES = [
    ("gdn2", "bfloat16", 128), ("previous", "bfloat16", 128), ("previous", "bfloat16", 64),
    ("token", "bfloat16", 128), ("dynamic", "bfloat16", 128), ("heads", "bfloat16", 128),
]  # fmt: skip
LONG = RECIPES[2], RECIPES[-1]
OTHERS = [
    ("gdn2", "bfloat16", 256), ("gdn2", "float16", 256), ("gdn2", "float32", 256), ("gdn2", "float32", 32),
    ("decayed", "bfloat16", 128), ("decayed", "float16", 64), ("previous", "float32", 64), ("previous", "float32", 32),
    ("delta", "bfloat16", 128), ("delta", "bfloat16", 256), ("delta", "float16", 128), ("delta", "float32", 128),
    ("delta", "bfloat16", 32),
    ("dynamic", "bfloat16", 256), ("dynamic", "float16", 128), ("dynamic", "float32", 128), ("heads", "bfloat16", 96),
    ("token", "bfloat16", 256), ("token", "float32", 96),
]  # fmt: skip
# Bytes that a thread of a sequential loop may spill: beside so much shared memory an SM's cache has room for little.
# The forward's content stage forms the decays and scores of a chunk of 128 channels in one program of four warps, of
# which an SM takes two. A mixer's step of many sequences spills a few for three programs on an SM.
SPILLED = {"gdn2": 0, "diagonal": 1024, "delta": 700, "dynamic": 0, "heads": 0, "token": 64}
# Of stages for all chunks at once that have most to hold: the last one of CARVE's backward, and its operands of content
# where they form in turn, which have the halvings of steep rows in the same program.
OTHERS_SPILLED = {"erasing_gradient": 256, "content_operands_in_turn": 1152}


@pytest.mark.parametrize(
    ("form", "dtype", "width"),
    [
        *(pytest.param(*case, marks=pytest.mark.long if case in LONG else pytest.mark.slow) for case in RECIPES),
        *(pytest.param(*case, marks=pytest.mark.long) for case in OTHERS),
    ],
)
def test_kernels_fit_a_hopper_gpu(form: str, dtype: str, width: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, form, dtype, str(width)],
        capture_output=True, text=True, env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {row["kernel"].removesuffix("_kernel") for row in rows} == KERNELS[ERASE[form]]
    assert all(row["shared"] <= SHARED_MEMORY for row in rows), rows
    # Triton rounds constants of bfloat16 to six decimals, which makes zeros of small ones
    assert not any(row["narrow_constants"] for row in rows), rows
    if (form, dtype, width) in RECIPES:  # larger tiles have too few registers
        if form in ("dynamic", "heads", "token"):  # every kernel is a loop; its products are too narrow for warp groups
            assert all(row["spilled"] <= SPILLED[form] and not row["products"] for row in rows), rows
            return
        loops = [row for row in rows if "_state_" in row["kernel"] or row["kernel"].startswith(LOOPS)]
        both_ways = ERASE[form] == "diagonal"  # content_gradient, after its operands and beside them
        assert len(loops) == 4 + both_ways and all(row["products"] for row in loops), rows
        # a compiler that finds sums touched while a product runs makes all products of a kernel wait for each other
        assert all(row["waits"] <= row["products"] / 2 for row in rows), rows
        assert all(row["spilled"] <= SPILLED[ERASE[form]] for row in loops), rows
        for row in rows:
            assert row["spilled"] <= OTHERS_SPILLED.get(row["kernel"].removesuffix("_kernel"), math.inf), row
