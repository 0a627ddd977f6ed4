"""Steps, evaluations and checkpoints of Megatron's loop reach a listener."""

import inspect
from types import SimpleNamespace

import pytest

from megatron_carve import patches


class TestTrainingEvents:
    @pytest.fixture
    def loop(self, monkeypatch, applied):
        """(megatron.training.training with recorders for its log and evaluation, what was called)."""
        from megatron.training import training

        calls = []
        listener = SimpleNamespace(
            on_step=lambda *values: calls.append(("on_step", *values)),
            on_evaluation=lambda losses: calls.append(("on_evaluation", losses)),
            on_save=lambda: calls.append(("on_save",)),
        )
        monkeypatch.setattr(
            training, "training_log", lambda *args, **kwargs: calls.append(("log", args, kwargs)) or "report"
        )

        def evaluate(*args, **kwargs):
            calls.append(("evaluate", args, kwargs))
            return {"lm loss": 2.5}, "collected", kwargs.get("verbose") == "timed out"

        monkeypatch.setattr(training, "evaluate", evaluate)
        monkeypatch.setattr(
            training, "save_checkpoint_and_time", lambda *args, **kwargs: calls.append(("save", args, kwargs))
        )
        applied(patches.training_events(listener))
        return training, calls

    def test_steps(self, loop):
        training, calls = loop
        losses, totals = {"lm loss": 3.0}, {}
        given = (losses, totals, 1e-3, 17, 1.0, True, 0, 0.25)
        assert training.training_log(*given, "params norm", 0, None, is_first_iteration=True) == "report"
        assert calls == [
            ("on_step", 17, losses, 1e-3, 0.25),
            ("log", (*given, "params norm", 0, None), {"is_first_iteration": True}),
        ]
        assert calls[0][2] is losses

    def test_evaluations(self, loop):
        training, calls = loop
        result = training.evaluate("forward", None, verbose=True)
        assert result == ({"lm loss": 2.5}, "collected", False)
        assert calls == [("evaluate", ("forward", None), {"verbose": True}), ("on_evaluation", {"lm loss": 2.5})]

    def test_saves(self, loop):
        training, calls = loop
        training.save_checkpoint_and_time(17, "model", train_data_iterator=None)
        assert calls == [("save", (17, "model"), {"train_data_iterator": None}), ("on_save",)]

    def test_an_evaluation_that_ran_out_of_time_is_no_event(self, loop):
        training, calls = loop
        assert training.evaluate("forward", verbose="timed out")[2] is True
        assert [name for name, *_ in calls] == ["evaluate"]

    def test_megatron_still_passes_what_the_patch_names(self):
        from megatron.training import training

        names = list(inspect.signature(training.training_log).parameters)
        assert names[:8] == [
            "loss_dict", "total_loss_dict", "learning_rate", "iteration", "loss_scale", "report_memory_flag",
            "skipped_iter", "grad_norm",
        ]  # fmt: skip
