"""CARVE with delta erase, the stages that run from chunk to chunk: erase gate, inverse and state, and their gradients.

The erase gate of a content chunk waits for the outputs of the one before it, so these loops are the critical path, and
one program runs a whole head. Their tiles are transposed: rows are the V channels, which eight warps divide without
copies, so that the state, the residuals and the state's update follow each other in registers; shared memory passes
on only what is BT rows high. A vector along a tile's columns would take a register per column and thread: sums over
columns are products instead, and what scales columns is kept to one vector. The content path (mean output, code,
content term) is float32 vectors; the state's partial sum and mean are of outputs without their scale.

Every register of an SM is in use, and nearly all of its shared memory, which leaves its cache less room than many
spilled registers take. What could be computed once before the loops is therefore computed in them (disable_licm).
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..checks import CHUNK_TOKENS
from .chunks import BT, sequence_and_head, sequence_chunks
from .decay import (
    UNSHIFT,
    halved_rows,
    has_halved_rows,
    load_first_chunks,
    load_late_factors,
    load_log2_decay,
    right_factor,
)
from .delta_operands import SUM_ROWS
from .gates import GATE_CONTENT, load_erase_gate, load_write_gate
from .launching import launch
from .products import content_code, matmul, pairs_of_halves, unit_triangular_inverse
from .stages import (
    HOPPER,
    Call,
    Content,
    DeltaOperands,
    Factors,
    GradientOperands,
    Inputs,
    Tuning,
    column_block,
    next_power_of_2,
)
from .steep import HALVINGS, halved_scores, halving_factor
from .tiles import load_columns, load_matrix, load_rows, store_columns, store_matrix

TUNING = {HOPPER: Tuning(0, 0, 8, 2)}
GRADIENT_TUNING = {HOPPER: Tuning(0, 0, 8, 2)}

# Kinds of chunks by their rows (see decay.py). The loops have a copy for each kind, which begins with a sequence's
# first chunk of it and takes the kinds before it too: what a kind's rows need costs registers, and a loop inside a loop
# keeps loads from being asked for ahead.
MILD = tl.constexpr(0)
LATE = tl.constexpr(1)
HALVED = tl.constexpr(2)


@triton.jit
def load_content_maps(content_down, content_up, i, o_k, o_v, o_c, K, V, R):
    """D transposed, [V, RP], and U [K, RP], of head i; columns from R on are zero."""
    b_down = load_matrix(content_down, i, o_v, o_c, V, R, True).to(tl.float32)
    return b_down, load_matrix(content_up, i, o_k, o_c, K, R, False).to(tl.float32)


@triton.jit
def tile_rows(i_ch, i_chv, V: tl.constexpr):
    """The first row of a chunk's tiles in descriptors with BT or SUM_ROWS rows a key head, BT or V a value head."""
    row_k, row_A = (i_ch * BT).to(tl.int32), (i_chv * BT).to(tl.int32)
    return row_k, (i_ch * SUM_ROWS).to(tl.int32), row_A, (i_chv * V).to(tl.int32)


@triton.jit
def delta_state_kernel(
    k, g, erase_logits, w, A_log, dt_bias, content_down, content_up, bias, logits_rows, v_rows,
    q_sum, P_sum, k_left, k_right, k_to_end, last, late, steep_from, halved_from, first_chunks,
    initial_S, initial_mean, initial_partial, initial_count,
    A, states, residuals, codes, content, means, final_S, final_mean, final_partial,
    table, first, content_chunk, scale, erase_scale, H, HV, content_heads,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    STEEP: tl.constexpr, HAS_INITIAL: tl.constexpr, RAW_DECAY: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence and value head; RP is R rounded up to a power of two, BK divides K. content_heads: 0 or
    1 where D and U are for all heads or one a head.

    Takes the chunks before a sequence's first one with steep rows or, if STEEP, the others, from the state that the
    first launch left: beside the loops for steep rows the one for mild rows would get fewer registers.

    Writes per chunk A [NC, HV, C, C], states [NC, HV, V, K], residuals [NC, HV, V, C], otherwise as GDN-2's stages do,
    and
        means [NC, HV, V] float32: m of the content chunk before,
        codes [NC, HV, R] and content [NC, HV, K] float32: tanh(D m) and U tanh(D m) with the bias,
    and the final state of the head.
    """
    i_n, i_hv, i_h, i_nhv = sequence_and_head(H, HV)
    o_r, o_k, o_v, o_c = tl.arange(0, BT), tl.arange(0, K), tl.arange(0, V), tl.arange(0, RP)
    b_down, b_up = load_content_maps(content_down, content_up, i_hv * content_heads, o_k, o_v, o_c, K, V, R)
    begin, end, row_0, tokens_from, tokens_to = sequence_chunks(table, first, i_n)
    first_steep_chunk, first_halved_chunk = load_first_chunks(first_chunks, i_n, i_h, H, end)
    since = first_steep_chunk if STEEP else begin
    token_share = 1.0 / (content_chunk * scale)  # of an output, which is scaled, in the mean
    filled = (since - begin) * BT
    if initial_count is not None:
        filled += tl.load(initial_count + i_n) // BT * BT
    filled = (filled % content_chunk).to(tl.int32)  # tokens of the running content chunk
    b_S = tl.zeros([V, K], tl.float32)
    b_mean = tl.zeros([V], tl.float32)
    b_partial = tl.zeros([V], tl.float32)
    if HAS_INITIAL:
        b_S += load_matrix(initial_S, i_nhv, o_v, o_k, V, K, True)
        b_mean += load_columns(initial_mean, i_nhv, V, o_v)
        b_partial += load_columns(initial_partial, i_nhv, V, o_v) * scale
    b_code = content_code(b_down, b_mean)
    b_content = tl.sum(b_up * b_code[None, :], 1)
    if bias is not None:
        b_content += load_columns(bias, i_h, K, o_k)
    for KIND in tl.static_range(LATE if STEEP else MILD, HALVED + 1 if STEEP else LATE):
        until = first_steep_chunk if KIND == MILD else first_halved_chunk if KIND == LATE else end
        for i_c in tl.range(since, until, disable_licm=True):
            start = row_0 + (i_c - begin) * BT
            m_r = (start + o_r >= tokens_from) & (start + o_r < tokens_to)
            i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
            row_k, row_s, _, row_v = tile_rows(i_ch, i_chv, V)
            store_columns(means, i_chv, V, o_v, b_mean)
            store_columns(codes, i_chv, R, o_c, b_code)
            store_columns(content, i_chv, K, o_k, b_content)
            b_w = load_write_gate(w, start, o_r, m_r, i_hv, HV, V, o_v, 1, True, LOGITS_W)

            b_b = logits_rows.load([start.to(tl.int32), i_h * K]).to(tl.float32)
            b_b = erase_scale * tl.sigmoid(b_b + b_content[None, :])
            # T and A are transposed, as are all scores here
            if KIND != MILD:
                first_steep = tl.load(steep_from + i_ch)
                b_T_late = tl.zeros([BT, BT], tl.float32)
                if first_steep < BT:
                    b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
                    b_left, b_right = load_late_factors(late, i_ch, o_r, K, o_k)
                    b_T_late = matmul(b_k * b_right, tl.trans((b_b * b_k * b_left).to(CT)), CT, PRECISION)
            b_bk = tl.trans((b_b * k_left.load([row_k, 0]).to(tl.float32)).to(CT))
            b_k_right = k_right.load([row_k, 0])
            b_T = matmul(b_k_right, b_bk, CT, PRECISION)
            if KIND != MILD:
                b_T = tl.where((o_r < first_steep)[None, :], b_T, b_T_late)
            if KIND == HALVED:
                first_halved = tl.load(halved_from + i_ch)
                if has_halved_rows(first_steep, first_halved):
                    tl.debug_barrier()  # what other threads stored is visible from here on
                    b_T_halved = halved_scores(
                        k, erase_logits, content, k, g, A_log, dt_bias, start, o_r, m_r, i_h, H, i_chv, 1.0,
                        erase_scale, K, BK, True, GATE_CONTENT, False, RAW_DECAY, CT, PRECISION,
                    )  # fmt: skip
                    m_halved = halved_rows(o_r, first_steep, first_halved)
                    b_T = tl.where(m_halved[None, :], tl.trans(b_T_halved), b_T)
            b_T = tl.where(o_r[None, :] > o_r[:, None], b_T, 0.0)
            b_A = unit_triangular_inverse(b_T, o_r, True, CT, PRECISION)
            b_Aw = (b_A * b_w).to(CT)
            b_A = b_A.to(CT)
            store_matrix(A, i_chv, o_r, o_r, BT, BT, True, b_A)

            b_S_CT = b_S.to(CT)
            states.store([row_v, 0], b_S_CT)
            b_erased = (matmul(b_S_CT, b_bk, CT, PRECISION) * -UNSHIFT).to(CT)
            b_sum = matmul(b_S_CT, tl.trans(q_sum.load([row_s, 0])), CT, PRECISION)
            b_R = matmul(tl.trans(v_rows.load([start.to(tl.int32), i_hv * V])), b_Aw, CT, PRECISION)
            b_R = (b_R + matmul(b_erased, b_A, CT, PRECISION)).to(CT)
            # Not the last product: with one that runs on into the next iteration ptxas has made all of them wait.
            b_last = load_columns(last, i_ch, K, o_k)[None, :]
            if KIND == MILD:  # a tile less to load
                b_S = (b_S * UNSHIFT + matmul(b_R, b_k_right, CT, PRECISION)) * b_last
            else:
                b_S = b_S * (b_last * UNSHIFT) + matmul(b_R, k_to_end.load([row_k, 0]), CT, PRECISION)
            b_sum += matmul(b_R, tl.trans(P_sum.load([row_s, 0])), CT, PRECISION)
            b_partial += tl.sum(b_sum, 1)
            filled += BT
            complete = (start + BT <= tokens_to) & (filled == content_chunk)
            if complete:
                filled = 0
                b_mean = b_partial * token_share
                b_partial = tl.zeros([V], tl.float32)
                b_code = content_code(b_down, b_mean)
                b_content = tl.sum(b_up * b_code[None, :], 1)
                if bias is not None:
                    b_content += load_columns(bias, i_h, K, o_k)
            residuals.store([row_v, 0], b_R)
        since = until
    store_matrix(final_S, i_nhv, o_v, o_k, V, K, True, b_S)
    store_columns(final_mean, i_nhv, V, o_v, b_mean)
    store_columns(final_partial, i_nhv, V, o_v, b_partial / scale)


@triton.jit
def late_content_gradient(
    k, erase_logits, content, late, b_dT, start, o_r, m_r, i_h, H, i_ch, i_chv, erase_scale,
    K: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a chunk's content term, [K], through the scores of its late rows, b_dT being transposed."""
    o_k = tl.arange(0, K)
    b_k = tl.trans(load_rows(k, start, o_r, m_r, i_h, H, K, o_k)).to(tl.float32)
    b_left = load_matrix(late, i_ch, o_k, o_r, K, BT, True).to(tl.float32)
    b_right = tl.where((o_r >= 32)[None, :], right_factor(b_left), b_left)
    b_d_left = matmul(b_k * b_right, b_dT, CT, PRECISION)
    b_b = tl.trans(load_rows(erase_logits, start, o_r, m_r, i_h, H, K, o_k)).to(tl.float32)
    b_b = erase_scale * tl.sigmoid(b_b + load_columns(content, i_chv, K, o_k)[:, None])
    return tl.sum(b_d_left * b_k * b_left * b_b * (1.0 - b_b / erase_scale), 1)


@triton.jit
def halved_content_gradient(
    k, g, erase_logits, content, A_log, dt_bias, b_dT, start, o_r, m_r, i_h, H, i_chv, erase_scale, d_content,
    K: tl.constexpr, BK: tl.constexpr, RAW_DECAY: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a chunk's content term through the scores of its halved rows."""
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
        b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        b_b = load_erase_gate(erase_logits, content, start, o_r, m_r, i_h, H, i_chv, K, o_k, erase_scale, GATE_CONTENT)
        b_db = tl.zeros([BT, BK], tl.float32)
        for step in range(HALVINGS):
            b_e = halving_factor(b_g, o_r, step, CT)
            b_pairs = tl.where(pairs_of_halves(o_r, step), b_dT, 0.0)
            b_db += b_e * matmul(b_pairs, b_k * b_e, CT, PRECISION)
        tl.store(d_content + i_chv * K + o_k, tl.sum(b_db * b_k * b_b * (1.0 - b_b / erase_scale), 0))


@triton.jit
def delta_state_gradient_kernel(
    k, g, erase_logits, A_log, dt_bias, content_down, content_up, codes, content,
    P, k_right, k_to_end, q_from_start, erasure, gate_slope, last, late, steep_from, halved_from, first_chunks,
    A, states, residuals, do_rows,
    d_final_S, d_final_mean, d_final_partial, initial_count,
    d_states, d_residuals, d_output_rows, d_content, d_initial_S, d_initial_mean, d_initial_partial,
    table, first, content_chunk, scale, erase_scale, chunks, H, HV, content_heads,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    HAS_FINAL: tl.constexpr, HAS_INITIAL: tl.constexpr, DETACHED: tl.constexpr, RAW_DECAY: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The reverse of delta_state_kernel, with the same programs.

    Writes per chunk d_states [NC, HV, V, K], d_residuals [NC, HV, V, C], otherwise as GDN-2's stage does, and
        d_output_rows [NC, HV, V] float32: what the content path adds to the gradient of every output of the chunk,
        d_content [NC, HV, K] float32: the gradient of its content term, unless DETACHED or that term is zero.
    and the gradient of the initial state of the head.
    """
    i_n, i_hv, i_h, i_nhv = sequence_and_head(H, HV)
    o_r, o_k, o_v, o_c = tl.arange(0, BT), tl.arange(0, K), tl.arange(0, V), tl.arange(0, RP)
    b_down, b_up = load_content_maps(content_down, content_up, i_hv * content_heads, o_k, o_v, o_c, K, V, R)
    begin, end, row_0, tokens_from, tokens_to = sequence_chunks(table, first, i_n)
    first_steep_chunk, first_halved_chunk = load_first_chunks(first_chunks, i_n, i_h, H, end)
    token_share = 1.0 / (content_chunk * scale)
    filled = (end - begin) * BT
    if HAS_INITIAL:
        filled += tl.load(initial_count + i_n) // BT * BT
    filled = (filled % content_chunk).to(tl.int32)  # tokens of the running content chunk; 0 when it is full
    b_dS = tl.zeros([V, K], tl.float32)
    # Gradients of the content term of the running content chunk, summed up, and of an output, from the next one's mean.
    b_d_content = tl.zeros([K], tl.float32)
    b_d_row = tl.zeros([V], tl.float32)
    b_d_final = tl.zeros([V], tl.float32)
    # what the final state's gradients weigh in that of an output: the partial sum's before the first content chunk
    # from behind that is complete, then the mean's in that one
    mean_pending = 1.0
    if HAS_FINAL:
        b_dS += load_matrix(d_final_S, i_nhv, o_v, o_k, V, K, True)
        b_d_row += load_columns(d_final_partial, i_nhv, V, o_v) / scale
        b_d_final += load_columns(d_final_mean, i_nhv, V, o_v)
    i_last = tl.where(begin < end, end - 1, chunks) * HV + i_hv
    d_states.store([(i_last * V).to(tl.int32), 0], b_dS.to(CT))
    since = end - end  # counted from behind, as chunks are here
    for KIND in tl.static_range(HALVED, MILD - 1, -1):
        until = end - (begin if KIND == MILD else first_steep_chunk if KIND == LATE else first_halved_chunk)
        for i_back in tl.range(since, until, disable_licm=True):
            i_c = end - 1 - i_back
            start = row_0 + (i_c - begin) * BT
            m_r = (start + o_r >= tokens_from) & (start + o_r < tokens_to)
            if (start + BT <= tokens_to) & (filled == 0):
                b_code = tl.zeros([RP], tl.float32)
                if i_back > 0:  # that of the content chunk after this one
                    b_code = load_columns(codes, (i_c + 1) * HV + i_hv, R, o_c)
                b_d_code = tl.sum(b_up * b_d_content[:, None], 0) * (1.0 - b_code * b_code)
                b_d_row = (tl.sum(b_down * b_d_code[None, :], 1) + mean_pending * b_d_final) * token_share
                b_d_content = tl.zeros([K], tl.float32)
                mean_pending = 0.0
            filled = tl.where(filled == 0, content_chunk, filled) - BT
            i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
            row_k, _, row_A, row_v = tile_rows(i_ch, i_chv, V)
            store_columns(d_output_rows, i_chv, V, o_v, b_d_row)
            b_do = tl.trans(do_rows.load([start.to(tl.int32), i_hv * V])).to(tl.float32)
            b_do = tl.where(m_r[None, :], b_do + b_d_row[:, None], 0.0).to(CT)
            b_last = load_columns(last, i_ch, K, o_k)[None, :]  # early: it arrives while the products run
            b_dR = matmul(b_do, P.load([row_k, 0]), CT, PRECISION)
            if KIND == MILD:
                b_dS *= b_last  # in place: K = 256 leaves no registers for a scaled copy beside it
                b_k_right = k_right.load([row_k, 0])
                b_dR += matmul(b_dS, tl.trans(b_k_right), CT, PRECISION)
                b_dS *= UNSHIFT
            else:
                b_dR += matmul(b_dS, tl.trans(k_to_end.load([row_k, 0])), CT, PRECISION)
                b_dS *= b_last * UNSHIFT
            b_dR = b_dR.to(CT)
            store_matrix(d_residuals, i_chv, o_v, o_r, V, BT, False, b_dR)
            # minus the gradient of w v - E S
            b_dE = (-matmul(b_dR, A.load([row_A, 0]), CT, PRECISION)).to(CT)

            b_dS += matmul(b_do, q_from_start.load([row_k, 0]), CT, PRECISION)
            b_dS += matmul(b_dE, erasure.load([row_A, 0]), CT, PRECISION)
            # Of the state before this chunk; before the first one a tile that nothing reads. Triton would keep what an
            # iteration's beginning stores in registers until its end.
            i_before = tl.where(i_c > begin, i_c - 1, chunks) * HV + i_hv
            d_states.store([(i_before * V).to(tl.int32), 0], b_dS.to(CT))

            # The first chunk's content is that of the initial state. A branch also keeps its loads out of the pipeline,
            # for which shared memory would not suffice.
            if not DETACHED:  # noqa: SIM102  decided by the compiler
                if i_c > begin - HAS_INITIAL:
                    b_slope = load_matrix(gate_slope, i_chv, o_k, o_r, K, BT, False)
                    b_R = load_matrix(residuals, i_chv, o_v, o_r, V, BT, False)
                    b_dT = matmul(tl.trans(b_R), b_dE, CT, PRECISION)
                    b_dT = tl.where(o_r[None, :] > o_r[:, None], b_dT, 0.0)
                    b_d_chunk = tl.zeros([K], tl.float32)
                    b_dT_mild = b_dT
                    if KIND != MILD:
                        first_steep, first_halved = tl.load(steep_from + i_ch), tl.load(halved_from + i_ch)
                        m_mild = (o_r < first_steep)[None, :]
                        m_halved = halved_rows(o_r, first_steep, first_halved)[None, :]
                        b_dT_mild = tl.where(m_mild, b_dT, 0.0)
                        if first_steep < BT:
                            b_d_chunk += late_content_gradient(
                                k, erase_logits, content, late, tl.where(m_mild | m_halved, 0.0, b_dT),
                                start, o_r, m_r, i_h, H, i_ch, i_chv, erase_scale, K, CT, PRECISION,
                            )  # fmt: skip
                    b_S = tl.trans(states.load([row_v, 0]))
                    b_d_left = matmul(b_S, b_dE, CT, PRECISION) * UNSHIFT
                    if KIND != MILD:
                        b_k_right = k_right.load([row_k, 0])
                    b_d_left += matmul(tl.trans(b_k_right), b_dT_mild, CT, PRECISION)
                    b_d_chunk += tl.sum(b_d_left * b_slope.to(tl.float32), 1)
                    if KIND == HALVED:  # noqa: SIM102  decided by the compiler
                        if has_halved_rows(first_steep, first_halved):
                            halved_content_gradient(
                                k, g, erase_logits, content, A_log, dt_bias, tl.trans(tl.where(m_halved, b_dT, 0.0)),
                                start, o_r, m_r, i_h, H, i_chv, erase_scale, d_content,
                                K, BK, RAW_DECAY, CT, PRECISION,
                            )  # fmt: skip
                            tl.debug_barrier()  # what other threads stored is visible from here on
                            b_d_chunk += load_columns(d_content, i_chv, K, o_k)
                            tl.debug_barrier()
                    store_columns(d_content, i_chv, K, o_k, b_d_chunk)
                    b_d_content += b_d_chunk
        since = until
    if HAS_INITIAL:
        b_code = tl.zeros([RP], tl.float32)
        if begin < end:
            b_code = load_columns(codes, begin * HV + i_hv, R, o_c)
        b_d_code = tl.sum(b_up * b_d_content[:, None], 0) * (1.0 - b_code * b_code)
        store_matrix(d_initial_S, i_nhv, o_v, o_k, V, K, True, b_dS)
        store_columns(d_initial_mean, i_nhv, V, o_v, tl.sum(b_down * b_d_code[None, :], 1) + mean_pending * b_d_final)
        store_columns(d_initial_partial, i_nhv, V, o_v, b_d_row * scale)


def descriptor(x: Tensor, rows: int, columns: int, heads: int = 1) -> TensorDescriptor:
    """Blocks of [rows, columns] of a contiguous tensor seen as rows of its last dimension, of this many heads."""
    width = heads * x.shape[-1]
    return TensorDescriptor(x, [x.numel() // width, width], [width, 1], [rows, columns])


def delta_sizes(call: Call, content_down: Tensor) -> dict[str, int]:
    _, R, V = content_down.shape
    return {"K": call.K, "BK": column_block(call.K, 64), "V": V, "R": R, "RP": next_power_of_2(R)}


def delta_state(
    call: Call, x: Inputs, content: Content, factors: Factors, operands: DeltaOperands,
    initial: Sequence[Tensor | None], count: Tensor | None, content_chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A, states, residuals (both transposed), codes, content, means, and the three tensors of the final state, which
    carry the state from the first launch to the second."""
    heads, sizes = call.erase_heads, delta_sizes(call, content.down)
    V = sizes["V"]
    A, residuals = call.tiles(x.v, heads, CHUNK_TOKENS, CHUNK_TOKENS), call.tiles(x.v, heads, V, CHUNK_TOKENS)
    states = call.tiles(x.v, heads, V, call.K)
    codes, terms, means = (call.floats_of_chunks(x.v, heads, size) for size in (sizes["R"], call.K, V))
    shape = (call.chunks.sequences, heads)
    final = [means.new_empty(*shape, *tail) for tail in ((call.K, V), (V,), (V,))]
    K = call.K
    read = (
        x.k, x.g, x.b, x.w, x.A_log, x.dt_bias, *content,
        descriptor(x.b, CHUNK_TOKENS, K, x.b.shape[2]), descriptor(x.v, CHUNK_TOKENS, V, x.v.shape[2]),
        descriptor(operands.q_sum, SUM_ROWS.value, K), descriptor(operands.P_sum, SUM_ROWS.value, CHUNK_TOKENS),
        descriptor(operands.k_left, CHUNK_TOKENS, K), descriptor(operands.k_right, CHUNK_TOKENS, K),
        descriptor(operands.k_to_end, CHUNK_TOKENS, K), factors.last, *factors.of_steep_rows, factors.first_chunks,
    )  # fmt: skip
    written = A, descriptor(states, V, K), descriptor(residuals, V, CHUNK_TOKENS), codes, terms, means, *final
    for steep, start in ((False, initial), (True, final)):
        launch(
            delta_state_kernel, (call.chunks.sequences * heads,),
            *read, *start, count, *written,
            call.chunks.table, call.chunks.first, content_chunk, call.scale, call.erase_scale, call.H, heads,
            content.by_head,
            **sizes, STEEP=steep, HAS_INITIAL=start[0] is not None,
            RAW_DECAY=call.raw_decay, LOGITS_W=call.logits_w, **call.launch(TUNING, call.K, V),
        )  # fmt: skip
    return A, states, residuals, codes, terms, means, *final


def delta_state_gradient(
    call: Call, x: Inputs, content: Content, codes: Tensor, factors: Factors, operands: GradientOperands,
    A: Tensor, states: Tensor, do: Tensor,
    d_final: Sequence[Tensor | None], count: Tensor | None, has_initial: bool, content_chunk: int, detached: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Gradients of states and residuals (both transposed), what is added to outputs', that of the content terms unless
    detached, those of the initial state."""
    heads, sizes = call.erase_heads, delta_sizes(call, content.down)
    V = sizes["V"]
    # one more tile a head, for the state before the first chunk
    d_states = states.new_empty(call.chunks.count + 1, *states.shape[1:])
    d_residuals = call.tiles(do, heads, V, CHUNK_TOKENS)
    d_rows = call.floats(do, heads, V)
    shape = (call.chunks.sequences, heads)
    tails = ((call.K, V), (V,), (V,))
    has_final = any(d is not None for d in d_final)
    if has_final:
        d_final = [
            d_rows.new_zeros(*shape, *t) if d is None else d.contiguous() for d, t in zip(d_final, tails, strict=True)
        ]
    d_initial = [d_rows.new_empty(*shape, *tail) if has_initial else None for tail in tails]
    K = call.K
    assert operands.P is not None and operands.k_right is not None  # gradient_operands(for_delta_loop=True)
    d_content = None if detached else call.floats(do, heads, K).zero_()
    launch(
        delta_state_gradient_kernel, (call.chunks.sequences * heads,),
        x.k, x.g, x.b, x.A_log, x.dt_bias, content.down, content.up, codes, x.content,
        descriptor(operands.P, CHUNK_TOKENS, CHUNK_TOKENS),
        descriptor(operands.k_right, CHUNK_TOKENS, K), descriptor(operands.k_to_end, CHUNK_TOKENS, K),
        descriptor(operands.q_from_start, CHUNK_TOKENS, K), descriptor(operands.erasure, CHUNK_TOKENS, K),
        operands.gate_slope, factors.last, *factors.of_steep_rows, factors.first_chunks,
        descriptor(A, CHUNK_TOKENS, CHUNK_TOKENS), descriptor(states, V, K), operands.residuals,
        descriptor(do, CHUNK_TOKENS, V, do.shape[2]),
        *d_final, count,
        descriptor(d_states, V, K), d_residuals, d_rows, d_content, *d_initial,
        call.chunks.table, call.chunks.first, content_chunk, call.scale, call.erase_scale, call.chunks.count,
        call.H, heads, content.by_head,
        **sizes, HAS_FINAL=has_final, HAS_INITIAL=has_initial, DETACHED=detached, RAW_DECAY=call.raw_decay,
        **call.launch(GRADIENT_TUNING, call.K, V),
    )  # fmt: skip
    return d_states[:-1], d_residuals, d_rows, d_content, d_initial
