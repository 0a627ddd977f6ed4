"""Megatron-Bridge on a GPU, with Transformer Engine's layers and Triton kernels: training and AutoBridge."""

import subprocess
import sys

import pytest
from support.bridge import INSTALLED, TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INSTALLED, reason="megatron-bridge is not installed here"),
]
PROGRAM = """
import sys
from pathlib import Path

from megatron_carve.bridge import prepare

if __name__ == "__main__":
    prepare()
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron_carve.bridge.conversion import export
    from megatron_carve.bridge.recipes import pretrain_config

    words = [
        "run.device=cuda", "run.folder=runs", "run.name=gpu", "model.layers=auto", "training.precision=bf16",
        "model.hidden_size=256", "mixer.key_head_dim=64", "mixer.value_head_dim=64", "data.text=cats.txt",
    ]
    pretrain(pretrain_config("tiny.yaml", *words), forward_step)
    pretrain(pretrain_config("tiny.yaml", *words, "training.steps=10"), forward_step)
    export(Path("runs/gpu/checkpoints"), Path("exported"))
    AutoBridge.import_ckpt("exported", "imported", trust_remote_code=True)
    import torch
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
"""


def test_training_resuming_and_conversion(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "cats.txt").write_text("the cat sat on the mat. " * 4000)
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-P", "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    assert "iteration       10/      10" in done.stdout and "at iteration 6" in done.stdout
    assert (tmp_path / "exported" / "model.safetensors").exists() and (tmp_path / "imported").exists()
    ours = [sys.executable, "-P", "-m", "megatron_carve.generate", "runs/gpu", "--prompt", "the cat"]
    done = subprocess.run(ours, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "the cat" in done.stdout, done.stderr[-3000:]
