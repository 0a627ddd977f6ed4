"""What decoding a model by one token of every sequence takes beside the ops: products with what surrounds them, and a
mixer's whole way from its first projection to its second. Without gradients; nothing is read on the host.

The torch backend computes what separate modules would, one after another; Triton computes the same in a few launches,
and rounds where they round. It reads weights, norms, a mixer's memory, rows and positions while the launch before may
still run, which therefore must not write them (overlap.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import resolve_backend
from .token_call import Norm, TokenCall
from .torch_backend import decoding


@torch.no_grad()
def mix_token(call: TokenCall, backend: str = "auto") -> Tensor:
    """Convolution, gates, recurrence and gated output norm of one token of every sequence.

    Returns:
        [N, HV * V] in the dtype of call.convolved.
    """
    if resolve_backend(backend, call.convolved.device) == "triton":
        from .triton_backend import decode_mixer

        return decode_mixer.mix_token(call)
    return decoding.mix_token(call)


@torch.no_grad()
def normed_product(x: Tensor, norm: Norm, weight: Tensor, *, gated: bool = False, backend: str = "auto") -> Tensor:
    """W norm(x) of one token of every sequence, through SwiGLU if `gated`.

    Args:
        x: [N, D].
        norm: of x.
        weight: [out, D] in one piece, in the dtype of x.
        gated: SiLU of the first half of the outputs, times the other half.

    Returns:
        [N, out], gated [N, out / 2], in the dtype of x.
    """
    if resolve_backend(backend, x.device) == "triton":
        from .triton_backend import decode_products

        return decode_products.normed_product(x, norm, weight, gated)
    return decoding.normed_product(x, norm, weight, gated)


@torch.no_grad()
def add_product(hidden: Tensor, x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """hidden + W x of one token of every sequence: [N, out], x [N, D], weight [out, D]."""
    if resolve_backend(backend, x.device) == "triton":
        from .triton_backend import decode_products

        return decode_products.add_product(hidden, x, weight)
    return hidden + x @ weight.t()
