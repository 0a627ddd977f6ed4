"""The Triton backend of the chunk ops: what they support, and their forward and backward as stages in data order."""

from typing import Any

import torch
from torch import Tensor

from .backends import require_triton_support
from .chunks import make_chunks
from .stages import (
    SEES_CONTENT,
    Call,
    Inputs,
    carve_state,
    carve_state_gradient,
    carve_tiles,
    chunk_key_gradient,
    chunk_operands,
    chunk_output,
    chunk_recompute,
    chunk_state,
    chunk_state_gradient,
    chunk_value_gradient,
    decay_factors,
)
from .state import CarveState


class ChunkGDN2(torch.autograd.Function):
    """GDN-2: q, k, v, g, b, w, A_log, dt_bias, initial_state -> o, final_state."""

    @staticmethod
    def forward(ctx: Any, call: Call, want_final: bool, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        *given, initial_state = tensors
        x = Inputs(*given)
        factors = decay_factors(call, x)
        A, P, erasure, update, k_to_end = chunk_operands(call, x, factors)
        states, residuals, final_state = chunk_state(
            call, erasure, update, k_to_end, factors, initial_state, want_final
        )
        o = chunk_output(call, x, factors, P, states, residuals)
        ctx.call = call
        ctx.has_initial = initial_state is not None
        ctx.save_for_backward(*given, A, P, states)
        return o, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        *given, A, P, states = ctx.saved_tensors
        x = Inputs(*given)
        do = do.contiguous()
        factors = decay_factors(call, x)
        recomputed = chunk_recompute(call, x, factors, A, P, states, do, for_carve_loop=False)
        d_states, d_residuals, d_initial = chunk_state_gradient(
            call, recomputed, factors, do, d_final_state, ctx.has_initial
        )
        dv, dw, scores = chunk_value_gradient(call, x, A, do, None, recomputed.residuals, d_residuals)
        d = chunk_key_gradient(call, x, factors, do, states, d_states, recomputed.residuals, scores)
        return None, None, d.q, d.k, dv, d.g, d.b, dw, d.A_log, d.dt_bias, d_initial


class ChunkCarve(torch.autograd.Function):
    """CARVE: the op's tensors, then the parts of the initial state -> o, S, mean, partial."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, content_chunk: int, detached: bool, want_final: bool, *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        down, up, *initial = tensors[8:]
        x = Inputs(*tensors[:8])
        factors = decay_factors(call, x)
        P, tiles = carve_tiles(call, x, factors)
        loop = carve_state(call, x, down, up, factors, tiles, initial, content_chunk, want_final)
        A, states, residuals, codes, content, means, *final = loop
        o = chunk_output(call, x, factors, P, states, residuals)
        ctx.call, ctx.content_chunk, ctx.detached = call, content_chunk, detached
        ctx.has_initial = initial[0] is not None
        saved = A, P, tiles.P_sum, states, codes, content, means
        ctx.save_for_backward(*tensors[:8], down, up, initial[3], *saved)
        ctx.set_materialize_grads(False)
        return o, *final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor | None, *d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        down, up, count, A, P, P_sum, states, codes, content, means = ctx.saved_tensors[8:]
        x = Inputs(*ctx.saved_tensors[:8], content)
        do = torch.zeros_like(x.v) if do is None else do.contiguous()
        factors = decay_factors(call, x)
        # without a gradient through the means nothing of the content path runs from chunk to chunk
        parallel = ctx.detached and d_final[1] is None and d_final[2] is None and not ctx.has_initial
        recomputed = chunk_recompute(call, x, factors, A, P, states, do, for_carve_loop=not parallel)
        d_rows: Tensor | None = None
        d_initial: list[Tensor | None] = [None, None, None]
        if parallel:
            d_states, d_residuals, _ = chunk_state_gradient(call, recomputed, factors, do, d_final[0], False)
        else:
            d_states, d_residuals, d_rows, d_initial = carve_state_gradient(
                call, x, down, up, factors, P_sum, recomputed, A, P, states, do,
                d_final, count, ctx.has_initial, ctx.content_chunk, ctx.detached,
            )  # fmt: skip
        dv, dw, scores = chunk_value_gradient(call, x, A, do, d_rows, recomputed.residuals, d_residuals)
        d = chunk_key_gradient(call, x, factors, do, states, d_states, recomputed.residuals, scores)
        assert d.content is not None
        d_up = torch.einsum("chk,chr->hkr", d.content, codes)
        d_down = torch.einsum("chr,chv->hrv", torch.einsum("hkr,chk->chr", up.float(), d.content), means)
        gradients = d.q, d.k, dv, d.g, d.b, dw, d.A_log, d.dt_bias, d_down.to(down.dtype), d_up.to(up.dtype)
        return None, None, None, None, *gradients, *d_initial, None


def chunk_gdn2(
    q, k, v, g, b, w, *, scale, initial_state, output_final_state, cu_seqlens,
    A_log=None, dt_bias=None, gate_logits=False, erase_scale=1.0,
):  # fmt: skip
    """The Triton backend of the public chunk_gdn2, after its checks."""
    require_triton_support("gdn2", q.dtype, q.shape[3], v.shape[3])
    call = Call(
        make_chunks(q, cu_seqlens, None), q.shape[2], v.shape[2], q.shape[3], v.shape[3], scale, erase_scale,
        gate=int(gate_logits), scalar_w=w.ndim == 3, logits_w=gate_logits, raw_decay=A_log is not None, dtype=q.dtype,
    )  # fmt: skip
    inputs = [x.contiguous() for x in (q, k, v, g, b, w)]
    return ChunkGDN2.apply(call, output_final_state, *inputs, A_log, dt_bias, initial_state)


def chunk_carve(
    q, k, v, g, erase_logits, w, content_down, content_up, *,
    content_chunk, content_grad, erase_scale, scale, initial_state, output_final_state, cu_seqlens,
    A_log=None, dt_bias=None, gate_logits=False,
):  # fmt: skip
    """The Triton backend of the public chunk_carve, after its checks."""
    require_triton_support("carve", q.dtype, q.shape[3], v.shape[3])
    count = None if initial_state is None else initial_state.count
    chunks = make_chunks(q, cu_seqlens, count)
    call = Call(
        chunks, q.shape[2], v.shape[2], q.shape[3], v.shape[3], scale, erase_scale,
        gate=SEES_CONTENT, scalar_w=True, logits_w=gate_logits, raw_decay=A_log is not None, dtype=q.dtype,
    )  # fmt: skip
    inputs = [x.contiguous() for x in (q, k, v, g, erase_logits, w)]
    content = [x.contiguous() for x in (content_down, content_up)]
    initial = (None,) * 4 if initial_state is None else [x.contiguous() for x in initial_state]
    o, *final = ChunkCarve.apply(
        call,
        content_chunk,
        content_grad == "detached",
        output_final_state,
        *inputs,
        A_log,
        dt_bias,
        *content,
        *initial,
    )
    if not output_final_state:
        return o, None
    lengths = chunks.lengths if count is None else chunks.lengths + count
    return o, CarveState(*final, lengths % content_chunk)
