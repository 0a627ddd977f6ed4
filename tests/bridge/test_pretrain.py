"""Megatron-Bridge trains our recipes, and its runs are runs of ours."""

import pytest
import torch
from support.bridge import pretrain, weights
from support.forks import checked, run_forked
from support.train import train

from megatron_carve.run.folder import CheckpointError


def config(folder, name, *words):
    from megatron_carve.bridge.recipes import pretrain_config

    return pretrain_config(str(folder / "tiny.yaml"), f"run.name={name}", f"run.folder={folder / 'runs'}", *words)


def test_both_programs_train_one_run_in_turn_as_ours_does_alone(folder):
    printed = pretrain(config(folder, "turns", "training.steps=2"))
    assert "iteration        2/       2" in printed
    done = train(folder, "tiny.yaml", "run.name=turns", "training.steps=4")
    assert "resuming at step 2" in done.stdout + done.stderr
    printed = pretrain(config(folder, "turns"))
    assert "successfully loaded checkpoint" in printed and "at iteration 4" in printed
    assert "iteration        5/       6" in printed
    train(folder, "tiny.yaml", "run.name=alone")
    turns, alone = (weights(folder / "runs" / name) for name in ("turns", "alone"))
    assert turns.keys() == alone.keys()
    for name, x in alone.items():
        torch.testing.assert_close(turns[name], x, rtol=0, atol=0, msg=name)


def test_bridge_goes_on_from_its_own_checkpoint(folder):
    pretrain(config(folder, "resumed", "training.steps=2"))
    assert "at iteration 2" in pretrain(config(folder, "resumed"))
    resumed, alone = (weights(folder / "runs" / name) for name in ("resumed", "turns"))
    for name, x in alone.items():
        torch.testing.assert_close(resumed[name], x, rtol=0, atol=0, msg=name)


SPREAD = """
import sys

from megatron_carve.bridge import prepare

if __name__ == "__main__":
    prepare("cpu")
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron_carve.bridge.recipes import pretrain_config

    config = pretrain_config("tiny.yaml", *sys.argv[1:])
    config.model.tensor_model_parallel_size, config.model.sequence_parallel = 2, True
    pretrain(config, forward_step)
"""


def test_a_layout_set_in_the_container_computes_the_same(folder):
    """Two tensor-parallel ranks go on from one process, and our own program from them."""
    pretrain(config(folder, "spread", "training.steps=2"))
    (folder / "spread_run.py").write_text(SPREAD)
    for words in ("run.name=spread training.steps=4", "run.name=text2 training.steps=2 data.text=cats.txt"):
        command = [str(folder / "spread_run.py"), *words.split()]
        checked(run_forked(command, processes=2, cwd=folder, timeout=560))
    train(folder, "tiny.yaml", "run.name=spread")
    assert (folder / "runs" / "text2" / "checkpoints" / "iter_0000002").exists()
    spread, alone = (weights(folder / "runs" / name) for name in ("spread", "alone"))
    for name, x in alone.items():
        torch.testing.assert_close(spread[name], x, rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_of_another_model_is_refused(folder):
    with pytest.raises(CheckpointError, match=r"another model \(model.hidden_size is 32 there and 64 here\)"):
        config(folder, "turns", "model.hidden_size=64")
