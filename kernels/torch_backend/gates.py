"""Gates in plain torch: from what a layer projects to what the reference ops take, and CARVE's erase gate."""

from typing import Any

import torch
from torch import Tensor

from ..call import OpCall
from .elementwise import log_decay


def plain_decay(call: OpCall) -> Tensor:
    """The log-decay, formed from the raw projection where A_log and dt_bias are given."""
    if call.A_log is None or call.dt_bias is None:
        return call.g
    return log_decay(call.g, call.A_log, call.dt_bias)


def plain_write_gate(call: OpCall) -> Tensor:
    return torch.sigmoid(call.w) if call.gate_logits else call.w


def plain_erase_gate(call: OpCall) -> Tensor:
    """GDN-2's erase gate, [B, T, H, K] or [B, T, H, 1]; from logits in float32, as CARVE's is, so that the two agree in
    every bit."""
    b = call.b if call.b.ndim == 4 else call.b.unsqueeze(-1)
    if not call.gate_logits:
        return b
    return call.erase_scale * torch.sigmoid(b.to(torch.promote_types(b.dtype, torch.float32)))


def erase_logits(call: OpCall) -> Tensor:
    """CARVE's erase logits with their bias, in the dtype to compute in, [B, T, H, K]."""
    logits = call.b.to(call.state_dtype)
    return logits if call.erase_bias is None else logits + call.erase_bias


def erase_gate(logits: Tensor, plain: Tensor, content: Tensor) -> Tensor:
    """sigmoid(logits + content), and exactly `plain` where the content term is zero.

    On a CPU torch.sigmoid rounds an element differently in a vector loop and in its remainder, so its bits depend on
    where the element stands. A caller's sigmoid(erase_logits) and CARVE without content agree in every bit only if
    both stand in the caller's layout, which is why `plain` is formed there.

    Args:
        logits: erase logits, [..., K].
        plain: sigmoid(logits), formed in the caller's layout; no gradient flows into it.
        content: the content term, broadcastable to logits.
    """
    return _EraseGate.apply(logits, plain, content)


class _EraseGate(torch.autograd.Function):
    """erase_gate with the gradient of the sigmoid in both branches: U must learn from zero."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, plain: Tensor, content: Tensor) -> Tensor:
        gate = torch.where(content == 0, plain, torch.sigmoid(logits + content))
        ctx.save_for_backward(gate)
        ctx.content_shape = content.shape
        return gate

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_gate: Tensor) -> tuple[Tensor, None, Tensor]:
        (gate,) = ctx.saved_tensors
        d_logits = torch.ops.aten.sigmoid_backward(d_gate, gate)
        return d_logits, None, d_logits.sum_to_size(ctx.content_shape)
