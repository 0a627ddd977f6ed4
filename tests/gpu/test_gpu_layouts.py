"""Parallel layouts over two GPUs of one machine: the losses of one GPU, from one checkpoint."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
from support.train import losses, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]

STEPS = 30
WORDS = (
    "debug", "model.layers=transformer_engine", "model.pattern=C-*-2-", "training.precision=bf16",
    "training.micro_batch_size=4", "training.global_batch_size=8", f"training.steps={STEPS}", "run.log_interval=1",
    "training.eval_interval=100", "checkpoint.interval=10", "run.name=run",
)  # fmt: skip
LAYOUTS = {
    "data": [],
    "tensor": ["parallel.tensor=2"],
    "tensor without sequence": ["parallel.tensor=2", "parallel.sequence=false"],
    "context by heads": ["parallel.context=2", "parallel.context_method=heads"],
    "context by sequence": ["parallel.context=2", "parallel.context_method=sequence"],
    "pipeline": ["parallel.pipeline=2", "model.pattern=C-*|-2-"],
    "interleaved pipeline": ["parallel.pipeline=2", "model.pattern=C-|*|-2|-"],
}


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory):
    """A run on one GPU, whose loss bfloat16 alone lets others depart from."""
    folder = tmp_path_factory.mktemp("one")
    train(folder, *WORDS)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_go_on_as_one(one_gpu, tmp_path, name):
    shutil.copytree(one_gpu / "runs", tmp_path / "runs")
    (tmp_path / "runs/run/checkpoints/latest_checkpointed_iteration.txt").write_text("10")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "megatron_carve.train", *WORDS, *LAYOUTS[name],
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "resuming at step 10" in done.stdout
    expected, found = losses(one_gpu, "run"), losses(tmp_path, "run")
    difference = {step: abs(found[step] / expected[step] - 1) for step in range(11, STEPS + 1)}
    print(f"{name}: largest relative difference of the loss {max(difference.values()):.1e}")
    assert difference[11] < 2e-3, difference
    assert max(difference.values()) < 1e-2, difference
