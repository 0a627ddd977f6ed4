"""What surrounds the recurrence in a mixer layer, as plain torch: convolution, norms, decay.

These are the references that fused kernels are measured against; they run on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import LARGEST_A_LOG

# Inside the square root of the L2 norm: small against any key that carries information.
L2_EPSILON = 1e-6


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, cu_seqlens: Tensor | None = None, activate: bool = True
) -> Tensor:
    """Causal depthwise convolution followed by SiLU.

    Args:
        x: [B, T, D].
        weight: [D, W]; the last tap multiplies the present token.
        bias: [D] or None.
        cu_seqlens: [N+1] int, the boundaries of packed sequences (B = 1); taps never reach across one.
        activate: False for the convolution alone.

    Returns:
        [B, T, D], dtype of x.
    """
    width = weight.shape[1]
    seen = _seen_by_taps(x, width, cu_seqlens)
    out = x * weight[:, -1]
    for tap in reversed(range(width - 1)):
        out = out + seen[tap] * weight[:, tap]
    out = out if bias is None else out + bias
    return F.silu(out) if activate else out


def dynamic_convolution(
    x: Tensor, features: Sequence[Tensor], weight: Tensor, up: Tensor, bias: Tensor | None = None, *,
    channels: Sequence[int], cu_seqlens: Tensor | None = None, activate: bool = True,
) -> Tensor:  # fmt: skip
    """Causal depthwise convolution whose taps depend on the token, beside the token itself, followed by SiLU.

        y_t[d] = x_t[d] + sum_i (weight[d, W - 1 - i] + up[d, W - 1 - i] . features_t) x_{t-i}[d]

    Args:
        x: [B, T, D].
        features: [B, T, R] for each section of the channels.
        weight: [D, W], the part of the taps that all tokens share; the last tap multiplies the present token.
        up: [D, W, R].
        bias: [D] or None.
        channels: of each section, D together.
        cu_seqlens, activate: as in short_convolution.

    Returns:
        [B, T, D], dtype of x.

    Source: arXiv 2606.03825.
    """
    seen = _seen_by_taps(x, weight.shape[1], cu_seqlens)
    out = x
    for tap in reversed(range(weight.shape[1])):
        of_sections = zip(features, up[:, tap].split(list(channels)), strict=True)
        taps = torch.cat([z @ part.t().to(z.dtype) for z, part in of_sections], -1) + weight[:, tap]
        out = out + seen[tap] * taps
    out = out if bias is None else out + bias
    return F.silu(out) if activate else out


def _seen_by_taps(x: Tensor, width: int, cu_seqlens: Tensor | None) -> list[Tensor]:
    """What each tap multiplies, oldest first: x of as many tokens before, zero beyond the beginning of a sequence."""
    length = x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    age = None if cu_seqlens is None else _position_in_sequence(cu_seqlens, length).unsqueeze(-1)
    seen = []
    for tap in range(width):
        earlier = padded[:, tap : tap + length]
        if age is not None and tap < width - 1:
            earlier = earlier * (age >= width - 1 - tap).to(x.dtype)
        seen.append(earlier)
    return seen


def _position_in_sequence(cu_seqlens: Tensor, length: int) -> Tensor:
    """Each token's index within its packed sequence, [T] int64."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.to(tokens.dtype), tokens, right=True) - 1
    return tokens - cu_seqlens[sequence]


def l2_normalize(x: Tensor) -> Tensor:
    """x / ||x|| over the last axis, computed in float32 (float64 for float64 input), dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPSILON)).to(x.dtype)


def log_decay(raw: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Natural-log decay g = -exp(A_log) * softplus(raw + dt_bias), always <= 0.

    Args:
        raw: [..., H, K], any floating dtype.
        A_log: [H] or [H, K] float32; above LARGEST_A_LOG it counts as that.
        dt_bias: [H, K] float32.

    Returns:
        [..., H, K] float32 (float64 when the parameters are).

    Source: the decay of GDN-2 (arXiv 2605.22791), with A_log [H], and of CARVE (arXiv 2606.27229), with A_log [H, K].
    """
    rate = A_log.clamp(max=LARGEST_A_LOG).exp()
    rate = rate if A_log.ndim == 2 else rate.unsqueeze(-1)
    return -rate * F.softplus(raw.to(A_log.dtype) + dt_bias)


def gated_rms_norm(x: Tensor, gate: Tensor | None, weight: Tensor, *, eps: float, activation: str) -> Tensor:
    """RMSNorm over the last axis, times weight, times activation(gate).

    Args:
        x: [..., V].
        gate: [..., V], or None with the activation "none".
        weight: [V].
        activation: "silu", "sigmoid" or "none".

    Returns:
        [..., V], dtype of x; computed in float32 (float64 for float64 input).
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(x.to(compute), (x.shape[-1],), weight.to(compute), eps)
    if gate is not None:
        wide = gate.to(compute)
        normed = normed * (F.silu(wide) if activation == "silu" else torch.sigmoid(wide))
    return normed.to(x.dtype)
