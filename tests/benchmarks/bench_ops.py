"""Time and memory of the ops on a GPU, beside flash-linear-attention's GDN-2 where it is installed.

    python tests/benchmarks/bench_ops.py [--peers] [--case 4,4096,16 ...] [--log2-decay -4 [--steep-share 0.05]]
        [--json FILE] [--plot FILE]
    python tests/benchmarks/bench_ops.py --decode [--peers]

Inputs: bfloat16, K = V = 128, g in float32 drawn as logsigmoid(normal), at least -5 as one of the peer's paths demands;
or --log2-decay at every step, or at those of a share of chunks times heads: beyond -180 / 64 chunks are steep for our
kernels, beyond -180 / 32 halves of them too. CARVE's erase logits are normal around --erase-mean, of its delta form
around 0.
Times are medians of triton.testing.do_bench, of a replayed CUDA graph for decoding; memory is counted by torch. Peers
tune themselves for minutes at first use.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from megatron_carve.kernels import CarveState, chunk_carve, chunk_gdn2, recurrent_carve, recurrent_gdn2

CASES = [(4, 4096, 16), (1, 16384, 16), (1, 65536, 16), (4, 4096, 2), (1, 4096, 16)]
DECODE_BATCHES = [1, 64, 512]
DECODE_HEADS = 16
K = V = 128
RANK = 32
CONTENT_CHUNK = 128
Op = Callable[..., Any]


def gdn2_inputs(B: int, T: int, H: int) -> list[Tensor]:
    q, k = (F.normalize(torch.randn(B, T, H, K, device="cuda"), dim=-1).bfloat16() for _ in range(2))
    v = torch.randn(B, T, H, V, device="cuda").bfloat16()
    g = F.logsigmoid(torch.randn(B, T, H, K, device="cuda")).clamp(min=-5)
    b, w = (torch.rand(B, T, H, K, device="cuda").bfloat16() for _ in range(2))
    return [q, k, v, g, b, w]


def carve_inputs(erase_mean: float) -> Callable[[int, int, int], list[Tensor]]:
    def draw(B: int, T: int, H: int) -> list[Tensor]:
        q, k, v, g, _, w = gdn2_inputs(B, T, H)
        logits = (torch.randn(B, T, H, K, device="cuda") + erase_mean).bfloat16()
        down = (torch.randn(RANK, V, device="cuda") * V**-0.5).bfloat16()
        up = torch.randn(K, RANK, device="cuda").bfloat16()
        return [q, k, v, g, logits, w[..., 0].contiguous(), down, up]

    return draw


def ours(erase_mean: float) -> dict[str, tuple[Op, Callable[[int, int, int], list[Tensor]]]]:
    def carve(**options: Any) -> Op:
        return lambda *x: chunk_carve(*x, content_chunk=CONTENT_CHUNK, backend="triton", **options)[0]

    diagonal = carve_inputs(erase_mean)
    return {
        "GDN-2": (lambda *x: chunk_gdn2(*x, backend="triton")[0], gdn2_inputs),
        "CARVE": (carve(), diagonal),
        "CARVE detached": (carve(content_grad="detached"), diagonal),
        "CARVE decayed": (carve(prediction="decayed"), diagonal),
        "CARVE delta": (carve(erase="delta"), carve_inputs(0.0)),
    }


def peers() -> dict[str, tuple[Op, Callable[[int, int, int], list[Tensor]]]]:
    from fla.ops.gdn2 import chunk_gdn2 as peer

    def path(**options: Any) -> Op:
        return lambda *x: peer(*x, **options)[0]

    return {
        "fla default": (path(), gdn2_inputs),
        "fla safe_gate": (path(safe_gate=True), gdn2_inputs),
        "fla safe_gate, no recompute": (path(safe_gate=True, disable_recompute=True), gdn2_inputs),
    }


def with_decay(inputs: list[Tensor], log2_decay: float | None, share: float) -> list[Tensor]:
    """The inputs with this decay a step in a share of chunks times heads; None leaves them as they are."""
    if log2_decay is None:
        return inputs
    q, k, v, g, *others = inputs
    B, T, H, _ = g.shape
    chosen = (torch.rand(B, -(-T // 64), H, 1, device=g.device) < share).repeat_interleave(64, 1)[:, :T]
    return [q, k, v, torch.where(chosen, log2_decay * math.log(2), g), *others]


def measure(op: Op, inputs: list[Tensor]) -> dict[str, float]:
    """Medians in ms; memory in MiB: kept between forward and backward besides o, and the peak above the inputs."""
    leaves = [x.requires_grad_() for x in inputs]
    do = torch.randn_like(inputs[2])

    def both() -> None:
        torch.autograd.grad(op(*leaves), leaves, do)

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o = op(*leaves)
    saved = torch.cuda.memory_allocated() - before - o.numel() * o.element_size()
    torch.autograd.grad(o, leaves, do)
    del o
    peak = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward = do_bench(lambda: op(*leaves), warmup=10, rep=60, return_mode="median")
    total = do_bench(both, warmup=20, rep=120, return_mode="median")
    # every input and output once in the forward; in the backward also do and the gradients
    sizes = sum(x.numel() * x.element_size() for x in inputs)
    o_size = inputs[2].numel() * inputs[2].element_size()
    traffic = 3 * sizes + 2 * o_size
    return {
        "forward_ms": round(forward, 3),
        "forward_backward_ms": round(total, 3),
        "saved_MiB": round(saved / 2**20, 1),
        "peak_MiB": round(peak / 2**20),
        "minimum_traffic_GB_s": round(traffic / total / 1e6),
    }


def bench_chunk(
    cases: list[tuple[int, ...]], with_peers: bool, log2_decay: float | None, share: float, erase_mean: float
) -> list[dict[str, Any]]:
    ops = ours(erase_mean) | (peers() if with_peers else {})
    rows: list[dict[str, Any]] = []
    print("| (B, T, H) | op | forward ms | with backward ms | saved MiB | peak MiB | GB/s of minimum traffic |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in cases:
        for name, (op, make) in ops.items():
            torch.manual_seed(0)
            found = measure(op, with_decay(make(*case), log2_decay, share))
            rows.append({"case": case, "op": name, **found})
            print("|", " | ".join(map(str, (case, name, *found.values()))), "|", flush=True)
    return rows


def decode_steps(batch: int, with_peers: bool) -> dict[str, Callable[[], Any]]:
    """One step of decoding, the state updated in place where the op can."""
    H = DECODE_HEADS
    S = torch.randn(batch, H, K, V, device="cuda")
    vectors = [torch.zeros(batch, H, V, device="cuda") for _ in range(2)]
    state = CarveState(S.clone(), *vectors, torch.zeros(batch, dtype=torch.int64, device="cuda"))
    gdn2, carve = gdn2_inputs(batch, 1, H), carve_inputs(-4.0)(batch, 1, H)
    steps: dict[str, Callable[[], Any]] = {
        "GDN-2": lambda: recurrent_gdn2(*gdn2, initial_state=S, inplace_state=True, backend="triton"),
        "CARVE": lambda: recurrent_carve(*carve, initial_state=state, inplace_state=True, backend="triton"),
    }
    if with_peers:
        from fla.ops.gdn2 import fused_recurrent_gdn2 as peer

        steps["fla fused_recurrent"] = lambda: peer(*gdn2, initial_state=S, output_final_state=True)
    return steps


def bench_decode(with_peers: bool) -> list[dict[str, Any]]:
    """Microseconds a step beside the time that reading and writing the state once takes at the speed of a copy."""
    rows: list[dict[str, Any]] = []
    pair = torch.randn(2, 2**28, device="cuda")
    copy_bytes_ms = pair.numel() * 4 / do_bench(lambda: pair[0].copy_(pair[1]), return_mode="median")
    print(f"copy bandwidth {copy_bytes_ms / 1e9:.2f} TB/s, {DECODE_HEADS} heads")
    print("| batch | op | us a step | tokens/s | state traffic at copy bandwidth, us |")
    print("| --- | --- | --- | --- | --- |")
    for batch in DECODE_BATCHES:
        least_us = 2 * batch * DECODE_HEADS * K * V * 4 / copy_bytes_ms * 1e3
        for name, step in decode_steps(batch, with_peers).items():
            step()
            us = do_bench_cudagraph(step, rep=50, return_mode="median") * 1e3
            row = {"batch": batch, "op": name, "us": round(us, 1), "tokens_s": round(batch / us * 1e6)}
            rows.append({**row, "least_us": round(least_us, 1)})
            print("|", " | ".join(map(str, rows[-1].values())), "|", flush=True)
    return rows


def plot(rows: list[dict[str, Any]], device: str, file: str) -> None:
    """Forward and backward time against T of the cases with one sequence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(row["op"] for row in rows):
        points = sorted((r["case"][1], r["forward_backward_ms"]) for r in rows if r["op"] == name and r["case"][0] == 1)
        axes.plot(*zip(*points, strict=True), "o--" if name.startswith("fla") else "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward and backward, ms")
    axes.set_xticks([4096, 16384, 65536], ["4096", "16384", "65536"], minor=False)
    axes.set_yticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"], minor=False)
    axes.minorticks_off()
    axes.set_title(f"one sequence, 16 heads, K = V = 128, bfloat16, {device}", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also time flash-linear-attention")
    parser.add_argument("--case", nargs="+", help="B,T,H; all if not given")
    parser.add_argument("--log2-decay", type=float, help="of every step, instead of drawn ones")
    parser.add_argument("--steep-share", type=float, default=1.0, help="of chunks times heads that --log2-decay is for")
    parser.add_argument("--erase-mean", type=float, default=-4.0, help="of CARVE's erase logits (default: -4)")
    parser.add_argument("--decode", action="store_true", help="time decoding instead")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--plot", help="draw time against T into this file")
    chosen = parser.parse_args()
    if chosen.log2_decay is None and chosen.steep_share != 1.0:
        parser.error("--steep-share needs --log2-decay")
    cases = [tuple(map(int, c.split(","))) for c in chosen.case] if chosen.case else CASES
    if chosen.decode:
        rows = bench_decode(chosen.peers)
    else:
        rows = bench_chunk(cases, chosen.peers, chosen.log2_decay, chosen.steep_share, chosen.erase_mean)
    device = torch.cuda.get_device_name()
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump({"device": device, "rows": rows}, file, indent=1)
    if chosen.plot:
        plot(rows, device, chosen.plot)


if __name__ == "__main__":
    sys.exit(main())
