"""Which checkpoints of a run stay."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_carve.patches import TrainingListener
from megatron_carve.recipe.schema import Checkpoint
from megatron_carve.run.folder import CheckpointError, RunFolder
from megatron_carve.run.progress import read_metrics


def staying(rule: Checkpoint, steps: Sequence[int], validation: Mapping[int, float]) -> set[int]:
    """Steps whose checkpoints stay.

    Args:
        rule: keep None keeps all.
        steps: of the finished checkpoints, rising.
        validation: loss by step, where there is one.
    """
    if rule.keep is None:
        return set(steps)
    kept = set(steps[-rule.keep :])
    if rule.keep_every is not None:
        kept |= {step for step in steps if step % rule.keep_every == 0}
    if rule.keep_best and (known := [step for step in steps if step in validation]):
        kept.add(min(known, key=lambda step: validation[step]))
    return kept


class Retention:
    """A listener that removes checkpoints as newer ones come, and passes on what it is told.

    What is still being written, and what is newer than the checkpoint that a resumption takes, stays.
    """

    def __init__(self, listener: TrainingListener, rule: Checkpoint, folder: RunFolder, *, removes: bool) -> None:
        """removes: whether this process does; one of all."""
        self.listener, self.rule, self.folder, self.removes = listener, rule, folder, removes
        self.on_step, self.on_evaluation = listener.on_step, listener.on_evaluation

    def on_save(self) -> None:
        if self.removes and self.rule.keep is not None:
            self._remove()
        self.listener.on_save()

    def _remove(self) -> None:
        try:
            newest = self.folder.checkpoint_step()
        except CheckpointError:
            return  # what is not whole is for a person to look at
        if newest is None:
            return
        for left in self.folder.checkpoints.glob(".removed_*"):  # by a program that was killed meanwhile
            shutil.rmtree(left, ignore_errors=True)
        finished = [step for step in self.folder.checkpoint_steps() if step <= newest]
        for step in set(finished) - staying(self.rule, finished, _validation(self.folder)):
            place = self.folder.checkpoint(step)
            removed = place.rename(place.with_name(f".removed_{place.name}"))
            shutil.rmtree(removed, ignore_errors=True)


def _validation(folder: RunFolder) -> dict[int, float]:
    records: list[dict[str, Any]] = read_metrics(folder.metrics) if folder.metrics.exists() else []
    return {r["step"]: r["validation_loss"] for r in records if r.get("validation_loss") is not None}
