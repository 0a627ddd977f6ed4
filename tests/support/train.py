"""Run the training program as a user does, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from support.forks import Done, run_forked

from megatron_carve.progress import read_metrics


def train(folder: Path, *words: str, threads: int = 1, check: bool = True, timeout: float = 560):
    """`python -m megatron_carve.train WORDS` in `folder`; a failure raises with what it printed."""
    command = ["-m", "megatron_carve.train", *words]
    run: Done | subprocess.CompletedProcess
    if threads == 1 and not torch.cuda.is_available():
        run = run_forked(command, cwd=folder, timeout=timeout)
    else:
        run = subprocess.run(
            [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
    if check and run.returncode:
        raise AssertionError(f"exit status {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}")
    return run


def train_ranks(processes: int, folder: Path, *words: str) -> Done:
    """As train, in several processes of one layout, as torchrun would start them."""
    command = ["-m", "megatron_carve.train", *words]
    run = run_forked(command, processes=processes, cwd=folder, timeout=560)
    if run.returncode:
        raise AssertionError(f"exit status {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}")
    return run


def losses(folder: Path, name: str) -> dict[int, float]:
    """Training loss by step of the run `name` that was started in `folder`."""
    return {r["step"]: r["loss"] for r in read_metrics(folder / "runs" / name / "metrics.jsonl") if "loss" in r}
