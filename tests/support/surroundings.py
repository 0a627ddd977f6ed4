"""Random calls of the ops around the recurrence; every output and every gradient by name.

Values are drawn in float64 and rounded to the dtype under test, so that all runs of a case start from the same numbers.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from support.oracle import oracle_convolution_of_heads, oracle_dynamic_convolution
from torch import Tensor

from megatron_carve.kernels.surroundings import (
    convolve_heads,
    convolve_qkv,
    dynamic_convolve_heads,
    dynamic_convolve_qkv,
    gated_head_norm,
)


@dataclass(frozen=True)
class Taps:
    """What short convolutions have in common.

    Attributes:
        B, T: batch and tokens; lengths of packed sequences replace them.
        K: channels of a head.
        W: taps.
        R: features that they are made of; 0 for taps that do not depend on the token.
        extra: channels of the projection beside those that are convolved.
    """

    B: int = 1
    T: int = 0
    K: int = 32
    W: int = 4
    R: int = 0
    lengths: tuple[int, ...] = ()
    extra: int = 5


@dataclass(frozen=True)
class Convolution(Taps):
    """A call of convolve_qkv, or with R of dynamic_convolve_qkv, on the first channels of a projection [T, B, F].

    Attributes:
        H: heads of q and k; V: all channels of v.
    """

    H: int = 1
    V: int = 32
    bias: bool = False

    def run(self, dtype: torch.dtype, compute: torch.dtype, device: str, backend: str) -> dict[str, Tensor]:
        """The call with values of `dtype` held in `compute`; the backend may also be "oracle", with R."""
        draw = Draw(dtype, compute, device)
        T = sum(self.lengths) or self.T
        D = 2 * self.H * self.K + self.V
        leaves = {"projected": draw(T, self.B, D + self.extra), "weight": draw(D, self.W)}
        if self.bias:
            leaves["bias"] = draw(D)
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)
        x = leaves["projected"].transpose(0, 1)[..., :D]
        options: dict[str, Any] = {
            "key_channels": self.H * self.K, "key_head_dim": self.K, "cu_seqlens": ends if self.lengths else None,
            "backend": backend,
        }  # fmt: skip
        if self.R:
            leaves |= {"features": draw(T, self.B, 3 * self.R + self.extra), "up": draw(D, self.W, self.R)}
            features = leaves["features"].transpose(0, 1)[..., : 3 * self.R]
            op: Any = dynamic_convolve_qkv
            if backend == "oracle":
                del options["backend"]
                op = oracle_dynamic_convolution
            q, k, v = op(x, features, leaves["weight"], leaves["up"], leaves.get("bias"), **options)
        else:
            q, k, v = convolve_qkv(x, leaves["weight"], leaves.get("bias"), **options)
        return with_gradients({"q": q, "k": k, "v": v}, leaves, draw)


@dataclass(frozen=True)
class Heads(Taps):
    """A call of convolve_heads, or with R of dynamic_convolve_heads, on a projection [T, B, F].

    Attributes:
        groups, group: groups of queries, and heads in one.
    """

    groups: int = 1
    group: int = 3

    def run(self, dtype: torch.dtype, compute: torch.dtype, device: str, backend: str) -> dict[str, Tensor]:
        """The call with values of `dtype` held in `compute`; the backend may also be "oracle"."""
        draw = Draw(dtype, compute, device)
        T = sum(self.lengths) or self.T
        D = self.groups * self.group * self.K
        leaves = {"projected": draw(T, self.B, D + self.extra), "weight": draw(D, self.W)}
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)
        x = leaves["projected"].transpose(0, 1)[..., :D]
        options: dict[str, Any] = {"cu_seqlens": ends if self.lengths else None}
        features = []
        if self.R:
            leaves |= {"features": draw(T, self.B, 3 * self.R + self.extra), "up": draw(D, self.W, self.R)}
            features = [leaves["features"].transpose(0, 1)[..., : 3 * self.R]]
        sizes = {"head_dim": self.K, "group": self.group}
        if backend == "oracle":
            dynamic = [*features, *([leaves["up"]] if self.R else [])]
            out = oracle_convolution_of_heads(x, leaves["weight"], *dynamic, **sizes, **options)
        elif self.R:
            out = dynamic_convolve_heads(
                x, *features, leaves["weight"], leaves["up"], **sizes, **options, backend=backend
            )  # fmt: skip
        else:
            out = convolve_heads(x, leaves["weight"], **options, backend=backend)
        return with_gradients({"out": out}, leaves, draw)


@dataclass(frozen=True)
class Norm:
    """A call of gated_head_norm.

    Attributes:
        B, T, H, V: sizes.
        gate: "projection", a slice of [T, B, F]; "heads", a slice of every head of a wider tensor; or "whole".
        x: "heads", as for the gate; "time first", from [T, B, H, V]; or "whole".
    """

    B: int = 1
    T: int = 0
    H: int = 1
    V: int = 32
    activation: str = "silu"
    gate: str = "projection"
    x: str = "whole"

    def run(self, dtype: torch.dtype, compute: torch.dtype, device: str, backend: str) -> dict[str, Tensor]:
        """The call with values of `dtype` held in `compute`."""
        draw = Draw(dtype, compute, device)
        B, T, H, V = self.B, self.T, self.H, self.V
        gates = {"projection": (T, B, H * V + 3), "heads": (B, T, H, V + 3), "whole": (B, T, H, V)}
        xs = {"heads": (B, T, H, V + 3), "time first": (T, B, H, V), "whole": (B, T, H, V)}
        leaves = {"x": draw(*xs[self.x]), "gate": draw(*gates[self.gate]), "weight": draw(V)}
        x = leaves["x"].transpose(0, 1) if self.x == "time first" else leaves["x"]
        gate = leaves["gate"]
        if self.gate == "projection":
            gate = gate.transpose(0, 1)[..., : H * V].unflatten(-1, (H, V))
        given: Tensor | None = gate[..., :V]
        if self.activation == "none":
            del leaves["gate"]
            given = None
        out = gated_head_norm(
            x[..., :V], given, leaves["weight"], eps=1e-5, activation=self.activation, backend=backend
        )  # fmt: skip
        return with_gradients({"out": out}, leaves, draw)


class Draw:
    """Leaves with normal values, the same ones for every `compute`."""

    def __init__(self, dtype: torch.dtype, compute: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.compute, self.device = dtype, compute, device

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        return values.to(self.device, self.compute).requires_grad_()


def with_gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor], draw: Draw) -> dict[str, Tensor]:
    """Outputs and "grad_<leaf>" for random gradients of the outputs, which are not contiguous."""
    results = {name: x.detach() for name, x in outputs.items()}
    weights = [draw(x.shape[1], x.shape[0], *x.shape[2:]).detach().transpose(0, 1) for x in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    return results | {f"grad_{name}": x for name, x in zip(leaves, gradients, strict=True)}
