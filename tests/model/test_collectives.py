"""What a mixer layer sends between ranks, counted, is what docs/parallelism.md says."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.parallel import run_ranks

WORKER = Path(__file__).parents[1] / "support" / "collectives_worker.py"
BYTES = 4  # of a number here, float32
CONTENT_RANK = 16


def documented(
    kind: str, *, tp: int, sp: bool, cp: int, method: str, options: dict[str, Any], hidden: int, heads: int, width: int,
    tokens: int, rank: int,
) -> dict[str, dict[str, list[int]]]:  # fmt: skip
    """The table of docs/parallelism.md with K = V = width, a batch of one and as many value heads as key heads.

    rank: within the context-parallel group.
    """
    forward: dict[str, list[int]] = {}
    backward: dict[str, list[int]] = {}

    def add(where: dict[str, list[int]], name: str, calls: int, numbers: int) -> None:
        before = where.setdefault(name, [0, 0])
        where[name] = [before[0] + calls, before[1] + BYTES * numbers]

    n = tokens // cp
    channels = heads * width // tp
    taps = 3 * options.get("convolution_rank", 0)
    if tp > 1:
        add(forward, "all-gather", 1, n * (2 * width + taps) // tp)
        add(backward, "reduce-scatter", 1, n * (2 * width + taps))
        if sp:
            add(forward, "all-gather", 1, n * hidden // tp)
            add(forward, "reduce-scatter", 1, n * hidden)
            add(backward, "all-gather", 2, 2 * n * hidden // tp)
            add(backward, "reduce-scatter", 1, n * hidden)
        else:
            add(forward, "all-reduce", 1, n * hidden)
            add(backward, "all-reduce", 2, n * hidden + width)
            if kind == "carve":
                add(backward, "all-reduce", 2, 2 * CONTENT_RANK * width)
    if cp > 1:
        erase_and_write = {"gdn2": 2 * channels, "carve": channels + heads // tp, "kda": heads // tp}[kind]
        for where in (forward, backward):
            everywhere = taps * (1 if method == "sequence" else cp)  # every share of the heads needs all features
            add(where, "all-to-all", 2, n * (5 * channels + erase_and_write + everywhere))
    if cp > 1 and method == "sequence":
        border = 3 * 3 * channels
        add(forward, "all-to-all", 1, border * (rank < cp - 1))
        add(backward, "all-to-all", 1, border * (rank > 0))
        if kind != "carve":
            add(forward, "all-gather", 1, 2 * channels * width)
            add(backward, "reduce-scatter", 1, cp * 2 * channels * width)
        else:
            message = channels * (width + 2)
            if rank < cp - 1:
                add(forward, "send", 1, message)
            if rank > 0:
                add(backward, "send", 1, message)
    return {"forward": dict(sorted(forward.items())), "backward": dict(sorted(backward.items()))}


@pytest.mark.parametrize(
    ("kind", "tp", "sp", "cp", "method"),
    [
        ("carve", 2, False, 1, "auto"),
        ("carve", 2, True, 1, "auto"),
        ("gdn2", 2, True, 1, "auto"),
        ("carve", 1, False, 2, "heads"),
        ("carve", 1, False, 2, "sequence"),
        ("gdn2", 1, False, 2, "sequence"),
        pytest.param("gdn2", 2, True, 2, "auto", marks=pytest.mark.slow),
        pytest.param("kda with dynamic taps", 2, True, 2, "auto", marks=pytest.mark.slow),
        ("kda with dynamic taps", 1, False, 2, "sequence"),
    ],
)
def test_collectives_of_a_layer(kind, tp, sp, cp, method, tmp_path):
    kind, _, dynamic = kind.partition(" with ")
    options = {"short_convolution": "dynamic", "convolution_rank": 4} if dynamic else {}
    sizes = {"hidden": 32, "heads": 4, "width": 8, "tokens": 128}
    layout = {"kind": kind, "tp": tp, "sp": sp, "cp": cp, "method": method, "options": options}
    run_ranks(tp * cp, WORKER, {**layout, **sizes, "out": str(tmp_path / "found")})
    found = json.loads((tmp_path / "found").read_text())
    for rank, counts in enumerate(found):
        # consecutive ranks are tensor-parallel
        assert counts == documented(**layout, **sizes, rank=rank // tp), f"rank {rank}"
