"""The Triton backend of the chunk ops: forward and backward of each form as stages in data order."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import OpCall
from ..state import CarveState
from ..wide_copy import contiguous
from .chunk_gradient import WrittenParts, chunk_gradient
from .chunk_operands import chunk_operands
from .chunk_output import chunk_output
from .chunk_state import chunk_state, chunk_state_gradient
from .chunks import make_chunks
from .content_gradient import content_gradient
from .content_operands import content_rows
from .content_terms import content_terms
from .decay import decay_factors
from .delta_operands import delta_operands
from .delta_state import delta_state, delta_state_gradient
from .erasing_gradient import erasing_gradient
from .gates import GATE_LOGITS, GATE_SCALAR, GATE_SCALAR_LOGITS, GATE_VALUES
from .gradient_operands import gradient_operands
from .stages import SEES_CONTENT, WIDEST_VALUES, Call, Content, DecayInputs, Inputs, architecture, next_power_of_2

# A raw decay whose softplus, and an erase logit whose sigmoid, is an exact 0.
NONE = -1e4


def chunk_op(op: OpCall) -> tuple[Tensor, Any]:
    """The Triton backend of the public chunk ops, after their checks."""
    if op.op == "gdn2":
        return _chunk_gdn2(op)
    call = _call(op, _carve_gate(op))
    if op.erases_by_decay:
        o, final = _run_carve(op, ChunkDiagonal, call)
    elif op.has_content:
        o, final = _run_carve(op, ChunkDelta, call)
    else:
        o, final = _run_delta_without_content(op, call)
    if not op.output_final_state:
        return o, None
    count = op.initial_state.count if isinstance(op.initial_state, CarveState) else 0
    S, mean, partial = final
    return o, CarveState(S, mean, partial, (call.chunks.lengths + count) % op.content_chunk)


class ChunkGDN2(torch.autograd.Function):
    """GDN-2: q, k, v, g, b, w, A_log [H, K] or [H], dt_bias [H, K], initial_state -> o, final_state."""

    @staticmethod
    def forward(ctx: Any, call: Call, want_final: bool, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        *given, initial_state = tensors
        x, ctx.A_log_by_head = Inputs(*given), False
        if x.A_log is not None and x.dt_bias is not None and x.A_log.ndim == 1:
            A_log = x.A_log.unsqueeze(1).expand_as(x.dt_bias).contiguous()
            x, ctx.A_log_by_head = x._replace(A_log=A_log), True
        o, final_state, *kept = forward_stages(call, x, initial_state, want_final)
        ctx.call = call
        ctx.has_initial = initial_state is not None
        ctx.save_for_backward(*x.of_tokens, *kept)
        return o, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
        *given, A, states, transitions = ctx.saved_tensors
        d_final_state = None if d_final_state is None else d_final_state.contiguous()
        d, d_initial = backward_stages(
            ctx.call, Inputs(*given), A, states, transitions, do.contiguous(), d_final_state, ctx.has_initial
        )  # fmt: skip
        if ctx.A_log_by_head and d.A_log is not None:
            d = d._replace(A_log=d.A_log.sum(1))
        return None, None, *d.of_tokens, d_initial


def forward_stages(
    call: Call, x: Inputs, initial_state: Tensor | None, want_final: bool, decay: DecayInputs | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """o, final state, and what the backward needs: A, states, transitions. decay: see decay_factors."""
    factors = decay_factors(call, x, decay)
    A, P, erasure, update, k_to_end, q_from_start = chunk_operands(call, x, factors)
    found = chunk_state(call, factors, erasure, update, k_to_end, initial_state, want_final)
    o = chunk_output(call, x, q_from_start, P, found.states, found.residuals)
    return o, found.final, A, found.states, found.transitions


def backward_stages(
    call: Call, x: Inputs, A: Tensor, states: Tensor, transitions: Tensor | None, do: Tensor,
    d_final_state: Tensor | None, has_initial: bool, decay: DecayInputs | None = None,
) -> tuple[Inputs, Tensor | None]:  # fmt: skip
    """Gradients of the inputs, or of those of erasing_gradient, and of the initial state. decay: see decay_factors."""
    factors = decay_factors(call, x, decay)
    operands = gradient_operands(call, x, factors, A, states, do)
    d_states, d_residuals, d_initial = chunk_state_gradient(
        call, factors, operands, do, d_final_state, has_initial, transitions
    )
    residuals = operands.residuals
    if decay is None:
        d = chunk_gradient(call, x, factors, residuals, A, states, do, None, d_residuals, d_states, None)
    else:
        d = erasing_gradient(call, x, decay, factors, residuals, A, states, do, None, None, d_residuals, d_states, None)
    return d, d_initial


class ContentOptions(NamedTuple):
    """How CARVE's ops treat the content: tokens of a content chunk, and whether its mean is detached."""

    content_chunk: int
    detached: bool


class ChunkDiagonal(torch.autograd.Function):
    """CARVE with diagonal erase: q, k, v, g, erase logits, w, A_log, dt_bias, D, U, bias, S, mean, partial, count ->
    o, S, mean, partial."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, options: ContentOptions, want_final: bool, *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        *given, initial_S, initial_mean, initial_partial, count = tensors
        q, k, v, g, logits, w, A_log, dt_bias, down, up, bias = given
        x = Inputs(q, k, v, torch.empty_like(g, dtype=torch.float32), w, w, None, None)
        terms = code = mean = final_mean = final_partial = None
        decay = DecayInputs(g, logits, A_log, dt_bias, None)
        if down is not None:
            content = _content(down, up, bias)
            terms, code, mean, final_mean, final_partial = content_terms(
                call, x, decay, content, (initial_S, initial_mean, initial_partial, count), options.content_chunk
            )
        elif bias is not None:
            terms = bias.expand(call.chunks.count, *bias.shape).contiguous()
        o, S, *kept = forward_stages(call, x, initial_S, want_final, decay._replace(content=terms))
        ctx.call, ctx.options, ctx.has_initial = call, options, initial_S is not None
        ctx.save_for_backward(*given, count, *kept, terms, code, mean)
        ctx.set_materialize_grads(False)
        if S is not None and down is None:
            final_mean, final_partial = (S.new_zeros(*S.shape[:2], call.V) for _ in range(2))
        return (o, S, final_mean, final_partial) if want_final else (o, None, None, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor | None, *d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        call, (content_chunk, detached), has_initial = ctx.call, ctx.options, ctx.has_initial
        # asked for once: under activation recomputation each asking would compute the op again
        *given, count, A, states, transitions, terms, code, mean = ctx.saved_tensors
        q, k, v, g, logits, w, A_log, dt_bias, down, up, bias = given
        decay = DecayInputs(g, logits, A_log, dt_bias, terms)
        x = Inputs(q, k, v, torch.empty_like(g, dtype=torch.float32), w, w, None, None)
        do = torch.zeros_like(v) if do is None else do.contiguous()
        # whether anything goes from a content chunk to the outputs of the one before
        through_means = down is not None and (not detached or has_initial or any(d is not None for d in d_final[1:]))
        d_initial: list[Tensor | None] = [None, None, None]
        if through_means:
            factors = decay_factors(call, x, decay)
            operands = gradient_operands(call, x, factors, A, states, do, for_content=True)
            rows = content_rows(call, factors, operands, count, content_chunk)
            found = content_gradient(
                call, x, decay, _content(down, up, bias), code, factors, operands, rows, states, do,
                d_final, count, has_initial, content_chunk, detached,
            )  # fmt: skip
            d_states, d_written, d_rows, *d_initial = found
            residuals, written = operands.residuals, WrittenParts(d_written, rows.written)
            del operands  # the memory is for the gradients
            d = erasing_gradient(
                call, x, decay, factors, residuals, A, states, do, d_rows, rows.after, None, d_states, written
            )  # fmt: skip
        else:
            d_S = None if d_final[0] is None else d_final[0].contiguous()
            d, d_initial[0] = backward_stages(call, x, A, states, transitions, do, d_S, has_initial, decay)
        of_maps = content_map_gradients(d.content, code, mean, down, up)
        d_bias = None if bias is None or d.content is None else d.content.sum(0)
        return None, None, None, *d.of_tokens, *of_maps, d_bias, *d_initial, None


class ChunkDelta(torch.autograd.Function):
    """CARVE with delta erase: arguments and results as ChunkDiagonal's."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, options: ContentOptions, want_final: bool, *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        *given, initial_S, initial_mean, initial_partial, count = tensors
        *of_tokens, down, up, bias = given
        x, initial = Inputs(*of_tokens), (initial_S, initial_mean, initial_partial)
        factors = decay_factors(call, x)
        operands = delta_operands(call, x, factors)
        content = _content(down, up, bias)
        loop = delta_state(call, x, content, factors, operands, initial, count, options.content_chunk)
        A, states, residuals, codes, terms, means, *final = loop
        o = chunk_output(call, x, operands.q_from_start, operands.P, states, residuals)
        ctx.call, ctx.options, ctx.has_initial = call, options, initial[0] is not None
        ctx.save_for_backward(*given, count, A, states, codes, terms, means)
        ctx.set_materialize_grads(False)
        return (o, *final) if want_final else (o, None, None, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor | None, *d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        call, (content_chunk, detached), has_initial = ctx.call, ctx.options, ctx.has_initial
        # asked for once: under activation recomputation each asking would compute the op again
        q, k, v, g, logits, w, A_log, dt_bias, down, up, bias, count, A, states, codes, terms, means = ctx.saved_tensors
        x = Inputs(q, k, v, g, logits, w, A_log, dt_bias, terms)
        do = torch.zeros_like(x.v) if do is None else do.contiguous()
        # without a gradient through the means nothing of the content path runs from chunk to chunk
        parallel = detached and d_final[1] is None and d_final[2] is None and not has_initial
        factors = decay_factors(call, x)
        operands = gradient_operands(call, x, factors, A, states, do, for_delta_loop=not parallel)
        d_rows: Tensor | None = None
        d_content: Tensor | None = None
        d_initial: list[Tensor | None] = [None, None, None]
        if parallel:
            d_S = None if d_final[0] is None else split_values(d_final[0], call.split)
            d_states, d_residuals, _ = chunk_state_gradient(call, factors, operands, do, d_S, False, None)
        else:
            d_states, d_residuals, d_rows, d_content, d_initial = delta_state_gradient(
                call, x, _content(down, up, bias), codes, factors, operands, A, states, do,
                d_final, count, has_initial, content_chunk, detached,
            )  # fmt: skip
        d = chunk_gradient(
            call, x, factors, operands.residuals, A, states, do, d_rows, d_residuals, d_states, d_content
        )
        of_content = content_map_gradients(d.content, codes, means, down, up)
        d_bias = None if bias is None else d.b.sum((0, 1), dtype=torch.float32)
        return None, None, None, *d.of_tokens, *of_content, d_bias, *d_initial, None


def _content(down: Tensor, up: Tensor, bias: Tensor | None) -> Content:
    """Of D and U for all heads, [R, V] and [K, R], or with one a head."""
    down, up = (x if x.ndim == 3 else x.unsqueeze(0) for x in (down, up))
    return Content(down, up, bias)


def content_map_gradients(
    d_terms: Tensor | None, codes: Tensor | None, means: Tensor | None, down: Tensor | None, up: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of D and U, from that of every chunk's content term, [NC, HV, K], and its code and mean."""
    if down is None or up is None:
        return None, None
    assert d_terms is not None and codes is not None and means is not None
    # by head; torch.einsum, which would do the same, takes the CPU four times as long
    d_terms, codes, means = (x.transpose(0, 1) for x in (d_terms, codes, means))
    d_codes = (d_terms @ up.float().expand(len(d_terms), -1, -1)) * (1 - codes.square())
    d_down, d_up = d_codes.mT @ means, d_terms.mT @ codes
    if down.ndim == 2:
        d_down, d_up = d_down.sum(0), d_up.sum(0)
    return d_down.to(down.dtype), d_up.to(up.dtype)


def _chunk_gdn2(op: OpCall) -> tuple[Tensor, Tensor | None]:
    gate = GATE_VALUES, GATE_LOGITS, GATE_SCALAR, GATE_SCALAR_LOGITS
    call = _call(op, gate[2 * (op.b.ndim == 3) + op.gate_logits].value)
    return _run_gdn2(op, call, op.b, op.initial_state)


def _run_gdn2(op: OpCall, call: Call, b: Tensor, initial_state: Any) -> tuple[Tensor, Tensor | None]:
    K, V = op.q.shape[3], op.v.shape[3]
    q, k, v, g, b, w = _tokens(op, b)
    A_log, dt_bias = _raw_decay(op, by_head=True)
    if initial_state is not None:
        initial_state = split_values(widen(widen(initial_state), axis=2), call.split)
    inputs = q, k, by_split(v, call), g, b, w if w.ndim == 3 else by_split(w, call), A_log, dt_bias
    o, S = ChunkGDN2.apply(call, op.output_final_state, *inputs, initial_state)
    if S is not None:
        S = S.unflatten(1, (-1, call.split)).transpose(2, 3).flatten(3)[..., :K, :V].contiguous()
    return as_given(o, op.v), S


def _carve_gate(op: OpCall) -> int:
    """What erases along the key: with diagonal erase the write gate."""
    if op.erases_by_decay:
        return (GATE_SCALAR_LOGITS if op.gate_logits else GATE_SCALAR).value
    return SEES_CONTENT if op.has_content else GATE_LOGITS.value


def _run_delta_without_content(op: OpCall, call: Call) -> tuple[Tensor, Sequence[Tensor]]:
    """GDN-2 with the bias in its logits."""
    logits = op.b if op.erase_bias is None else op.b.float() + op.erase_bias
    state = op.initial_state.S if isinstance(op.initial_state, CarveState) else None
    o, S = _run_gdn2(op, call, logits, state)
    return o, () if S is None else (S, *(S.new_zeros(*S.shape[:2], S.shape[3]) for _ in range(2)))


def _run_carve(op: OpCall, function: type[torch.autograd.Function], call: Call) -> tuple[Tensor, Sequence[Tensor]]:
    K, V = op.q.shape[3], op.v.shape[3]
    q, k, v, g, logits, w = _tokens(op, op.b)
    A_log, dt_bias = _raw_decay(op)
    down, up = op.content_down, op.content_up
    if down is not None and up is not None:
        down, up = contiguous(widen(down)), contiguous(widen(up, axis=-2))
    bias = None if op.erase_bias is None else widen(op.erase_bias)
    initial: list[Tensor | None] = [None] * 4
    if isinstance(op.initial_state, CarveState):
        S, mean, partial, count = op.initial_state
        initial = [x.contiguous() for x in (widen(widen(S), axis=2), widen(mean), widen(partial), count)]
    if op.erases_by_decay:
        q, k, g, logits = (by_value_head(x, call.H, 2) for x in (q, k, g, logits))
        A_log, dt_bias, bias = (by_value_head(x, call.H, 0) for x in (A_log, dt_bias, bias))
    o, *final = function.apply(
        call, ContentOptions(op.content_chunk, op.detached), op.output_final_state,
        q, k, by_split(v, call), g, logits, w, A_log, dt_bias, down, up, bias, *initial,
    )  # fmt: skip
    o = as_given(o, op.v)
    if not op.output_final_state:
        return o, ()
    S, mean, partial = final
    return o, (S[..., :K, :V].contiguous(), mean[..., :V].contiguous(), partial[..., :V].contiguous())


def by_value_head(x: Any, heads: int, axis: int) -> Any:
    """A tensor of key heads with one entry for every value head that shares it."""
    if x is None or x.shape[axis] == heads:
        return x
    group = heads // x.shape[axis]
    shared = x.unsqueeze(axis + 1).expand(*x.shape[: axis + 1], group, *x.shape[axis + 1 :])
    return contiguous(shared).flatten(axis, axis + 1)


def by_split(x: Tensor, call: Call) -> Tensor:
    """Values or their gates by heads of a width that the kernels take, [B, T, HV, V]."""
    return x if call.split == 1 else x.view(*x.shape[:2], call.HV, call.V)


def as_given(o: Tensor, v: Tensor) -> Tensor:
    """Outputs by the heads of the values that were given, without the channels that were added to them."""
    return o if o.shape == v.shape else o.view(*v.shape[:3], -1)[..., : v.shape[3]]


def _tokens(op: OpCall, b: Tensor) -> tuple[Tensor, ...]:
    """q, k, v, g, b, w, contiguous, with channels added that hold nothing and, raw or not, neither decay nor erase."""
    g = widen(op.g, fill=0.0 if op.A_log is None else NONE)
    b = b if b.ndim == 3 else widen(b, fill=NONE if op.op == "carve" else 0.0)
    w = op.w if op.w.ndim == 3 else widen(op.w)
    return tuple(contiguous(x) for x in (widen(op.q), widen(op.k), widen(op.v), g, b, w))


def _raw_decay(op: OpCall, *, by_head: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """A_log and dt_bias by channel, [H, K] both, or None; by_head leaves one number per head what it is, [H]."""
    A_log, dt_bias = op.A_log, op.dt_bias
    if A_log is None or dt_bias is None:
        return None, None
    if A_log.ndim == 1 and not by_head:
        A_log = A_log.unsqueeze(1).expand_as(dt_bias)
    return (A_log if A_log.ndim == 1 else widen(A_log)).contiguous(), widen(dt_bias).contiguous()


def widen(x: Tensor, axis: int = -1, fill: float = 0.0) -> Tensor:
    """x with an axis of channels filled up to a power of two, which the kernels' tiles are."""
    missing = next_power_of_2(x.shape[axis]) - x.shape[axis]
    if missing == 0:
        return x
    axis %= x.ndim
    return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, missing), value=fill)


def _chunks(op: OpCall) -> Any:
    count = op.initial_state.count if isinstance(op.initial_state, CarveState) else None
    return make_chunks(op.q, op.cu_seqlens, count)


def _call(op: OpCall, gate: int) -> Call:
    """What the stages need besides tensors: widths as _tokens makes them; with diagonal erase every value head has a
    key head of its own."""
    K, V = next_power_of_2(op.q.shape[3]), next_power_of_2(op.v.shape[3])
    H, HV, split = op.q.shape[2], op.v.shape[2], max(V // WIDEST_VALUES, 1)
    by_decay = op.erases_by_decay
    return Call(
        _chunks(op), HV if by_decay else H, HV * split, K, V // split, split, op.output_scale, op.erase_scale,
        gate=gate, scalar_w=op.w.ndim == 3, logits_w=op.gate_logits, raw_decay=op.A_log is not None and not by_decay,
        before=op.predicts_before_decay, dtype=op.q.dtype,
        architecture=architecture(op.q.device), packed=op.cu_seqlens is not None,
    )  # fmt: skip


def split_values(S: Tensor, split: int) -> Tensor:
    """States with the columns of every value head divided over `split` heads: [N, HV, K, V] -> contiguous."""
    return S.unflatten(3, (split, -1)).transpose(2, 3).flatten(1, 2).contiguous()
