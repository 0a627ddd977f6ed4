"""The stages of the backward that treat all chunks at once.

STATES_T: the states are [V, K]. D_STATES_T: so are their gradients, and those of the residuals are [V, C].
"""

import triton
import triton.language as tl

from .decay_factors import load_log2_decay
from .tiles import (
    GATE_CONTENT,
    GATE_VALUES,
    LOG2_E,
    UNSHIFT,
    chunk_rows,
    load_columns,
    load_decay_to_end,
    load_erase_gate,
    load_matrix,
    load_rows,
    load_tile,
    load_total_decay,
    load_write_gate,
    matmul,
    store_rows,
    store_tile,
    sum_rows,
)


@triton.jit
def chunk_recompute_kernel(
    q, k, v, b, w, content, left, right, last, rest, steep_from, A, P, states, do,
    erasure, q_from_start, k_to_end, residuals, d_residuals_here, q_sum, k_right, gate_slope,
    table, scale, erase_scale, H, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, SCALAR_W: tl.constexpr, LOGITS_W: tl.constexpr,
    FOR_CARVE_LOOP: tl.constexpr, STATES_T: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and value head: what the forward formed and did not keep.

    Writes per chunk
        erasure [NC, HE, C, K]: A (exp(G) b k), or exp(G) b k for CARVE's loop. HE is HV where the gate sees content,
            else H.
        q_from_start [NC, H, C, K]: scale * exp(G) q; k_to_end [NC, H, C, K].
        residuals [NC, HV, C, V]: R = A (w v - exp(G) b k S).
        d_residuals_here [NC, HV, C, V]: P^T do, not for CARVE's loop.
    and what CARVE's loop needs instead, in the shifted factors of tiles:
        q_sum [NC, H, K] float32: the sum of q_from_start's rows.
        k_right [NC, H, C, K]: right k.
        gate_slope [NC, HV, C, K]: derivative of the rows left b k by the erase logits.
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    G = HV // H
    i_h = i_hv // G
    i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    first_steep = tl.load(steep_from + i_ch)
    b_A = load_tile(A, i_chv if GATE == GATE_CONTENT else i_ch, o_r, 64, o_r)
    for i_v in tl.static_range(V // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        if not FOR_CARVE_LOOP:
            b_do = load_rows(do, start, o_r, m_r, i_hv, HV, V, o_v)
            b_Pt = load_matrix(P, i_ch, o_r, o_r, 64, 64, True)
            store_tile(d_residuals_here, i_chv, o_r, V, o_v, matmul(b_Pt, b_do, CT, PRECISION))
        b_w = load_write_gate(w, start, o_r, m_r, i_hv, HV, V, o_v, SCALAR_W, LOGITS_W)
        b_rest = b_w * load_rows(v, start, o_r, m_r, i_hv, HV, V, o_v).to(tl.float32)
        for i_k in range(K // BK):
            o_k = i_k * BK + tl.arange(0, BK)
            b_start = load_tile(left, i_ch, o_r, K, o_k).to(tl.float32) * UNSHIFT
            b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
            b_b = load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_chv, K, o_k, erase_scale, GATE)
            b_E = (b_b * b_k * b_start).to(CT)
            b_S = load_matrix(states, i_chv, o_k, o_v, K, V, STATES_T)
            b_rest -= matmul(b_E, b_S, CT, PRECISION)
            if i_v == 0:
                if not FOR_CARVE_LOOP:
                    b_E = matmul(b_A, b_E, CT, PRECISION).to(CT)
                else:
                    b_slope = b_b * (1.0 - b_b / erase_scale) * b_k * load_tile(left, i_ch, o_r, K, o_k).to(tl.float32)
                    store_tile(gate_slope, i_chv, o_r, K, o_k, b_slope)
                if GATE == GATE_CONTENT:
                    store_tile(erasure, i_chv, o_r, K, o_k, b_E)
                if i_hv % G == 0:
                    if GATE != GATE_CONTENT:
                        store_tile(erasure, i_ch, o_r, K, o_k, b_E)
                    b_q = load_rows(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale
                    store_tile(q_from_start, i_ch, o_r, K, o_k, b_q * b_start)
                    b_to_end = load_decay_to_end(right, last, rest, first_steep, i_ch, o_r, K, o_k)
                    store_tile(k_to_end, i_ch, o_r, K, o_k, b_k * b_to_end)
                    if FOR_CARVE_LOOP:
                        tl.store(q_sum + i_ch * K + o_k, tl.sum(b_q * b_start, 0))
                        b_right = load_tile(right, i_ch, o_r, K, o_k).to(tl.float32)
                        store_tile(k_right, i_ch, o_r, K, o_k, b_k * b_right)
        store_tile(residuals, i_chv, o_r, V, o_v, matmul(b_A, b_rest, CT, PRECISION))


@triton.jit
def chunk_value_gradient_kernel(
    v, w, A, do, d_output_rows, residuals, d_residuals,
    dv, dw, d_outputs, d_written, dT, dP, dP_own,
    table, H, HV,
    V: tl.constexpr, BV: tl.constexpr, PER_HEAD_A: tl.constexpr,
    SCALAR_W: tl.constexpr, LOGITS_W: tl.constexpr, OUTPUT_ROWS: tl.constexpr,
    D_STATES_T: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and value head: gradients of values, write gates and both score matrices.

    Writes dv, dw like v, w (dw of a scalar gate per token), and per chunk
        d_outputs [NC, HV, C, V]: for OUTPUT_ROWS, do with d_output_rows added to every row,
        d_written [NC, HV, C, V]: A^T dR, gradient of w v,
        dT, dP [NC, HV, C, C]: gradients of the erased scores and of the query scores with earlier keys,
        dP_own [NC, HV, C] float32: gradient of the query scores with the keys of the same row.
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_chv = i_c * HV + i_hv
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    i_A = i_chv if PER_HEAD_A else i_c * H + i_hv // (HV // H)
    b_At = load_matrix(A, i_A, o_r, o_r, 64, 64, True)
    b_dT = tl.zeros([64, 64], tl.float32)
    b_dP = tl.zeros([64, 64], tl.float32)
    b_dw_row = tl.zeros([64], tl.float32)
    for i_v in range(V // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_dz = matmul(b_At, load_matrix(d_residuals, i_chv, o_r, o_v, 64, V, D_STATES_T), CT, PRECISION)
        store_tile(d_written, i_chv, o_r, V, o_v, b_dz)
        b_Rt = load_matrix(residuals, i_chv, o_v, o_r, V, 64, True)
        b_do = load_rows(do, start, o_r, m_r, i_hv, HV, V, o_v)
        if OUTPUT_ROWS:
            b_do = b_do.to(tl.float32) + load_columns(d_output_rows, i_chv, V, o_v)[None, :]
            b_do = tl.where(m_r[:, None], b_do, 0.0).to(CT)
            store_tile(d_outputs, i_chv, o_r, V, o_v, b_do)
        b_dT -= matmul(b_dz, b_Rt, CT, PRECISION)
        b_dP += matmul(b_do, b_Rt, CT, PRECISION)
        b_v = load_rows(v, start, o_r, m_r, i_hv, HV, V, o_v).to(tl.float32)
        b_w = load_write_gate(w, start, o_r, m_r, i_hv, HV, V, o_v, SCALAR_W, LOGITS_W)
        store_rows(dv, start, o_r, m_r, i_hv, HV, V, o_v, b_w * b_dz)
        b_dw = b_v * b_dz
        if LOGITS_W:
            b_dw *= b_w * (1.0 - b_w)
        if SCALAR_W:
            b_dw_row += tl.sum(b_dw, 1)
        else:
            store_rows(dw, start, o_r, m_r, i_hv, HV, V, o_v, b_dw)
    if SCALAR_W:
        tl.store(dw + (start + o_r) * HV + i_hv, b_dw_row.to(dw.dtype.element_ty), mask=m_r)
    b_dT = tl.where(o_r[:, None] > o_r[None, :], b_dT, 0.0)
    tl.store(dP_own + i_chv * 64 + o_r, tl.sum(tl.where(o_r[:, None] == o_r[None, :], b_dP, 0.0), 1))
    b_dP = tl.where(o_r[:, None] > o_r[None, :], b_dP, 0.0)
    store_tile(dT, i_chv, o_r, 64, o_r, b_dT)
    store_tile(dP, i_chv, o_r, 64, o_r, b_dP)


@triton.jit
def chunk_row_gradient_kernel(
    q, k, b, content, left, right, steep_from, do, d_outputs, states, d_written, dT, dP, dP_own,
    dq, dk, db, d_content, d_sums,
    table, scale, erase_scale, H, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, OUTPUT_ROWS: tl.constexpr, STATES_T: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of key columns, chunk and value head: gradients of what stands in rows, b k and q.

    They come through the state before the chunk and through the scores with earlier keys. Writes dq, db [B*T, HV, K], a
    share per value head; what of dk is known then, in dk; for GATE_CONTENT d_content [NC, HV, K], the sum of db over
    the chunk; and d_sums [NC, HV, C, K] float32, the gradient of the sums of log-decays from the chunk's start. On
    entry dq and db of a chunk with steep rows hold what steep_gradient_kernel wrote there.
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64) // (K // BK), tl.program_id(1)
    i_h = i_hv // (HV // H)
    i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    o_k = (tl.program_id(0) % (K // BK)) * BK + tl.arange(0, BK)
    first_steep = tl.load(steep_from + i_ch)
    m_steep = m_r & (o_r >= tl.where(first_steep < 64, 0, 64))
    b_dbk = tl.zeros([64, BK], tl.float32)
    b_dq = tl.zeros([64, BK], tl.float32)
    for i_v in range(V // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_S = load_matrix(states, i_chv, o_k, o_v, K, V, STATES_T)
        b_dbk -= matmul(load_tile(d_written, i_chv, o_r, V, o_v), tl.trans(b_S), CT, PRECISION)
        if OUTPUT_ROWS:
            b_do = load_tile(d_outputs, i_chv, o_r, V, o_v)
        else:
            b_do = load_rows(do, start, o_r, m_r, i_hv, HV, V, o_v)
        b_dq += matmul(b_do, tl.trans(b_S), CT, PRECISION)
    b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_columns = (b_k * load_tile(right, i_ch, o_r, K, o_k).to(tl.float32)).to(CT)
    o_square = i_chv * 64 * 64 + (o_r[:, None] * 64 + o_r[None, :])
    m_mild = (o_r < first_steep)[:, None]
    b_dT, b_dP = tl.load(dT + o_square, mask=m_mild, other=0.0), tl.load(dP + o_square, mask=m_mild, other=0.0)
    b_dbk = b_dbk * UNSHIFT + matmul(b_dT, b_columns, CT, PRECISION)
    b_dq = b_dq * UNSHIFT + matmul(b_dP, b_columns, CT, PRECISION)
    b_left = load_tile(left, i_ch, o_r, K, o_k).to(tl.float32)
    b_dbk = b_left * b_dbk + load_rows(db, start, o_r, m_steep, i_hv, HV, K, o_k).to(tl.float32)
    b_dq = b_left * b_dq + load_rows(dq, start, o_r, m_steep, i_hv, HV, K, o_k).to(tl.float32)
    b_b = load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_chv, K, o_k, erase_scale, GATE)
    b_q = load_rows(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale
    # a query meets its own key without decay
    b_own = tl.load(dP_own + i_chv * 64 + o_r)[:, None]
    store_tile(d_sums, i_chv, o_r, K, o_k, b_q * b_dq + b_b * b_k * b_dbk)
    store_rows(dq, start, o_r, m_r, i_hv, HV, K, o_k, scale * (b_dq + b_own * b_k))
    store_rows(dk, start, o_r, m_r, i_hv, HV, K, o_k, b_b * b_dbk + b_own * b_q)
    b_db = b_k * b_dbk
    if GATE != GATE_VALUES:
        b_db *= b_b * (1.0 - b_b / erase_scale)
    if GATE == GATE_CONTENT:
        tl.store(d_content + i_chv * K + o_k, tl.sum(tl.where(m_r[:, None], b_db, 0.0), 0))
    store_rows(db, start, o_r, m_r, i_hv, HV, K, o_k, b_db)


@triton.jit
def chunk_key_gradient_kernel(
    q, k, g, b, A_log, dt_bias, content, left, right, last, rest, steep_from,
    states, d_states, residuals, dT, dP, d_sums, steep_dk,
    dk, dg, dA_log, d_dt_bias,
    table, scale, erase_scale, H, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, RAW_DECAY: tl.constexpr, STATES_T: tl.constexpr, D_STATES_T: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of key columns, chunk and value head: gradients of the keys as columns, and of the decays.

    They come through the state after the chunk and through the scores with later rows. Adds to dk what
    chunk_row_gradient_kernel left there, and steep_dk in a chunk with steep rows, and writes dg [B*T, HV, K]; for
    RAW_DECAY also dA_log and d_dt_bias [NC, HV, K], sums over the chunk.
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64) // (K // BK), tl.program_id(1)
    i_h = i_hv // (HV // H)
    i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    o_k = (tl.program_id(0) % (K // BK)) * BK + tl.arange(0, BK)
    first_steep = tl.load(steep_from + i_ch)
    m_steep = m_r & (o_r >= tl.where(first_steep < 64, 0, 64))
    b_dkey = tl.zeros([64, BK], tl.float32)
    b_dtotal = tl.zeros([BK], tl.float32)
    for i_v in range(V // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_dS = load_matrix(d_states, i_chv, o_k, o_v, K, V, D_STATES_T)
        b_dkey += matmul(load_tile(residuals, i_chv, o_r, V, o_v), tl.trans(b_dS), CT, PRECISION)
        b_S = load_matrix(states, i_chv, o_k, o_v, K, V, STATES_T)
        b_dtotal += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)
    b_dkey *= load_decay_to_end(right, last, rest, first_steep, i_ch, o_r, K, o_k)
    b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_dtotal = b_dtotal * load_total_decay(last, i_ch, K, o_k) + tl.sum(b_dkey * b_k, 0)

    b_left = load_tile(left, i_ch, o_r, K, o_k).to(tl.float32)
    b_bk = load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_chv, K, o_k, erase_scale, GATE) * b_k * b_left
    b_q = load_rows(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale * b_left
    o_transposed = i_chv * 64 * 64 + (o_r[None, :] * 64 + o_r[:, None])
    m_mild = (o_r < first_steep)[None, :]
    b_dcolumn = matmul(tl.load(dT + o_transposed, mask=m_mild, other=0.0), b_bk, CT, PRECISION)
    b_dcolumn += matmul(tl.load(dP + o_transposed, mask=m_mild, other=0.0), b_q, CT, PRECISION)
    b_dkey += b_dcolumn * load_tile(right, i_ch, o_r, K, o_k).to(tl.float32)
    b_dkey += load_rows(steep_dk, start, o_r, m_steep, i_hv, HV, K, o_k).to(tl.float32)
    b_dg = load_tile(d_sums, i_chv, o_r, K, o_k) - b_k * b_dkey
    b_dkey += load_rows(dk, start, o_r, m_r, i_hv, HV, K, o_k).to(tl.float32)
    store_rows(dk, start, o_r, m_r, i_hv, HV, K, o_k, b_dkey)

    # The log-decays: what a row gains with its decay from the start, a key loses. The decay of the whole chunk and that
    # of a key to its end also run over the steps after a row: their sum is added at every step.
    b_dg = sum_rows(o_r[None, :] >= o_r[:, None], b_dg, CT) + b_dtotal[None, :]
    if RAW_DECAY:
        b_dg = tl.where(m_r[:, None], b_dg, 0.0)
        b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
        tl.store(dA_log + i_chv * K + o_k, tl.sum(b_dg * b_g, 0) / LOG2_E)
        b_x = load_rows(g, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        b_x += tl.load(dt_bias + i_h * K + o_k)[None, :]
        b_dg *= -tl.exp(tl.load(A_log + i_h)) * tl.sigmoid(b_x)
        tl.store(d_dt_bias + i_chv * K + o_k, tl.sum(b_dg, 0))
    store_rows(dg, start, o_r, m_r, i_hv, HV, K, o_k, b_dg)
