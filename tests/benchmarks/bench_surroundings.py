"""Time of the ops around the recurrence on a GPU: Triton beside the torch reference.

    python tests/benchmarks/bench_surroundings.py [--json FILE] [--public FOLDER]

Inputs: bfloat16, heads of 128 channels, four taps (dynamic ones of 16 features); x, features and gate are slices of a
projection [T, B, F], as in a mixer. The ops called ..._heads are attention's, without SiLU and norms.
Times are medians of triton.testing.do_bench. The minimum traffic is every input and output once in the forward; in the
backward the inputs, the gradients of the outputs and those of the inputs.

With --public, a checkout of github.com/OliverSieberling/dynamic-conv1d, its low-rank kernel too. It takes one set of
features for all channels, their number and one for static taps a power of two, and neither slices nor packed
sequences: so it is called three times, for queries, keys and values, on contiguous tensors, with one feature fewer
than ours beside static taps, and computes what dynamic_convolve_heads does. Before the first row it tunes itself, for
minutes.
"""

import argparse
import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from megatron_carve.kernels.surroundings import (
    convolve_heads,
    convolve_qkv,
    dynamic_convolve_heads,
    dynamic_convolve_qkv,
    gated_head_norm,
)

# (B, T, heads)
SIZES = [(4, 4096, 16), (1, 16384, 16), (1, 2048, 16)]
WIDTH, RANK = 128, 16
Outputs = tuple[Tensor, ...]
Case = tuple[Callable[[str], Outputs], list[Tensor]]


def projection(B: int, T: int, channels: int) -> Tensor:
    """[B, T, channels], whose tokens are parts of longer rows."""
    wide = torch.randn(T, B, channels + 2048, device="cuda", dtype=torch.bfloat16)
    return wide.transpose(0, 1)[..., :channels].requires_grad_()


def convolution(B: int, T: int, H: int, *, packed: bool = False, rank: int = 0) -> Case:
    if packed:
        B, T = 1, B * T
    x = projection(B, T, 3 * H * WIDTH)
    weight = torch.randn(x.shape[2], 4, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ends = torch.arange(0, T + 1, T // 8, device="cuda", dtype=torch.int32) if packed else None
    op: Callable[..., Outputs] = convolve_qkv
    leaves = [x, weight]
    if rank:
        op = dynamic_convolve_qkv
        up = torch.randn(*weight.shape, rank, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        leaves = [x, projection(B, T, 3 * rank), weight, up]

    def run(backend: str) -> Outputs:
        return op(*leaves, key_channels=H * WIDTH, key_head_dim=WIDTH, cu_seqlens=ends, backend=backend)

    return run, leaves


def heads_convolution(B: int, T: int, H: int, *, rank: int = 0) -> Case:
    x = projection(B, T, 3 * H * WIDTH)
    weight = torch.randn(x.shape[2], 4, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    if not rank:
        return lambda backend: (convolve_heads(x, weight, backend=backend),), [x, weight]
    up = torch.randn(*weight.shape, rank, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, projection(B, T, 3 * rank), weight, up]
    return lambda backend: (dynamic_convolve_heads(*leaves, head_dim=WIDTH, group=3, backend=backend),), leaves


def norm(B: int, T: int, H: int) -> Case:
    x = torch.randn(B, T, H, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gate = projection(B, T, H * WIDTH)
    weight = torch.ones(WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run(backend: str) -> Outputs:
        heads = gate.unflatten(-1, (H, WIDTH))
        return (gated_head_norm(x, heads, weight, eps=1e-5, activation="silu", backend=backend),)

    return run, [x, gate, weight]


def public_convolution(lowrank: Callable[..., Tensor], B: int, T: int, H: int) -> Case:
    """A call of the public kernel for each of queries, keys and values."""
    D = H * WIDTH
    shapes = [(B, T, D), (B, T, RANK - 1), (RANK - 1, 4 * D), (4, D)]
    sections = [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        for _ in range(3)
    ]

    def run(_backend: str) -> Outputs:
        return tuple(lowrank(*section, residual=True) for section in sections)

    return run, [leaf for section in sections for leaf in section]


CASES: dict[str, Callable[[int, int, int], Case]] = {
    "convolve_qkv": convolution,
    "convolve_qkv, 8 packed": lambda B, T, H: convolution(B, T, H, packed=True),
    "dynamic_convolve_qkv": lambda B, T, H: convolution(B, T, H, rank=RANK),
    "dynamic_convolve_qkv, 8 packed": lambda B, T, H: convolution(B, T, H, packed=True, rank=RANK),
    "convolve_heads": heads_convolution,
    "dynamic_convolve_heads": lambda B, T, H: heads_convolution(B, T, H, rank=RANK),
    "gated_head_norm": norm,
}


def measure(run: Callable[[str], Outputs], leaves: list[Tensor], backend: str) -> dict[str, float]:
    gradients = [torch.randn_like(x) for x in run(backend)]
    inputs, outputs = (sum(x.numel() * x.element_size() for x in tensors) for tensors in (leaves, gradients))
    with torch.no_grad():
        forward = do_bench(lambda: run(backend), warmup=20, rep=100, return_mode="median")
    both = do_bench(
        lambda: torch.autograd.grad(run(backend), leaves, gradients), warmup=20, rep=100, return_mode="median"
    )
    return {
        "forward_ms": round(forward, 3),
        "forward_GB_s": round((inputs + outputs) / forward / 1e6),
        "forward_backward_ms": round(both, 3),
        "forward_backward_GB_s": round((3 * inputs + 2 * outputs) / both / 1e6),
    }


def public_kernel(folder: Path) -> Callable[..., Tensor]:
    sys.path.insert(0, str(folder))
    return importlib.import_module("lowrank").lowrank_dynamic_convolution


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--public", type=Path, metavar="FOLDER", help="also time the public kernel in this checkout")
    chosen = parser.parse_args()
    if chosen.public and not (chosen.public / "lowrank.py").is_file():
        parser.error(f"--public: expected a folder with lowrank.py, got {chosen.public}")
    cases = [(name, backend, make) for name, make in CASES.items() for backend in ("triton", "torch")]
    if chosen.public:
        make_public = functools.partial(public_convolution, public_kernel(chosen.public))
        cases.append(("dynamic_convolve_heads", "public", make_public))
    rows: list[dict[str, Any]] = []
    print("| (B, T, H) | op | backend | forward ms | GB/s | with backward ms | GB/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in SIZES:
        for name, backend, make in cases:
            torch.manual_seed(0)
            found = measure(*make(*size), backend)
            rows.append({"size": size, "op": name, "backend": backend, **found})
            print("|", " | ".join(map(str, (size, name, backend, *found.values()))), "|", flush=True)
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
