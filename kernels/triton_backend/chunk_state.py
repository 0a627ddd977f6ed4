"""GDN-2, the stages that run from chunk to chunk: the state forward, its gradient backward."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, sequence_and_head, sequence_chunks
from .decay import load_total_decay
from .launching import launch
from .products import matmul
from .segments import Segments, entering_states, segments_of, segments_of_sequences
from .stages import HOPPER, Call, Factors, GradientOperands, Tuning
from .tiles import load_rows, load_tile, store_tile

TUNING = {HOPPER: Tuning(0, 64, 4, 3)}
# With columns of transitions there are twice as many programs, two on a multiprocessor.
EFFECT_TUNING = {HOPPER: Tuning(0, 64, 4, 2)}
GRADIENT_TUNING = {HOPPER: Tuning(0, 64, 8, 2)}


@triton.jit
def load_state(p, i, o_s, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, GIVEN: tl.constexpr):
    """Columns of state i, or zeros; o_s: offsets of [K, BV] numbers in it."""
    b_S = tl.zeros([K, BV], tl.float32)
    if GIVEN:
        b_S += tl.load(p + i * K * V + o_s)
    return b_S


@triton.jit
def chunk_state_kernel(
    erasure, update, k_to_end, last, initial_state,
    states, residuals, final_state, transitions,
    first, H, HV,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, STORE_CHUNKS: tl.constexpr, STORE_FINAL: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, value head and block of value columns.

    Reads chunk_operands_kernel's tiles; writes, if STORE_CHUNKS, per chunk
        states [NC, HV, K, V]: the state before it,
        residuals [NC, HV, C, V]: R = A (w v - exp(G) b k S), what it adds at each of its keys,
    and final_state [N, HV, K, V] float32. If transitions [N, H, K, K] float32 are given, there are programs for their
    columns after those of values: what becomes of an identity in which nothing is written.
    """
    i_n, i_hv, i_h, i_nhv = sequence_and_head(H, HV)
    o_r, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), tl.program_id(1) * BV + tl.arange(0, BV)
    o_s = o_k[:, None] * V + o_v[None, :]
    b_S = load_state(initial_state, i_nhv, o_s, K, V, BV, HAS_INITIAL)
    begin, end = tl.load(first + i_n), tl.load(first + i_n + 1)
    if transitions is not None:
        of_values = tl.program_id(1) < V // BV
        b_S += tl.where(o_k[:, None] == (o_v - V)[None, :], 1.0, 0.0)
        end = tl.where(of_values | (i_hv % (HV // H) == 0), end, begin)  # value heads of a key head share it
    for i_c in range(begin, end):
        i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
        b_S_CT = b_S.to(CT)
        if STORE_CHUNKS:
            tl.store(states + i_chv * K * V + o_s, b_S_CT)
        b_W = load_tile(erasure, i_ch, o_r, K, o_k)
        if transitions is None:
            b_U = load_tile(update, i_chv, o_r, V, o_v)
        else:
            m_v = tl.broadcast_to((o_v < V)[None, :], [BT, BV])
            b_U = tl.load(update + i_chv * BT * V + (o_r[:, None] * V + o_v[None, :]), mask=m_v, other=0.0)
        b_R = b_U.to(tl.float32) - matmul(b_W, b_S_CT, CT, PRECISION)
        b_R = b_R.to(CT)
        if STORE_CHUNKS:
            store_tile(residuals, i_chv, o_r, V, o_v, b_R)
        b_k = load_tile(k_to_end, i_ch, o_r, K, o_k)
        b_S = b_S * load_total_decay(last, i_ch, K, o_k)[:, None] + matmul(tl.trans(b_k), b_R, CT, PRECISION)
    if STORE_FINAL:
        m_v = tl.broadcast_to((o_v < V)[None, :], [K, BV])
        tl.store(final_state + i_nhv * K * V + o_s, b_S, mask=m_v)
    if transitions is not None:
        o_M = o_v - V
        m_M = tl.broadcast_to(((o_M >= 0) & (o_M < K) & (begin < end))[None, :], [K, BV])
        tl.store(transitions + (i_n * H + i_h) * K * K + (o_k[:, None] * K + o_M[None, :]), b_S, mask=m_M)


@triton.jit
def chunk_state_gradient_kernel(
    erasure, k_to_end, q_from_start, last, d_residuals_here, do, d_final_state,
    d_states, d_residuals, d_initial_state,
    table, first, H, HV, HE,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HAS_FINAL: tl.constexpr, STORE_CHUNKS: tl.constexpr, STORE_INITIAL: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The reverse of chunk_state_kernel, with the same programs.

    Reads erasure [NC, HE, C, K] and d_residuals_here [NC, HV, C, V], what the chunk's own outputs give its residuals;
    writes, if STORE_CHUNKS, per chunk
        d_states [NC, HV, K, V]: gradient of the state after it,
        d_residuals [NC, HV, C, V]: gradient of its residuals,
    and d_initial_state [N, HV, K, V] float32.
    """
    i_n, i_hv, i_h, i_nhv = sequence_and_head(H, HV)
    o_r, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), tl.program_id(1) * BV + tl.arange(0, BV)
    o_s = o_k[:, None] * V + o_v[None, :]
    b_dS = load_state(d_final_state, i_nhv, o_s, K, V, BV, HAS_FINAL)
    begin, end, row_0, tokens_from, tokens_to = sequence_chunks(table, first, i_n)
    for i_back in range(end - begin):
        i_c = end - 1 - i_back
        i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
        b_dS_CT = b_dS.to(CT)
        if STORE_CHUNKS:
            tl.store(d_states + i_chv * K * V + o_s, b_dS_CT)
        b_k = load_tile(k_to_end, i_ch, o_r, K, o_k)
        b_dR = load_tile(d_residuals_here, i_chv, o_r, V, o_v).to(tl.float32)
        b_dR += matmul(b_k, b_dS_CT, CT, PRECISION)
        b_dR = b_dR.to(CT)
        if STORE_CHUNKS:
            store_tile(d_residuals, i_chv, o_r, V, o_v, b_dR)
        start = row_0 + (i_c - begin) * BT
        m_r = (start + o_r >= tokens_from) & (start + o_r < tokens_to)
        b_do = load_rows(do, start, o_r, m_r, i_hv, HV, V, o_v)
        b_q = load_tile(q_from_start, i_ch, o_r, K, o_k)
        b_W = load_tile(erasure, i_c * HE + i_hv // (HV // HE), o_r, K, o_k)
        b_dS = b_dS * load_total_decay(last, i_ch, K, o_k)[:, None]
        b_dS += matmul(tl.trans(b_q), b_do, CT, PRECISION) - matmul(tl.trans(b_W), b_dR, CT, PRECISION)
    if STORE_INITIAL:
        tl.store(d_initial_state + i_nhv * K * V + o_s, b_dS)


class States(NamedTuple):
    """What chunk_state_kernel writes; transitions of segments, for the backward, where the chain was cut."""

    states: Tensor
    residuals: Tensor
    final: Tensor | None
    transitions: Tensor | None


def chunk_state(
    call: Call, factors: Factors, erasure: Tensor, update: Tensor, k_to_end: Tensor, initial_state: Tensor | None,
    want_final: bool,
) -> States:  # fmt: skip
    """The states of all chunks, from [N, HV, K, V] initial ones or None."""
    sequences = call.chunks.sequences
    states, residuals = call.tiles(erasure, call.HV, call.K, call.V), torch.empty_like(update)
    BV = call.value_block(TUNING)

    def run(first: Tensor, initial: Tensor | None, final: Tensor | None, transitions: Tensor | None) -> None:
        columns = call.V if transitions is None else call.V + call.K
        launch(
            chunk_state_kernel, ((first.shape[0] - 1) * call.HV, -(-columns // BV)),
            erasure, update, k_to_end, factors.last, initial,
            states, residuals, final, transitions,
            first, call.H, call.HV,
            K=call.K, V=call.V, BV=BV, HAS_INITIAL=initial is not None, STORE_CHUNKS=transitions is None,
            STORE_FINAL=final is not None,
            **call.launch(TUNING if transitions is None else EFFECT_TUNING, call.K, BV),
        )  # fmt: skip

    def floats(chains: int, heads: int, columns: int) -> Tensor:
        return factors.last.new_empty(chains, heads, call.K, columns)

    segments = segments_of(call, sequences * call.HV * (call.V // BV))
    if segments is None:
        final_state = floats(sequences, call.HV, call.V) if want_final else None
        run(call.chunks.first, initial_state, final_state, None)
        return States(states, residuals, final_state, None)
    chains = sequences * segments.of_sequence
    effects, transitions = floats(chains, call.HV, call.V), floats(chains, call.H, call.K)
    run(segments.first, None, effects, transitions)
    entering = entering_states(call, segments, initial_state, transitions, effects, back=False)
    final = effects if want_final else None  # which is not needed any more
    run(segments.first, entering, final, None)
    return States(states, residuals, _of_segment(final, segments, -1), transitions)


def chunk_state_gradient(
    call: Call, factors: Factors, operands: GradientOperands, do: Tensor, d_final_state: Tensor | None,
    want_initial: bool, transitions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of states, residuals and the initial state; transitions: those of chunk_state."""
    sequences = call.chunks.sequences
    d_states, d_residuals = call.tiles(do, call.HV, call.K, call.V), call.tiles(do, call.HV, CHUNK_TOKENS, call.V)
    BV = call.value_block(GRADIENT_TUNING)

    def run(first: Tensor, d_final: Tensor | None, d_initial: Tensor | None, store_chunks: bool) -> None:
        launch(
            chunk_state_gradient_kernel, ((first.shape[0] - 1) * call.HV, call.V // BV),
            operands.erasure, operands.k_to_end, operands.q_from_start, factors.last, operands.d_residuals_here,
            do, d_final,
            d_states, d_residuals, d_initial,
            call.chunks.table, first, call.H, call.HV, call.erase_heads,
            K=call.K, V=call.V, BV=BV, HAS_FINAL=d_final is not None, STORE_CHUNKS=store_chunks,
            STORE_INITIAL=d_initial is not None, **call.launch(GRADIENT_TUNING, call.K, BV),
        )  # fmt: skip

    def floats(chains: int) -> Tensor:
        return factors.last.new_empty(chains, call.HV, call.K, call.V)

    if transitions is None:
        d_initial = floats(sequences) if want_initial else None
        run(call.chunks.first, d_final_state, d_initial, True)
        return d_states, d_residuals, d_initial
    segments = segments_of_sequences(call, transitions.shape[0] // sequences)
    effects = floats(transitions.shape[0])
    run(segments.first, None, effects, False)
    entering = entering_states(call, segments, d_final_state, transitions, effects, back=True)
    d_initial = effects if want_initial else None
    run(segments.first, entering, d_initial, True)
    return d_states, d_residuals, _of_segment(d_initial, segments, 0)


def _of_segment(states: Tensor | None, segments: Segments, i: int) -> Tensor | None:
    """Of the states of all segments those of the i-th one of each sequence."""
    return None if states is None else states.unflatten(0, (-1, segments.of_sequence))[:, i].contiguous()
