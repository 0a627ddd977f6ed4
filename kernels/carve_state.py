"""CARVE, the stages that run from chunk to chunk: erase gate, inverse and state forward, their gradients backward.

The erase gate of a content chunk waits for the outputs of the one before it, so these loops are the critical path, and
one program runs a whole head. Vectors of the content path (mean output, content term) are held as 16 equal rows: the
tensor cores then take them like any tile, and no reduction across threads is needed. Four warps, because products of 64
rows that feed each other are divided among warps by rows, 16 to each: with eight, every value would be held twice.
"""

import triton
import triton.language as tl

from .tiles import (
    chunk_rows,
    load_blocks,
    load_steep_rows,
    load_tile,
    load_write_gate,
    matmul,
    pairs_in_block,
    pairs_of_halves,
    store_tile,
    unit_lower_inverse,
)


@triton.jit
def store_equal_rows(x, o_r, o_d, m_d, b_x):
    """Store one row of a tile of equal rows as a vector."""
    tl.store(x + o_d[None, :] + 0 * o_r[:, None], b_x, mask=(o_r == 0)[:, None] & m_d[None, :])


@triton.jit
def load_equal_rows(x, o_r, o_d, m_d):
    """Load a vector as a tile of equal rows."""
    return tl.load(x + o_d[None, :] + 0 * o_r[:, None], mask=m_d[None, :] & (o_r >= 0)[:, None], other=0.0)


@triton.jit
def first_of_equal_rows(o_r, o_e, CT: tl.constexpr):
    """[64, 16]: times a tile of 16 equal rows, its 64 equal rows."""
    return tl.where((o_e[None, :] == 0) & (o_r[:, None] >= 0), 1.0, 0.0).to(CT)


@triton.jit
def carve_state_kernel(
    v, erase_logits, w, content_down, content_up, q_sum, P_sum, blocks, steep,
    k_down, k_up, k_16, k_32, k_start, k_to_end, k_halved,
    initial_S, initial_mean, initial_partial, initial_count,
    A, states, residuals, codes, means, final_S, final_mean, final_partial,
    table, first, content_chunk, erase_scale, H, HV,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence and value head; KP, VP, RP are K, V, R rounded up to powers of two (RP at least 16).

    Writes per chunk A [NC, HV, C, C], states [NC, HV, K, V], residuals [NC, HV, C, V] as GDN-2's stages do, and
        means [NC, HV, V] float32: m, the mean output of the content chunk before, where it is not zero,
        codes [NC, HV, R] float32: D m,
    and the final state of the head (final_mean only where it is not zero).
    """
    i_n, i_hv = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    i_h, i_nhv = i_hv // (HV // H), i_n * HV + i_hv
    o_r, o_k, o_v, o_c, o_e = tl.arange(0, 64), tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, RP), tl.arange(0, 16)
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]
    p_down = content_down + i_hv * R * V + (o_c[None, :] * V + o_v[:, None])
    p_up = content_up + i_hv * K * R + (o_k[None, :] * R + o_c[:, None])
    m_down, m_up = (o_c < R)[None, :] & m_v[:, None], (o_c < R)[:, None] & m_k[None, :]

    b_S = tl.zeros([KP, VP], tl.float32)
    b_partial = tl.zeros([16, VP], tl.float32)
    b_code = tl.zeros([16, RP], tl.float32)
    count = tl.zeros([], tl.int64)
    begin, end = tl.load(first + i_n), tl.load(first + i_n + 1)
    if HAS_INITIAL:
        b_S += tl.load(initial_S + i_nhv * K * V + o_s, mask=m_s, other=0.0)
        b_partial += load_equal_rows(initial_partial + i_nhv * V, o_e, o_v, m_v)
        b_mean = load_equal_rows(initial_mean + i_nhv * V, o_e, o_v, m_v)
        count += tl.load(initial_count + i_n) // 64 * 64
        b_code += matmul(b_mean, tl.load(p_down, mask=m_down, other=0.0), CT, PRECISION)
        for i_next in range(begin, tl.minimum(begin + (content_chunk - count) // 64, end)):
            store_equal_rows(means + (i_next * HV + i_hv) * V, o_e, o_v, m_v, b_mean)
        if STORE_FINAL:
            store_equal_rows(final_mean + i_nhv * V, o_e, o_v, m_v, b_mean)
    for i_c in range(begin, end):
        start, low, high = chunk_rows(table, i_c)
        m_r = (o_r >= low) & (o_r < high)
        i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
        b_S_CT = b_S.to(CT)
        tl.store(states + i_chv * K * V + o_s, b_S_CT, mask=m_s)
        store_equal_rows(codes + i_chv * R, o_e, o_c, o_c < R, b_code)

        p_b = erase_logits + start * (H * K) + (o_r[:, None] * (H * K) + i_h * K + o_k[None, :])
        b_b = tl.load(p_b, mask=m_r[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        b_content = matmul(b_code, tl.load(p_up, mask=m_up, other=0.0), CT, PRECISION)
        # the sum as a product's accumulator: kept apart, the compiler would form the gate in every layout it is used in
        b_b = tl.dot(first_of_equal_rows(o_r, o_e, CT), b_content.to(CT), b_b, input_precision=PRECISION)
        b_b = (erase_scale * tl.sigmoid(b_b)).to(CT)
        b_steep = load_steep_rows(steep, i_ch, o_r)
        b_x = load_tile(k_down, i_ch, o_r, K, o_k)
        b_y = load_tile(k_up, i_ch, o_r, K, o_k)
        b_T = tl.where(pairs_in_block(o_r, b_steep), matmul(b_b * b_x, tl.trans(b_y), CT, PRECISION), 0.0)
        b_x = load_tile(k_16, i_ch, o_r, K, o_k)
        b_T += tl.where(pairs_of_halves(o_r, 4), matmul(b_b * b_x, tl.trans(b_x), CT, PRECISION), 0.0)
        b_x = load_tile(k_32, i_ch, o_r, K, o_k)
        b_T += tl.where(pairs_of_halves(o_r, 5), matmul(b_b * b_x, tl.trans(b_x), CT, PRECISION), 0.0)
        for step in range(tl.where(tl.max(b_steep, 0) == 0, 0, 4)):
            b_x = load_tile(k_halved, i_ch * 4 + step, o_r, K, o_k)
            m_pairs = pairs_of_halves(o_r, step) & (b_steep == 1)[:, None]
            b_T += tl.where(m_pairs, matmul(b_b * b_x, tl.trans(b_x), CT, PRECISION), 0.0)
        b_A = unit_lower_inverse(b_T, o_r, CT, PRECISION).to(CT)
        store_tile(A, i_chv, o_r, 64, o_r, b_A)

        p_v = v + start * (HV * V) + (o_r[:, None] * (HV * V) + i_hv * V + o_v[None, :])
        b_z = tl.load(p_v, mask=m_r[:, None] & m_v[None, :], other=0.0).to(tl.float32)
        b_z *= load_write_gate(w, start, o_r, m_r, i_hv, HV, V, o_v, True, LOGITS_W)
        b_z -= matmul(b_b * load_tile(k_start, i_ch, o_r, K, o_k), b_S_CT, CT, PRECISION)
        b_R = matmul(b_A, b_z, CT, PRECISION).to(CT)
        store_tile(residuals, i_chv, o_r, V, o_v, b_R)

        b_partial += matmul(load_equal_rows(q_sum + i_ch * K, o_e, o_k, m_k), b_S_CT, CT, PRECISION)
        b_partial += matmul(load_equal_rows(P_sum + i_ch * 64, o_e, o_r, o_r >= 0), b_R, CT, PRECISION)
        b_0, b_1, b_2, b_3 = load_blocks(blocks, i_ch, K, o_k)
        b_S *= (b_0 * b_1 * b_2 * b_3)[:, None]
        b_S += matmul(tl.trans(load_tile(k_to_end, i_ch, o_r, K, o_k)), b_R, CT, PRECISION)
        count += 64
        if (high == 64) & (count % content_chunk == 0):
            b_mean = b_partial / content_chunk
            b_partial = tl.zeros([16, VP], tl.float32)
            b_code = matmul(b_mean, tl.load(p_down, mask=m_down, other=0.0), CT, PRECISION)
            for i_next in range(i_c + 1, tl.minimum(i_c + 1 + content_chunk // 64, end)):
                store_equal_rows(means + (i_next * HV + i_hv) * V, o_e, o_v, m_v, b_mean)
            if STORE_FINAL:
                store_equal_rows(final_mean + i_nhv * V, o_e, o_v, m_v, b_mean)
    if STORE_FINAL:
        tl.store(final_S + i_nhv * K * V + o_s, b_S, mask=m_s)
        store_equal_rows(final_partial + i_nhv * V, o_e, o_v, m_v, b_partial)


@triton.jit
def carve_state_gradient_kernel(
    erase_logits, content_down, content_up, content, q_sum, P_sum, blocks, steep,
    k_down, k_up, k_16, k_32, k_start, k_to_end, k_halved,
    A, states, residuals, erasure, q_from_start, d_residuals_here, do,
    d_final_S, d_final_mean, d_final_partial, initial_count,
    d_states, d_residuals, d_output_rows, d_initial_S, d_initial_mean, d_initial_partial,
    table, first, content_chunk, erase_scale, H, HV,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    HAS_FINAL: tl.constexpr, HAS_INITIAL: tl.constexpr, DETACHED: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The reverse of carve_state_kernel, with the same programs.

    Writes per chunk d_states [NC, HV, K, V], d_residuals [NC, HV, C, V] as GDN-2's stage does, and
        d_output_rows [NC, HV, V] float32: what the content path adds to the gradient of every output of the chunk,
    and the gradient of the initial state of the head.
    """
    i_n, i_hv = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    i_h, i_nhv = i_hv // (HV // H), i_n * HV + i_hv
    o_r, o_k, o_v, o_c, o_e = tl.arange(0, 64), tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, RP), tl.arange(0, 16)
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]
    p_down = content_down + i_hv * R * V + (o_c[:, None] * V + o_v[None, :])
    p_up = content_up + i_hv * K * R + (o_k[:, None] * R + o_c[None, :])
    m_down, m_up = (o_c < R)[:, None] & m_v[None, :], m_k[:, None] & (o_c < R)[None, :]

    first_chunk, last_chunk = tl.load(first + i_n), tl.load(first + i_n + 1) - 1
    count = (last_chunk - first_chunk + 1) * 64
    if HAS_INITIAL:
        count += tl.load(initial_count + i_n) // 64 * 64
    b_dS = tl.zeros([KP, VP], tl.float32)
    # Gradients of D m: of the running content chunk's, summed up, and of the next one's, known.
    b_d_code = tl.zeros([16, RP], tl.float32)
    b_d_next_code = tl.zeros([16, RP], tl.float32)
    # what the final state's gradients weigh in that of an output: the partial sum's before the first content chunk
    # from behind that is complete, then the mean's in that one
    partial_weight, mean_weight, mean_pending = 1.0, 0.0, 1.0
    if HAS_FINAL:
        b_dS += tl.load(d_final_S + i_nhv * K * V + o_s, mask=m_s, other=0.0)
    _, _, last_high = chunk_rows(table, tl.maximum(last_chunk, 0))
    for i_back in range(last_chunk - first_chunk + 1):
        i_c = last_chunk - i_back
        if ((i_back > 0) | (last_high == 64)) & (count % content_chunk == 0):
            b_d_next_code = b_d_code / content_chunk
            b_d_code = tl.zeros([16, RP], tl.float32)
            partial_weight, mean_weight, mean_pending = 0.0, mean_pending / content_chunk, 0.0
        count -= 64
        start, low, high = chunk_rows(table, i_c)
        m_r = (o_r >= low) & (o_r < high)
        i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
        b_dS_CT = b_dS.to(CT)
        tl.store(d_states + i_chv * K * V + o_s, b_dS_CT, mask=m_s)
        b_d_row = matmul(b_d_next_code, tl.load(p_down, mask=m_down, other=0.0), CT, PRECISION)
        if HAS_FINAL:
            b_d_row += partial_weight * load_equal_rows(d_final_partial + i_nhv * V, o_e, o_v, m_v)
            b_d_row += mean_weight * load_equal_rows(d_final_mean + i_nhv * V, o_e, o_v, m_v)
        store_equal_rows(d_output_rows + i_chv * V, o_e, o_v, m_v, b_d_row)

        # every output of the chunk gets the same row, so a residual gets it times the column sum of P
        b_P_sum = tl.where(o_e[None, :] == 0, tl.load(P_sum + i_ch * 64 + o_r)[:, None], 0.0)
        b_dR = load_tile(d_residuals_here, i_chv, o_r, V, o_v).to(tl.float32)
        b_dR = tl.dot(b_P_sum.to(CT), b_d_row.to(CT), b_dR, input_precision=PRECISION)
        b_dR += matmul(load_tile(k_to_end, i_ch, o_r, K, o_k), b_dS_CT, CT, PRECISION)
        b_dR = b_dR.to(CT)
        store_tile(d_residuals, i_chv, o_r, V, o_v, b_dR)
        b_At = tl.load(A + i_chv * 64 * 64 + (o_r[None, :] * 64 + o_r[:, None]))
        b_dz = matmul(b_At, b_dR, CT, PRECISION).to(CT)

        if not DETACHED:
            b_dT = matmul(b_dz, tl.trans(load_tile(residuals, i_chv, o_r, V, o_v)), CT, PRECISION)
            b_S = tl.load(states + i_chv * K * V + o_s, mask=m_s, other=0.0)
            b_db = load_tile(k_start, i_ch, o_r, K, o_k) * matmul(b_dz, tl.trans(b_S), CT, PRECISION)
            b_steep = load_steep_rows(steep, i_ch, o_r)
            b_x = load_tile(k_up, i_ch, o_r, K, o_k)
            b_x = matmul(tl.where(pairs_in_block(o_r, b_steep), b_dT, 0.0), b_x, CT, PRECISION)
            b_db += load_tile(k_down, i_ch, o_r, K, o_k) * b_x
            b_x = load_tile(k_16, i_ch, o_r, K, o_k)
            b_db += b_x * matmul(tl.where(pairs_of_halves(o_r, 4), b_dT, 0.0), b_x, CT, PRECISION)
            b_x = load_tile(k_32, i_ch, o_r, K, o_k)
            b_db += b_x * matmul(tl.where(pairs_of_halves(o_r, 5), b_dT, 0.0), b_x, CT, PRECISION)
            for step in range(tl.where(tl.max(b_steep, 0) == 0, 0, 4)):
                b_x = load_tile(k_halved, i_ch * 4 + step, o_r, K, o_k)
                m_pairs = pairs_of_halves(o_r, step) & (b_steep == 1)[:, None]
                b_db += b_x * matmul(tl.where(m_pairs, b_dT, 0.0), b_x, CT, PRECISION)
            p_b = erase_logits + start * (H * K) + (o_r[:, None] * (H * K) + i_h * K + o_k[None, :])
            b_b = tl.load(p_b, mask=m_r[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            b_b = tl.sigmoid(b_b + tl.load(content + i_chv * K + o_k, mask=m_k, other=0.0)[None, :])
            b_db *= b_b * (1.0 - b_b)
            b_db_sum = matmul(tl.full([16, 64], 1.0, CT), b_db, CT, PRECISION)
            b_d_code -= erase_scale * matmul(b_db_sum, tl.load(p_up, mask=m_up, other=0.0), CT, PRECISION)

        p_do = do + start * (HV * V) + (o_r[:, None] * (HV * V) + i_hv * V + o_v[None, :])
        b_do = tl.load(p_do, mask=m_r[:, None] & m_v[None, :], other=0.0).to(tl.float32)
        b_do = tl.dot(first_of_equal_rows(o_r, o_e, CT), b_d_row.to(CT), b_do, input_precision=PRECISION)
        b_0, b_1, b_2, b_3 = load_blocks(blocks, i_ch, K, o_k)
        b_dS *= (b_0 * b_1 * b_2 * b_3)[:, None]
        b_dS += matmul(tl.trans(load_tile(q_from_start, i_ch, o_r, K, o_k)), b_do, CT, PRECISION)
        b_dS -= matmul(tl.trans(load_tile(erasure, i_chv, o_r, K, o_k)), b_dz, CT, PRECISION)
    if HAS_INITIAL:
        b_d = matmul(b_d_code, tl.load(p_down, mask=m_down, other=0.0), CT, PRECISION)
        b_d_row = matmul(b_d_next_code, tl.load(p_down, mask=m_down, other=0.0), CT, PRECISION)
        if HAS_FINAL:
            b_d_mean = load_equal_rows(d_final_mean + i_nhv * V, o_e, o_v, m_v)
            b_d += mean_pending * b_d_mean
            b_d_row += mean_weight * b_d_mean
            b_d_row += partial_weight * load_equal_rows(d_final_partial + i_nhv * V, o_e, o_v, m_v)
        tl.store(d_initial_S + i_nhv * K * V + o_s, b_dS, mask=m_s)
        store_equal_rows(d_initial_mean + i_nhv * V, o_e, o_v, m_v, b_d)
        store_equal_rows(d_initial_partial + i_nhv * V, o_e, o_v, m_v, b_d_row)
