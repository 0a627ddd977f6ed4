"""Tell a listener about every training step, evaluation and checkpoint of Megatron's loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from megatron_carve.patches.patch import Patch, Replacement


class TrainingListener(Protocol):
    """What a listener is told, on every rank."""

    def on_step(self, iteration: int, losses: dict[str, Any], learning_rate: float | None, grad_norm: Any) -> None:
        """After an optimizer step. `losses` holds averages as tensors, on the last pipeline stage only."""

    def on_evaluation(self, losses: dict[str, Any]) -> None:
        """After an evaluation. `losses` as above."""

    def on_save(self) -> None:
        """After a checkpoint was saved, or handed over to be saved beside training."""


def training_events(listener: TrainingListener) -> Patch:
    """A patch that calls `listener` from Megatron's functions that log, evaluate and save."""

    def log(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def training_log(
            loss_dict: dict, total_loss_dict: dict, learning_rate: Any, iteration: int, loss_scale: Any,
            report_memory_flag: bool, skipped_iter: int, grad_norm: Any, *args: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            listener.on_step(iteration, loss_dict, learning_rate, grad_norm)
            return original(
                loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter,
                grad_norm, *args, **kwargs,
            )  # fmt: skip

        return training_log

    def evaluation(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            losses, _, timed_out = result
            if not timed_out:
                listener.on_evaluation(losses)
            return result

        return evaluate

    def saving(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def save_checkpoint_and_time(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            listener.on_save()
            return result

        return save_checkpoint_and_time

    return Patch(
        name="training_events",
        reason="Megatron's loop has no hook for progress reports",
        upstream="megatron/training/training.py, training_log, evaluate and save_checkpoint_and_time",
        remove_when="megatron.training calls user callbacks",
        replacements=[
            Replacement("megatron.training.training:training_log", log),
            Replacement("megatron.training.training:evaluate", evaluation),
            Replacement("megatron.training.training:save_checkpoint_and_time", saving),
        ],
    )
