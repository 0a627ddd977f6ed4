"""Two torchrun agents on one machine, a GPU each, as on two nodes: NCCL speaks over sockets, and a worker is killed."""

import os

import pytest
import torch
from support.agents import AGENTS, train_with_a_kill
from support.train import losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < AGENTS, reason="needs two GPUs"),
]

STEPS = 400
WORDS = (
    "debug", "training.precision=bf16", "training.micro_batch_size=4", "training.global_batch_size=8",
    f"training.steps={STEPS}", "training.eval_interval=1000", "checkpoint.interval=20", "run.log_interval=1",
)  # fmt: skip
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET": "Socket", "NCCL_NVLS_ENABLE": "0"}


@pytest.mark.parametrize(
    "layout", [(), ("parallel.tensor=2",), ("parallel.pipeline=2",)], ids=["data", "tensor", "pipeline"]
)
def test_two_agents_end_when_a_worker_is_killed_and_go_on(tmp_path, layout):
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(AGENTS)))).split(",")
    told = {**SOCKETS, "NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(tmp_path / "nccl.%p")}
    train_with_a_kill(tmp_path, [*WORDS, *layout], [{**told, "CUDA_VISIBLE_DEVICES": gpus[i]} for i in range(AGENTS)])
    assert any("NET/Socket" in log.read_text(errors="replace") for log in tmp_path.glob("nccl.*"))
    found = losses(tmp_path, "run")
    assert list(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < found[1]
