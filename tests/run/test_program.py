"""What the programs share."""

import math

import pytest
import torch

from megatron_carve.run.pretraining import FiniteGradients


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
