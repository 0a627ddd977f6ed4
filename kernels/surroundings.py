"""What surrounds the recurrence in a mixer layer, as differentiable ops with a torch and a Triton backend.

Dtypes: x is float16, bfloat16, float32 or float64; the other float inputs have that dtype or, beside a 16-bit one,
float32. The torch backend rounds to the dtype of x after every step of the convolution; Triton computes in float32 and
rounds once. Neither reads a value on the host.
"""

from __future__ import annotations

from torch import Tensor

from .backends import (
    require_triton_convolution,
    require_triton_dtype,
    require_triton_dynamic_taps,
    require_triton_width,
    resolve_backend,
)
from .checks import (
    check_convolution,
    check_dynamic_convolution,
    check_dynamic_heads,
    check_gated_norm,
    check_taps,
)
from .torch_backend import elementwise

# Channels of a block where heads do not matter.
BLOCK = 128


def convolve_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    key_channels: int,
    key_head_dim: int,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a layer: causal depthwise convolution, SiLU, and an L2 norm per head of q and k.

    Differentiable in x, weight and bias; nothing but the arguments is kept for the backward by Triton.

    Args:
        x: projected tokens, [B, T, D]: key_channels of q, as many of k, the rest of v. A slice of a wider projection
            need not be copied.
        weight: taps, [D, W], oldest first; the last one multiplies the present token.
        bias: [D] or None.
        key_channels: channels of q, and of k.
        key_head_dim: channels of a head of q or k, over which the norm is taken; divides key_channels.
        cu_seqlens: boundaries of packed sequences, [N + 1], int32 or int64, from 0 to T, nondecreasing; needs B = 1.
            No tap reaches across one.
        backend: "torch" (any device, the reference), "triton" or "auto" (see resolve_backend).

    Returns:
        q and k, [B, T, key_channels], and v, [B, T, D - 2 * key_channels], in the dtype of x; contiguous from Triton.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value; the message names it.
        NotImplementedError: the backend does not exist for this device, or Triton for these sizes or this dtype.
    """
    check_convolution(
        x, weight, bias, key_channels=key_channels, key_head_dim=key_head_dim, cu_seqlens=cu_seqlens
    )  # fmt: skip
    if resolve_backend(backend, x.device) == "triton":
        require_triton_dtype(x.dtype)
        require_triton_width("convolve_qkv", "key_head_dim", key_head_dim)
        require_triton_convolution(weight.shape[1])
        from .triton_backend.short_convolution import ConvolveQKV

        x = x if x.stride(-1) == 1 else x.contiguous()
        return ConvolveQKV.apply(x, weight, bias, cu_seqlens, key_channels, key_head_dim)
    mixed = elementwise.short_convolution(x, weight, bias, cu_seqlens=cu_seqlens).to(x.dtype)
    return _with_unit_heads(mixed, key_channels, key_head_dim)


def dynamic_convolve_qkv(
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    key_channels: int,
    key_head_dim: int,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """convolve_qkv with taps that depend on the token, beside the token itself (arXiv 2606.03825):

        y_t[d] = x_t[d] + sum_i (weight[d, W - 1 - i] + up[d, W - 1 - i] . z_t) x_{t-i}[d] + bias[d]

    with the features z_t of q, k or v, whichever d is of; then SiLU, and an L2 norm per head of q and k. Differentiable
    in all of them. Triton forms the taps in registers and keeps nothing but the arguments for the backward, which of a
    tap's gradient, and of y's in it, takes as many bits as x has to those of features, weight and up.

    Args:
        x, bias, key_channels, key_head_dim, cu_seqlens, backend: as in convolve_qkv.
        features: [B, T, 3 * R], R of q, as many of k and of v, in the dtype of x. A slice need not be copied.
        weight: [D, W], the part of the taps that all tokens share, oldest first.
        up: [D, W, R].

    Returns:
        As convolve_qkv.

    Raises:
        ValueError, NotImplementedError: as convolve_qkv.
    """
    check_dynamic_convolution(
        x, features, weight, up, bias, key_channels=key_channels, key_head_dim=key_head_dim, cu_seqlens=cu_seqlens
    )  # fmt: skip
    if resolve_backend(backend, x.device) == "triton":
        require_triton_dtype(x.dtype)
        require_triton_width("dynamic_convolve_qkv", "key_head_dim", key_head_dim)
        require_triton_convolution(weight.shape[1])
        require_triton_dynamic_taps(x.dtype, key_head_dim, *up.shape[1:])
        from .triton_backend.dynamic_convolution import DynamicConvolveQKV

        x, features = (part if part.stride(-1) == 1 else part.contiguous() for part in (x, features))
        return DynamicConvolveQKV.apply(x, features, weight, up, bias, cu_seqlens, key_channels, key_head_dim)
    mixed = elementwise.dynamic_convolution(
        x, features.chunk(3, -1), weight, up, bias,
        channels=(key_channels, key_channels, x.shape[2] - 2 * key_channels), cu_seqlens=cu_seqlens,
    ).to(x.dtype)  # fmt: skip
    return _with_unit_heads(mixed, key_channels, key_head_dim)


def convolve_heads(x: Tensor, weight: Tensor, *, cu_seqlens: Tensor | None = None, backend: str = "auto") -> Tensor:
    """The causal depthwise convolution of convolve_qkv alone, as attention takes it, whose queries and keys get their
    positions after it; differentiable in x and weight.

    Args:
        x, weight, cu_seqlens, backend: as in convolve_qkv; the order of channels does not matter.

    Returns:
        [B, T, D] in the dtype of x.

    Raises:
        ValueError, NotImplementedError: as convolve_qkv.
    """
    check_taps(x, weight, cu_seqlens)
    if resolve_backend(backend, x.device) == "triton":
        require_triton_dtype(x.dtype)
        require_triton_convolution(weight.shape[1])
        from .triton_backend.short_convolution import ConvolveQKV

        x = x if x.stride(-1) == 1 else x.contiguous()
        return ConvolveQKV.apply(x, weight, None, cu_seqlens, 0, BLOCK, False)[2]
    return elementwise.short_convolution(x, weight, cu_seqlens=cu_seqlens, activate=False).to(x.dtype)


def dynamic_convolve_heads(
    x: Tensor, features: Tensor, weight: Tensor, up: Tensor, *, head_dim: int, group: int,
    cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """convolve_heads with taps that depend on the token, beside the token itself, as in dynamic_convolve_qkv;
    differentiable in x, features, weight and up.

    Args:
        x: [B, T, D], head after head: of every group of attention's queries their heads, that of its key and that of
            its value, which is the order of Megatron's linear_qkv.
        features, weight, up, cu_seqlens, backend: as in dynamic_convolve_qkv.
        head_dim: channels of every head.
        group: heads of a group.

    Returns:
        [B, T, D] in the dtype of x.

    Raises:
        ValueError, NotImplementedError: as convolve_qkv.
    """
    check_dynamic_heads(x, features, weight, up, head_dim=head_dim, group=group, cu_seqlens=cu_seqlens)
    if resolve_backend(backend, x.device) == "triton":
        require_triton_dtype(x.dtype)
        require_triton_width("dynamic_convolve_heads", "head_dim", head_dim)
        require_triton_convolution(weight.shape[1])
        require_triton_dynamic_taps(x.dtype, head_dim, *up.shape[1:])
        from .triton_backend.dynamic_convolution import DynamicConvolveQKV

        x, features = (part if part.stride(-1) == 1 else part.contiguous() for part in (x, features))
        return DynamicConvolveQKV.apply(x, features, weight, up, None, cu_seqlens, 0, head_dim, group)[2]
    groups = x.shape[2] // (group * head_dim)
    return elementwise.dynamic_convolution(
        x, features.chunk(3, -1) * groups, weight, up, cu_seqlens=cu_seqlens, activate=False,
        channels=((group - 2) * head_dim, head_dim, head_dim) * groups,
    ).to(x.dtype)  # fmt: skip


def _with_unit_heads(mixed: Tensor, key_channels: int, key_head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, D] divided into q, k and v, every head of q and k of norm 1."""
    q, k, v = mixed.split([key_channels, key_channels, mixed.shape[2] - 2 * key_channels], dim=-1)
    q, k = (elementwise.l2_normalize(part.unflatten(-1, (-1, key_head_dim))).flatten(-2) for part in (q, k))
    return q, k, v


def gated_head_norm(
    x: Tensor, gate: Tensor | None, weight: Tensor, *, eps: float, activation: str, backend: str = "auto"
) -> Tensor:
    """RMSNorm of every head, times weight, times activation(gate); differentiable in x, gate and weight.

    Args:
        x: output of the recurrence, [B, T, H, V].
        gate: [B, T, H, V], or None with the activation "none". A slice of a wider projection need not be copied, nor
            one whose time lies outside the batch.
        weight: [V], shared by the heads.
        eps: added to the mean of squares.
        activation: "silu", "sigmoid" or "none".
        backend: "torch" (any device, the reference), "triton" or "auto" (see resolve_backend).

    Returns:
        [B, T, H, V] in the dtype of x; computed in float32 (float64 for float64 input). From Triton its order in memory
        is that of the gate (without one, of x), or batch, time, head where that had to be copied.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value; the message names it.
        NotImplementedError: the backend does not exist for this device, or Triton for this width or dtype.
    """
    check_gated_norm(x, gate, weight, eps=eps, activation=activation)
    if resolve_backend(backend, x.device) == "triton":
        require_triton_dtype(x.dtype)
        require_triton_width("gated_head_norm", "V", x.shape[3])
        from .triton_backend.gated_norm import GatedNorm, whole_tokens

        gate = None if gate is None else whole_tokens(gate)
        return GatedNorm.apply(whole_tokens(x), gate, weight, eps, activation)
    return elementwise.gated_rms_norm(x, gate, weight, eps=eps, activation=activation)
