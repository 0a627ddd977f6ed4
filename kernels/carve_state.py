"""CARVE, the stages that run from chunk to chunk: erase gate, inverse and state forward, their gradients backward.

The erase gate of a content chunk waits for the outputs of the one before it, so these loops are the critical path, and
one program runs a whole head. Their tiles are transposed: rows are the V channels, which eight warps divide without
copies, so that the state, the residuals and the state's update follow each other in registers; shared memory passes
on only what is 64 rows high. The content path (mean output, code, content term) is float32 vectors.
"""

import triton
import triton.language as tl

from .steep import write_steep_erase_gradient, write_steep_scores
from .tiles import (
    GATE_CONTENT,
    UNSHIFT,
    load_columns,
    load_matrix,
    load_rows,
    load_tile,
    load_total_decay,
    load_write_gate,
    matmul,
    merge_scores,
    sequence_rows,
    store_columns,
    store_matrix,
    store_tile,
    unit_lower_inverse,
)


@triton.jit
def find_steep_chunk(steep_from, begin, end, i_h, H):
    """The first of a sequence's chunks that has steep rows, or `end`."""
    o_c = tl.arange(0, 64)
    found = end
    for i_c in range(begin, end, 64):
        b_first = tl.load(steep_from + (i_c + o_c) * H + i_h, mask=i_c + o_c < end, other=64)
        found = tl.minimum(found, tl.min(tl.where(b_first < 64, i_c + o_c, end), 0))
    return found


@triton.jit
def carve_state_kernel(
    k, v, g, erase_logits, w, A_log, dt_bias, content_down, content_up,
    q_sum, P_sum, k_left, k_right, k_to_end, last, steep_from,
    initial_S, initial_mean, initial_partial, initial_count,
    A, states, residuals, codes, content, means, final_S, final_mean, final_partial,
    table, first, content_chunk, erase_scale, H, HV,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr,
    HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr, RAW_DECAY: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence and value head; KP, VP, RP are K, V, R rounded up to powers of two;
    BK divides K.

    Writes per chunk A [NC, HV, C, C], states [NC, HV, V, K], residuals [NC, HV, V, C], otherwise as GDN-2's stages do,
    and
        means [NC, HV, V] float32: m, the mean output of the content chunk before,
        codes [NC, HV, R] and content [NC, HV, K] float32: D m and U D m,
    and the final state of the head.
    """
    i_n, i_hv = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    i_h, i_nhv = i_hv // (HV // H), i_n * HV + i_hv
    o_r, o_k, o_v, o_c = tl.arange(0, 64), tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, RP)
    b_down = load_matrix(content_down, i_hv, o_v, o_c, V, R, True).to(tl.float32)
    b_up = load_matrix(content_up, i_hv, o_k, o_c, K, R, False).to(tl.float32)

    b_S = tl.zeros([VP, KP], tl.float32)
    b_mean = tl.zeros([VP], tl.float32)
    b_partial = tl.zeros([VP], tl.float32)
    count = tl.zeros([], tl.int64)
    if HAS_INITIAL:
        b_S += load_matrix(initial_S, i_nhv, o_v, o_k, V, K, True)
        b_mean += load_columns(initial_mean, i_nhv, V, o_v)
        b_partial += load_columns(initial_partial, i_nhv, V, o_v)
        count += tl.load(initial_count + i_n) // 64 * 64
    begin, end = tl.load(first + i_n), tl.load(first + i_n + 1)
    row_0, tokens_from, tokens_to = sequence_rows(table, begin, end)
    first_steep_chunk = find_steep_chunk(steep_from, begin, end, i_h, H)
    # Two copies of the loop: the code for steep rows takes registers that the other chunks go without.
    for STEEP in tl.static_range(2):
        for i_c in range(first_steep_chunk if STEEP else begin, end if STEEP else first_steep_chunk):
            start = row_0 + (i_c - begin) * 64
            m_r = (start + o_r >= tokens_from) & (start + o_r < tokens_to)
            i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
            b_S_CT = b_S.to(CT)
            store_matrix(states, i_chv, o_v, o_k, V, K, False, b_S_CT)
            store_columns(means, i_chv, V, o_v, b_mean)
            b_code = tl.sum(b_down * b_mean[:, None], 0)
            store_columns(codes, i_chv, R, o_c, b_code)
            b_content = tl.sum(b_up * b_code[None, :], 1)
            store_columns(content, i_chv, K, o_k, b_content)

            b_b = load_rows(erase_logits, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
            b_b = erase_scale * tl.sigmoid(b_b + b_content[None, :])
            b_bk = (b_b * load_tile(k_left, i_ch, o_r, K, o_k).to(tl.float32)).to(CT)
            b_T = matmul(b_bk, tl.trans(load_tile(k_right, i_ch, o_r, K, o_k)), CT, PRECISION)
            if STEEP:
                first_steep = tl.load(steep_from + i_ch)
                tl.debug_barrier()  # what other threads stored is visible from here on
                write_steep_scores(
                    k, k, g, erase_logits, content, A_log, dt_bias, A, A, table, 1.0, erase_scale,
                    i_c, i_h, i_chv, H,
                    K, BK, GATE_CONTENT, RAW_DECAY, True, False, CT, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
                b_T = merge_scores(b_T, A + i_chv * 64 * 64 + (o_r[:, None] * 64 + o_r[None, :]), first_steep, o_r)
                tl.debug_barrier()
            else:
                b_T = tl.where(o_r[None, :] < o_r[:, None], b_T, 0.0)
            b_A = unit_lower_inverse(b_T, o_r, CT, PRECISION).to(CT)
            store_tile(A, i_chv, o_r, 64, o_r, b_A)

            b_erased = (matmul(b_S_CT, tl.trans(b_bk), CT, PRECISION) * -UNSHIFT).to(CT)
            b_w = load_write_gate(w, start, o_r, m_r, i_hv, HV, V, o_v, True, LOGITS_W)
            # the write gate scales the columns of A, so that the values go from memory to the product as they are
            b_Aw = (b_A.to(tl.float32) * tl.trans(b_w)).to(CT)
            b_v = tl.trans(load_rows(v, start, o_r, m_r, i_hv, HV, V, o_v))
            b_R = matmul(b_v, tl.trans(b_Aw), CT, PRECISION)
            b_R += matmul(b_erased, tl.trans(b_A), CT, PRECISION)
            b_partial += tl.sum(b_S * load_columns(q_sum, i_ch, K, o_k)[None, :], 1)
            b_partial += tl.sum(b_R * tl.load(P_sum + i_ch * 64 + o_r)[None, :], 1)
            b_R = b_R.to(CT)
            store_matrix(residuals, i_chv, o_v, o_r, V, 64, False, b_R)
            b_S *= load_total_decay(last, i_ch, K, o_k)[None, :]
            b_S += matmul(b_R, load_tile(k_to_end, i_ch, o_r, K, o_k), CT, PRECISION)
            count += 64
            complete = (start + 64 <= tokens_to) & (count % content_chunk == 0)
            b_mean = tl.where(complete, b_partial / content_chunk, b_mean)
            b_partial = tl.where(complete, 0.0, b_partial)
    if STORE_FINAL:
        store_matrix(final_S, i_nhv, o_v, o_k, V, K, True, b_S)
        store_columns(final_mean, i_nhv, V, o_v, b_mean)
        store_columns(final_partial, i_nhv, V, o_v, b_partial)


@triton.jit
def carve_state_gradient_kernel(
    k, g, erase_logits, A_log, dt_bias, content_down, content_up, content,
    q_sum, P_sum, k_right, k_to_end, q_from_start, erasure, gate_slope, last, steep_from,
    A, P, states, residuals, do,
    d_final_S, d_final_mean, d_final_partial, initial_count,
    steep_dT, steep_d_content, d_states, d_residuals, d_output_rows, d_initial_S, d_initial_mean, d_initial_partial,
    table, first, content_chunk, erase_scale, H, HV,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr,
    HAS_FINAL: tl.constexpr, HAS_INITIAL: tl.constexpr, DETACHED: tl.constexpr, RAW_DECAY: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The reverse of carve_state_kernel, with the same programs.

    Writes per chunk d_states [NC, HV, V, K], d_residuals [NC, HV, V, C], otherwise as GDN-2's stage does, and
        d_output_rows [NC, HV, V] float32: what the content path adds to the gradient of every output of the chunk,
    and the gradient of the initial state of the head. steep_dT [N, HV, C, C] and steep_d_content [N, HV, K] float32
    are scratch.
    """
    i_n, i_hv = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    i_h, i_nhv = i_hv // (HV // H), i_n * HV + i_hv
    o_r, o_k, o_v, o_c = tl.arange(0, 64), tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, RP)
    b_down = load_matrix(content_down, i_hv, o_v, o_c, V, R, True).to(tl.float32)
    b_up = load_matrix(content_up, i_hv, o_k, o_c, K, R, False).to(tl.float32)

    begin, end = tl.load(first + i_n), tl.load(first + i_n + 1)
    row_0, tokens_from, tokens_to = sequence_rows(table, begin, end)
    first_steep_chunk = find_steep_chunk(steep_from, begin, end, i_h, H)
    count = (end - begin) * 64
    if HAS_INITIAL:
        count += tl.load(initial_count + i_n) // 64 * 64
    b_dS = tl.zeros([VP, KP], tl.float32)
    # Gradients of D m: of the running content chunk's, summed up, and of the next one's, known.
    b_d_code = tl.zeros([RP], tl.float32)
    b_d_next_code = tl.zeros([RP], tl.float32)
    # what the final state's gradients weigh in that of an output: the partial sum's before the first content chunk
    # from behind that is complete, then the mean's in that one
    partial_weight, mean_weight, mean_pending = 1.0, 0.0, 1.0
    if HAS_FINAL:
        b_dS += load_matrix(d_final_S, i_nhv, o_v, o_k, V, K, True)
        b_d_mean = load_columns(d_final_mean, i_nhv, V, o_v)
        b_d_partial = load_columns(d_final_partial, i_nhv, V, o_v)
    for MILD in tl.static_range(2):
        for i_back in range(end - first_steep_chunk if MILD else 0, end - begin if MILD else end - first_steep_chunk):
            i_c = end - 1 - i_back
            start = row_0 + (i_c - begin) * 64
            m_r = (start + o_r >= tokens_from) & (start + o_r < tokens_to)
            complete = (start + 64 <= tokens_to) & (count % content_chunk == 0)
            b_d_next_code = tl.where(complete, b_d_code / content_chunk, b_d_next_code)
            b_d_code = tl.where(complete, 0.0, b_d_code)
            mean_weight = tl.where(complete, mean_pending / content_chunk, mean_weight)
            mean_pending = tl.where(complete, 0.0, mean_pending)
            partial_weight = tl.where(complete, 0.0, partial_weight)
            count -= 64
            i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
            b_dS_CT = b_dS.to(CT)
            store_matrix(d_states, i_chv, o_v, o_k, V, K, False, b_dS_CT)
            b_d_row = tl.sum(b_down * b_d_next_code[None, :], 1)
            if HAS_FINAL:
                b_d_row += partial_weight * b_d_partial + mean_weight * b_d_mean
            store_columns(d_output_rows, i_chv, V, o_v, b_d_row)

            b_do = tl.trans(load_rows(do, start, o_r, m_r, i_hv, HV, V, o_v))
            # every output of the chunk gets the same row, so a residual gets it times the column sum of P
            b_dR = b_d_row[:, None] * tl.load(P_sum + i_ch * 64 + o_r)[None, :]
            b_dR += matmul(b_do, load_tile(P, i_ch, o_r, 64, o_r), CT, PRECISION)
            b_dR += matmul(b_dS_CT, tl.trans(load_tile(k_to_end, i_ch, o_r, K, o_k)), CT, PRECISION)
            b_dR = b_dR.to(CT)
            store_matrix(d_residuals, i_chv, o_v, o_r, V, 64, False, b_dR)
            # minus the gradient of w v - E S
            b_dE = (-matmul(b_dR, load_tile(A, i_chv, o_r, 64, o_r), CT, PRECISION)).to(CT)

            # The first chunk's content is that of the initial state. A branch also keeps its loads out of the pipeline,
            # for which shared memory would not suffice.
            if (not DETACHED) & (i_c > begin - HAS_INITIAL):
                b_rows = tl.trans(b_dE)
                b_dT = matmul(b_rows, tl.trans(load_tile(residuals, i_chv, o_r, V, o_v)), CT, PRECISION)
                b_dT = tl.where(o_r[None, :] < o_r[:, None], b_dT, 0.0)
                b_S = load_matrix(states, i_chv, o_v, o_k, V, K, False)
                b_d_left = matmul(b_rows, b_S, CT, PRECISION) * UNSHIFT
                b_dT_mild = b_dT
                if not MILD:
                    first_steep = tl.load(steep_from + i_ch)
                    b_dT_mild = tl.where((o_r < first_steep)[:, None], b_dT, 0.0)
                b_d_left += matmul(b_dT_mild, load_tile(k_right, i_ch, o_r, K, o_k), CT, PRECISION)
                b_db = b_d_left * load_tile(gate_slope, i_chv, o_r, K, o_k).to(tl.float32)
                b_d_content = tl.sum(b_db, 0)
                if not MILD:
                    store_tile(steep_dT, i_nhv, o_r, 64, o_r, b_dT)
                    tl.debug_barrier()  # what other threads stored is visible from here on
                    write_steep_erase_gradient(
                        k, g, erase_logits, content, A_log, dt_bias, steep_dT, steep_d_content, table, erase_scale,
                        i_c, i_h, i_chv, i_nhv, H, first_steep,
                        K, BK, RAW_DECAY, CT, PRECISION,
                    )  # fmt: skip
                    tl.debug_barrier()
                    b_d_content += load_columns(steep_d_content, i_nhv, K, o_k)
                    tl.debug_barrier()
                b_d_code += tl.sum(b_up * b_d_content[:, None], 0)

            b_dS *= load_total_decay(last, i_ch, K, o_k)[None, :]
            b_dS += b_d_row[:, None] * load_columns(q_sum, i_ch, K, o_k)[None, :]
            b_dS += matmul(b_do, load_tile(q_from_start, i_ch, o_r, K, o_k), CT, PRECISION)
            b_dS += matmul(b_dE, load_tile(erasure, i_chv, o_r, K, o_k), CT, PRECISION)
    if HAS_INITIAL:
        b_d = tl.sum(b_down * b_d_code[None, :], 1)
        b_d_row = tl.sum(b_down * b_d_next_code[None, :], 1)
        if HAS_FINAL:
            b_d += mean_pending * b_d_mean
            b_d_row += mean_weight * b_d_mean + partial_weight * b_d_partial
        store_matrix(d_initial_S, i_nhv, o_v, o_k, V, K, True, b_dS)
        store_columns(d_initial_mean, i_nhv, V, o_v, b_d)
        store_columns(d_initial_partial, i_nhv, V, o_v, b_d_row)
