"""What the programs share."""

import math
import os
import subprocess
import sys

import pytest
import torch

from megatron_carve.run.pretraining import FiniteGradients


def test_a_name_beyond_ascii_where_python_uses_no_utf8(tmp_path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "megatron_carve.train", "debug", "run.name=läuft"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 2 and not list(tmp_path.iterdir())
    assert run.stderr == (
        "error: run.name=l\\xe4uft: beyond ASCII, where Python uses no UTF-8; set PYTHONUTF8=1 in the environment\n"
    )


class Listener:
    def __init__(self):
        self.told = []

    def on_step(self, *values):
        self.told.append(values)

    def on_evaluation(self, losses):
        self.told.append(losses)

    def on_save(self):
        self.told.append("saved")


def test_what_a_listener_is_told_is_passed_on():
    listener = Listener()
    guarded = FiniteGradients(listener)
    guarded.on_step(1, {"loss": 2.0}, 1e-3, 0.5)
    guarded.on_step(2, {"loss": math.nan}, None, None)  # a loss scaler has skipped it
    guarded.on_evaluation({"loss": 1.0})
    assert listener.told[0] == (1, {"loss": 2.0}, 1e-3, 0.5)
    guarded.on_save()
    assert listener.told[1][0] == 2 and listener.told[2:] == [{"loss": 1.0}, "saved"]


@pytest.mark.parametrize("norm", [math.nan, math.inf, torch.tensor(math.nan)])
def test_gradients_that_are_no_numbers_end_training(norm):
    listener = Listener()
    with pytest.raises(FloatingPointError, match="step 7: expected a finite norm of the gradients, got"):
        FiniteGradients(listener).on_step(7, {}, 1e-3, norm)
    assert not listener.told
