"""Which checkpoints of a run stay, and that the others go."""

import json
from types import SimpleNamespace

import pytest

from megatron_carve.recipe.schema import Checkpoint
from megatron_carve.run import folder as run_folder
from megatron_carve.run.folder import RunFolder
from megatron_carve.run.retention import Retention, staying

LOSSES = {10: 3.0, 20: 2.0, 40: 2.5}


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({}, {10, 20, 30, 40, 50}),
        ({"keep": 2}, {40, 50}),
        ({"keep": 9}, {10, 20, 30, 40, 50}),
        ({"keep": 1, "keep_every": 20}, {20, 40, 50}),
        ({"keep": 1, "keep_best": True}, {20, 50}),
        ({"keep": 1, "keep_every": 30, "keep_best": True}, {20, 30, 50}),
    ],
)
def test_the_rules(rule, kept):
    assert staying(Checkpoint(**rule), [10, 20, 30, 40, 50], LOSSES) == kept


def test_nothing_is_best_where_nothing_was_measured():
    assert staying(Checkpoint(keep=1, keep_best=True), [10, 20], {}) == {20}


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"keep_every": 3}, {"keep_best": True}, {"keep": 1, "keep_every": 0}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"keep(_every)?: expected"):
        Checkpoint(**wrong)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with whole checkpoints of 10 to 40, the newest, and one of 50 that is being written."""
    monkeypatch.setattr(run_folder, "_check_whole", lambda folder: None)
    run = RunFolder(tmp_path)
    for step in (10, 20, 30, 40, 50):
        (run.checkpoint(step) / "deep").mkdir(parents=True)
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text("40")
    run.metrics.write_text("".join(json.dumps({"step": s, "validation_loss": x}) + "\n" for s, x in LOSSES.items()))
    return run


@pytest.mark.parametrize(("removes", "left"), [(True, [20, 40, 50]), (False, [10, 20, 30, 40, 50])])
def test_the_others_go_when_one_is_saved(run, removes, left):
    told = []
    (run.checkpoints / ".removed_iter_0000005").mkdir()
    listener = SimpleNamespace(on_step=None, on_evaluation=None, on_save=lambda: told.append("saved"))
    Retention(listener, Checkpoint(keep=1, keep_best=True), run, removes=removes).on_save()
    assert run.checkpoint_steps() == left and told == ["saved"]
    assert bool(list(run.checkpoints.glob(".removed_*"))) is not removes
