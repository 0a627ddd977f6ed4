"""Recall of overwritten keys: CARVE and forms of it beside GDN-2 and GDN, by accuracy.

    python tests/benchmarks/bench_recall.py OUT [--steps N] [--seeds N] [--levels PAIRS,OVERWRITES ...]
        [--variants NAME ...] [--jobs N]

Keys are assigned values, some again and again, and the last value must be returned (data/recall.py). Every
model has two mixer layers with the same recurrent state and, by the width of its MLPs, the same number of parameters;
all else is one recipe. The runs divide the GPUs that are there. OUT gets results.json, after every run, and a table and
a plot; started again it goes on with the runs that are missing. GDN is Megatron's and needs flash-linear-attention and
a GPU; without them it is left out, and the table says so.
"""

import argparse
import importlib.util
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from training_runs import mlp_as_large_as, train_each

from megatron_carve.recipe import Recipe, estimate, load_recipe

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
VARIANTS = {
    "CARVE": ["model.pattern=C-C-"],
    "CARVE, no content": ["model.pattern=C-C-", "mixer.content_rank=0"],
    "CARVE, delta erase": ["model.pattern=C-C-", "mixer.erase=delta"],
    "delta erase, no content": ["model.pattern=C-C-", "mixer.erase=delta", "mixer.content_rank=0"],
    "GDN-2": ["model.pattern=2-2-"],
    # Where the peer's kernels refuse some Triton versions, Megatron has a path in torch.
    "GDN": ["model.pattern=G-G-", "megatron.deterministic_mode=true"],
}


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
    return sum(estimate.parameters(recipe, vocab).values())


def words(variant: str, level: tuple[int, int], seed: int, steps: int) -> list[str]:
    """The recipe of a run, with MLPs as wide as makes it as large as GDN-2's."""

    def of(variant: str, ffn: int) -> list[str]:
        return [
            *RECIPE, *VARIANTS[variant], f"model.ffn_hidden_size={ffn}", f"training.steps={steps}",
            f"training.eval_interval={max(steps // 5, 1)}", f"training.seed={seed}",
            f"data.recall.num_pairs={level[0]}", f"data.recall.num_overwrites={level[1]}",
        ]  # fmt: skip

    def size(variant: str, ffn: int) -> int:
        name, *overrides = of(variant, ffn)
        return parameters(variant, load_recipe(name, overrides))

    return of(variant, mlp_as_large_as(size("GDN-2", FFN), lambda ffn: size(variant, ffn), FFN))


def row(job: tuple[str, tuple[int, int], int, int], chosen: list[str], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's accuracy on unseen sequences, at the end and after every fifth of the steps."""
    variant, level, seed, steps = job
    curve = [(r["step"], r["accuracy"]) for r in metrics if "accuracy" in r]
    return {
        "variant": variant, "level": list(level), "seed": seed, "steps": steps,
        "parameters": parameters(variant, load_recipe(chosen[0], chosen[1:])),
        "accuracy": curve[-1][1], "curve": curve,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Mean accuracy, and the lowest and highest of the seeds, as a Markdown table."""
    levels = [list(level) for level in sorted({tuple(r["level"]) for r in rows})]
    lines = ["| model | parameters | " + " | ".join(f"{p} pairs, {o} overwrites" for p, o in levels) + " |"]
    lines.append("| --- " * (2 + len(levels)) + "|")
    for variant in [v for v in VARIANTS if v in {r["variant"] for r in rows}]:
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
        for i, variant in enumerate(VARIANTS):
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
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    chosen = parser.parse_args()
    levels = [(int(pairs), int(overwrites)) for pairs, overwrites in (x.split(",") for x in chosen.levels)]
    variants = chosen.variants
    if "GDN" in variants and not (torch.cuda.is_available() and importlib.util.find_spec("fla")):
        variants.remove("GDN")
        print("without GDN, which needs flash-linear-attention and a GPU")
    chosen.out.mkdir(parents=True, exist_ok=True)
    results = chosen.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    rows = [r for r in rows if "curve" in r]  # what an older version wrote is trained again
    there = {(r["variant"], tuple(r["level"]), r["seed"], r["steps"]) for r in rows}
    jobs = [(v, level, 1 + s, chosen.steps) for level in levels for s in range(chosen.seeds) for v in variants]
    missing = {
        f"{v}-{level[0]}-{level[1]}-{s}": (v, level, s, n) for v, level, s, n in jobs if (v, level, s, n) not in there
    }
    recipes = {name: words(*job) for name, job in missing.items()}
    for name, metrics in train_each(chosen.out, recipes, chosen.jobs):
        rows.append(row(missing[name], recipes[name], metrics))
        print(json.dumps(rows[-1]), flush=True)
        results.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    wanted = [r for r in rows if (r["variant"], tuple(r["level"]), r["seed"], r["steps"]) in set(jobs)]
    (chosen.out / "table.md").write_text("\n".join(table(wanted)) + "\n")
    print("\n".join(table(wanted)))
    draw(chosen.out / "recall.png", wanted)


if __name__ == "__main__":
    main()
