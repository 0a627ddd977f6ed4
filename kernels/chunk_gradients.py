"""The stages of the backward that treat all chunks at once."""

import triton
import triton.language as tl

from .decay_factors import load_log2_decay
from .tiles import (
    GATE_CONTENT,
    GATE_VALUES,
    LOG2_E,
    by_block,
    chunk_rows,
    decay_after_block,
    decay_before_block,
    later_pairs_in_block,
    load_blocks,
    load_erase_gate,
    load_rows,
    load_steep_rows,
    load_tile,
    load_write_gate,
    matmul,
    pairs_in_block,
    pairs_of_halves,
    pairs_of_halves_mirrored,
    reverse_cumsum,
    store_rows,
    store_tile,
)


@triton.jit
def chunk_recompute_kernel(
    q, k, v, b, w, content, down, rest, blocks, A, P, states, do,
    erasure, q_from_start, k_to_end, residuals, d_residuals_here,
    table, scale, erase_scale, H, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, SCALAR_W: tl.constexpr, LOGITS_W: tl.constexpr,
    WITH_A: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and value head: what the forward formed and did not keep.

    Writes per chunk
        erasure [NC, HE, C, K]: A (exp(G) b k), or exp(G) b k where WITH_A is false. HE is HV where the gate sees
            content, else H.
        q_from_start [NC, H, C, K]: scale * exp(G) q; k_to_end [NC, H, C, K].
        residuals [NC, HV, C, V]: R = A (w v - exp(G) b k S).
        d_residuals_here [NC, HV, C, V]: P^T do.
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    G = HV // H
    i_h = i_hv // G
    i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    b_A = load_tile(A, i_chv if GATE == GATE_CONTENT else i_ch, o_r, 64, o_r)
    b_Pt = tl.load(P + i_ch * 64 * 64 + (o_r[None, :] * 64 + o_r[:, None]))
    for i_v in tl.static_range(V // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = load_rows(do, start, o_r, m_r, HV * V, i_hv * V + o_v)
        store_tile(d_residuals_here, i_chv, o_r, V, o_v, matmul(b_Pt, b_do, CT, PRECISION))
        b_w = load_write_gate(w, start, o_r, m_r, i_hv, HV, V, o_v, SCALAR_W, LOGITS_W)
        b_rest = b_w * load_rows(v, start, o_r, m_r, HV * V, i_hv * V + o_v).to(tl.float32)
        for i_k in range(K // BK):
            o_k = i_k * BK + tl.arange(0, BK)
            b_0, b_1, b_2, b_3 = load_blocks(blocks, i_ch, K, o_k)
            b_decay = load_tile(down, i_ch, o_r, K, o_k).to(tl.float32) * decay_before_block(o_r, b_0, b_1, b_2)
            b_k = load_rows(k, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32)
            b_b = load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_chv, K, o_k, erase_scale, GATE)
            b_E = (b_b * b_k * b_decay).to(CT)
            b_S = tl.load(states + i_chv * K * V + (o_k[:, None] * V + o_v[None, :]))
            b_rest -= matmul(b_E, b_S, CT, PRECISION)
            if i_v == 0:
                if WITH_A:
                    b_E = matmul(b_A, b_E, CT, PRECISION).to(CT)
                if GATE == GATE_CONTENT:
                    store_tile(erasure, i_chv, o_r, K, o_k, b_E)
                if i_hv % G == 0:
                    if GATE != GATE_CONTENT:
                        store_tile(erasure, i_ch, o_r, K, o_k, b_E)
                    b_q = load_rows(q, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32) * scale
                    store_tile(q_from_start, i_ch, o_r, K, o_k, b_q * b_decay)
                    b_decay = load_tile(rest, i_ch, o_r, K, o_k).to(tl.float32)
                    store_tile(k_to_end, i_ch, o_r, K, o_k, b_k * b_decay * decay_after_block(o_r, b_1, b_2, b_3))
        store_tile(residuals, i_chv, o_r, V, o_v, matmul(b_A, b_rest, CT, PRECISION))


@triton.jit
def chunk_value_gradient_kernel(
    v, w, A, do, d_output_rows, residuals, d_residuals,
    dv, dw, d_written, dT, dP,
    table, H, HV,
    V: tl.constexpr, BV: tl.constexpr, PER_HEAD_A: tl.constexpr,
    SCALAR_W: tl.constexpr, LOGITS_W: tl.constexpr, OUTPUT_ROWS: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and value head: gradients of values, write gates and both score matrices.

    Writes dv, dw like v, w (dw of a scalar gate per token), and per chunk
        d_written [NC, HV, C, V]: A^T dR, gradient of w v,
        dT, dP [NC, HV, C, C]: gradients of the erased scores and of the query scores.
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_chv = i_c * HV + i_hv
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    i_A = i_chv if PER_HEAD_A else i_c * H + i_hv // (HV // H)
    b_At = tl.load(A + i_A * 64 * 64 + (o_r[None, :] * 64 + o_r[:, None]))
    b_dT = tl.zeros([64, 64], tl.float32)
    b_dP = tl.zeros([64, 64], tl.float32)
    b_dw_row = tl.zeros([64], tl.float32)
    for i_v in range(V // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_dz = matmul(b_At, load_tile(d_residuals, i_chv, o_r, V, o_v), CT, PRECISION)
        store_tile(d_written, i_chv, o_r, V, o_v, b_dz)
        b_Rt = tl.load(residuals + i_chv * 64 * V + (o_r[None, :] * V + o_v[:, None]))
        b_do = load_rows(do, start, o_r, m_r, HV * V, i_hv * V + o_v).to(tl.float32)
        if OUTPUT_ROWS:
            b_do += tl.where(m_r[:, None], tl.load(d_output_rows + i_chv * V + o_v)[None, :], 0.0)
        b_dT -= matmul(b_dz, b_Rt, CT, PRECISION)
        b_dP += matmul(b_do, b_Rt, CT, PRECISION)
        b_v = load_rows(v, start, o_r, m_r, HV * V, i_hv * V + o_v).to(tl.float32)
        b_w = load_write_gate(w, start, o_r, m_r, i_hv, HV, V, o_v, SCALAR_W, LOGITS_W)
        store_rows(dv, start, o_r, m_r, HV * V, i_hv * V + o_v, b_w * b_dz)
        b_dw = b_v * b_dz
        if LOGITS_W:
            b_dw *= b_w * (1.0 - b_w)
        if SCALAR_W:
            b_dw_row += tl.sum(b_dw, 1)
        else:
            store_rows(dw, start, o_r, m_r, HV * V, i_hv * V + o_v, b_dw)
    if SCALAR_W:
        tl.store(dw + (start + o_r) * HV + i_hv, b_dw_row.to(dw.dtype.element_ty), mask=m_r)
    b_dT = tl.where(o_r[:, None] > o_r[None, :], b_dT, 0.0)
    b_dP = tl.where(o_r[:, None] >= o_r[None, :], b_dP, 0.0)
    store_tile(dT, i_chv, o_r, 64, o_r, b_dT)
    store_tile(dP, i_chv, o_r, 64, o_r, b_dP)


@triton.jit
def chunk_row_gradient_kernel(
    q, k, b, content, down, up, rest, blocks, steep, do, d_output_rows, states, d_written, dT, dP,
    steep_dq, steep_dbk, dq, dk, db, d_content, d_sums,
    table, scale, erase_scale, H, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, OUTPUT_ROWS: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of key columns, chunk and value head: gradients of what stands in rows, b k and q.

    They come through the state before the chunk and through the scores with the keys before them. Writes dq, db
    [B*T, HV, K], a share per value head; what of dk is known then, in dk; for GATE_CONTENT d_content [NC, HV, K], the
    sum of db over the chunk; and d_sums [NC, HV, C, K] float32, the gradient of the sums of log-decays from the chunk's
    start. steep_dq and steep_dbk are steep_gradient_kernel's results; they may be dq's and db's own memory.
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64) // (K // BK), tl.program_id(1)
    i_h = i_hv // (HV // H)
    i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    o_k = (tl.program_id(0) % (K // BK)) * BK + tl.arange(0, BK)
    i_out = i_hv * K + o_k
    m_block = m_r & (tl.load(steep + i_ch * 4 + o_r // 16) != 0)
    b_drow = tl.zeros([64, BK], tl.float32)
    b_dq = tl.zeros([64, BK], tl.float32)
    for i_v in range(V // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_S = tl.trans(tl.load(states + i_chv * K * V + (o_k[:, None] * V + o_v[None, :])))
        b_do = load_rows(do, start, o_r, m_r, HV * V, i_hv * V + o_v)
        if OUTPUT_ROWS:
            b_do = b_do.to(tl.float32)
            b_do += tl.where(m_r[:, None], tl.load(d_output_rows + i_chv * V + o_v)[None, :], 0.0)
        b_drow -= matmul(load_tile(d_written, i_chv, o_r, V, o_v), b_S, CT, PRECISION)
        b_dq += matmul(b_do, b_S, CT, PRECISION)
    b_0, b_1, b_2, _ = load_blocks(blocks, i_ch, K, o_k)
    b_before = decay_before_block(o_r, b_0, b_1, b_2)
    b_drow *= b_before
    b_dq *= b_before
    b_dT, b_dP = load_tile(dT, i_chv, o_r, 64, o_r), load_tile(dP, i_chv, o_r, 64, o_r)
    b_k = load_rows(k, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32)
    b_columns = b_k * load_tile(rest, i_ch, o_r, K, o_k).to(tl.float32)
    m_pairs = pairs_of_halves(o_r, 4)
    b_drow += matmul(tl.where(m_pairs, b_dT, 0.0), b_columns, CT, PRECISION)
    b_dq += matmul(tl.where(m_pairs, b_dP, 0.0), b_columns, CT, PRECISION)
    b_columns = (b_columns * by_block(o_r, b_1[None, :], 1.0, 0.0, 0.0)).to(CT)
    b_from_half = by_block(o_r, 0.0, 0.0, 1.0, b_2[None, :])
    b_drow += b_from_half * matmul(b_dT, b_columns, CT, PRECISION)
    b_dq += b_from_half * matmul(b_dP, b_columns, CT, PRECISION)
    b_columns = (b_k * load_tile(up, i_ch, o_r, K, o_k).to(tl.float32)).to(CT)
    m_pairs = pairs_in_block(o_r, load_steep_rows(steep, i_ch, o_r))
    b_drow += matmul(tl.where(m_pairs, b_dT, 0.0), b_columns, CT, PRECISION)
    b_dq += matmul(tl.where(m_pairs, b_dP, 0.0), b_columns, CT, PRECISION)
    b_down = load_tile(down, i_ch, o_r, K, o_k).to(tl.float32)
    # a query meets its own key without decay
    b_own = tl.load(dP + i_chv * 64 * 64 + o_r * 65).to(tl.float32)[:, None]
    b_q = load_rows(q, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32) * scale
    b_dq = b_dq * b_down + load_rows(steep_dq, start, o_r, m_block, HV * K, i_out).to(tl.float32)
    store_rows(dq, start, o_r, m_r, HV * K, i_out, scale * (b_dq + b_own * b_k))
    b_dg = b_q * b_dq
    b_b = load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_chv, K, o_k, erase_scale, GATE)
    b_drow = b_drow * b_down + load_rows(steep_dbk, start, o_r, m_block, HV * K, i_out).to(tl.float32)
    b_dg += b_b * b_k * b_drow
    b_db = b_k * b_drow
    if GATE != GATE_VALUES:
        b_db *= b_b * (1.0 - b_b / erase_scale)
    if GATE == GATE_CONTENT:
        tl.store(d_content + i_chv * K + o_k, tl.sum(tl.where(m_r[:, None], b_db, 0.0), 0))
    store_rows(db, start, o_r, m_r, HV * K, i_out, b_db)
    store_rows(dk, start, o_r, m_r, HV * K, i_out, b_b * b_drow + b_own * b_q)
    store_tile(d_sums, i_chv, o_r, K, o_k, b_dg)


@triton.jit
def chunk_key_gradient_kernel(
    q, k, g, b, A_log, dt_bias, content, down, up, rest, blocks, steep,
    states, d_states, residuals, dT, dP, d_sums, steep_dk,
    dk, dg, dA_log, d_dt_bias,
    table, scale, erase_scale, H, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, RAW_DECAY: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of key columns, chunk and value head: gradients of the keys as columns, and of the decays.

    They come through the state after the chunk and through the scores with the rows after them. Adds to dk what
    chunk_row_gradient_kernel left there, and writes dg [B*T, HV, K]; for RAW_DECAY also dA_log and d_dt_bias
    [NC, HV, K], sums over the chunk.
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64) // (K // BK), tl.program_id(1)
    i_h = i_hv // (HV // H)
    i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    o_k = (tl.program_id(0) % (K // BK)) * BK + tl.arange(0, BK)
    i_out = i_hv * K + o_k
    m_block = m_r & (tl.load(steep + i_ch * 4 + o_r // 16) != 0)
    b_dkey = tl.zeros([64, BK], tl.float32)
    b_dtotal = tl.zeros([BK], tl.float32)
    for i_v in range(V // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        o_S = o_k[:, None] * V + o_v[None, :]
        b_dS = tl.load(d_states + i_chv * K * V + o_S)
        b_dkey += matmul(load_tile(residuals, i_chv, o_r, V, o_v), tl.trans(b_dS), CT, PRECISION)
        b_dtotal += tl.sum(tl.load(states + i_chv * K * V + o_S).to(tl.float32) * b_dS.to(tl.float32), 1)
    b_0, b_1, b_2, b_3 = load_blocks(blocks, i_ch, K, o_k)
    b_rest = load_tile(rest, i_ch, o_r, K, o_k).to(tl.float32)
    b_dkey *= decay_after_block(o_r, b_1, b_2, b_3) * b_rest
    b_k = load_rows(k, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32)
    b_dtotal = b_dtotal * b_0 * b_1 * b_2 * b_3 + tl.sum(b_dkey * b_k, 0)

    b_down = load_tile(down, i_ch, o_r, K, o_k).to(tl.float32)
    b_q = load_rows(q, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32) * scale * b_down
    b_bk = load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_chv, K, o_k, erase_scale, GATE) * b_k * b_down
    o_transposed = o_r[None, :] * 64 + o_r[:, None]
    b_dT, b_dP = tl.load(dT + i_chv * 64 * 64 + o_transposed), tl.load(dP + i_chv * 64 * 64 + o_transposed)
    b_from_half = by_block(o_r, 0.0, 0.0, 1.0, b_2[None, :])
    b_dcolumn = matmul(b_dT, b_bk * b_from_half, CT, PRECISION)
    b_dcolumn += matmul(b_dP, b_q * b_from_half, CT, PRECISION)
    b_dcolumn *= by_block(o_r, b_1[None, :], 1.0, 0.0, 0.0)
    b_q, b_bk = b_q.to(CT), b_bk.to(CT)
    m_pairs = pairs_of_halves_mirrored(o_r, 4)
    b_dcolumn += matmul(tl.where(m_pairs, b_dT, 0.0), b_bk, CT, PRECISION)
    b_dcolumn += matmul(tl.where(m_pairs, b_dP, 0.0), b_q, CT, PRECISION)
    b_dkey += b_dcolumn * b_rest
    m_pairs = later_pairs_in_block(o_r, load_steep_rows(steep, i_ch, o_r))
    b_dcolumn = matmul(tl.where(m_pairs, b_dT, 0.0), b_bk, CT, PRECISION)
    b_dcolumn += matmul(tl.where(m_pairs, b_dP, 0.0), b_q, CT, PRECISION)
    b_dkey += b_dcolumn * load_tile(up, i_ch, o_r, K, o_k).to(tl.float32)
    b_dkey += load_rows(steep_dk, start, o_r, m_block, HV * K, i_out).to(tl.float32)
    b_dg = load_tile(d_sums, i_chv, o_r, K, o_k) - b_k * b_dkey
    b_dkey += load_rows(dk, start, o_r, m_r, HV * K, i_out).to(tl.float32)
    store_rows(dk, start, o_r, m_r, HV * K, i_out, b_dkey)

    # The log-decays: what a row gains with its decay from the start, a key loses. The decay of the whole chunk and that
    # of a key to its end also run over the steps after a row: their sum is added at every step.
    b_dg = reverse_cumsum(b_dg, o_r, CT) + b_dtotal[None, :]
    if RAW_DECAY:
        b_dg = tl.where(m_r[:, None], b_dg, 0.0)
        b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
        tl.store(dA_log + i_chv * K + o_k, tl.sum(b_dg * b_g, 0) / LOG2_E)
        b_x = load_rows(g, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32)
        b_x += tl.load(dt_bias + i_h * K + o_k)[None, :]
        b_dg *= -tl.exp(tl.load(A_log + i_h)) * tl.sigmoid(b_x)
        tl.store(d_dt_bias + i_chv * K + o_k, tl.sum(b_dg, 0))
    store_rows(dg, start, o_r, m_r, HV * K, i_out, b_dg)
