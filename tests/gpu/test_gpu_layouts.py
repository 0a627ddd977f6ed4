"""Parallel layouts over two or four GPUs of one machine: the losses of one GPU, from one checkpoint."""

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
    "training.eval_interval=100", "checkpoint.interval=10", "run.name=run", "model.attention_convolution=dynamic",
)  # fmt: skip
EXPERTS = (
    "model.pattern=C-CE*E", "megatron.num_experts=4", "megatron.moe_ffn_hidden_size=176",
    "megatron.moe_token_dispatcher_type=alltoall",
)  # fmt: skip
# Name -> GPUs, words of the model, words of the layout.
LAYOUTS = {
    "data": (2, (), []),
    "tensor": (2, (), ["parallel.tensor=2"]),
    "tensor without sequence": (2, (), ["parallel.tensor=2", "parallel.sequence=false"]),
    "context by heads": (2, (), ["parallel.context=2", "parallel.context_method=heads"]),
    "context by sequence": (2, (), ["parallel.context=2", "parallel.context_method=sequence"]),
    "pipeline": (2, (), ["parallel.pipeline=2", "model.pattern=C-*|-2-"]),
    "interleaved pipeline": (2, (), ["parallel.pipeline=2", "model.pattern=C-|*|-2|-"]),
    "expert 2": (2, EXPERTS, ["megatron.expert_model_parallel_size=2"]),
    "expert 2, local layers": (2, EXPERTS, ["megatron.expert_model_parallel_size=2", "model.layers=local"]),
    "tensor 4": (4, (), ["parallel.tensor=4"]),
    "context 4": (4, (), ["parallel.context=4"]),
    "tensor 2 x context 2": (4, (), ["parallel.tensor=2", "parallel.context=2"]),
    "pipeline 2 x tensor 2": (4, (), ["parallel.pipeline=2", "parallel.tensor=2"]),
    "expert 2 x tensor 2": (4, EXPERTS, ["megatron.expert_model_parallel_size=2", "parallel.tensor=2"]),
    "expert 4": (4, EXPERTS, ["megatron.expert_model_parallel_size=4", "training.micro_batch_size=2"]),
}


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory):
    """By model, a run on one GPU, whose loss bfloat16 alone lets others depart from."""
    folders = {}

    def run(model):
        if model not in folders:
            folders[model] = tmp_path_factory.mktemp("one")
            train(folders[model], *WORDS, *model)
        return folders[model]

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_several_gpus_go_on_as_one(one_gpu, tmp_path, name):
    gpus, model, layout = LAYOUTS[name]
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    one = one_gpu(model)
    shutil.copytree(one / "runs", tmp_path / "runs")
    (tmp_path / "runs/run/checkpoints/latest_checkpointed_iteration.txt").write_text("10")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}",
            "-m", "megatron_carve.train", *WORDS, *model, *layout,
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "resuming at step 10" in done.stdout
    expected, found = losses(one, "run"), losses(tmp_path, "run")
    difference = {step: abs(found[step] / expected[step] - 1) for step in range(11, STEPS + 1)}
    print(f"{name}: largest relative difference of the loss {max(difference.values()):.1e}")
    assert difference[11] < 2e-3, difference
    assert max(difference.values()) < 1e-2, difference
