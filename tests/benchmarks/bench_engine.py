"""Throughput of the engine beside the static path, and for a Transformer beside Megatron's own dynamic engine.

    python tests/benchmarks/bench_engine.py OUT [--models NAME ...] [--requests N ...] [--prompt TOKENS] [--new TOKENS]

Weights are random. N requests arrive at once, with prompts of half to all of --prompt tokens and half to all of --new
tokens to generate, greedily; the engine has room for all. The static path reads the same prompts one after another and
steps all together, until the longest has ended. What is counted are the tokens that were asked for, by the time from
the first prompt to the last token. Every model runs in a process of its own. OUT gets results.json and a table. To try
it on a CPU: --recipe debug --prompt 64 --new 16 --requests 4.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_generation import MODELS, or_nothing, recipe, synchronise

from megatron_carve.use import engine as engines
from megatron_carve.use import generation
from megatron_carve.use.dynamic_context import dynamic_context
from megatron_carve.use.trained import untrained_model

Requests = list[tuple[list[int], int]]


def requests(vocab: int, number: int, prompt: int, new: int) -> Requests:
    chance = random.Random(number)
    return [
        ([chance.randrange(vocab) for _ in range(chance.randint(prompt // 2, prompt))], chance.randint(new // 2, new))
        for _ in range(number)
    ]


def by_engine(trained: Any, coming: Requests, cuda_graphs: bool) -> dict[str, float]:
    longest = max(len(prompt) + tokens for prompt, tokens in coming)
    engine = engines.Engine(
        trained, max_requests=len(coming), max_sequence=longest, max_tokens=4096, cuda_graphs=cuda_graphs
    )

    def run(these: Requests) -> dict[str, float]:
        for prompt, tokens in these:
            engine.add(prompt, engines.Sampling(max_tokens=tokens, temperature=0))
        times, generating = [], 0.0
        while not engine.idle():
            start = time.perf_counter()
            steps = engine.step()
            times.append(time.perf_counter() - start)
            if len(steps) == len(these):
                generating = max(generating, len(steps) / times[-1])
        return {"seconds": sum(times), "tokens_per_second_when_all_generate": generating}

    run([(prompt[:32], 4) for prompt, _ in coming])
    found = run(coming)
    engine.close()
    return found | {"tokens_per_second": sum(tokens for _, tokens in coming) / found["seconds"]}


def by_static(trained: Any, coming: Requests) -> dict[str, float]:
    prompts = [torch.tensor(prompt) for prompt, _ in coming]
    new = max(tokens for _, tokens in coming)

    def run(prompts: list[torch.Tensor], new: int) -> None:
        sampling = generation.Sampling(temperature=0)
        for _ in generation.generate(
            trained.model, prompts, max_new_tokens=new, sampling=sampling, vocab_size=trained.vocab_size
        ):
            pass

    run([prompt[:32] for prompt in prompts], 4)
    synchronise(trained.device)
    start = time.perf_counter()
    run(prompts, new)
    synchronise(trained.device)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens_per_second": sum(tokens for _, tokens in coming) / seconds}


def by_megatron(trained: Any, coming: Requests) -> dict[str, float]:
    """Megatron's own engine, with its sampling and scheduling, without CUDA graphs."""
    from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    longest = max(len(prompt) + tokens for prompt, tokens in coming)
    context = dynamic_context(
        trained.model, max_requests=len(coming), max_tokens=4096, max_sequence=longest,
        blocks=len(coming) * -(-longest // 256),
    )  # fmt: skip
    tokenizer = SimpleNamespace(vocab_size=trained.vocab_size, eod=-1, bos=None, detokenize=lambda ids, **options: "")
    wrapped = GPTInferenceWrapper(trained.model, context)
    engine = DynamicInferenceEngine(TextGenerationController(wrapped, tokenizer), context)
    given = 0

    def run(these: Requests) -> float:
        nonlocal given
        start = time.perf_counter()
        for prompt, tokens in these:
            sampling = SamplingParams(num_tokens_to_generate=tokens, top_k=1, termination_id=-1)
            engine.add_request(given, prompt, sampling)
            given += 1
        while engine.has_unfinished_requests():
            engine.step_modern()
        synchronise(trained.device)
        return time.perf_counter() - start

    run([(prompt[:32], 4) for prompt, _ in coming])
    seconds = run(coming)
    return {"seconds": seconds, "tokens_per_second": sum(tokens for _, tokens in coming) / seconds}


def measure(model: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one model, in this process."""
    from megatron_carve.model.paged_attention import flash_attention_serves

    with untrained_model(recipe(model, chosen.recipe)) as trained:
        on_gpu = trained.device.type == "cuda"
        found: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name() if on_gpu else "none",
            "attention": "FlashAttention" if on_gpu and flash_attention_serves() else "ours",
        }
        for number in chosen.requests:
            coming = requests(trained.vocab_size, number, chosen.prompt, chosen.new)
            ways = {"static": lambda c=coming: by_static(trained, c)}
            if on_gpu:
                ways["engine, CUDA graphs"] = lambda c=coming: by_engine(trained, c, True)
            ways["engine"] = lambda c=coming: by_engine(trained, c, False)
            if model == "Transformer":
                ways["Megatron's engine"] = lambda c=coming: by_megatron(trained, c)
            found[str(number)] = {name: or_nothing(way) for name, way in ways.items()}
    return found


def table(results: dict[str, Any]) -> str:
    """Tokens per second; a dash is what did not fit or was not tried."""
    numbers = [key for key in next(iter(results.values())) if key.isdigit()]
    ways = list(dict.fromkeys(way for r in results.values() for n in numbers for way in r[n]))
    lines = [f"| model, requests | {' | '.join(ways)} |", "|" + " --- |" * (len(ways) + 1)]
    for name, r in results.items():
        for n in numbers:
            entries = [r[n].get(way) for way in ways]
            cells = ["-" if entry is None else format(entry["tokens_per_second"], ",.0f") for entry in entries]
            lines.append(f"| {name}, {n} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["CARVE hybrid", "CARVE recurrent", "Transformer"]
    )
    parser.add_argument("--requests", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--recipe", help="in the place of the models' own")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        chosen.out.write_text(json.dumps(measure(chosen.one, chosen)))
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for model in chosen.models:
        part = chosen.out / "part.json"
        words = [sys.executable, __file__, str(part), "--one", model, "--prompt", str(chosen.prompt)]
        words += ["--new", str(chosen.new), "--requests", *map(str, chosen.requests)]
        subprocess.run([*words, *(["--recipe", chosen.recipe] if chosen.recipe else [])], check=True)
        results[model] = json.loads(part.read_text())
        part.unlink()
        (chosen.out / "results.json").write_text(json.dumps(results, indent=1))
        print(table({model: results[model]}), flush=True)
    (chosen.out / "table.md").write_text(table(results))


if __name__ == "__main__":
    main()
