"""What a program sets up in its process is undone at its end, so that others can follow there."""

import fractions
import io
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from support.forks import checked, run_forked
from support.train import losses

from megatron_carve.patches import applied_patches, layer_symbols
from megatron_carve.run.session import command_line, session

IN_TURN = """
import gc, os, sys

from megatron_carve.run.session import ENVIRONMENT
from megatron_carve import evaluate, generate, train
from megatron_carve.patches import applied_patches

WORDS = ["debug", "training.steps=4", "run.log_interval=1", "checkpoint.interval=2", "data.text=text.txt"]


def state():
    return sys.argv, {name: os.environ.get(name) for name in ENVIRONMENT}, applied_patches()


def main():
    before = state()
    assert train.main([*WORDS, "run.name=first"]) == 0
    assert state() == before
    assert train.main([*WORDS, "run.name=second"]) == 0
    assert generate.main(["runs/second", "--prompt", "a", "--max-new-tokens", "3"]) == 0
    assert train.main([*WORDS, "run.name=second", "megatron.no_such_option=1"]) == 2
    assert evaluate.main(["runs/first", "--tasks", "perplexity", "--text", "text.txt"]) == 0
    assert train.main([*WORDS, "run.name=first", "training.steps=6"]) == 0
    assert state() == before
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o).__name__ in ("DistributedDataParallel", "DistributedOptimizer")]


if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_programs_follow_each_other_in_one_process(tmp_path):
    (tmp_path / "text.txt").write_text("a line of text\n" * 2000)
    (tmp_path / "in_turn.py").write_text(IN_TURN)
    run = checked(run_forked([str(tmp_path / "in_turn.py")], cwd=tmp_path, timeout=300))
    first, second = losses(tmp_path, "first"), losses(tmp_path, "second")
    assert {step: first[step] for step in second} == second and len(second) == 4
    assert sorted(first) == [1, 2, 3, 4, 5, 6]
    assert "resuming at step 4" in run.stdout


def test_a_session_leaves_things_as_they_were(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    before = applied_patches()
    kept = Path(sys.argv[0]).name
    with session():
        os.environ["RANK"] = "0"
        layer_symbols.apply()
        with command_line(["--one", "--two"]):
            assert [Path(sys.argv[0]).name, *sys.argv[1:]] == [kept, "--one", "--two"]
    assert "RANK" not in os.environ
    assert applied_patches() == before


def test_in_a_session_pickles_are_not_trusted(monkeypatch):
    torch.save(fractions.Fraction(1, 2), file := io.BytesIO())

    def load():
        file.seek(0)
        return torch.load(file, weights_only=False)

    with session(), pytest.raises(pickle.UnpicklingError, match=r"fractions\.Fraction"):
        load()
    assert load() == fractions.Fraction(1, 2)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with session():
        assert load() == fractions.Fraction(1, 2)


def test_a_session_keeps_patches_that_were_in_force(tmp_path):
    layer_symbols.apply()
    try:
        with session():
            layer_symbols.apply()
        assert layer_symbols.applied
    finally:
        layer_symbols.revert()
