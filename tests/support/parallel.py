"""Run support.worker under torchrun and read what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("worker.py")


def run_layout(out: Path, *, tp: int = 1, pp: int = 1, cp: int = 1, dp: int = 1, sp: bool = False, **job) -> dict:
    """Losses, gradient norms and whole gradients of a run on tp * pp * cp * dp processes."""
    settings = {
        "tp": tp, "pp": pp, "cp": cp, "sp": sp, "pattern": "C-2-*-", "dtype": "float32", "steps": 3, "seq_length": 80,
        "micro_batch_size": 1, "micro_batches": 4, "distributed_optimizer": dp > 1, "out": str(out), **job,
    }  # fmt: skip
    launch(tp * pp * cp * dp, [str(WORKER), json.dumps(settings)])
    return torch.load(out, weights_only=False)


def launch(processes: int, command: list[str], **options) -> subprocess.CompletedProcess:
    """torchrun on this machine's CPU; a failure raises with the end of what the processes printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command],
        env=environment, capture_output=True, text=True, timeout=600, **options,
    )  # fmt: skip
    if run.returncode:
        raise AssertionError(f"exit status {run.returncode}\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}")
    return run
