"""How much of its GPUs a run uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Dense products of 16-bit numbers, in TFLOP/s, as NVIDIA's data sheets give them; by the name that torch has of a GPU.
PEAK_TFLOPS = {
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.4,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
}


@dataclass(frozen=True)
class Gpus:
    """Those of a run.

    Attributes:
        count: of all processes.
        flops_per_token: floating-point operations of the model, forward and backward; what is recomputed counts once.
            None where they are not known.
        peak_tflops: of one, in 10^12 operations a second; None where it is not known.
    """

    count: int
    flops_per_token: float | None
    peak_tflops: float | None = None

    def measures(self, tokens_per_second: float) -> dict[str, Any]:
        """What a run's metrics hold of each GPU; None what is not known."""
        each = tokens_per_second / self.count
        tflops = None if self.flops_per_token is None else each * self.flops_per_token / 1e12
        return {
            "tokens_per_second_and_gpu": each,
            "tflops_per_second_and_gpu": tflops,
            "utilisation": tflops / self.peak_tflops if tflops is not None and self.peak_tflops else None,
        }


def peak_tflops(name: str, precision: str) -> float | None:
    """Of a GPU by torch's name of it, in a recipe's precision."""
    return None if precision == "fp32" else PEAK_TFLOPS.get(name)
