"""What a recipe's model costs, before anything is launched: `python -m megatron_carve.plan RECIPE [key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_carve.recipe import Recipe, check_layout, estimate, load_recipe, recipe_names
from megatron_carve.recipe.pipeline import better_pattern
from megatron_carve.run.data import data_lines
from megatron_carve.run.program import exit_status
from megatron_carve.run.vocabulary import vocab_size

GIB = 2**30
# What CUDA, the kernels and the allocator's gaps take besides tensors.
RESERVE_GIB = 4.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status. A user's mistake ends in one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_carve.plan",
        description="Parameters, operations, memory and time of a recipe, by arithmetic; no GPU is needed.",
    )
    parser.add_argument("recipe", help=f"a YAML file or one of: {', '.join(recipe_names())}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpus", type=int, help="GPUs of the whole job; as many as one model needs if not given")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GiB", help="of one GPU (default: 80)")
    parser.add_argument("--tokens-per-second", type=float, metavar="N", help="of one GPU, measured: gives the time")
    chosen = parser.parse_intermixed_args(arguments)
    return exit_status(lambda: _plan(chosen))


def _plan(chosen: argparse.Namespace) -> None:
    recipe = load_recipe(chosen.recipe, chosen.overrides)
    if chosen.tokens_per_second is not None and not chosen.tokens_per_second > 0:
        raise ValueError(f"--tokens-per-second: expected a number above 0, got {chosen.tokens_per_second}")
    if not chosen.gpu_memory > 0:
        raise ValueError(f"--gpu-memory: expected a number above 0, got {chosen.gpu_memory}")
    print("\n".join(report(recipe, chosen.gpus, chosen.gpu_memory, chosen.tokens_per_second)))


def report(recipe: Recipe, gpus: int | None, gpu_memory: float, tokens_per_second: float | None) -> list[str]:
    """The lines of the report.

    Args:
        gpus: of the whole job; None for the least.
        gpu_memory: of one, in GiB.
        tokens_per_second: of one, or None for no estimate of time.
    """
    vocab = vocab_size(recipe)
    p, t = recipe.parallel, recipe.training
    model_gpus = p.tensor * p.pipeline * p.context
    gpus = model_gpus if gpus is None else gpus
    if gpus < 1:
        raise ValueError(f"--gpus: expected at least 1, got {gpus}")
    check_layout(recipe, gpus)
    replicas = gpus // model_gpus
    micro_batches = t.global_batch_size // (t.micro_batch_size * replicas)
    all_tokens = t.total_steps * t.tokens_per_step
    flops = 3 * estimate.forward_flops_per_token(recipe, vocab)
    lines = ["Parameters", *_parameters(recipe, vocab), *_of_a_mixer(recipe), ""]
    lines += [
        f"Training operations per token: {flops / 1e9:.3g} GFLOP (three times the forward's)",
        f"Recurrent state of one sequence: {estimate.state_bytes(recipe) / 2**20:.1f} MiB, whatever its length",
        "",
        f"Layout: {gpus} GPUs = tensor {p.tensor} * pipeline {p.pipeline} * context {p.context} * data {replicas}",
        *_stages(recipe, vocab),
        f"Step: {t.tokens_per_step:,} tokens in {micro_batches} micro-batches of {t.micro_batch_size} x {t.seq_length}",
        f"Run: {t.total_steps:,} steps, {all_tokens / 1e9:.1f}B tokens",
        *data_lines(recipe),
        "",
        "Memory of the fullest GPU, GiB",
        *_memory(recipe, vocab, gpus, gpu_memory),
    ]
    if tokens_per_second is not None:
        seconds = all_tokens / (tokens_per_second * gpus)
        used = flops * tokens_per_second / 1e12
        lines += [
            "",
            f"Time at {tokens_per_second:,.0f} tokens/s and GPU: {seconds / 86400:.1f} days on {gpus} GPUs, "
            f"{seconds * gpus / 3600:,.0f} GPU hours; {used:.0f} TFLOP/s and GPU",
        ]
    return lines


def _parameters(recipe: Recipe, vocab: int) -> list[str]:
    decoder, _, _ = estimate.layers(recipe)
    counts = {estimate.KINDS[letter]: n for letter, n in decoder.items()}
    found = estimate.parameters(recipe, vocab)
    total = sum(found.values())
    lines = [
        _row(f"{counts[part]} {part}" if part in counts else part, f"{number:,}", f"{number / total:6.1%}")
        for part, number in found.items()
    ]
    lines.append(_row("all", f"{total:,}", ""))
    if (active := estimate.active_parameters(recipe, vocab)) < total:
        lines.append(_row("used by one token", f"{active:,}", f"{active / total:6.1%}"))
    for name in recipe_names():
        other = load_recipe(name)
        theirs = sum(estimate.parameters(other, vocab_size(other)).values())
        if total / 10 < theirs < 10 * total:
            lines.append(_row(f"{name} has", f"{theirs:,}", f"{total / theirs - 1:+.1%} here"))
    return lines


def _of_a_mixer(recipe: Recipe) -> list[str]:
    """One CARVE layer beside one of GDN-2 with the same sizes: as CARVE's paper counts, and whole."""
    if "C" not in recipe.model.pattern:
        return []
    counts = (
        (
            "of a CARVE mixer",
            recipe.mixer.paper_parameter_count,
            ", as the paper counts (without output projection and gate)",
        ),
        ("of a whole CARVE layer", recipe.mixer.parameter_count, ""),
    )
    lines = []
    for name, count, note in counts:
        carve, gdn2 = (count(kind, recipe.model.hidden_size) for kind in ("carve", "gdn2"))
        lines.append(_row(name, f"{carve:,}", f"{carve / gdn2 - 1:+.1%} of GDN-2's {gdn2:,}{note}"))
    return lines


def _stages(recipe: Recipe, vocab: int) -> list[str]:
    """Another division of the layers over pipeline stages, where the pattern's own is not the best."""
    if (found := better_pattern(recipe, vocab)) is None:
        return []
    pattern, slowest, own = found
    return [
        f"  by operations the slowest stage takes {own:.2f} times what a mean one does; {slowest:.2f} times with",
        f"  model.pattern='{pattern}'",
    ]


def _memory(recipe: Recipe, vocab: int, gpus: int, gpu_memory: float) -> list[str]:
    found = {part: number / GIB for part, number in estimate.memory(recipe, vocab, gpus).items()}
    if buffers := estimate.user_buffer_bytes(recipe):
        found["user buffers"] = buffers / GIB
    found["CUDA and gaps (a guess)"] = RESERVE_GIB
    total = sum(found.values())
    lines = [_row(part, f"{number:.1f}", "") for part, number in found.items()]
    verdict = f"of {gpu_memory:g}"
    if total > gpu_memory:
        verdict += ": DOES NOT FIT; less: training.micro_batch_size, model.mixer_recompute, parallel.tensor or .context"
    return [*lines, _row("all", f"{total:.1f}", verdict)]


def _row(name: str, number: str, note: str) -> str:
    return f"  {name:<32}{number:>16}  {note}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
