"""Stage 2 of the backward: what of the forward's operands the next stages need again, for all chunks at once."""

import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, chunk_rows
from .decay import UNSHIFT, erase_left, load_decay_to_end, load_left, right_factor, takes_loop_for_steep_rows
from .gates import load_erase_gate, load_write_gate
from .launching import launch
from .products import matmul
from .stages import HOPPER, Call, Factors, GradientOperands, Inputs, Tuning
from .steep import merge_scores, scores_of_steep_rows
from .tiles import (
    load_columns,
    load_key_and_query,
    load_matrix,
    load_rows,
    load_tile,
    store_columns,
    store_matrix,
    store_tile,
)

TUNING = {HOPPER: Tuning(64, 0, 4, 2)}


@triton.jit
def gradient_operands_kernel(
    q, k, v, b, w, content, left, last, rest, steep_from, first_chunks, A, P, states, do,
    erasure, k_to_end, q_from_start, residuals, d_residuals_here, k_right, gate_slope, P_sum, rows_here,
    table, scale, erase_scale, H, HV, HE,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, SPLIT: tl.constexpr,
    GATE: tl.constexpr, BEFORE: tl.constexpr, SCALAR_W: tl.constexpr, LOGITS_W: tl.constexpr,
    STATES_T: tl.constexpr, FOR_DELTA_LOOP: tl.constexpr, FOR_CONTENT: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and value head. STATES_T: the states are [V, K].

    HE heads have an erase gate of their own: the key heads, or where the gate sees content the value heads. Writes per
    chunk
        k_to_end, q_from_start [NC, H, C, K] as in the forward: for the delta form's loop k_to_end where it takes it,
        erasure [NC, HE, C, K]: A (exp(G) b k); for the delta form's loop exp(G) b k.
        residuals [NC, HV, C, V]: R = A (w v - exp(G) b k S); for the delta form's loop [NC, HV, V, C].
        d_residuals_here [NC, HV, C, V]: P^T do, what the chunk's own outputs give its residuals; not for that loop;
    for the diagonal form's content A^T comes before k_to_end, erasure is without A, it and q_from_start are in the
    shifted factors of decay.py, and so is k_right, which is also written, and in the place of d_residuals_here
        P [NC, H, C, C]: P A; float32, P_sum [NC, H, C], its column sums, and rows_here [NC, H, K], the sum over rows r
            of q_from_start_r - P_sum_r erasure_r;
    and for the delta form's loop alone, in the shifted factors of decay.py:
        P [NC, H, C, C], k_right [NC, H, C, K] as in the forward,
        gate_slope [NC, HE, K, C]: derivative of the rows left b k by the erase logits.
    On entry P holds the scores of steep rows.
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    G = HV // H
    i_h = i_hv // G
    i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
    i_e = i_c * HE + i_hv // (HV // HE)
    leads_keys, leads_gate = i_hv % G == 0, i_hv % (HV // HE) == 0
    start, o_r, m_r = chunk_rows(table, i_c)
    o_v = tl.arange(0, V)
    first_steep = tl.load(steep_from + i_ch)
    wants_k_to_end = takes_loop_for_steep_rows(first_chunks, table, i_c, i_h, H) if FOR_DELTA_LOOP else True

    b_A = load_tile(A, i_e, o_r, BT, o_r)
    b_P = tl.zeros([BT, BT], tl.float32)
    b_own = tl.zeros([BT], tl.float32)
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_left = load_left(left, i_ch, o_r, K, o_k)
        b_k, b_q = load_key_and_query(k, q, start, o_r, m_r, i_h, H, K, o_k, scale)
        b_own += tl.sum(b_q * b_k, 1)
        b_q *= b_left
        b_k_right = (b_k * right_factor(b_left)).to(CT)
        b_P += matmul(b_q, tl.trans(b_k_right), CT, PRECISION)
        if leads_keys:
            store_tile(q_from_start, i_ch, o_r, K, o_k, b_q if FOR_CONTENT else b_q * UNSHIFT)
            if FOR_CONTENT:
                store_columns(rows_here, i_ch, K, o_k, tl.sum(b_q, 0))
            if FOR_DELTA_LOOP or FOR_CONTENT:
                store_tile(k_right, i_ch, o_r, K, o_k, b_k_right)
            if wants_k_to_end:
                b_to_end = load_decay_to_end(b_left, last, rest, first_steep, i_ch, o_r, K, o_k)
                b_k_to_end = b_k * b_to_end
                if FOR_CONTENT:
                    b_k_to_end = matmul(tl.trans(b_A), b_k_to_end, CT, PRECISION)
                store_tile(k_to_end, i_ch, o_r, K, o_k, b_k_to_end)
    # asked for before the waits that follow
    b_do = None if FOR_DELTA_LOOP or FOR_CONTENT else load_rows(do, start, o_r, m_r, i_hv, HV, V, o_v)
    b_z = load_rows(v, start, o_r, m_r, i_hv, HV, V, o_v).to(tl.float32)
    b_z *= load_write_gate(w, start, o_r, m_r, i_hv, HV, V, o_v, SPLIT, SCALAR_W, LOGITS_W)
    o_square = i_ch * BT * BT + (o_r[:, None] * BT + o_r[None, :])
    b_P = merge_scores(b_P, P + o_square, first_steep, o_r)
    b_P = tl.where(o_r[:, None] == o_r[None, :], b_own[:, None], b_P).to(CT)
    if FOR_DELTA_LOOP:
        if leads_keys:
            tl.store(P + o_square, b_P)
    elif FOR_CONTENT:
        b_PA = matmul(b_P, b_A, CT, PRECISION)
        tl.store(P + o_square, b_PA.to(CT))
        b_P_sum = tl.sum(b_PA, 0)
        tl.store(P_sum + i_chv * BT + o_r, b_P_sum)
        tl.debug_barrier()  # rows_here are read again
    else:
        store_tile(d_residuals_here, i_chv, o_r, V, o_v, matmul(tl.trans(b_P), b_do, CT, PRECISION))

    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_left = erase_left(load_left(left, i_ch, o_r, K, o_k), left, i_ch, o_r, K, o_k, BEFORE)
        b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * b_left
        b_b = load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_e, K, o_k, erase_scale, GATE)
        b_E = b_b * b_k
        if FOR_CONTENT:
            store_tile(erasure, i_e, o_r, K, o_k, b_E)
            b_rows = load_columns(rows_here, i_ch, K, o_k) - tl.sum(b_P_sum[:, None] * b_E, 0)
            store_columns(rows_here, i_ch, K, o_k, b_rows)
        b_E = (b_E * UNSHIFT).to(CT)
        if FOR_DELTA_LOOP:
            if leads_gate:
                store_tile(erasure, i_e, o_r, K, o_k, b_E)
                store_matrix(gate_slope, i_e, o_r, o_k, BT, K, True, b_b * (1.0 - b_b / erase_scale) * b_k)
        elif not FOR_CONTENT:  # noqa: SIM102  decided by the compiler
            if leads_gate:
                store_tile(erasure, i_e, o_r, K, o_k, matmul(b_A, b_E, CT, PRECISION))
        b_z -= matmul(b_E, load_matrix(states, i_chv, o_k, o_v, K, V, STATES_T), CT, PRECISION)
    store_matrix(residuals, i_chv, o_r, o_v, BT, V, FOR_DELTA_LOOP, matmul(b_A, b_z, CT, PRECISION))


def gradient_operands(
    call: Call, x: Inputs, factors: Factors, A: Tensor, states: Tensor, do: Tensor, *,
    for_delta_loop: bool = False, for_content: bool = False,
) -> GradientOperands:  # fmt: skip
    key_tile, gate_heads = (CHUNK_TOKENS, call.K), call.erase_heads
    value_tile = (call.V, CHUNK_TOKENS) if for_delta_loop else (CHUNK_TOKENS, call.V)
    P = scores_of_steep_rows(call, x, factors, None)
    operands = GradientOperands(
        call.tiles(x.q, gate_heads, *key_tile), call.tiles(x.q, call.H, *key_tile), call.tiles(x.q, call.H, *key_tile),
        call.tiles(x.q, call.HV, *value_tile),
        None if for_delta_loop or for_content else call.tiles(x.q, call.HV, *value_tile),
        P if for_delta_loop or for_content else None,
        call.tiles(x.q, call.H, *key_tile) if for_delta_loop or for_content else None,
        call.tiles(x.q, gate_heads, call.K, CHUNK_TOKENS) if for_delta_loop else None,
        call.floats(x.q, call.HV, CHUNK_TOKENS) if for_content else None,
        call.floats(x.q, call.HV, call.K) if for_content else None,
    )  # fmt: skip
    BK = call.key_block(TUNING)
    launch(
        gradient_operands_kernel, (call.chunks.count, call.HV),
        x.q, x.k, x.v, x.b, x.w, x.content, *factors.of_rows, factors.first_chunks, A, P, states, do,
        operands.erasure, operands.k_to_end, operands.q_from_start, operands.residuals, operands.d_residuals_here,
        operands.k_right, operands.gate_slope, operands.P_sum, operands.rows_here,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV, gate_heads,
        K=call.K, BK=BK, V=call.V, **call.gates,
        STATES_T=call.sees_content, FOR_DELTA_LOOP=for_delta_loop, FOR_CONTENT=for_content,
        **call.launch(TUNING, BK, call.V),
    )  # fmt: skip
    return operands
