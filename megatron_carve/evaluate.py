"""Evaluate a trained model: `python -m megatron_carve.evaluate RUN --tasks perplexity,needles,...`."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_carve.data.text import read_text
from megatron_carve.run.folder import replace_text
from megatron_carve.run.program import exit_status, run_parser
from megatron_carve.use import needles

if TYPE_CHECKING:
    from megatron_carve.use.trained import Trained

LENGTHS = (1024, 4096, 16384)
DEPTHS = 5
# New tokens in which an answer must come; a UUID is 36 bytes.
ANSWER_TOKENS = 48


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status. A user's mistake ends in one line on stderr and status 2."""
    chosen = options().parse_args(arguments)
    return exit_status(lambda: _evaluate(chosen))


def options() -> argparse.ArgumentParser:
    """Of the program; run.evaluate of a recipe takes those that say what to do."""
    parser = run_parser(
        "evaluate",
        "Evaluates the model of a run. Tasks: perplexity (of --text), needles (all of "
        f"{', '.join(needles.TASKS)}, or some by these names), and any task of lm-evaluation-harness by its name there "
        "(wikitext, lambada_openai, hellaswag, ...), which needs the package lm-eval and the task's data.",
    )
    parser.add_argument("--tasks", required=True, metavar="NAME,NAME", help="see above")
    parser.add_argument("--text", type=Path, metavar="FILE", help="for perplexity")
    parser.add_argument("--length", type=int, metavar="N", help="tokens read at once (default: as trained)")
    parser.add_argument("--stride", type=int, metavar="N", help="between windows of the text (default: --length)")
    parser.add_argument("--haystack", type=Path, metavar="FILE", help="the text in which needles are hidden")
    parser.add_argument(
        "--needle-lengths", default=",".join(map(str, LENGTHS)), metavar="N,N", help="tokens (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=10, metavar="N", help="of each length and depth (default: 10)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="texts or questions at a time (default: 1)")
    parser.add_argument("--limit", type=int, metavar="N", help="examples of a harness's task (default: all)")
    parser.add_argument("--include-path", metavar="FOLDER", help="of further tasks for the harness")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for results.json and a heat map of the needles")
    return parser


@dataclass(frozen=True)
class Chosen:
    """Tasks and their options, checked as far as they can be without a model.

    Attributes:
        options: of the program.
        tasks: as they were given.
        hidden: those of needles.
        harness: those of lm-evaluation-harness.
        lengths: of the texts in which needles are hidden, in tokens.
        texts: what "text" and "haystack" name.
    """

    options: argparse.Namespace
    tasks: list[str]
    hidden: list[str]
    harness: list[str]
    lengths: list[int]
    texts: dict[str, str]


def checked(chosen: argparse.Namespace) -> Chosen:
    """Raises ValueError, OSError, ImportError: in one line what is wrong."""
    tasks = [name.strip() for name in chosen.tasks.split(",") if name.strip()]
    if not tasks:
        raise ValueError(f"--tasks: expected at least one, got {chosen.tasks!r}")
    wanted = dict.fromkeys(task for name in tasks for task in (needles.TASKS if name == "needles" else [name]))
    hidden = [task for task in wanted if task in needles.TASKS]
    harness = [name for name in tasks if name not in ("perplexity", "needles", *needles.TASKS)]
    lengths = _lengths(chosen.needle_lengths)
    for name in ("samples", "batch"):
        if getattr(chosen, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(chosen, name)}")
    if "perplexity" in tasks and chosen.text is None:
        raise ValueError("--text: perplexity needs a text file, got none")
    if chosen.haystack is None and (needy := [t for t in hidden if needles.TASKS[t].from_text]):
        raise ValueError(f"--haystack: {', '.join(needy)} hide needles in a text file, got none")
    texts = {name: read_text(path) for name, path in
             (("text", chosen.text), ("haystack", chosen.haystack)) if path is not None}  # fmt: skip
    if harness:
        from megatron_carve.use.harness import require_tasks

        require_tasks(harness, chosen.include_path)
    return Chosen(chosen, tasks, hidden, harness, lengths, texts)


def parts(trained: Trained, what: Chosen) -> list[Callable[[], dict[str, Any]]]:
    """What is to be done with a model, one after another; what may be wrong with that is found here."""
    if trained.tokenizer is None:
        raise ValueError(f"{what.options.run}: was trained on generated tokens, which are no text to evaluate with")
    found: list[Callable[[], dict[str, Any]]] = []
    if "perplexity" in what.tasks:
        found.append(_perplexity(trained, what.texts["text"], what.options))
    if what.hidden:
        found.append(_needles(trained, what.hidden, what.lengths, what.texts.get("haystack"), what.options))
    return found + [partial(_harness, trained, name, what.options) for name in what.harness]


def _evaluate(chosen: argparse.Namespace) -> None:
    what = checked(chosen)
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
    # Here because torch and Megatron take seconds to import; a typing mistake need not wait.
    from megatron_carve.use.trained import trained_model

    with trained_model(chosen.run, device=chosen.device, step=chosen.step) as trained:
        todo = parts(trained, what)  # which finds what may be wrong, before the first one takes its time
        results: dict[str, Any] = {"run": chosen.run, "step": trained.step}
        print(f"{chosen.run}, step {trained.step}", flush=True)
        for part in todo:  # and what was found stays, whatever becomes of the next ones
            found = part()
            print("\n".join(report(found)), flush=True)
            for name, value in found.items():  # of the harness's tasks there is a part each
                results[name] = results.get(name, {}) | value if name == "harness" else value
            if chosen.out is not None:
                replace_text(chosen.out / "results.json", json.dumps(results, indent=2) + "\n")
                if "needles" in found:
                    draw_heat_map(chosen.out / "needles.png", found["needles"])


def _lengths(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"--needle-lengths: expected numbers with commas between, got {words!r}") from None


def _perplexity(trained: Trained, text: str, chosen: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    from megatron_carve.use.perplexity import check_windows, text_perplexity

    assert trained.tokenizer is not None
    length = trained.recipe.training.seq_length if chosen.length is None else chosen.length
    stride = length if chosen.stride is None else chosen.stride
    ids = trained.tokenizer.encode(text).tolist()
    check_windows(len(ids), length, stride)

    def compute() -> dict[str, Any]:
        found = text_perplexity(
            trained.model, ids, length=length, stride=stride, batch=chosen.batch, text_bytes=len(text.encode())
        )
        about = {"file": str(chosen.text), "length": length, "stride": stride, "tokens": found.tokens}
        values = {name: getattr(found, name) for name in ("nats_per_token", "perplexity", "bits_per_byte")}
        return {"perplexity": about | values}

    return compute


def _needles(
    trained: Trained, tasks: list[str], lengths: list[int], haystack: str | None, chosen: argparse.Namespace
) -> Callable[[], dict[str, Any]]:
    """Accuracy of every task, length and depth."""
    tokenizer = trained.tokenizer
    assert tokenizer is not None

    def questions(task: str, length: int, depth: float, count: int) -> list[needles.Sample]:
        return [
            needles.make_sample(task, length, depth, chosen.seed + i, lambda t: len(tokenizer.encode(t)), haystack)
            for i in range(count)
        ]

    for task in tasks:  # a haystack that is none, or a text too short for the question, shows here
        questions(task, min(lengths), 0.0, chosen.samples)

    def compute() -> dict[str, Any]:
        rows = []
        for task, length, step in itertools.product(tasks, lengths, range(DEPTHS)):
            depth = step / (DEPTHS - 1)
            samples = questions(task, length, depth, chosen.samples)
            share = needles.accuracy(samples, _answers(trained, [s.prompt for s in samples], chosen.batch))
            rows.append({"task": task, "length": length, "depth": depth, "accuracy": share})
            print(f"{task}, {length} tokens, depth {depth:.2f}: {share:.1%}", file=sys.stderr, flush=True)
        return {"needles": rows}

    return compute


def _answers(trained: Trained, prompts: Sequence[str], batch: int) -> list[str]:
    import torch

    from megatron_carve.use.generation import Sampling, generate

    tokenizer = trained.tokenizer
    assert tokenizer is not None
    answers: list[str] = []
    for start in range(0, len(prompts), batch):
        steps = generate(
            trained.model, [torch.from_numpy(tokenizer.encode(text)).long() for text in prompts[start : start + batch]],
            max_new_tokens=ANSWER_TOKENS, sampling=Sampling(temperature=0), vocab_size=trained.vocab_size,
        )  # fmt: skip
        answers += [tokenizer.decode(ids) for ids in torch.stack(list(steps), 1).numpy()]
    return answers


def _harness(trained: Trained, name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    from megatron_carve.use.harness import evaluate

    return {"harness": evaluate(trained, [name], chosen.batch, chosen.limit, chosen.include_path)}


def report(results: dict[str, Any]) -> list[str]:
    """The lines that a person reads."""
    lines = []
    if found := results.get("perplexity"):
        lines.append(
            f"perplexity of {found['file']}: {found['perplexity']:.4f} a token ({found['nats_per_token']:.4f} nats), "
            f"{found['bits_per_byte']:.4f} bits a byte, {found['tokens']:,} tokens in windows of {found['length']}"
        )
    if rows := results.get("needles"):
        lengths = sorted({row["length"] for row in rows})
        lines.append(f"{'needles found':<16}" + "".join(f"{length:>10}" for length in lengths))
        for task in dict.fromkeys(row["task"] for row in rows):
            cells = (_mean(r["accuracy"] for r in rows if (r["task"], r["length"]) == (task, n)) for n in lengths)
            lines.append(f"{task:<16}" + "".join(f"{cell:>10.1%}" for cell in cells))
    if found := results.get("harness"):
        lines += [
            f"{task:<24}{metric:<24}{value:>10.4f}"
            for task, metrics in found.items()
            for metric, value in metrics.items()
            if isinstance(value, float)
        ]
    return lines


def draw_heat_map(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy over length and depth, a picture for each task, as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("length", "depth"))
    figure = Figure(figsize=(3.2 * len(tasks) + 1, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        found = {(r["depth"], r["length"]): r["accuracy"] for r in rows if r["task"] == task}
        cells = [[found[depth, length] for length in lengths] for depth in depths]
        image = axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set(title=task, xlabel="tokens", ylabel="depth of the needle")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
    figure.colorbar(image, label="needles found")
    figure.savefig(path, dpi=150)


def _mean(values: Any) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    sys.exit(main())
