"""How much of one GPU's speed each parallel layout keeps, on one host of up to eight GPUs: our models beside one of
Megatron's attention layers alone, of their size.

    python tests/benchmarks/bench_layouts.py OUT [section.key=value ...] [--layouts NAME ...] [--models NAME ...]
        [--limit SECONDS] [--micro-batches N] [--warmup N] [--steps N] [--gpus N] [--side-by-side]

Every measurement is megatron_carve.bench. OUT gets results.json (its numbers, with the words of the recipe) and
table.md after each, so that a run that is stopped keeps what it has, and what the processes printed in logs/. The most
valuable come first; --limit begins none after so many seconds. With --layouts or --models those of the list that they
name are measured, with both each of these models in each of these layouts. The words after OUT are of every
measurement's recipe.

Processes stay for the measurements to come on the same GPUs, with as many of CUDA's queues: only their first waits for
CUDA to start and for libraries to load. A failure ends them, and the next measurement has new ones. While others
measure they keep a CUDA context, some hundred MiB that no column has. What libraries keep of torch's memory is in the
peaks of later measurements; the end of each log says how much it is.

A micro-batch has 16,384 tokens, a step --micro-batches of them for every GPU: four sequences of 4,096 each (sixteen of
1,024 for the small model with experts). Over p pipeline stages these are p times as many micro-batches, and the pattern
is divided as `plan` proposes. The layouts called long have one sequence of 16,384 a GPU and step; context parallelism
has one sequence, as long as all of those together, and is a share of their speed.

In the layouts called overlap Transformer Engine's layers send while they multiply. What CUDA copies for that is not in
the column of NCCL, nor are their buffers in those of memory.

The next measurement's processes, where they are new, import libraries while one runs, on other cores. With
--side-by-side those that together need no more GPUs than there are run at the same time, a GPU each: on a host with 16
cores a GPU little is lost by it, and the first, which compile the kernels of all others, wait for each other least. On
a machine without a GPU the model `debug` tries it out, with --models debug --layouts NAME ... --gpus 2.
"""

import argparse
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from megatron_carve.recipe import load_recipe
from megatron_carve.recipe.pipeline import better_pattern
from megatron_carve.run.launch import set_connections
from megatron_carve.run.session import session
from megatron_carve.run.vocabulary import vocab_size

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.ranks import Ranks

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
GIB = 2**30
# Seconds after which a measurement has failed.
PATIENCE = 300.0


class Model(NamedTuple):
    """What is measured.

    Attributes:
        words: recipe and overrides.
        length: tokens of a sequence.
        micro_batch: sequences of a micro-batch on one GPU.
    """

    words: list[str]
    length: int = 4096
    micro_batch: int = 4


class Layout(NamedTuple):
    """How a model is spread.

    Attributes:
        gpus: of all of it.
        words: of the recipe.
        beside: the layout whose speed this one's is a share of.
        sequences: micro-batches of short ones; a long one on each GPU; one, over all GPUs.
        attention: the layout that attention, which knows fewer, is compared in.
    """

    gpus: int
    words: list[str]
    beside: str | None = "one"
    sequences: Literal["short", "long", "one"] = "short"
    attention: str | None = None


ATTENTION = "attention"
MODELS = {
    "carve": Model(["carve_1p3b_hybrid"]),
    "gdn2": Model(["gdn2_1p3b_hybrid"]),
    # In the place of mixers, with MLPs that make up for their parameters.
    ATTENTION: Model(["carve_1p3b_hybrid", f"model.pattern={'*-' * 24}", "model.ffn_hidden_size=6144"]),
    "moe": Model(["carve_125m_moe"], 1024, 16),
    "carve-recurrent": Model(["carve_1p3b_recurrent"]),
    "gdn2-recurrent": Model(["gdn2_1p3b_recurrent"]),
    "debug": Model(["debug", "model.pattern=C-2-C-2-"], 32, 2),
}


OVERLAP = "megatron.tp_comm_overlap=true"
SHARDED = ["megatron.use_megatron_fsdp=true", "megatron.data_parallel_sharding_strategy=optim_grads_params"]


def _of(gpus: int) -> dict[str, Layout]:
    """The layouts that take all of so many GPUs for one kind of parallelism."""
    tensor, context = f"parallel.tensor={gpus}", f"parallel.context={gpus}"
    long, by_heads = f"data{gpus}-long", f"context{gpus}-heads"
    return {
        f"data{gpus}": Layout(gpus, []),
        f"tensor{gpus}": Layout(gpus, [tensor]),
        f"tensor{gpus}-overlap": Layout(gpus, [tensor, OVERLAP]),
        long: Layout(gpus, [], None, "long"),
        by_heads: Layout(gpus, [context, "parallel.context_method=heads"], long, "one"),
        f"context{gpus}-sequence": Layout(
            gpus, [context, "parallel.context_method=sequence"], long, "one", attention=by_heads
        ),
        f"pipeline{gpus}": Layout(gpus, [f"parallel.pipeline={gpus}"]),
        f"expert{gpus}": Layout(gpus, [f"megatron.expert_model_parallel_size={gpus}"]),
    }


LAYOUTS = {
    "one": Layout(1, [], None),
    **_of(2),
    **_of(4),
    **_of(8),
    "data2-tensor2": Layout(4, ["parallel.tensor=2"]),
    "data2-tensor2-overlap": Layout(4, ["parallel.tensor=2", OVERLAP]),
    "data4-expert2": Layout(4, ["megatron.expert_model_parallel_size=2"]),
    "data4-tensor2": Layout(8, ["parallel.tensor=2"]),
    "data2-tensor4": Layout(8, ["parallel.tensor=4"]),
    "data2-pipeline2-tensor2": Layout(8, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "data8-sharded-fp8": Layout(8, [*SHARDED, "megatron.fp8=hybrid"]),
}


def in_order(gpus: int) -> list[tuple[str, str]]:
    """(layout, model) of all that is worth measuring on two, four or eight GPUs, the most valuable first."""
    if gpus == 8:
        both = ["carve", "carve-recurrent", ATTENTION]
        host = [
            (["one", "data8"], both),
            (["data8-long", "context8-heads"], ["gdn2", "carve", ATTENTION]),
            (["data4-tensor2", "data2-tensor4", "data2-pipeline2-tensor2", "data8-sharded-fp8"], both),
        ]
        return [(layout, model) for layouts, models in host for layout in layouts for model in models]
    tensor = ["tensor2"] if gpus == 2 else ["data2-tensor2", "tensor4"]
    overlap = [f"{layout}-overlap" for layout in tensor]
    of_18_heads = tensor[:1]  # of attention, as GDN-2's hybrid has them
    long, methods = f"data{gpus}-long", [f"context{gpus}-heads", f"context{gpus}-sequence"]
    experts = [f"expert{gpus}", "data4-expert2"] if gpus == 4 else [f"expert{gpus}"]
    stages = [
        (["one", f"data{gpus}", *tensor], ["carve", ATTENTION]),
        ([long, *methods], ["gdn2", "carve"]),
        ([long, methods[0]], [ATTENTION]),
        ([f"pipeline{gpus}"], ["carve", ATTENTION]),
        (["one", f"data{gpus}", *of_18_heads, f"pipeline{gpus}"], ["gdn2"]),
        (overlap, ["carve", ATTENTION]),
        (["one", f"data{gpus}", *experts], ["moe"]),
    ]
    return [(layout, model) for layouts, models in stages for layout in layouts for model in models]


def recipe_words(layout: str, model: str, micro_batches: int, overrides: Sequence[str] = ()) -> list[str]:
    """Recipe and overrides of a measurement.

    Args:
        micro_batches: that a GPU has in a step of short sequences.
    """
    where, what = LAYOUTS[layout], MODELS[model]
    long = what.length * what.micro_batch
    length, at_a_time, in_all = {
        "short": (what.length, what.micro_batch, what.micro_batch * micro_batches * where.gpus),
        "long": (long, 1, where.gpus),
        "one": (long * where.gpus, 1, 1),
    }[where.sequences]
    words = [
        *what.words, *where.words, f"training.seq_length={length}", f"training.micro_batch_size={at_a_time}",
        f"training.global_batch_size={in_all}", *overrides,
    ]  # fmt: skip
    recipe = load_recipe(words[0], words[1:])
    proposed = better_pattern(recipe, vocab_size(recipe))
    return words if proposed is None else [*words, f"model.pattern={proposed[0]}"]


class Measurement:
    """megatron_carve.bench of a model in a layout.

    Args:
        out: the folder of the benchmark.
        layout, model: names.
        words: of the recipe.
        counts: warm-up and steps.
    """

    def __init__(self, out: Path, layout: str, model: str, words: list[str], counts: tuple[int, int]) -> None:
        self.layout, self.model, self.words, self.gpus = layout, model, words, LAYOUTS[layout].gpus
        self.log, self.numbers = (out / "logs" / f"{layout}-{model}.{end}" for end in ("txt", "json"))
        self.log.parent.mkdir(exist_ok=True)
        self.numbers.unlink(missing_ok=True)
        warmup, steps = map(str, counts)
        self.command = [*words, "--warmup", warmup, "--steps", steps, "--json", str(self.numbers)]
        with session():  # which puts the environment back
            set_connections(load_recipe(words[0], words[1:]))
            self.connections = os.environ.get(CONNECTIONS)

    def begin(self, ranks: Ranks) -> None:
        self.ranks, self.began = ranks, time.monotonic()
        ranks.begin("bench", self.command, self.log.parent, self.log)

    def wait(self) -> dict[str, Any]:
        """Its numbers; where it failed, what it said at its end."""
        which = {"layout": self.layout, "model": self.model, "words": self.words}
        try:
            self.ranks.wait(self.began + PATIENCE - time.monotonic())
        except RuntimeError as failure:
            return {**which, "failed": str(failure)}
        return {**which, "seconds": time.monotonic() - self.began, **json.loads(self.numbers.read_text())}


class Processes:
    """Those that stay, by their GPUs and by what CUDA reads when it starts; new ones after a failure."""

    def __init__(self) -> None:
        self.groups: dict[tuple[tuple[str, ...], str | None], Ranks] = {}

    def of(self, gpus: Sequence[str], connections: str | None) -> Ranks:
        """Those on GPUs by their names in CUDA_VISIBLE_DEVICES; they start now if there are none."""
        key = tuple(gpus), connections
        if key not in self.groups or not self.groups[key].alive:
            environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
            environment["TEARDOWN_CUPTI"] = "1"  # else all launches after a profile are slower
            if connections is not None:
                environment[CONNECTIONS] = connections
            self.groups[key] = Ranks(len(gpus), environment)
        return self.groups[key]

    def end(self) -> None:
        for ranks in self.groups.values():
            ranks.end()


def side_by_side(measurements: Sequence[Measurement], gpus: int) -> list[list[Measurement]]:
    """Neighbours that together need no more than so many GPUs, in order."""
    groups: list[list[Measurement]] = []
    for one in measurements:
        if not groups or sum(m.gpus for m in groups[-1]) + one.gpus > gpus:
            groups.append([])
        groups[-1].append(one)
    return groups


def measure(groups: Sequence[list[Measurement]], gpus: Sequence[str], limit: float) -> Iterator[dict[str, Any]]:
    """What each measurement found, as it ends; those of a group run at the same time.

    Args:
        gpus: their names.
        limit: seconds after which none begins.
    """
    end = time.monotonic() + limit
    processes = Processes()

    def ranks(group: list[Measurement]) -> list[Ranks]:
        firsts = itertools.accumulate((one.gpus for one in group), initial=0)
        return [
            processes.of(gpus[first : first + one.gpus], one.connections)
            for first, one in zip(firsts, group, strict=False)
        ]

    try:
        for group, following in itertools.zip_longest(groups, groups[1:], fillvalue=[]):
            if time.monotonic() > end:
                break
            for one, its in zip(group, ranks(group), strict=True):
                one.begin(its)
            ranks(following)  # which import meanwhile
            for one in group:
                yield one.wait()
    finally:
        processes.end()


def shares(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """By (layout, model), a GPU's speed over that of a GPU of the layout that it is compared with, where both are."""
    speeds = {(r["layout"], r["model"]): r["tokens_per_second_and_gpu"] for r in rows if "failed" not in r}
    return {
        (layout, model): speed / speeds[beside, model]
        for (layout, model), speed in speeds.items()
        if (beside := LAYOUTS[layout].beside) is not None and (beside, model) in speeds
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Speeds, shares and memory, and under that the parts of a profiled step, of the first process."""
    found = shares(rows)
    lines = [
        "| layout | model | tokens/s a GPU | of its speed in | share | attention's | over attention's "
        "| ms a step (least to most) | peak GiB, fullest GPU | planned | s |",
        "| --- " * 11 + "|",
    ]
    measured = [r for r in rows if "failed" not in r]
    for r in measured:
        layout = LAYOUTS[r["layout"]]
        share = found.get((r["layout"], r["model"]))
        theirs = found.get((layout.attention or r["layout"], ATTENTION)) if r["model"] != ATTENTION else None
        low, high = (f"{pick(r['all_seconds']) * 1e3:.0f}" for pick in (min, max))
        cells = [
            r["layout"], r["model"], f"{r['tokens_per_second_and_gpu']:,.0f}", layout.beside or "",
            _number(share), _number(theirs), _number(share / theirs if share and theirs else None),
            f"{r['seconds_per_step'] * 1e3:.1f} ({low} to {high})", _gib(r["peak_allocated_bytes"]),
            _gib(r["planned_bytes"]), f"{r['seconds']:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    if measured:
        lines += ["", *_parts(measured)]
    for r in rows:
        if "failed" in r:
            said = r["failed"].strip().splitlines() or ["nothing was said"]
            why = next((line for line in reversed(said) if "Error: " in line or "error: " in line), said[-1])
            lines += ["", f"{r['layout']} {r['model']} failed: {why.strip()}"]
    return lines


def _parts(rows: Sequence[dict[str, Any]]) -> list[str]:
    parts = list(rows[0]["seconds_by_part"])
    lines = [f"| ms | {' | '.join(parts)} | of which NCCL |", "| --- " * (len(parts) + 2) + "|"]
    for r in rows:
        # of the dozen longest kernels, which the profile names
        nccl = sum(seconds for name, seconds in r["longest"] if "nccl" in name.lower())
        cells = [f"{seconds * 1e3:.1f}" for seconds in [*(r["seconds_by_part"][part] for part in parts), nccl]]
        lines.append(f"| {r['layout']} {r['model']} | {' | '.join(cells)} |")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.1f}"


def heading(rows: Sequence[dict[str, Any]], chosen: argparse.Namespace) -> str:
    """What the table was measured on."""
    device, version = next(((r["device"], r["torch"]) for r in rows if "failed" not in r), ("?", torch.__version__))
    nccl = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")]
    ways = [f"{chosen.micro_batches} micro-batches a GPU", *(["side by side"] if chosen.side_by_side else []), *nccl]
    return f"{chosen.gpus} x {device}, torch {version}, {', '.join([*ways, *chosen.overrides])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, metavar="NAME", help=", ".join(LAYOUTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--micro-batches", type=int, default=4, metavar="N")
    parser.add_argument("--warmup", type=int, default=3, metavar="N")
    parser.add_argument("--steps", type=int, default=8, metavar="N")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), metavar="N", help="2, 4 or 8")
    parser.add_argument("--side-by-side", action="store_true")
    chosen = parser.parse_intermixed_args()
    if chosen.gpus < 2:
        parser.error(f"--gpus: expected 2 or more, got {chosen.gpus}")
    if chosen.layouts and chosen.models:
        pairs = [(layout, model) for layout in chosen.layouts for model in chosen.models]
    else:
        listed = in_order(next(n for n in (8, 4, 2) if n <= chosen.gpus))
        pairs = [p for p in listed if p[0] in (chosen.layouts or LAYOUTS) and p[1] in (chosen.models or MODELS)]
    if not pairs:
        parser.error("--layouts, --models: none of the list has these; name both, for each of these in each of those")
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends too
    counts = chosen.warmup, chosen.steps
    try:
        words = {
            (layout, model): recipe_words(layout, model, chosen.micro_batches, chosen.overrides)
            for layout, model in pairs
        }
    except ValueError as error:
        parser.error(str(error))
    measurements = [Measurement(out, layout, model, of_it, counts) for (layout, model), of_it in words.items()]
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    groups = side_by_side(measurements, chosen.gpus) if chosen.side_by_side else [[m] for m in measurements]
    rows: list[dict[str, Any]] = []
    for row in measure(groups, names or [str(i) for i in range(chosen.gpus)], chosen.limit):
        rows.append(row)
        (out / "results.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        lines = table(rows)
        (out / "table.md").write_text("\n".join([heading(rows, chosen), "", *lines]) + "\n")
        print(f"{row['layout']} {row['model']}: ", end="")
        print(row.get("failed") or f"{row['tokens_per_second_and_gpu']:,.0f} tokens/s a GPU", flush=True)
    print("\n".join(table(rows)))
    sys.exit(any("failed" in row for row in rows))


if __name__ == "__main__":
    main()
