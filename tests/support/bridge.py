"""Megatron-Bridge's entry points, in this process, with a recipe of ours."""

import contextlib
import importlib.util
import io
import os
from pathlib import Path

import torch
from support.ports import free_port

TINY = """
inherit: debug
model: {pattern: C-*-2-K-, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2}
mixer: {num_key_heads: 2, num_value_heads: 4, key_head_dim: 16, value_head_dim: 12, content_rank: 4}
training:
  {steps: 6, seq_length: 64, micro_batch_size: 2, global_batch_size: 4, lr_schedule: constant, eval_interval: 6,
   eval_iters: 1}
checkpoint: {interval: 2}
run: {log_interval: 1, device: cpu}
"""
INSTALLED = importlib.util.find_spec("megatron.bridge") is not None


def recipe_file(folder: Path) -> Path:
    """The recipe `tiny`, and a text."""
    (folder / "cats.txt").write_text("the cat sat on the mat. " * 800)
    (folder / "tiny.yaml").write_text(TINY)
    return folder / "tiny.yaml"


def pretrain(config) -> str:
    """What Megatron-Bridge's pretrain prints."""
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    printed = io.StringIO()
    with alone(), contextlib.redirect_stdout(printed):
        pretrain(config, forward_step)
    return printed.getvalue()


@contextlib.contextmanager
def alone():
    """One process, of which nothing is left in the environment, with a port of its own."""
    from megatron_carve.run.session import session

    with session():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        yield


def logits(run: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of our own model of a run's newest checkpoint, [B, T, V]."""
    from megatron_carve.use.trained import trained_model

    with trained_model(run, device="cpu") as trained, torch.no_grad():
        return trained.model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def weights(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Of a run's checkpoint, the newest if no step is given."""
    from megatron_carve.use.trained import trained_model

    with trained_model(run, device="cpu", step=step) as trained:
        return {name: x.clone() for name, x in trained.model.state_dict().items() if x is not None}
