"""Recall of overwritten keys: CARVE beside GDN-2 with a scalar write gate, GDN-2 and GDN, by accuracy.

    python tests/benchmarks/bench_recall.py OUT [--steps N] [--seeds N] [--levels PAIRS,OVERWRITES ...] [--jobs N]

Keys are assigned values, some again and again, and the last value must be returned (megatron_carve/recall.py). Every
model has two mixer layers with the same recurrent state and, by the width of its MLPs, the same number of parameters;
all else is one recipe. The runs divide the GPUs that are there. OUT gets results.json, after every run, and a table and
a plot; started again it goes on with the runs that are missing. GDN is Megatron's and needs flash-linear-attention and
a GPU; without them it is left out, and the table says so.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from megatron_carve import estimate, train
from megatron_carve.mixers import CarveMixer
from megatron_carve.progress import read_metrics
from megatron_carve.recipe import Recipe, load_recipe

# Of assignments, and of these that assign an earlier key again; a head's state has 32 columns.
LEVELS = [(32, 16), (64, 32), (96, 48), (128, 64)]
FFN = 352
RECIPE = [
    "debug", "model.hidden_size=128", "model.layers=auto", "mixer.num_key_heads=2", "mixer.num_value_heads=2",
    "mixer.key_head_dim=32", "mixer.value_head_dim=32", "mixer.content_rank=16", "data.recall.num_keys=128",
    "data.recall.num_values=64", "training.seq_length=384", "training.micro_batch_size=32",
    "training.global_batch_size=32", "training.lr=2e-3", "training.precision=bf16", "training.eval_iters=8",
    "checkpoint.interval=null", "run.log_interval=50",
]  # fmt: skip
PATTERNS = {"CARVE": "C-C-", "GDN-2, scalar write": "C-C-", "GDN-2": "2-2-", "GDN": "G-G-"}


def parameters(variant: str, recipe: Recipe) -> int:
    """What the variant trains."""
    vocab = recipe.data.recall.num_keys + recipe.data.recall.num_values + 1
    c, h = recipe.mixer, recipe.model.hidden_size
    if variant == "GDN":
        # of a layer: projections of q, k, v, gate, and of two scalars a head; convolution; decay; norms; output
        width = 2 * c.key_dim + 2 * c.value_dim + 2 * c.num_value_heads
        layer = h * width + (2 * c.key_dim + c.value_dim) * c.conv_width + 2 * c.num_value_heads
        layer += c.value_head_dim + c.value_dim * h + h
        as_mlps = load_recipe(RECIPE[0], [*RECIPE[1:], "training.steps=1", "model.pattern=--"])
        others = estimate.parameters(as_mlps, vocab)
        mlp = 3 * h * recipe.model.ffn_hidden_size + h
        return 2 * (layer + mlp) + sum(n for part, n in others.items() if part != "MLP")
    total = sum(estimate.parameters(recipe, vocab).values())
    if variant == "GDN-2, scalar write":  # the content path is there and stays as it is, at zero
        total -= 2 * c.num_value_heads * c.content_rank * (c.key_head_dim + c.value_head_dim)
    return total


def words(variant: str, level: tuple[int, int], seed: int, steps: int) -> list[str]:
    """The recipe of a run, with MLPs as wide as makes it as large as GDN-2's."""

    def of(variant: str, ffn: int) -> list[str]:
        return [
            *RECIPE, f"model.pattern={PATTERNS[variant]}", f"model.ffn_hidden_size={ffn}", f"training.steps={steps}",
            f"training.eval_interval={max(steps // 5, 1)}", f"training.seed={seed}",
            f"data.recall.num_pairs={level[0]}", f"data.recall.num_overwrites={level[1]}",
            f"run.name={variant}-{level[0]}-{level[1]}-{seed}",
        ]  # fmt: skip

    def size(variant: str, ffn: int) -> int:
        name, *overrides = of(variant, ffn)
        return parameters(variant, load_recipe(name, overrides))

    wanted = size("GDN-2", FFN)
    return of(variant, min(range(FFN - 200, FFN + 400, 4), key=lambda ffn: abs(size(variant, ffn) - wanted)))


def run(
    out: Path, gpus: SimpleQueue[str], variant: str, level: tuple[int, int], seed: int, steps: int
) -> dict[str, Any]:
    """Train one model in a process of its own, on the GPU whose turn it is; returns its accuracy on unseen
    sequences, at the end and after every fifth of the steps."""
    chosen = words(variant, level, seed, steps)
    gpu = gpus.get()
    done = subprocess.run(
        [sys.executable, Path(__file__).resolve(), "--child", variant, *chosen],
        cwd=out, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpu},
    )  # fmt: skip
    gpus.put(gpu)
    if done.returncode:
        raise RuntimeError(f"{variant}, {level}, seed {seed}: {done.stderr[-2000:]}")
    folder = out / "runs" / f"{variant}-{level[0]}-{level[1]}-{seed}"
    curve = [(r["step"], r["accuracy"]) for r in read_metrics(folder / "metrics.jsonl") if "accuracy" in r]
    size = parameters(variant, load_recipe(chosen[0], chosen[1:]))
    row = {
        "variant": variant, "level": list(level), "seed": seed, "steps": steps, "parameters": size,
        "accuracy": curve[-1][1], "curve": curve,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def child(variant: str, chosen: list[str]) -> int:
    """What a run's process does."""
    if variant == "GDN-2, scalar write":
        reset = CarveMixer.reset_parameters

        def without_content(self: CarveMixer) -> None:
            reset(self)
            for parameter in (self.content_down, self.content_up):
                nn.Parameter.requires_grad_(parameter, False)

        CarveMixer.reset_parameters = without_content  # type: ignore[method-assign]
    if variant == "GDN":  # where the peer's kernels refuse some Triton versions, Megatron has a path in torch
        chosen = [*chosen, "megatron.deterministic_mode=true"]
    return train.main(chosen)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Mean accuracy, and the lowest and highest of the seeds, as a Markdown table."""
    levels = [list(level) for level in sorted({tuple(r["level"]) for r in rows})]
    lines = ["| model | parameters | " + " | ".join(f"{p} pairs, {o} overwrites" for p, o in levels) + " |"]
    lines.append("| --- " * (2 + len(levels)) + "|")
    for variant in [v for v in PATTERNS if v in {r["variant"] for r in rows}]:
        cells = []
        for level in levels:
            found = [r["accuracy"] for r in rows if (r["variant"], r["level"]) == (variant, level)]
            cells.append(f"{statistics.mean(found):.1%} ({min(found):.1%} to {max(found):.1%})" if found else "not run")
        size = next(r["parameters"] for r in rows if r["variant"] == variant)
        lines.append(f"| {variant} | {size:,} | " + " | ".join(cells) + " |")
    return lines


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy against steps, a panel for each level and a line for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = sorted({tuple(r["level"]) for r in rows})
    figure = Figure(figsize=(4.2 * len(levels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    for axes, level in zip(panels, levels, strict=True):
        for i, variant in enumerate(PATTERNS):
            curves = [r["curve"] for r in rows if (r["variant"], tuple(r["level"])) == (variant, level)]
            for n, curve in enumerate(curves):
                axes.plot(*zip(*curve, strict=True), f"C{i}", marker=".", label=None if n else variant)
        axes.set(xlabel="steps", title=f"{level[0]} assignments, {level[1]} of earlier keys", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("recall accuracy")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--levels", nargs="+", default=[f"{p},{o}" for p, o in LEVELS], metavar="PAIRS,OVERWRITES")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    chosen = parser.parse_args()
    levels = [(int(pairs), int(overwrites)) for pairs, overwrites in (x.split(",") for x in chosen.levels)]
    variants = list(PATTERNS)
    if not (torch.cuda.is_available() and importlib.util.find_spec("fla")):
        variants.remove("GDN")
        print("without GDN, which needs flash-linear-attention and a GPU")
    chosen.out.mkdir(parents=True, exist_ok=True)
    results = chosen.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    rows = [r for r in rows if "curve" in r]  # what an older version wrote is trained again
    there = {(r["variant"], tuple(r["level"]), r["seed"], r["steps"]) for r in rows}
    jobs = [(v, level, 1 + s, chosen.steps) for level in levels for s in range(chosen.seeds) for v in variants]
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = names or [str(i) for i in range(max(torch.cuda.device_count(), 1))]
    gpus: SimpleQueue[str] = SimpleQueue()
    for i in range(chosen.jobs):
        gpus.put(names[i % len(names)])
    with ThreadPoolExecutor(chosen.jobs) as pool:
        runs = [pool.submit(run, chosen.out, gpus, *job) for job in jobs if job not in there]
        for done in as_completed(runs):
            rows.append(done.result())
            results.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    wanted = [r for r in rows if (r["variant"], tuple(r["level"]), r["seed"], r["steps"]) in set(jobs)]
    (chosen.out / "table.md").write_text("\n".join(table(wanted)) + "\n")
    print("\n".join(table(wanted)))
    draw(chosen.out / "recall.png", wanted)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(sys.argv[2], sys.argv[3:]))
    main()
