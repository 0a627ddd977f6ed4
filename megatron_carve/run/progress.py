"""What a person sees of a run: a line per interval, metrics.jsonl, and at the end a loss curve and a summary."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_carve.recipe import Recipe
from megatron_carve.run.folder import RunFolder, replace_text
from megatron_carve.run.speed import Gpus

LOSS = "lm loss"
# Steps over which speed is averaged: long enough to smooth, short enough to follow a change.
SPEED_WINDOW = 20


class Progress:
    """Follows training (see patches.training_events). Only the process that has the losses writes.

    Args:
        recipe: of the run.
        chance_loss: loss in nats of a uniform guess.
        first_step: the first that this start of the program trains.
        gpus: of the run; None on a CPU.
        console: where lines go; the present standard output if None.
    """

    def __init__(
        self, recipe: Recipe, *, chance_loss: float, first_step: int = 1, gpus: Gpus | None = None,
        console: TextIO | None = None,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.gpus = gpus
        self.folder = RunFolder(recipe.run.path)
        self.writes = False
        self.accuracy_name = accuracy_name(recipe)
        self.chance_loss = chance_loss
        self.console = console or sys.stdout
        self.step = first_step - 1
        self.first_step = first_step
        self._began_writing = False
        self.started = time.monotonic()
        self._since: float | None = None  # when the running step began; that of the first one, which compiles, is none
        self._steps: deque[float] = deque(maxlen=SPEED_WINDOW)  # seconds of the last steps alone
        self._announced = False  # that the first step takes long
        self._paused = 0.0  # seconds of evaluations and saves

    def say(self, line: str) -> None:
        """Print one line to the user, while there is one who reads."""
        try:
            print(line, file=self.console, flush=True)
        except BrokenPipeError:  # as of `| head`; the run goes on
            self.console = io.StringIO()

    def begin(self, line: str) -> None:
        """Say that training begins, and that the first step takes long."""
        self.say(line)
        self._announced = True
        self.say("the first step compiles what torch fuses, but for what earlier runs have left in its cache")

    def on_step(self, iteration: int, losses: dict[str, Any], learning_rate: float | None, grad_norm: Any) -> None:
        self.step = iteration
        now = time.monotonic()
        if self._since is not None:
            self._steps.append(now - self._since)
        self._since = now
        if self._announced:
            self._announced = False
            self.say(f"set up and compiled in {_duration(now - self.started)}")
        self.writes = LOSS in losses and _is_last_process()
        if not self.writes:
            return
        every = self.recipe.run.log_interval
        # Reading the loss waits for the GPU, so it happens once an interval.
        if iteration % every and iteration != self.recipe.training.total_steps and iteration != 1:
            return
        record = {
            "step": iteration,
            "loss": _number(losses[LOSS]),
            "tokens_per_second": (speed := self._speed()),
            **(self.gpus.measures(speed) if self.gpus and speed else {}),
            "learning_rate": learning_rate,
            "grad_norm": None if grad_norm is None else _number(grad_norm),
            "peak_memory_bytes": _peak_memory(),
        }
        self._record(record)
        self.say(self._line(record))

    def on_save(self) -> None:
        self.pause()

    def pause(self) -> None:
        """The time since the last step was no training; it counts in what is left, and not in the speed."""
        now = time.monotonic()
        if self._since is not None:
            self._paused += now - self._since
            self._since = now

    def on_evaluation(self, losses: dict[str, Any]) -> None:
        self.pause()
        self.writes = LOSS in losses and _is_last_process()  # there may have been no step: megatron.skip_train
        if not self.writes:
            return
        record = {"step": self.step, "validation_loss": _number(losses[LOSS])}
        if self.accuracy_name in losses:
            record["accuracy"] = _number(losses[self.accuracy_name])
        self._record(record)
        accuracy = f", {self.accuracy_name} {_text(record['accuracy'], '.1%')}" if "accuracy" in record else ""
        self.say(f"  validation at step {self.step}: loss {_text(record['validation_loss'], '.4f')}{accuracy}")

    def finish(self, *, parameters: int | None, device: str, layers: str) -> None:
        """Write the loss curve and the summary from the run's metrics, and say where they are."""
        if not self.folder.metrics.exists():
            return
        history = read_metrics(self.folder.metrics)
        train = [r for r in history if "loss" in r]
        validation = [r for r in history if "validation_loss" in r]
        draw_loss_curve(self.folder.loss_curve, history, self.recipe, self.chance_loss)
        speeds = sorted(r["tokens_per_second"] for r in train if r["tokens_per_second"])
        summary = {
            "run": self.recipe.run.name,
            "pattern": self.recipe.model.pattern,
            "parameters": parameters,
            "device": device,
            "layers": layers,
            "first_step_of_this_start": self.first_step,
            "steps": self.step,
            "final_loss": train[-1]["loss"] if train else None,
            "final_validation": validation[-1] if validation else None,
            "accuracy_name": self.accuracy_name,
            "chance_loss": self.chance_loss,
            "median_tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
            "peak_memory_bytes": _peak_memory(),
            "seconds_of_this_start": round(time.monotonic() - self.started, 1),
        }
        replace_text(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        self.say(self._closing(summary))

    def _record(self, record: dict[str, Any]) -> None:
        if not self._began_writing:
            self._began_writing = True
            self._forget_later_steps()
        with self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _forget_later_steps(self) -> None:
        """A killed run may have got further than its checkpoint; those steps are trained, and recorded, again."""
        if self.folder.metrics.exists():
            kept = [r for r in read_metrics(self.folder.metrics) if r["step"] < self.first_step]
            replace_text(self.folder.metrics, "".join(json.dumps(r) + "\n" for r in kept))

    def _speed(self) -> float | None:
        if not self._steps:
            return None
        return self.recipe.training.tokens_per_step * len(self._steps) / sum(self._steps)

    def _seconds_left(self, speed: float) -> float:
        """At this speed, with evaluations and saves as often as so far."""
        pauses = self._paused / (self.step - self.first_step + 1)
        return (self.recipe.training.total_steps - self.step) * (self.recipe.training.tokens_per_step / speed + pauses)

    def _line(self, r: dict[str, Any]) -> str:
        total = self.recipe.training.total_steps
        parts = [f"step {r['step']:>{len(str(total))}}/{total}", f"loss {_text(r['loss'], '.4f')}"]
        if r["grad_norm"] is not None:
            parts.append(f"grad norm {_text(r['grad_norm'], '.2f')}")
        if r["learning_rate"] is not None:
            parts.append(f"lr {r['learning_rate']:.2e}")
        if r["tokens_per_second"]:
            left = _duration(self._seconds_left(r["tokens_per_second"]))
            parts += [_speed_text(r, self.gpus), f"{left} left"]
        return " | ".join(parts)

    def _closing(self, s: dict[str, Any]) -> str:
        what = "" if s["parameters"] is None else f" {s['parameters']:,} parameters"
        loss = "not a number" if s["final_loss"] is None else f"{s['final_loss']:.4f} nats"
        lines = [f"trained{what} to step {s['steps']}; final loss {loss}"]
        lines[-1] += f" (chance: {self.chance_loss:.4f})"
        final = s["final_validation"]
        if final:
            lines.append(f"validation loss {_text(final['validation_loss'], '.4f')} nats")
            if "accuracy" in final:
                lines[-1] += f", {self.accuracy_name} {_text(final['accuracy'], '.1%')}"
        lines.append(f"loss curve {self.folder.loss_curve}, summary {self.folder.summary}")
        return "\n".join(lines)


def accuracy_name(recipe: Recipe) -> str:
    """How the share of right answers is called for this data."""
    return "recall accuracy" if recipe.data.source == "recall" else "next-token accuracy"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The run's records by step; where a killed and resumed run repeats steps, the later record counts."""
    latest: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a killed process was writing
        latest[record["step"], "loss" in record] = record
    return [latest[key] for key in sorted(latest)]


def draw_loss_curve(path: Path, history: list[dict[str, Any]], recipe: Recipe, chance_loss: float) -> None:
    """Training and validation loss over steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, validation = (
        [(r["step"], r[key]) for r in history if r.get(key) is not None] for key in ("loss", "validation_loss")
    )
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1.2, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o", color="tab:orange", markersize=5, label="validation")
    axes.axhline(chance_loss, color="gray", linestyle="--", linewidth=1, label=f"chance ({chance_loss:.2f})")
    axes.set(
        title=f"{recipe.run.name}: {recipe.model.pattern}", xlabel="optimizer step", ylabel="loss (nats per token)"
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _is_last_process() -> bool:
    return not torch.distributed.is_initialized() or (
        torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    )


def _peak_memory() -> int | None:
    """Bytes of tensors on this process's GPU, at their most so far; None without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _number(value: Any) -> float | None:
    """A plain number; None, which JSON has and NaN it has not, for what is none."""
    number = value.item() if isinstance(value, torch.Tensor) else float(value)
    return number if math.isfinite(number) else None


def _speed_text(record: dict[str, Any], gpus: Gpus | None) -> str:
    text = f"{_short(record['tokens_per_second'])} tokens/s"
    if gpus is None:
        return text
    each = " a GPU" if gpus.count > 1 else ""
    if each:
        text += f", {_short(record['tokens_per_second_and_gpu'])}{each}"
    if record["tflops_per_second_and_gpu"] is None:
        return text
    text += f", {record['tflops_per_second_and_gpu']:.3g} TFLOP/s{each}"
    return text if record["utilisation"] is None else f"{text} ({record['utilisation']:.1%})"


def _text(number: float | None, form: str) -> str:
    return "nan" if number is None else format(number, form)


def _short(n: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.1f}{unit}"
    return f"{n:.0f}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h}h"
    return f"{h}h {m:02d}m" if hours else f"{m}m {s:02d}s" if minutes else f"{s}s"
