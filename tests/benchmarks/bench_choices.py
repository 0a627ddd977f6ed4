"""The choices that CARVE's paper leaves open, by validation loss: small models on Python source.

    python tests/benchmarks/bench_choices.py OUT [--steps N] [--seeds N] [--variants NAME ...] [--jobs N]

Every model has four layers of a mixer and an MLP, four heads of 64 x 64 and, by the width of its MLPs, the number of
parameters of the GDN-2 model; all else is one recipe. The text is the source of this Python's torch, one document in
the order of its paths, as bytes; its last twentieth is for validation. OUT gets results.json, after every run, and
table.md; started again it goes on with the runs that are missing.
"""

import argparse
import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from training_runs import mlp_as_large_as, train_each

from megatron_carve.recipe import estimate, load_recipe
from megatron_carve.run.vocabulary import vocab_size

FFN = 640
RECIPE = [
    "debug", "model.hidden_size=256", "model.layers=auto", "mixer.num_key_heads=4", "mixer.num_value_heads=4",
    "mixer.key_head_dim=64", "mixer.value_head_dim=64", "mixer.content_rank=16", "training.seq_length=1024",
    "training.micro_batch_size=16", "training.global_batch_size=16", "training.lr=2e-3", "training.precision=bf16",
    "training.eval_iters=32", "checkpoint.interval=null", "run.log_interval=50", "model.position_embedding=none",
]  # fmt: skip
CARVE = ["model.pattern=C-C-C-C-"]
NO_CONTENT = [*CARVE, "mixer.content_rank=0"]
BASE = "CARVE (bias -4)"
VARIANTS = {
    BASE: CARVE,
    **{f"CARVE, bias {bias}": [*CARVE, f"mixer.erase_bias={bias}"] for bias in (0, -2, -3, -5, -6)},
    "CARVE, decayed": [*CARVE, "mixer.prediction=decayed"],
    "CARVE, detached": [*CARVE, "mixer.content_grad=detached"],
    "CARVE, L = 128": [*CARVE, "mixer.content_chunk=128"],
    "CARVE, no content": NO_CONTENT,
    "CARVE, no content, decayed": [*NO_CONTENT, "mixer.prediction=decayed"],
    "CARVE, delta erase": [*CARVE, "mixer.erase=delta"],
    "GDN-2 with scalar write": [*NO_CONTENT, "mixer.erase=delta"],
    # The erase gates, shut by their bias, leave KDA; their projections are too many.
    "KDA": [*NO_CONTENT, "mixer.prediction=decayed", "mixer.erase_bias=-100"],
    "GDN-2": ["model.pattern=2-2-2-2-"],
}


def source(path: Path) -> str:
    """Write the text to `path`; returns what is said of it."""
    files = sorted(Path(torch.__file__).parent.rglob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)
    path.write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()[:12]
    return f"Python source of torch {torch.__version__}: {len(files):,} files, {len(text):,} bytes, SHA-256 {digest}"


def words(variant: str, seed: int, steps: int, text: Path) -> list[str]:
    """The recipe of a run."""

    def of(variant: str, ffn: int) -> list[str]:
        return [
            *RECIPE, *VARIANTS[variant], f"model.ffn_hidden_size={ffn}", f"training.steps={steps}",
            f"training.eval_interval={max(steps // 4, 1)}", f"training.seed={seed}", f"data.text={text}",
            f"data.cache={text.parent / 'tokens'}",
        ]  # fmt: skip

    return of(variant, mlp_as_large_as(size(of("GDN-2", FFN)), lambda ffn: size(of(variant, ffn)), FFN))


def size(chosen: list[str]) -> int:
    """Parameters of a model."""
    recipe = load_recipe(chosen[0], chosen[1:])
    return sum(estimate.parameters(recipe, vocab_size(recipe)).values())


def table(rows: list[dict[str, Any]], steps: int) -> list[str]:
    """Validation loss by variant, mean of the seeds, and its difference to the first, seed by seed."""
    found = {(r["variant"], r["seed"]): r["loss"] for r in rows if r["steps"] == steps}
    seeds = sorted({seed for _, seed in found})
    lines = [
        f"| {steps} steps | parameters | " + " | ".join(f"seed {s}" for s in seeds) + " | mean | beside the first |",
        "| --- " * (4 + len(seeds)) + "|",
    ]
    for variant in VARIANTS:
        losses = [found.get((variant, s)) for s in seeds]
        there = [x for x in losses if x is not None]
        if not there:
            continue
        beside = [found[variant, s] - found[BASE, s] for s in seeds if (variant, s) in found and (BASE, s) in found]
        cells = [
            variant, f"{next(r['parameters'] for r in rows if r['variant'] == variant):,}",
            *("" if x is None else f"{x:.4f}" for x in losses), f"{statistics.mean(there):.4f}",
            f"{statistics.mean(beside):+.4f} ({min(beside):+.4f} to {max(beside):+.4f})" if beside else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    text = out / "source.py.txt"
    print(source(text))
    results = out / "results.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    there = {(r["variant"], r["seed"], r["steps"]) for r in rows}
    jobs = {
        f"{variant}, seed {1 + s}": (variant, 1 + s, chosen.steps)
        for s in range(chosen.seeds)
        for variant in chosen.variants
        if (variant, 1 + s, chosen.steps) not in there
    }
    recipes = {name: words(*job, text) for name, job in jobs.items()}
    for name, metrics in train_each(out, recipes, chosen.jobs):
        variant, seed, steps = jobs[name]
        curve = [(r["step"], r["validation_loss"]) for r in metrics if "validation_loss" in r]
        speeds = [r["tokens_per_second"] for r in metrics if r.get("tokens_per_second")]
        rows.append({
            "variant": variant, "seed": seed, "steps": steps, "parameters": size(recipes[name]),
            "loss": curve[-1][1], "curve": curve, "tokens_per_second": statistics.median(speeds),
        })  # fmt: skip
        results.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        (out / "table.md").write_text("\n".join(table(rows, chosen.steps)) + "\n")
    print("\n".join(table(rows, chosen.steps)))


if __name__ == "__main__":
    main()
