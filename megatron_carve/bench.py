"""What a training step takes on this machine: `python -m megatron_carve.bench RECIPE [section.key=value ...]`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_carve.recipe import Recipe, estimate, load_recipe, recipe_names
from megatron_carve.run.program import exit_status

if TYPE_CHECKING:
    import torch

    from megatron_carve.recipe.schema import Training
    from megatron_carve.run.preflight import Plan

GIB = 2**30
# A product of two square matrices this large runs at the most that a GPU reaches.
MATMUL_SIZE = 8192


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status. A user's mistake ends in one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog="[torchrun ... -m | python -m] megatron_carve.bench",
        description="Measures whole training steps of a recipe: time, use of the GPU, memory, and where the time goes. "
        "They are the recipe's first, at its learning rates. Nothing is saved; its checkpoints and run folder do not "
        "count. Without data in the recipe, generated tokens are used. torchrun can start several processes, on one "
        "machine.",
    )
    parser.add_argument("recipe", help=f"a YAML file or one of: {', '.join(recipe_names())}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--warmup", type=int, default=4, metavar="N", help="steps before those that count (default: 4)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps that count (default: 10)")
    parser.add_argument("--peak-tflops", type=float, metavar="N", help="of one GPU; measured if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    chosen = parser.parse_intermixed_args(arguments)
    with _scratch() as scratch:
        return exit_status(lambda: _prepared(chosen, scratch), lambda plan: _measure(plan, chosen), log=sys.stdout)


def _prepared(chosen: argparse.Namespace, scratch: Path) -> Plan:
    recipe = _recipe(chosen, scratch)
    # Here because torch and Megatron take seconds to import; a typing mistake need not wait.
    from megatron_carve.run.preflight import prepare

    return prepare(recipe)


def _measure(plan: Plan, chosen: argparse.Namespace) -> None:
    from megatron_carve.run.pretraining import pretrain

    bench = StepTimer(plan, warmup=chosen.warmup, steps=chosen.steps)
    bench.parameters = pretrain(plan, bench, bench.watch)
    if plan.rank == 0:
        numbers = bench.numbers(chosen.peak_tflops)
        print("\n".join(report(numbers)))
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for what a run writes, one for all processes of this machine; it is gone at the end."""
    job = os.getppid() if "RANK" in os.environ else os.getpid()  # torchrun is the parent of all
    folder = Path(tempfile.gettempdir()) / f"megatron_carve_bench_{job}"
    try:
        yield folder
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)


def _recipe(chosen: argparse.Namespace, scratch: Path) -> Recipe:
    for name in ("warmup", "steps"):
        if getattr(chosen, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(chosen, name)}")
    if chosen.peak_tflops is not None and not chosen.peak_tflops > 0:
        raise ValueError(f"--peak-tflops: expected a number above 0, got {chosen.peak_tflops}")
    if chosen.json is not None and not chosen.json.parent.is_dir():
        raise ValueError(f"--json: {chosen.json.parent} is not a folder")
    steps = chosen.warmup + chosen.steps + 1  # the last is profiled
    fixed = [
        "training.tokens=null", f"training.steps={steps}", f"training.eval_interval={steps + 1}",
        "training.eval_iters=1", "checkpoint.interval=null", "checkpoint.load=null", f"run.folder={scratch}",
        *_beginning(load_recipe(chosen.recipe, chosen.overrides).training, steps),
    ]  # fmt: skip
    return load_recipe(chosen.recipe, [*chosen.overrides, *fixed])


def _beginning(training: Training, steps: int) -> list[str]:
    """What makes `steps` steps the first ones of a longer run: its warm-up, and after that its learning rate.

    A warm-up cut short would measure another model: it throws the weights about, and steep decays take longer.
    """
    warmup = training.warmup_fraction * training.total_steps
    here = min(warmup, 0.99 * steps)
    share = here / warmup if warmup else 1.0
    return [
        f"training.lr={training.lr * share}", "training.min_lr=null", "training.lr_schedule=constant",
        f"training.warmup_fraction={here / steps}",
    ]  # fmt: skip


class StepTimer:
    """Listens to training: times the steps after the warm-up, then profiles one more.

    Args:
        plan: of the run.
        warmup: steps before those that count, at least 1.
        steps: those that count.
    """

    def __init__(self, plan: Plan, *, warmup: int, steps: int) -> None:
        self.plan = plan
        self.began = time.perf_counter()
        self.warmup, self.last = warmup, warmup + steps
        self.parameters = 0
        self.console = sys.stdout  # Megatron's output is sent elsewhere while it runs
        self.models: list[torch.nn.Module] = []
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.peak_bytes: tuple[int, ...] | None = None
        self.parts: dict[str, float] = {}
        self.kernels: list[tuple[str, float]] = []
        self.profiler: Any = None

    def watch(self, models: Sequence[torch.nn.Module]) -> None:
        """Take the models whose parts the last step is broken down into."""
        self.models.extend(models)

    def on_step(self, iteration: int, losses: dict[str, Any], learning_rate: float | None, grad_norm: Any) -> None:
        import torch

        from megatron_carve.run.progress import LOSS

        on_gpu = self.plan.device == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        if self.warmup <= iteration <= self.last:
            self.ends.append(time.perf_counter())
        if self.plan.rank == 0:
            stage = "warm-up" if iteration <= self.warmup else "timed" if iteration <= self.last else "profiled"
            seconds = time.perf_counter() - self.began
            print(f"step {iteration} of {self.last + 1}: {stage}, after {seconds:.0f} s", file=self.console, flush=True)
        if LOSS in losses:  # on the last pipeline stage
            self.losses.append(float(losses[LOSS]))
        if iteration == self.warmup and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        if iteration == self.last:
            if on_gpu:
                self.peak_bytes = _of_the_fullest(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
            self._begin_profile()
        elif iteration == self.last + 1:
            self._end_profile()

    def on_evaluation(self, losses: dict[str, Any]) -> None:
        """Megatron evaluates when it has finished; that is not measured."""

    def on_save(self) -> None:
        """A benchmark saves nothing."""

    def _begin_profile(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        from megatron_carve.run.breakdown import mark_parts

        for model in self.models:
            mark_parts(model)
        gpu = [ProfilerActivity.CUDA] if self.plan.device == "cuda" else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
        self.profiler.start()

    def _end_profile(self) -> None:
        from megatron_carve.run.breakdown import longest_kernels, time_by_part

        self.profiler.stop()
        events = self.profiler.events()
        self.parts, self.kernels = time_by_part(events), longest_kernels(events, 12)

    def numbers(self, peak_tflops: float | None) -> dict[str, Any]:
        """Everything measured, in plain types; times in seconds, memory in bytes.

        Args:
            peak_tflops: of one GPU; None to measure what a large product reaches.
        """
        import torch

        from megatron_carve.run.launch import world_size
        from megatron_carve.run.speed import Gpus

        recipe, on_gpu = self.plan.recipe, self.plan.device == "cuda"
        seconds = [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]
        step = statistics.median(seconds)
        gpus = world_size()
        vocab = self.plan.start.vocab_size
        operations = estimate.training_flops_per_token(recipe, vocab)
        tokens = recipe.training.tokens_per_step
        peak = peak_tflops or (_matmul_tflops() if on_gpu else None)
        speed = Gpus(gpus, operations, peak).measures(tokens / step)
        return {
            "recipe": recipe.run.name,
            "pattern": recipe.model.pattern,
            "parameters": self.parameters,
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "gpus": gpus,
            "torch": torch.__version__,
            "layers": self.plan.layers,
            "precision": recipe.training.precision,
            "parallel": dataclasses.asdict(recipe.parallel),
            "seq_length": recipe.training.seq_length,
            "micro_batch_size": recipe.training.micro_batch_size,
            "global_batch_size": recipe.training.global_batch_size,
            "tokens_per_step": tokens,
            "seconds_per_step": step,
            "all_seconds": seconds,
            "losses": self.losses,
            "model_gflop_per_token": None if operations is None else operations / 1e9,
            "peak_tflops": peak,
            "tokens_per_second_and_gpu": speed["tokens_per_second_and_gpu"],
            "model_tflops_per_second_and_gpu": speed["tflops_per_second_and_gpu"],
            "utilisation": speed["utilisation"],
            "peak_allocated_bytes": self.peak_bytes and self.peak_bytes[0],
            "peak_reserved_bytes": self.peak_bytes and self.peak_bytes[1],
            "planned_bytes": None
            if estimate.unknown_layers(recipe)
            else sum(estimate.memory(recipe, vocab, gpus).values()),
            "seconds_by_part": self.parts,
            "longest": self.kernels,
        }


def report(n: dict[str, Any]) -> list[str]:
    """The lines that a person reads, from `StepTimer.numbers`."""
    where = n["device"] if n["gpus"] == 1 else f"{n['gpus']} processes, each on {n['device']}"
    low, high = min(n["all_seconds"]), max(n["all_seconds"])
    lines = [
        f"{n['pattern']}, {n['parameters']:,} parameters, {n['precision']}, {n['layers']} layers, on {where}",
        f"step: {n['tokens_per_step']:,} tokens (sequences of {n['seq_length']:,}, micro-batches of "
        f"{n['micro_batch_size']}) in {n['seconds_per_step']:.4f} s, median of {len(n['all_seconds'])} "
        f"({low:.4f} to {high:.4f})",
        f"speed: {n['tokens_per_second_and_gpu']:,.0f} tokens/s and GPU",
    ]
    if n["model_tflops_per_second_and_gpu"] is not None:
        lines[-1] += f", {n['model_tflops_per_second_and_gpu']:.1f} TFLOP/s of the model"
    if n["utilisation"] is not None:
        lines[-1] += f", {n['utilisation']:.1%} of the {n['peak_tflops']:.0f} that matrix products reach"
    if n["peak_allocated_bytes"] is not None:
        fullest = " of the fullest" if n["gpus"] > 1 else ""
        planned = "" if n["planned_bytes"] is None else f" (planned {n['planned_bytes'] / GIB:.2f})"
        lines.append(
            f"memory: {n['peak_allocated_bytes'] / GIB:.2f} GiB of tensors at the peak{fullest}{planned}, "
            f"{n['peak_reserved_bytes'] / GIB:.2f} reserved"
        )
    busy = sum(n["seconds_by_part"].values())
    what = "the GPU's work" if n["peak_allocated_bytes"] is not None else "the operations"
    lines += ["", f"{what} of one profiled step, {busy * 1e3:.1f} ms"]
    for part, seconds in n["seconds_by_part"].items():
        lines.append(f"  {part:<40}{seconds * 1e3:>10.2f} ms  {seconds / busy:>6.1%}")
    lines += ["", "longest"]
    lines += [f"  {name[:60]:<60}{seconds * 1e3:>10.2f} ms" for name, seconds in n["longest"]]
    return lines


def _of_the_fullest(*sizes: int) -> tuple[int, ...]:
    """The largest of each on any process, all of which call this; of pipeline stages the first keeps the most."""
    import torch

    most = torch.tensor(sizes, device="cuda")
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return tuple(most.tolist())


def _matmul_tflops() -> float:
    """TFLOP/s of a large bfloat16 product on this GPU."""
    import torch

    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = 20
    for _ in range(3):
        a @ a
    start.record()
    for _ in range(repeats):
        a @ a
    end.record()
    end.synchronize()
    return repeats * 2 * MATMUL_SIZE**3 / (start.elapsed_time(end) / 1e3) / 1e12


if __name__ == "__main__":
    sys.exit(main())
