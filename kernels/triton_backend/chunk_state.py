"""GDN-2, the stages that run from chunk to chunk: the state forward, its gradient backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, sequence_and_head, sequence_chunks
from .decay import load_total_decay
from .launching import launch
from .products import matmul
from .stages import HOPPER, Call, Factors, GradientOperands, Tuning
from .tiles import load_rows, load_tile, store_tile

TUNING = {HOPPER: Tuning(0, 64, 4, 3)}
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
    states, residuals, final_state,
    first, H, HV,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, value head and block of value columns.

    Reads chunk_operands_kernel's tiles; writes per chunk
        states [NC, HV, K, V]: the state before it,
        residuals [NC, HV, C, V]: R = A (w v - exp(G) b k S), what it adds at each of its keys,
    and final_state [N, HV, K, V] float32.
    """
    i_n, i_hv, i_h, i_nhv = sequence_and_head(H, HV)
    o_r, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), tl.program_id(1) * BV + tl.arange(0, BV)
    o_s = o_k[:, None] * V + o_v[None, :]
    b_S = load_state(initial_state, i_nhv, o_s, K, V, BV, HAS_INITIAL)
    for i_c in range(tl.load(first + i_n), tl.load(first + i_n + 1)):
        i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
        b_S_CT = b_S.to(CT)
        tl.store(states + i_chv * K * V + o_s, b_S_CT)
        b_W = load_tile(erasure, i_ch, o_r, K, o_k)
        b_R = load_tile(update, i_chv, o_r, V, o_v).to(tl.float32) - matmul(b_W, b_S_CT, CT, PRECISION)
        b_R = b_R.to(CT)
        store_tile(residuals, i_chv, o_r, V, o_v, b_R)
        b_k = load_tile(k_to_end, i_ch, o_r, K, o_k)
        b_S = b_S * load_total_decay(last, i_ch, K, o_k)[:, None] + matmul(tl.trans(b_k), b_R, CT, PRECISION)
    if STORE_FINAL:
        tl.store(final_state + i_nhv * K * V + o_s, b_S)


@triton.jit
def chunk_state_gradient_kernel(
    erasure, k_to_end, q_from_start, last, d_residuals_here, do, d_final_state,
    d_states, d_residuals, d_initial_state,
    table, first, H, HV, HE,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HAS_FINAL: tl.constexpr, STORE_INITIAL: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The reverse of chunk_state_kernel, with the same programs.

    Reads erasure [NC, HE, C, K] and d_residuals_here [NC, HV, C, V], what the chunk's own outputs give its residuals;
    writes per chunk
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
        tl.store(d_states + i_chv * K * V + o_s, b_dS_CT)
        b_k = load_tile(k_to_end, i_ch, o_r, K, o_k)
        b_dR = load_tile(d_residuals_here, i_chv, o_r, V, o_v).to(tl.float32)
        b_dR += matmul(b_k, b_dS_CT, CT, PRECISION)
        b_dR = b_dR.to(CT)
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


def chunk_state(
    call: Call, factors: Factors, erasure: Tensor, update: Tensor, k_to_end: Tensor, initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """States, residuals, final state."""
    states, residuals = call.tiles(erasure, call.HV, call.K, call.V), torch.empty_like(update)
    sequences = call.chunks.sequences
    final_state = factors.last.new_empty(sequences, call.HV, call.K, call.V) if want_final else None
    BV = call.value_block(TUNING)
    launch(
        chunk_state_kernel, (sequences * call.HV, call.V // BV),
        erasure, update, k_to_end, factors.last, initial_state,
        states, residuals, final_state,
        call.chunks.first, call.H, call.HV,
        K=call.K, V=call.V, BV=BV,
        HAS_INITIAL=initial_state is not None, STORE_FINAL=want_final, **call.launch(TUNING, call.K, BV),
    )  # fmt: skip
    return states, residuals, final_state


def chunk_state_gradient(
    call: Call,
    factors: Factors,
    operands: GradientOperands,
    do: Tensor,
    d_final_state: Tensor | None,
    want_initial: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of states, residuals and the initial state."""
    d_states, d_residuals = call.tiles(do, call.HV, call.K, call.V), call.tiles(do, call.HV, CHUNK_TOKENS, call.V)
    sequences = call.chunks.sequences
    d_initial = factors.last.new_empty(sequences, call.HV, call.K, call.V) if want_initial else None
    BV = call.value_block(GRADIENT_TUNING)
    launch(
        chunk_state_gradient_kernel, (sequences * call.HV, call.V // BV),
        operands.erasure, operands.k_to_end, operands.q_from_start, factors.last, operands.d_residuals_here,
        do, d_final_state,
        d_states, d_residuals, d_initial,
        call.chunks.table, call.chunks.first, call.H, call.HV, call.erase_heads,
        K=call.K, V=call.V, BV=BV,
        HAS_FINAL=d_final_state is not None, STORE_INITIAL=want_initial,
        **call.launch(GRADIENT_TUNING, call.K, BV),
    )  # fmt: skip
    return d_states, d_residuals, d_initial
