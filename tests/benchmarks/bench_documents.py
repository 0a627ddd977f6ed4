"""What it is worth to keep documents apart: small models that learn from them joined or apart, read either way.

    python tests/benchmarks/bench_documents.py OUT [--steps N] [--seeds N] [--jobs N] [section.key=value ...]

CARVE hybrids of about 4M parameters on bytes. The documents are the top-level pieces (functions, classes, what lies
between them) of the Python source of this Python's torch, in the order of their paths; every twentieth is for
validation. Models of a seed start alike and see the same samples of the data, as often. A trained model is validated on
the same documents joined, as they fill sequences, and apart, each from an empty state. OUT gets results.json and
table.md.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from training_runs import train_each

from megatron_carve.run.progress import read_metrics

WAYS = ("joined", "apart")
RECIPE = [
    "debug", "model.pattern=C-*-C-C-", "model.hidden_size=256", "model.ffn_hidden_size=640", "model.layers=auto",
    "model.attention_window=null", "mixer.num_key_heads=4", "mixer.num_value_heads=4", "mixer.key_head_dim=64",
    "mixer.value_head_dim=64", "mixer.content_rank=16", "training.seq_length=4096", "training.micro_batch_size=4",
    "training.global_batch_size=4", "training.lr=2e-3", "training.precision=bf16", "training.eval_iters=32",
    "run.log_interval=50", "data.text=documents.jsonl",
]  # fmt: skip


def documents(path: Path) -> str:
    """Write the documents to `path`; returns what is said of them."""
    files = sorted(Path(torch.__file__).parent.rglob("*.py"))
    texts = [text for file in files for text in file.read_text(encoding="utf-8").split("\n\n\n") if text.strip()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    mean = statistics.mean(len(text.encode()) for text in texts)
    return f"{len(texts):,} pieces of the Python source of torch {torch.__version__}, {mean:,.0f} bytes on average"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time")
    parser.add_argument("words", nargs="*", help="of the recipe of all")
    chosen = parser.parse_intermixed_args()
    out = chosen.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(1, chosen.seeds + 1)
    said = documents(out / "documents.jsonl")

    def words(way: str, seed: int) -> list[str]:
        return [
            *RECIPE, f"training.steps={chosen.steps}", f"training.eval_interval={chosen.steps}",
            f"checkpoint.interval={chosen.steps}", f"training.seed={seed}", f"data.documents={way}", *chosen.words,
        ]  # fmt: skip

    trained = {f"{way}-{seed}": words(way, seed) for way in WAYS for seed in seeds}
    read = {
        f"{way}-{seed}-read-{reading}": [
            *words(reading, seed), f"checkpoint.load={out / 'runs' / f'{way}-{seed}'}",
            "checkpoint.weights_only=true", "megatron.skip_train=true",
        ]
        for way in WAYS for seed in seeds for reading in WAYS
    }  # fmt: skip
    for runs in (trained, read):
        for name, _ in train_each(out, runs, chosen.jobs):
            print(name, flush=True)
    losses = {name: read_metrics(out / "runs" / name / "metrics.jsonl")[-1]["validation_loss"] for name in read}
    (out / "results.json").write_text(json.dumps({"documents": said, "steps": chosen.steps, "losses": losses}))
    lines = ["| learned from documents | " + " | ".join(f"read {way}" for way in WAYS) + " |", "| --- | --- | --- |"]
    for way in WAYS:
        cells = []
        for reading in WAYS:
            found = [losses[f"{way}-{seed}-read-{reading}"] for seed in seeds]
            cells.append(f"{statistics.mean(found):.4f} ({', '.join(f'{loss:.4f}' for loss in found)})")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    lines.append(f"\n{said}; validation loss in nats per byte after {chosen.steps:,} steps, mean and by seed.")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
