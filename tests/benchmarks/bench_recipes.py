"""Whole training steps of recipes, each in a process of its own: the 125M models of the CARVE paper beside its figures,
and the 1.3B models.

    python tests/benchmarks/bench_recipes.py OUT [--cases NAME ...] [--warmup N] [--steps N]

OUT gets results.json (megatron_carve.bench's numbers, with the case and its recipe's words) and table.md.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A model to measure.

    Attributes:
        words: recipe and overrides.
        paper: tokens/s and GB in the paper (arXiv 2606.27229; one H100), where it has them.
    """

    words: list[str]
    paper: tuple[str, str] = ("", "")


SMALL = ["training.micro_batch_size=8", "training.global_batch_size=8"]
LARGE = ["training.micro_batch_size=4", "training.global_batch_size=4"]
WITH_ATTENTION = ["model.position_embedding=rope"]
CASES = {
    "125M GDN-2": Case(["gdn2_125m", *SMALL], ("93.77K", "7.50")),
    "125M CARVE": Case(["carve_125m", *SMALL], ("93.36K", "6.54")),
    "125M CARVE + attention 1:1": Case(
        ["carve_125m", *SMALL, f"model.pattern={'C-*-' * 6}", *WITH_ATTENTION], ("120.0K", "")
    ),
    "125M attention": Case(["carve_125m", *SMALL, f"model.pattern={'*-' * 12}", *WITH_ATTENTION], ("159.8K", "")),
    "125M CARVE, delta erase": Case(["carve_125m", *SMALL, "mixer.erase=delta"]),
    "125M CARVE, no content": Case(["carve_125m", *SMALL, "mixer.content_rank=0"]),
    "1.3B CARVE": Case(["carve_1p3b_recurrent", *LARGE]),
    "1.3B CARVE + attention 3:1": Case(["carve_1p3b_hybrid", *LARGE]),
    "1.3B GDN-2": Case(["gdn2_1p3b_recurrent", *LARGE]),
    "1.3B GDN-2 + attention": Case(["gdn2_1p3b_hybrid", *LARGE]),
}


def measure(out: Path, name: str, warmup: int, steps: int) -> dict[str, Any]:
    """One case's numbers."""
    words = CASES[name].words
    numbers = out / "numbers.json"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "megatron_carve.bench", *words, "--warmup", str(warmup), "--steps", str(steps),
         "--json", str(numbers)],
        capture_output=True, text=True, env={**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    return {"case": name, "words": words, **json.loads(numbers.read_text())}


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | parameters | tokens/s | paper | peak GB | planned | paper | ms a step (least to most) | mixer op |",
        "| --- " * 9 + "|",
    ]
    for r in rows:
        low, high = min(r["all_seconds"]) * 1e3, max(r["all_seconds"]) * 1e3
        paper = CASES[r["case"]].paper
        lines.append(
            f"| {r['case']} | {r['parameters']:,} | {r['tokens_per_second_and_gpu'] / 1e3:.2f}K | {paper[0]} "
            f"| {r['peak_allocated_bytes'] / 1e9:.2f} | {r['planned_bytes'] / 1e9:.2f} | {paper[1]} "
            f"| {r['seconds_per_step'] * 1e3:.1f} ({low:.1f} to {high:.1f}) "
            f"| {r['seconds_by_part'].get('mixer op', 0.0) * 1e3:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in chosen.cases:
        rows.append(measure(chosen.out, name, chosen.warmup, chosen.steps))
        print(table(rows[-1:])[-1], flush=True)
        (chosen.out / "results.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        (chosen.out / "table.md").write_text("\n".join([rows[0]["device"], "", *table(rows)]) + "\n")
    (chosen.out / "numbers.json").unlink()
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
