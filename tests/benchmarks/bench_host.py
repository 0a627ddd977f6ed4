"""Time that the CPU takes for a call of a chunk op, forward and backward: what small models wait for.

    python tests/benchmarks/bench_host.py [--tokens 256] [--calls 100]

Calls are those of a layer in training, with so few tokens and heads that the GPU is done before the CPU. Times are
medians of ten runs of so many calls, between which nothing waits for the GPU.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megatron_carve.kernels import chunk_carve, chunk_gdn2

HEADS, WIDTH, RANK = 2, 128, 32
FORMS: dict[str, dict[str, Any]] = {
    "GDN-2": {},
    "CARVE": {"content_chunk": 128},
    "CARVE delta": {"content_chunk": 128, "erase": "delta"},
}
RUNS = 10


def call_of_a_layer(form: str, tokens: int, device: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The op with its arguments, and those that have a gradient."""

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)

    def parameter(*shape: int) -> Tensor:
        return leaf(*shape, dtype=torch.float32)

    by_token = [leaf(1, tokens, HEADS, WIDTH) for _ in range(5)]
    options = {"gate_logits": True, "backend": "triton", **FORMS[form]}
    if form == "GDN-2":
        given = [*by_token, leaf(1, tokens, HEADS, WIDTH)]
        named = {"A_log": parameter(HEADS), "dt_bias": parameter(HEADS, WIDTH)}
        return lambda: chunk_gdn2(*given, **named, **options)[0], [*given, *named.values()]
    given = [*by_token, leaf(1, tokens, HEADS), leaf(RANK, WIDTH), leaf(WIDTH, RANK)]
    named = {name: parameter(HEADS, WIDTH) for name in ("A_log", "dt_bias", "erase_bias")}
    return lambda: chunk_carve(*given, **named, **options)[0], [*given, *named.values()]


def microseconds(call: Callable[[], Any], calls: int) -> float:
    call()  # compiles
    times = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - began) / calls)
    return median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--calls", type=int, default=100)
    chosen = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, {chosen.tokens} tokens, {HEADS} heads")
    print("| op | forward us | backward us |")
    print("| --- | --- | --- |")
    for form in FORMS:
        op, leaves = call_of_a_layer(form, chosen.tokens, "cuda")
        o = op()
        do = torch.randn_like(o)

        def backward(o: Tensor = o, leaves: list[Tensor] = leaves, do: Tensor = do) -> Any:
            return torch.autograd.grad(o, leaves, do, retain_graph=True)

        print(f"| {form} | {microseconds(op, chosen.calls):.0f} | {microseconds(backward, chosen.calls):.0f} |")


if __name__ == "__main__":
    main()
