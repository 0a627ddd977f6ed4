"""One token of every sequence, as plain torch: the reference of the kernels that decode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import OpCall
from ..state import CarveState
from . import elementwise
from .recurrent import recurrent_op

if TYPE_CHECKING:
    from ..token_call import Norm, TokenCall


def normed_product(x: Tensor, norm: Norm, weight: Tensor, gated: bool) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    factor = norm.weight.to(compute) + (1 if norm.zero_centered else 0)
    out = F.rms_norm(x.to(compute), (x.shape[-1],), factor, norm.eps).to(x.dtype) @ weight.t()
    if not gated:
        return out
    gate, partner = (part.to(compute) for part in out.chunk(2, -1))
    return (F.silu(gate) * partner).to(x.dtype)


def mix_token(call: TokenCall) -> Tensor:
    x, S = call.convolved, call.state[0]
    HV, K, V = S.shape[1:]
    H, out = call.key_heads, x.new_zeros(x.shape[0], HV * V)
    there: slice | Tensor = slice(None)
    slots: slice | Tensor = slice(None)
    if call.rows is not None:
        there = call.rows >= 0
        slots = call.rows[there].long()

    def part(tensor: Tensor) -> Tensor:
        return tensor[there][:, None]

    seen = torch.cat([call.kept[slots], part(x)], 1)
    call.kept[slots] = seen[:, 1:]
    taps = x.new_ones(x.shape[1], 1) if call.taps is None else call.taps
    mixed = elementwise.short_convolution(seen, taps, call.convolution_bias)[:, -1:].to(x.dtype)
    q, k, v = mixed.split([H * K, H * K, HV * V], -1)
    q, k = (elementwise.l2_normalize(y.unflatten(-1, (H, K))) for y in (q, k))
    v = v.unflatten(-1, (HV, V))
    decay = part(call.decay)
    decay = decay if call.decay_up is None else F.linear(decay, call.decay_up)
    write = part(call.write)
    if call.write_gates == "value_channels":
        write = write.unflatten(-1, (HV, V))
    erase = write if call.erase is None else part(call.erase).unflatten(-1, (H, K))
    if call.write_gates == "key_heads":
        write, v = write.repeat_interleave(HV // H, -1), call.erase_scale * v
    carve = isinstance(call.state, CarveState)
    state: CarveState | Tensor = S[slots]
    if isinstance(call.state, CarveState):
        tokens = call.state.count[slots] if call.positions is None else part(call.positions)[:, 0] % call.content_chunk
        state = CarveState(S[slots], call.state.mean[slots], call.state.partial[slots], tokens.long())
    op = OpCall(
        op="carve" if carve else "gdn2", q=q, k=k, v=v, g=decay.unflatten(-1, (H, K)), b=erase, w=write,
        content_down=call.content_down, content_up=call.content_up, erase_bias=call.erase_bias, erase=call.erase_form,
        prediction=call.prediction, content_chunk=call.content_chunk, erase_scale=call.erase_scale, gate_logits=True,
        A_log=call.A_log, dt_bias=call.dt_bias, initial_state=state, output_final_state=True, backend="torch",
    )  # fmt: skip
    o, after = recurrent_op(op)
    parts = zip(call.state, after, strict=True) if isinstance(after, CarveState) else [(S, after)]
    for old, new in parts:
        if not (call.positions is not None and new.ndim == 1):
            old[slots] = new
    gate = None if call.gate is None else part(call.gate)
    if gate is not None and call.gate_up is not None:
        gate = F.linear(gate, call.gate_up, call.gate_bias)
    gate = None if gate is None else gate.unflatten(-1, (HV, V))
    normed = elementwise.gated_rms_norm(o, gate, call.norm_weight, eps=call.eps, activation=call.activation)
    out[there] = normed[:, 0].flatten(-2)
    return out
