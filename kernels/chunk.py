"""The Triton backend of the chunk ops: what they support, and their forward and backward as stages in data order."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .backends import require_triton_support
from .chunks import make_chunks
from .stages import (
    SEES_CONTENT,
    WIDEST_VALUES,
    Call,
    Inputs,
    carve_operands,
    carve_state,
    carve_state_gradient,
    chunk_gradient,
    chunk_operands,
    chunk_output,
    chunk_state,
    chunk_state_gradient,
    decay_factors,
    gradient_operands,
)
from .state import CarveState
from .wide_copy import contiguous

# A raw decay whose softplus is an exact 0.
NO_DECAY = -1e4


class ChunkGDN2(torch.autograd.Function):
    """GDN-2: q, k, v, g, b, w, A_log, dt_bias, initial_state -> o, final_state."""

    @staticmethod
    def forward(ctx: Any, call: Call, want_final: bool, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        *given, initial_state = tensors
        x = Inputs(*given)
        factors = decay_factors(call, x)
        A, P, erasure, update, k_to_end, q_from_start = chunk_operands(call, x, factors)
        states, residuals, final_state = chunk_state(
            call, factors, erasure, update, k_to_end, initial_state, want_final
        )
        o = chunk_output(call, x, q_from_start, P, states, residuals)
        ctx.call = call
        ctx.has_initial = initial_state is not None
        ctx.save_for_backward(*given, A, states)
        return o, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        *given, A, states = ctx.saved_tensors
        x = Inputs(*given)
        do = do.contiguous()
        d_final_state = None if d_final_state is None else d_final_state.contiguous()
        factors = decay_factors(call, x)
        operands = gradient_operands(call, x, factors, A, states, do, for_carve_loop=False)
        d_states, d_residuals, d_initial = chunk_state_gradient(
            call, factors, operands, do, d_final_state, ctx.has_initial
        )
        d = chunk_gradient(call, x, factors, operands, A, states, do, None, d_residuals, d_states, None)
        return None, None, *d[:-1], d_initial


class ChunkCarve(torch.autograd.Function):
    """CARVE: the op's tensors, then the parts of the initial state -> o, S, mean, partial."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, content_chunk: int, detached: bool, want_final: bool, *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        down, up, *initial, count = tensors[8:]
        x = Inputs(*tensors[:8])
        factors = decay_factors(call, x)
        operands = carve_operands(call, x, factors)
        loop = carve_state(call, x, down, up, factors, operands, initial, count, content_chunk)
        A, states, residuals, codes, content, means, *final = loop
        o = chunk_output(call, x, operands.q_from_start, operands.P, states, residuals)
        ctx.call, ctx.content_chunk, ctx.detached = call, content_chunk, detached
        ctx.has_initial = initial[0] is not None
        ctx.save_for_backward(*tensors[:8], down, up, count, A, states, codes, content, means)
        ctx.set_materialize_grads(False)
        return (o, *final) if want_final else (o, None, None, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor | None, *d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        # asked for once: under activation recomputation each asking would compute the op again
        *given, down, up, count, A, states, codes, content, means = ctx.saved_tensors
        x = Inputs(*given, content)
        do = torch.zeros_like(x.v) if do is None else do.contiguous()
        # without a gradient through the means nothing of the content path runs from chunk to chunk
        parallel = ctx.detached and d_final[1] is None and d_final[2] is None and not ctx.has_initial
        factors = decay_factors(call, x)
        operands = gradient_operands(call, x, factors, A, states, do, for_carve_loop=not parallel)
        d_rows: Tensor | None = None
        d_content: Tensor | None = None
        d_initial: list[Tensor | None] = [None, None, None]
        if parallel:
            d_S = None if d_final[0] is None else split_values(d_final[0], call.split)
            d_states, d_residuals, _ = chunk_state_gradient(call, factors, operands, do, d_S, False)
        else:
            d_states, d_residuals, d_rows, d_content, d_initial = carve_state_gradient(
                call, x, down, up, factors, operands, A, states, do,
                d_final, count, ctx.has_initial, ctx.content_chunk, ctx.detached,
            )  # fmt: skip
        d = chunk_gradient(call, x, factors, operands, A, states, do, d_rows, d_residuals, d_states, d_content)
        assert d.content is not None
        d_up = torch.einsum("chk,chr->hkr", d.content, codes)
        d_down = torch.einsum("chr,chv->hrv", torch.einsum("hkr,chk->chr", up.float(), d.content), means)
        return None, None, None, None, *d[:-1], d_down.to(down.dtype), d_up.to(up.dtype), *d_initial, None


def chunk_gdn2(
    q, k, v, g, b, w, *, scale, initial_state, output_final_state, cu_seqlens,
    A_log=None, dt_bias=None, gate_logits=False, erase_scale=1.0,
):  # fmt: skip
    """The Triton backend of the public chunk_gdn2, after its checks."""
    require_triton_support("gdn2", q.dtype, q.shape[3], v.shape[3])
    K, V = q.shape[3], v.shape[3]
    q, k, g, b, dt_bias = widen_keys(q, k, g, b, A_log, dt_bias)
    v, w = widen(v), w if w.ndim == 3 else widen(w)
    call = make_call(
        q, v, w, cu_seqlens, None, scale, erase_scale, gate=int(gate_logits), logits_w=gate_logits, raw_decay=A_log
    )
    if initial_state is not None:
        initial_state = split_values(widen(widen(initial_state), axis=2), call.split)
    q, k, v, g, b, w = (contiguous(x) for x in (q, k, v, g, b, w))
    v_heads, w_heads = (x if x.ndim == 3 else x.view(*x.shape[:2], call.HV, call.V) for x in (v, w))
    o, S = ChunkGDN2.apply(call, output_final_state, q, k, v_heads, g, b, w_heads, A_log, dt_bias, initial_state)
    if S is not None:
        S = S.unflatten(1, (-1, call.split)).transpose(2, 3).flatten(3)[..., :K, :V].contiguous()
    return o.view(v.shape)[..., :V], S


def chunk_carve(
    q, k, v, g, erase_logits, w, content_down, content_up, *,
    content_chunk, content_grad, erase_scale, scale, initial_state, output_final_state, cu_seqlens,
    A_log=None, dt_bias=None, gate_logits=False,
):  # fmt: skip
    """The Triton backend of the public chunk_carve, after its checks."""
    require_triton_support("carve", q.dtype, q.shape[3], v.shape[3])
    K, V = q.shape[3], v.shape[3]
    count = None if initial_state is None else initial_state.count
    q, k, g, erase_logits, dt_bias = widen_keys(q, k, g, erase_logits, A_log, dt_bias)
    v, down, up = widen(v), widen(content_down), widen(content_up, axis=1)
    call = make_call(
        q, v, w, cu_seqlens, count, scale, erase_scale, gate=SEES_CONTENT, logits_w=gate_logits, raw_decay=A_log
    )
    q, k, v, g, erase_logits, w, down, up = (contiguous(x) for x in (q, k, v, g, erase_logits, w, down, up))
    initial: list[Tensor | None] = [None] * 4
    if initial_state is not None:
        S, mean, partial, _ = initial_state
        initial = [x.contiguous() for x in (widen(widen(S), axis=2), widen(mean), widen(partial), count)]
    o, *final = ChunkCarve.apply(
        call, content_chunk, content_grad == "detached", output_final_state,
        q, k, v.view(*v.shape[:2], call.HV, call.V), g, erase_logits, w, A_log, dt_bias, down, up, *initial,
    )  # fmt: skip
    o = o.view(v.shape)[..., :V]
    if not output_final_state:
        return o, None
    S, mean, partial = final
    lengths = call.chunks.lengths if count is None else call.chunks.lengths + count
    state = S[..., :K, :V].contiguous(), mean[..., :V].contiguous(), partial[..., :V].contiguous()
    return o, CarveState(*state, lengths % content_chunk)


def widen(x: Tensor, axis: int = -1, fill: float = 0.0) -> Tensor:
    """x with an axis of channels filled up to a power of two, which the kernels' tiles are."""
    missing = triton.next_power_of_2(x.shape[axis]) - x.shape[axis]
    if missing == 0:
        return x
    axis %= x.ndim
    return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, missing), value=fill)


def widen_keys(
    q: Tensor, k: Tensor, g: Tensor, b: Tensor, A_log: Tensor | None, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Key-side tensors with channels added that hold nothing and, raw or not, do not decay."""
    g = widen(g, fill=0.0 if A_log is None else NO_DECAY)
    return widen(q), widen(k), g, widen(b), None if dt_bias is None else widen(dt_bias)


def make_call(
    q: Tensor, v: Tensor, w: Tensor, cu_seqlens: Tensor | None, count: Tensor | None, scale: float, erase_scale: float,
    *, gate: int, logits_w: bool, raw_decay: Tensor | None,
) -> Call:  # fmt: skip
    (H, K), (HV, V) = q.shape[2:], v.shape[2:]
    split = max(V // WIDEST_VALUES, 1)
    return Call(
        make_chunks(q, cu_seqlens, count), H, HV * split, K, V // split, split, scale, erase_scale,
        gate=gate, scalar_w=w.ndim == 3, logits_w=logits_w, raw_decay=raw_decay is not None, dtype=q.dtype,
    )  # fmt: skip


def split_values(S: Tensor, split: int) -> Tensor:
    """States with the columns of every value head divided over `split` heads: [N, HV, K, V] -> contiguous."""
    return S.unflatten(3, (split, -1)).transpose(2, 3).flatten(1, 2).contiguous()
