"""Short convolutions, none, static or dynamic, in CARVE, GDN-2 and attention: small models, by loss and by recall.

    python tests/benchmarks/bench_convolutions.py OUT [--tasks text recall] [--steps N] [--recall-steps N] [--seeds N]
        [--mixers NAME ...] [--convolutions NAME ...] [--text FILE] [--eager] [section.key=value ...]

Text: models of four layers of a mixer and an MLP, about 4M parameters, on bytes; the source of this Python's torch
where no file is given, its last twentieth for validation. Recall: two such layers, where keys are assigned values, some
again, and the last value must be returned. Models of a task have, by the width of their MLPs, the same number of
parameters, and models of a seed see the same tokens. Loss at equal time: where a mixer's models stand, between their
evaluations, when the fastest of them is finished.

All are trained in this process, one after another. On a GPU a step is one CUDA graph, since a model this small would
else wait for Python; --eager goes without. The tasks can be two commands, with an OUT each. OUT gets results.json,
after every model, and table.md; started again it goes on with the models that are missing.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_choices import source
from torch import Tensor, nn
from training_runs import mlp_as_large_as

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.models import hybrid_model, one_process

from megatron_carve.data.recall import RecallDataset
from megatron_carve.recipe import Recipe, estimate, load_recipe
from megatron_carve.run.vocabulary import vocab_size
from megatron_carve.use.graphs import rehearse

MIXERS = {"CARVE": "C-", "GDN-2": "2-", "attention": "*-"}
CONVOLUTIONS = ("none", "static", "dynamic")
# Heads are alike in both tasks, so that they share compiled kernels.
SHARED = [
    "debug", "model.vocab_multiple=1", "model.attention_window=null", "mixer.key_head_dim=32",
    "mixer.value_head_dim=32", "model.attention_head_dim=32", "mixer.content_rank=16", "training.lr=2e-3",
    "training.precision=bf16",
]  # fmt: skip
TASKS = {
    "text": [
        "model.hidden_size=256", "model.num_attention_heads=8", "mixer.num_key_heads=8", "mixer.num_value_heads=8",
        "model.ffn_hidden_size=640", "training.seq_length=512", "training.micro_batch_size=16",
        "training.global_batch_size=16",
        "model.vocab_size=256",
    ],
    "recall": [
        "model.hidden_size=128", "model.num_attention_heads=4", "mixer.num_key_heads=4", "mixer.num_value_heads=4",
        "model.ffn_hidden_size=352", "training.seq_length=384", "training.micro_batch_size=32",
        "training.global_batch_size=32",
        "data.recall.num_keys=128", "data.recall.num_values=64", "data.recall.num_pairs=32",
        "data.recall.num_overwrites=16",
    ],
}  # fmt: skip
LAYERS = {"text": 4, "recall": 2}
BASE = ("GDN-2", "static")
EVALUATIONS = 10
VALIDATION_BATCHES = 4


class Examples(NamedTuple):
    """Batches of a task, [number, B, T] each; the loss is of tokens where mask is 1."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor

    def at(self, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One batch, by a number on the device."""
        tokens, labels, mask = (x.index_select(0, number)[0] for x in self)
        return tokens.long(), labels.long(), mask.float()


class CausalAttention(nn.Module):
    """Torch's, in the place of Megatron's core attention: local layers form all scores."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.permute(2, 0, 1, 3).flatten(2)


def recipe(task: str, mixer: str, convolution: str, steps: int, overrides: list[str]) -> Recipe:
    """Of a model, with MLPs as wide as makes it as large as BASE's."""

    def of(mixer: str, convolution: str) -> Recipe:
        chosen = "model.attention_convolution" if mixer == "attention" else "mixer.short_convolution"
        words = [
            *SHARED[1:], *TASKS[task], f"model.pattern='{MIXERS[mixer] * LAYERS[task]}'", f"{chosen}={convolution}",
            f"training.steps={steps}", *overrides,
        ]  # fmt: skip
        return load_recipe(SHARED[0], words)

    def size(recipe: Recipe) -> int:
        return sum(estimate.parameters(recipe, vocab_size(recipe)).values())

    def widened(width: int) -> Recipe:
        return dataclasses.replace(mine, model=dataclasses.replace(mine.model, ffn_hidden_size=width))

    mine, base = of(mixer, convolution), of(*BASE)
    return widened(mlp_as_large_as(size(base), lambda width: size(widened(width)), base.model.ffn_hidden_size))


def build(recipe: Recipe, seed: int, device: str) -> nn.Module:
    """A model with fresh weights."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_carve.run.compiling import compile_kernels
    from megatron_carve.specs import stack_spec

    m, x = recipe.model, recipe.mixer
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    spec = stack_spec("local", attention_convolution=m.attention_convolution)
    spec.submodules.attention_layer.submodules.self_attention.submodules.core_attention = CausalAttention
    on_gpu = device == "cuda"
    model = hybrid_model(
        m.pattern, spec, vocab_size=vocab_size(recipe), length=recipe.training.seq_length, hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size, num_attention_heads=m.num_attention_heads, kv_channels=m.attention_head_dim,
        linear_num_key_heads=x.num_key_heads, linear_num_value_heads=x.num_value_heads,
        linear_key_head_dim=x.key_head_dim, linear_value_head_dim=x.value_head_dim,
        linear_conv_kernel_dim=x.conv_width, mixer=x.options, bf16=on_gpu,
        params_dtype=torch.bfloat16 if on_gpu else torch.float32,
    )  # fmt: skip
    compile_kernels([model], recipe)
    return model


@cache
def text_examples(path: Path, recipe_key: tuple[int, int, int], seed: int, device: str) -> tuple[Examples, Examples]:
    """For training and for validation, of (batches, B, T)."""
    steps, B, T = recipe_key
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    train, rest = data[: len(data) * 19 // 20], data[len(data) * 19 // 20 :]
    if len(rest) <= T + 1:
        raise ValueError(f"--text: expected at least {20 * (T + 2)} bytes, got {len(data)}")
    starts = torch.randint(len(train) - T, (steps * B,), generator=torch.Generator().manual_seed(seed))
    evenly = torch.linspace(0, len(rest) - T - 1, VALIDATION_BATCHES * B).long()

    def of(data: Tensor, starts: Tensor) -> Examples:
        rows = data[starts[:, None] + torch.arange(T + 1)].unflatten(0, (-1, B)).to(device)
        return Examples(rows[..., :-1], rows[..., 1:], torch.ones_like(rows[..., 1:]))

    return of(train, starts), of(rest, evenly)


@cache
def recall_examples(task: Any, recipe_key: tuple[int, int, int], seed: int, device: str) -> tuple[Examples, Examples]:
    """As text_examples; task: the recipe's data.recall."""
    steps, B, T = recipe_key

    def of(split: str, batches: int) -> Examples:
        data = RecallDataset(
            seq_length=T, num_samples=batches * B, seed=seed, split=split, **dataclasses.asdict(task)
        )  # fmt: skip
        samples = [data[i] for i in range(batches * B)]
        columns = (torch.stack([s[key] for s in samples]) for key in ("tokens", "labels", "loss_mask"))
        return Examples(*(x.to(torch.uint8).unflatten(0, (-1, B)).to(device) for x in columns))

    return of("train", steps), of("validation", VALIDATION_BATCHES)


class Training:
    """One model's steps: AdamW on float32 weights, after a warm-up a learning rate that falls as a cosine."""

    def __init__(self, model: nn.Module, recipe: Recipe, examples: Examples, *, graph: bool) -> None:
        t = recipe.training
        self.model, self.examples, self.graph = model, examples, graph
        self.weights = [p for p in model.parameters() if p.requires_grad]
        device = self.weights[0].device
        self.positions = torch.arange(t.seq_length, device=device).expand(t.micro_batch_size, -1)
        self.exact = [nn.Parameter(p.detach().float().clone()) for p in self.weights]
        for p in self.exact:
            p.grad = torch.zeros_like(p)
        steps = torch.arange(t.total_steps, dtype=torch.float32)
        warmup = max(1, round(0.05 * t.total_steps))
        fall = ((steps - warmup) / max(1, t.total_steps - warmup)).clamp(0, 1)
        rates = t.final_lr + (t.lr - t.final_lr) * (1 + torch.cos(math.pi * fall)) / 2
        self.rates = (rates * ((steps + 1) / warmup).clamp(max=1)).to(device)
        self.rate, self.done = torch.tensor(0.0, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.exact if p.ndim > 1], "weight_decay": t.weight_decay},
                {"params": [p for p in self.exact if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=self.rate, betas=(t.adam_beta1, t.adam_beta2), capturable=device.type == "cuda",
        )  # fmt: skip
        self.step: Callable[[], None] = self._step
        self.seconds, self.timed = 0.0, 0

    def _step(self) -> None:
        tokens, labels, mask = self.examples.at(self.done)
        losses = self._losses(tokens, labels)
        gradients = torch.autograd.grad((losses * mask).sum() / mask.sum(), self.weights)
        torch._foreach_copy_([p.grad for p in self.exact], gradients)
        nn.utils.clip_grad_norm_(self.exact, 1.0)
        self.rate.copy_(self.rates.index_select(0, self.done)[0])
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.exact)
        self.done.add_(1)

    def _losses(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(tokens, self.positions, None)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    def advance(self, steps: int) -> None:
        """Take so many steps; from the fourth on they are one graph, and are timed."""
        beginning = min(steps, max(0, 3 - int(self.done)))
        self._wait()
        if self.graph and beginning:
            rehearse(self._step, beginning)
        elif beginning:
            for _ in range(beginning):
                self._step()
        if self.graph and self.step == self._step and int(self.done) >= 3:
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded, capture_error_mode="thread_local"):  # which computes nothing
                self._step()
            self.step = recorded.replay
        self._wait()
        began = time.perf_counter()
        for _ in range(steps - beginning):
            self.step()
        self._wait()
        self.seconds += time.perf_counter() - began
        self.timed += steps - beginning

    @torch.no_grad()
    def evaluate(self, examples: Examples) -> tuple[float, float]:
        """Mean loss, and the share of tokens whose largest logit is right."""
        self.model.eval()
        total = torch.zeros(3, device=self.done.device)
        for number in range(len(examples.tokens)):
            tokens, labels, mask = examples.at(self.done.new_tensor([number]))
            logits = self.model(tokens, self.positions, None).float()
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
            right = (logits.argmax(-1) == labels).float()
            total += torch.stack([(losses * mask).sum(), (right * mask).sum(), mask.sum()])
        self.model.train()
        loss, right_ones, count = total.tolist()
        return loss / count, right_ones / count

    def _wait(self) -> None:
        if self.done.is_cuda:
            torch.cuda.synchronize()


def trained(recipe: Recipe, seed: int, text: Path, device: str, *, eager: bool) -> dict[str, Any]:
    """Numbers of one model, trained."""
    t = recipe.training
    sizes = t.total_steps, t.micro_batch_size, t.seq_length
    if recipe.model.vocab_size is None:
        train, validation = recall_examples(recipe.data.recall, sizes, seed, device)
    else:
        train, validation = text_examples(text, sizes, seed, device)
    model = build(recipe, seed, device)
    run = Training(model, recipe, train, graph=device == "cuda" and not eager)
    marks = sorted({max(1, t.total_steps * i // EVALUATIONS) for i in range(1, EVALUATIONS + 1)})
    curve, at = [], 0
    for mark in marks:
        run.advance(mark - at)
        curve.append([mark, *run.evaluate(validation)])
        at = mark
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "ffn_hidden_size": recipe.model.ffn_hidden_size,
        "seconds_per_step": run.seconds / run.timed if run.timed else None, "tokens_per_step": t.tokens_per_step,
        "loss": curve[-1][1], "accuracy": curve[-1][2], "curve": curve,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "graph": run.graph,
    }  # fmt: skip


def loss_after(row: dict[str, Any], seconds: float) -> float:
    """Validation loss after so much training, between two evaluations in proportion."""
    step = seconds / row["seconds_per_step"]
    before: tuple[float, float] | None = None
    for mark, loss, _ in row["curve"]:
        if mark >= step:
            if before is None:
                return loss
            share = (step - before[0]) / (mark - before[0])
            return before[1] + share * (loss - before[1])
        before = mark, loss
    return row["curve"][-1][1]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Means of the seeds, with the lowest and the highest, as a Markdown table."""
    lines = [
        "| mixer | convolution | parameters | tokens/s | validation loss | loss at equal time | recall |",
        "| --- " * 7 + "|",
    ]

    def spread(values: list[float], form: str) -> str:
        mean, low, high = statistics.mean(values), min(values), max(values)
        return f"{mean:{form}} ({low:{form}} to {high:{form}})" if len(values) > 1 else f"{mean:{form}}"

    def of(task: str, mixer: str, convolution: str | None = None) -> list[dict[str, Any]]:
        wanted = [r for r in rows if (r["task"], r["mixer"]) == (task, mixer)]
        return [r for r in wanted if convolution in (None, r["convolution"])]

    def step_time(found: list[dict[str, Any]]) -> float | None:
        times = [r["seconds_per_step"] for r in found if r["seconds_per_step"]]
        return statistics.mean(times) if times else None

    for mixer in MIXERS:
        times = {c: step_time(of("text", mixer, c)) for c in CONVOLUTIONS}
        known = [x for x in times.values() if x is not None]
        for convolution in CONVOLUTIONS:
            text, recall = of("text", mixer, convolution), of("recall", mixer, convolution)
            cells = [mixer, convolution, "", "", "", "", ""]
            each = times[convolution]
            if text:
                cells[2] = f"{text[0]['parameters']:,}"
                cells[4] = spread([r["loss"] for r in text], ".4f")
            if text and each is not None:
                cells[3] = f"{text[0]['tokens_per_step'] / each:,.0f}"
                end = min(known) * text[0]["steps"]
                cells[5] = spread([loss_after({**r, "seconds_per_step": each}, end) for r in text], ".4f")
            if recall:
                cells[6] = spread([r["accuracy"] for r in recall], ".1%")
            if text or recall:
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS), metavar="NAME")
    parser.add_argument("--convolutions", nargs="+", choices=CONVOLUTIONS, default=CONVOLUTIONS, metavar="NAME")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--recall-steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    chosen = parser.parse_intermixed_args()
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    text = chosen.text or out / "source.py.txt"
    if chosen.text is None and "text" in chosen.tasks:
        print(source(text))
    results = out / "results.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    steps = {"text": chosen.steps, "recall": chosen.recall_steps}
    names = ("task", "mixer", "convolution", "seed", "steps")
    jobs = [
        (task, mixer, convolution, 1 + seed, steps[task])
        for task in chosen.tasks
        for seed in range(chosen.seeds)
        for mixer in chosen.mixers
        for convolution in chosen.convolutions
    ]
    there = {tuple(r[name] for name in names) for r in rows}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with one_process(device):
        for job in jobs:
            if job in there:
                continue
            task, mixer, convolution, seed, count = job
            began = time.perf_counter()
            of_model = recipe(task, mixer, convolution, count, chosen.overrides)
            numbers = trained(of_model, seed, text, device, eager=chosen.eager)
            rows.append({**dict(zip(names, job, strict=True)), **numbers})
            print(
                f"{task}, {mixer}, {convolution}, seed {seed}: loss {numbers['loss']:.4f}, accuracy "
                f"{numbers['accuracy']:.1%}, {time.perf_counter() - began:.1f} s", flush=True,
            )  # fmt: skip
            results.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            torch.cuda.empty_cache()
    wanted = [r for r in rows if tuple(r[name] for name in names) in set(jobs)]
    (out / "table.md").write_text("\n".join(table(wanted)) + "\n")
    print("\n".join(table(wanted)))


if __name__ == "__main__":
    main()
