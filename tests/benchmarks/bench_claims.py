"""What CARVE's paper says of trained models, measured on one: carve_125m trained on Python source as bytes.

    python tests/benchmarks/bench_claims.py OUT [--steps N] [--recipe NAME] [section.key=value ...]

Of every checkpoint, on validation text and each layer by itself, with the inputs that it has in the model:

- deviation: of the outputs, when the gate sees the mean over the L tokens of the content chunk before, from those with
  a gate that sees S_{t-1}^T q_t at every token; root mean square, relative to the outputs
- share: variance of the content's term U tanh(D m) over that of W_b x, over tokens and channels
- steepness: the share of windows of 16, 32 and 64 tokens over which a channel, or any channel of a head, decays by more
  than 2^90 or 2^180
"""

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_choices import source
from torch import Tensor

from megatron_carve.kernels import OpCall
from megatron_carve.model.mixers import base
from megatron_carve.run.folder import RunFolder
from megatron_carve.use.trained import trained_model

LENGTHS = (16, 32, 64, 128)
WINDOWS = (16, 32, 64)
BITS = (90, 180)
SEQUENCES = 4


class Layers(NamedTuple):
    """The recurrence's inputs of all layers and the op's outputs, float32: [T, rows, H, ...], a row for each layer and
    sequence; maps D [rows, R, V], U [rows, K, R]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    logits: Tensor
    w: Tensor
    o: Tensor
    bias: Tensor
    D: Tensor
    U: Tensor


def recurrence(x: Layers, length: int | None, prediction: str) -> tuple[Tensor, Tensor]:
    """S_t^T q_t and the content's term at every token, [T, rows, H, V] and [..., K]; length None: exact content."""
    T, rows, H, V = x.v.shape
    S = x.v.new_zeros(rows, H, x.k.shape[3], V)
    mean, total = x.v.new_zeros(rows, H, V), x.v.new_zeros(rows, H, V)
    outputs, terms = [], []
    for t in range(T):
        if length is None:
            mean = torch.einsum("nhkv,nhk->nhv", S, x.q[t])
        elif t and t % length == 0:
            mean, total = total / length, torch.zeros_like(total)
        term = torch.einsum("nkr,nhr->nhk", x.U, torch.einsum("nrv,nhv->nhr", x.D, mean).tanh())
        a = x.g[t] + F.logsigmoid(-(x.logits[t] + x.bias + term))
        decayed = a.exp()[..., None] * S
        seen = torch.einsum("nhkv,nhk->nhv", S if prediction == "previous" else decayed, x.k[t])
        S = decayed + torch.einsum("nhk,nhv->nhkv", x.k[t], x.w[t][..., None] * (x.v[t] - seen))
        y = torch.einsum("nhkv,nhk->nhv", S, x.q[t])
        total = total + y
        outputs.append(y)
        terms.append(term)
    return torch.stack(outputs), torch.stack(terms)


def layers_of(run: Path, step: int, text: Path, device: str) -> tuple[Layers, str, int]:
    """What the layers of a checkpoint read on validation text, how they predict, and their content chunk."""
    found: list[tuple[Any, ...]] = []
    run = base.chunk_on_span

    def listen(span: Any, call: OpCall) -> Tensor:
        tensors = (call.q, call.k, call.v, call.g, call.b, call.w)
        q, k, v, raw, logits, write = (x.detach().float().transpose(0, 1) for x in tensors)
        assert call.A_log is not None and call.dt_bias is not None
        g = -call.A_log.exp() * F.softplus(raw + call.dt_bias)
        per_layer = (x.detach().float() for x in (call.erase_bias, call.content_down, call.content_up) if x is not None)
        rows = (x.expand(q.shape[1], *x.shape) for x in per_layer)
        o = run(span, call)
        found.append((q, k, v, g, logits, write.sigmoid(), o.float().transpose(0, 1), *rows))
        return o

    data = text.read_bytes()
    begin = int(0.96 * len(data))
    with trained_model(run, device=device, step=step) as trained, torch.no_grad():
        assert trained.tokenizer is not None
        T = trained.recipe.training.seq_length
        ids = trained.tokenizer.encode(data[begin : begin + 2 * SEQUENCES * T].decode(errors="ignore"))
        tokens = torch.tensor(ids[: SEQUENCES * T], device=trained.device).view(SEQUENCES, T)
        base.chunk_on_span = listen
        try:
            trained.model(tokens, torch.arange(T, device=trained.device).expand_as(tokens), None)
        finally:
            base.chunk_on_span = run
        mixer = trained.recipe.mixer
    by_token = [torch.cat(parts, 1) for parts in list(zip(*found, strict=True))[:7]]
    by_row = [torch.cat(parts, 0) for parts in list(zip(*found, strict=True))[7:]]
    return Layers(*by_token, *by_row), mixer.prediction, mixer.content_chunk


@torch.no_grad()
def measure(run: Path, step: int, text: Path, device: str) -> dict[str, Any]:
    x, prediction, content_chunk = layers_of(run, step, text, device)
    K = x.k.shape[3]
    by_layer = (-1, SEQUENCES)
    exact, _ = recurrence(x, None, prediction)
    deviation, terms = {}, {}
    for length in LENGTHS:
        o, terms[length] = recurrence(x, length, prediction)
        if length == content_chunk:
            assert (K**-0.5 * o - x.o).norm() < 0.02 * x.o.norm(), "the op's outputs are others than this script's"
        off = (o - exact).square().unflatten(1, by_layer).mean((0, 2, 3, 4))
        relative = (off / exact.square().unflatten(1, by_layer).mean((0, 2, 3, 4))).sqrt()
        deviation[length] = [relative.square().mean().sqrt().item(), relative.max().item()]

    def variance(y: Tensor) -> Tensor:
        return y.unflatten(1, by_layer).transpose(0, 1).flatten(1).var(1)

    shares = variance(terms[64]) / variance(x.logits)
    a = (x.g + F.logsigmoid(-(x.logits + x.bias + terms[64]))) / math.log(2)
    steep: dict[str, Any] = {}
    for window in WINDOWS:
        sums = a.unflatten(0, (-1, window)).sum(1)
        for bits in BITS:
            below = sums < -bits
            steep[f"{window} tokens, 2^-{bits}"] = [below.float().mean().item(), below.any(-1).float().mean().item()]
    b = (x.logits + x.bias + terms[64]).sigmoid()
    return {
        "step": step, "deviation": deviation, "share": [shares.mean().item(), shares.min().item(), shares.max().item()],
        "steep": steep, "mean_erase": b.mean().item(), "mean_log2_decay": (x.g.mean() / math.log(2)).item(),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| step | " + " | ".join(f"deviation, L = {n}" for n in LENGTHS) + " | share | mean b |"]
    lines.append("| --- " * (len(LENGTHS) + 3) + "|")
    for r in rows:
        cells = [f"{r['deviation'][n][0]:.1e} (worst layer {r['deviation'][n][1]:.1e})" for n in LENGTHS]
        mean, low, high = r["share"]
        cells += [f"{mean:.1%} ({low:.1%} to {high:.1%})", f"{r['mean_erase']:.3f}"]
        lines.append(f"| {r['step']} | " + " | ".join(cells) + " |")
    names = list(rows[-1]["steep"])
    lines += ["", "| step | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for r in rows:
        cells = [f"{r['steep'][n][0]:.2%} of channels, {r['steep'][n][1]:.1%} of heads" for n in names]
        lines.append(f"| {r['step']} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--recipe", default="carve_125m")
    chosen = parser.parse_intermixed_args()
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    text = out / "source.py.txt"
    print(source(text))
    words = [
        chosen.recipe, "training.micro_batch_size=8", "training.global_batch_size=8", f"training.steps={chosen.steps}",
        f"training.eval_interval={chosen.steps}", "training.eval_iters=8",
        f"checkpoint.interval={-(-chosen.steps // 4)}", f"data.text={text}", "run.name=claims", *chosen.overrides,
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, "-P", "-m", "megatron_carve.train", *words], cwd=out, check=True, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    run = out / "runs/claims"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Each in a process of its own: Megatron is set up once in a process.
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = list(pool.map(partial(measure, run, text=text, device=device), RunFolder(run).checkpoint_steps()))
    (out / "results.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    (out / "table.md").write_text("\n".join(table(rows)) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
