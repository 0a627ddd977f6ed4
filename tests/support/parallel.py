"""Run programs in several processes; how Megatron divides tokens over context-parallel ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from support.forks import Done, checked, run_forked

WORKER = Path(__file__).with_name("worker.py")


def run_layout(out: Path, *, tp: int = 1, pp: int = 1, cp: int = 1, dp: int = 1, sp: bool = False, **job) -> dict:
    """What support.worker found on tp * pp * cp * dp processes: losses and gradient norms of all steps; of the first
    also outputs, gradients of the embedded tokens and of parameters, put together from all ranks."""
    settings = {
        "tp": tp, "pp": pp, "cp": cp, "sp": sp, "virtual": 1, "ep": 1, "pattern": "C-2-*-", "documents": None,
        "rows": None, "window": 16, "dtype": "float32", "steps": 3, "seq_length": 80, "micro_batch_size": 1,
        "micro_batches": 4, "distributed_optimizer": dp > 1, "out": str(out), **job,
    }  # fmt: skip
    run_ranks(tp * pp * cp * dp, WORKER, settings)
    return torch.load(out, weights_only=False)


def run_ranks(processes: int, worker: Path, job: object) -> None:
    """A worker of support/ with its job in that many processes; a failure raises with the end of what they printed."""
    checked(run_forked([str(worker), json.dumps(job)], processes=processes, timeout=600))


def launch(processes: int, command: list[str], **options) -> Done:
    """torchrun on this machine's CPU; a failure raises with the end of what the processes printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command],
        env=environment, capture_output=True, text=True, timeout=600, **options,
    )  # fmt: skip
    return checked(Done(run.returncode, run.stdout, run.stderr))


def places(rank: int, size: int, lengths: Sequence[int]) -> torch.Tensor:
    """The tokens of a rank: of every document its piece from the front, then its piece from the back."""
    parts = []
    for start, length in zip([0, *accumulate(lengths)], lengths, strict=False):
        pieces = torch.arange(start, start + length).chunk(2 * size)
        parts += [pieces[rank], pieces[-1 - rank]] if size > 1 else [torch.arange(start, start + length)]
    return torch.cat(parts)
