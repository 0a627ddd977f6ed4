"""Many training runs, each in a process of its own, divided over the GPUs that are there."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from megatron_carve.run.progress import read_metrics


def train_each(
    out: Path, runs: Mapping[str, Sequence[str]], at_a_time: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Train runs by name, each with the words of its recipe, in out/runs; yields a name and its metrics as it ends.

    Raises:
        RuntimeError: at the end, what runs that failed had to say.
    """
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = names or [str(i) for i in range(max(torch.cuda.device_count(), 1))]
    gpus: SimpleQueue[str] = SimpleQueue()
    for i in range(at_a_time):
        gpus.put(names[i % len(names)])

    failures: list[str] = []

    def train(name: str) -> str | None:
        gpu = gpus.get()
        done = subprocess.run(
            [sys.executable, "-P", "-m", "megatron_carve.train", *runs[name], f"run.name={name}"],
            cwd=out, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpu},
        )  # fmt: skip
        gpus.put(gpu)
        if done.returncode:
            failures.append(f"{name}: {done.stderr[-2000:]}")
            return None
        return name

    with ThreadPoolExecutor(at_a_time) as pool:
        for done in as_completed([pool.submit(train, name) for name in runs]):
            if name := done.result():
                yield name, read_metrics(out / "runs" / name / "metrics.jsonl")
    if failures:
        raise RuntimeError("\n".join(failures))


def mlp_as_large_as(wanted: int, size: Callable[[int], int], around: int) -> int:
    """The width of MLPs, a multiple of 4 within some hundreds of `around`, at which size(width) is nearest `wanted`."""
    return min(range(around - 200, around + 400, 4), key=lambda width: abs(size(width) - wanted))
