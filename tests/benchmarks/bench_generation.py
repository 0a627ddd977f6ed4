"""Generation of the 1.3B recipes and of a Transformer of their size: prefill, decoding and memory against length.

    python tests/benchmarks/bench_generation.py OUT [--models NAME ...] [--prompts TOKENS ...] [--contexts TOKENS ...]
        [--batches N ...]

Weights are random. Every model runs in a process of its own, by the programs' own Memory: a prompt in pieces, then the
CUDA graph of one token of every sequence. A batch that does not fit the GPU is left out, and the table says so. OUT
gets results.json, a table and a plot. To try it on a CPU: --recipe debug.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_carve.recipe import Recipe, estimate, load_recipe
from megatron_carve.use.generation import PREFILL_TOKENS, Memory
from megatron_carve.use.trained import untrained_model

PROMPTS, CONTEXTS, BATCHES = [4096, 65536, 524288], [4096, 65536], [1, 16, 128]
STEPS = 32
ONE_STEP = ["training.steps=1", "training.tokens=null"]
MODELS = {
    "GDN-2 hybrid": "gdn2_1p3b_hybrid",
    "GDN-2 recurrent": "gdn2_1p3b_recurrent",
    "CARVE hybrid": "carve_1p3b_hybrid",
    "CARVE recurrent": "carve_1p3b_recurrent",
    "Transformer": "gdn2_1p3b_recurrent",
}


def recipe(model: str, named: str | None) -> Recipe:
    """The Transformer has attention over all tokens in the place of every mixer, and MLPs that make up the size."""
    name = named or MODELS[model]
    if model != "Transformer":
        return load_recipe(name, ONE_STEP)
    wanted = load_recipe(name, ONE_STEP)
    size = sum(estimate.parameters(wanted, wanted.model.vocab_size or 256).values())

    def transformer(ffn: int) -> Recipe:
        pattern = "*-" * (wanted.model.num_layers // 2)
        words = [f"model.pattern={pattern}", f"model.ffn_hidden_size={ffn}", "model.attention_window=null"]
        return load_recipe(name, [*words, "model.position_embedding=rope", *ONE_STEP])

    def difference(ffn: int) -> int:
        return abs(sum(estimate.parameters(transformer(ffn), wanted.model.vocab_size or 256).values()) - size)

    return transformer(min(range(64, 2 * wanted.model.ffn_hidden_size, 64), key=difference))


def kept_bytes(memory: Memory) -> int:
    return sum(x.numel() * x.element_size() for layer in memory.context.key_value_memory_dict.values() for x in layer)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(device: torch.device, function: Any) -> float:
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def prefill(trained: Any, tokens: int) -> dict[str, float]:
    """Read a prompt of random tokens, after another has been read."""
    prompt = torch.randint(trained.vocab_size, (tokens,), device=trained.device)
    memory = Memory(trained.model, 1, tokens, vocab_size=trained.vocab_size)
    memory.read(0, prompt[: 2 * PREFILL_TOKENS])
    time_taken = seconds(trained.device, lambda: memory.read(0, prompt))
    return {"tokens_per_second": tokens / time_taken, "bytes": kept_bytes(memory)}


def decode(trained: Any, context: int, batch: int) -> dict[str, float]:
    """Step sequences that all have about `context` tokens. What the tokens were makes no difference to the time."""
    memory = Memory(trained.model, batch, context + STEPS, vocab_size=trained.vocab_size)
    memory.read(0, torch.randint(trained.vocab_size, (64,), device=trained.device))
    for layer, kept in memory.context.key_value_memory_dict.items():
        for x in kept:
            x[1:] = x[:1].clone()
        if trained.model.decoder.layer_type_list[layer - 1] == "*":
            kept[-1].fill_(context - 8)
    memory.lengths = [context - 8] * batch
    tokens = torch.randint(trained.vocab_size, (batch,), device=trained.device)
    for _ in range(4):
        tokens = memory.step(tokens).argmax(-1)
    times = []
    for _ in range(STEPS):

        def step() -> None:
            nonlocal tokens
            tokens = memory.step(tokens).argmax(-1)

        times.append(seconds(trained.device, step))
    return {"tokens_per_second": batch / statistics.median(times), "bytes_per_sequence": kept_bytes(memory) / batch}


def measure(model: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one model, in this process."""
    with untrained_model(recipe(model, chosen.recipe)) as trained:
        device = trained.device
        found: dict[str, Any] = {
            "parameters": sum(p.numel() for p in trained.model.parameters()),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none", "prefill": {}, "decode": {},
        }  # fmt: skip
        for tokens in chosen.prompts:
            found["prefill"][str(tokens)] = or_nothing(lambda n=tokens: prefill(trained, n))
        for context in chosen.contexts:
            for batch in chosen.batches:
                found["decode"][f"{context} {batch}"] = or_nothing(lambda c=context, b=batch: decode(trained, c, b))
    return found


def or_nothing(function: Any) -> Any:
    """The result, or None where it does not fit the GPU."""
    try:
        return function()
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def table(results: dict[str, Any]) -> str:
    """Rows are models; a dash is what did not fit."""

    def row(name: str, cells: list[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    def cell(entry: Any, key: str, form: str, unit: float = 1.0) -> str:
        return "-" if entry is None else format(entry[key] / unit, form)

    first = next(iter(results.values()))
    prompts, decodes = list(first["prefill"]), list(first["decode"])
    lines = ["Prefill of one sequence, tokens per second by the prompt's length:", ""]
    lines += [row("model (parameters)", prompts), "|" + " --- |" * (len(prompts) + 1)]
    for name, r in results.items():
        cells = [cell(r["prefill"][n], "tokens_per_second", ",.0f") for n in prompts]
        lines.append(row(f"{name} ({r['parameters'] / 1e9:.3f}B)", cells))
    heads = ["{} x {}".format(*reversed(key.split())) for key in decodes]
    decoding = "Decoding, tokens per second of all sequences (sequences x tokens that they have)"
    memory = "Memory of a sequence, MiB"
    for title, key, form, unit in (
        (decoding, "tokens_per_second", ",.0f", 1.0),
        (memory, "bytes_per_sequence", ",.1f", 2.0**20),
    ):
        lines += ["", f"{title}:", "", row("model", heads), "|" + " --- |" * (len(heads) + 1)]
        lines += [row(name, [cell(r["decode"][d], key, form, unit) for d in decodes]) for name, r in results.items()]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Prefill speed against length, and decoding speed against the batch at every context."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(results.values()))
    contexts = sorted({int(key.split()[0]) for key in first["decode"]})
    figure = Figure(figsize=(5 * (1 + len(contexts)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(contexts))

    def line(axis: Any, name: str, points: dict[int, Any]) -> None:
        there = {n: entry["tokens_per_second"] for n, entry in points.items() if entry}
        axis.plot(list(there), list(there.values()), marker="o", label=name)

    for name, r in results.items():
        line(axes[0], name, {int(n): entry for n, entry in r["prefill"].items()})
        for axis, context in zip(axes[1:], contexts, strict=True):
            of_context = {k.split()[1]: e for k, e in r["decode"].items() if int(k.split()[0]) == context}
            line(axis, name, {int(n): entry for n, entry in of_context.items()})
    titles = ["prefill, by the prompt's tokens", *(f"decoding after {n} tokens, by sequences" for n in contexts)]
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xscale="log", yscale="log", ylabel="tokens per second")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    for name, default in ("--prompts", PROMPTS), ("--contexts", CONTEXTS), ("--batches", BATCHES):
        parser.add_argument(name, nargs="+", type=int, default=default)
    parser.add_argument("--recipe", help="in the place of every model's")
    parser.add_argument("--only", choices=MODELS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.only:
        print(json.dumps(measure(chosen.only, chosen)))
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for model in chosen.models:
        done = subprocess.run([sys.executable, *sys.argv, "--only", model], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{model}:\n{done.stderr[-3000:]}")
        results[model] = json.loads(done.stdout.splitlines()[-1])
        (chosen.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(table({model: results[model]}), flush=True)
    (chosen.out / "table.md").write_text(table(results))
    plot(results, chosen.out / "generation.png")


if __name__ == "__main__":
    main()
