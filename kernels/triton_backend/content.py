"""CARVE with diagonal erase: what content adds to the erase logits of every chunk, and its gradient.

The decays of a content chunk wait for the mean of the one before it. So one program goes through a sequence and value
head and carries the state on by what the means need alone; once all content terms are known, everything else is
GDN-2's stages for all chunks at once, with the decays of erasing_decay.py and the write gate as erase gate. Backward it
is the same: a loop over the chunks carries the gradients of the state and of the means, then all others follow at once.
Every value head has decays of its own here, so that H is the number of them, and key-side tensors are given for each.

Tiles are transposed: rows are channels, which eight warps divide without copies, columns the BT tokens of a chunk.
Decays are formed in the loops, in the shifted factors of decay.py. Rows that have decayed beyond their range, the
steep ones, take halvings of the chunk as in steep.py.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .decay import (
    LOG2_E,
    SHIFT,
    SHIFTED,
    STEEPEST_LOG2_DECAY,
    UNSHIFT,
    load_rate,
    right_factor,
    softplus,
)
from .erasing_decay import DecayInputs
from .stages import Call, Content, Factors, GradientOperands, Inputs
from .steep import HALVINGS
from .tiles import (
    BT,
    content_code,
    load_columns,
    load_matrix,
    load_scalar_gate,
    load_tile,
    matmul,
    pairs_of_halves,
    sequence_rows,
    store_columns,
    store_matrix,
    unit_triangular_inverse,
)

# Warps of a program by the larger head width.
WARPS = {32: 4, 64: 4, 128: 8}


class ContentTerms(NamedTuple):
    """By chunk, float32: term [NC, H, K], what is added to its erase logits; code [NC, H, R], tanh(D m); mean
    [NC, H, V], m. And the final mean and partial sum, [N, H, V]."""

    term: Tensor
    code: Tensor
    mean: Tensor
    final_mean: Tensor
    final_partial: Tensor


class ContentGradients(NamedTuple):
    """d_states [NC, H, K, V] and d_residuals [NC, H, C, V] as GDN-2's stage gives them; d_output_rows [NC, H, V]
    float32, what the means add to the gradient of every output of a chunk; those of the initial state or None."""

    d_states: Tensor
    d_residuals: Tensor
    d_output_rows: Tensor
    d_S: Tensor | None
    d_mean: Tensor | None
    d_partial: Tensor | None


@triton.jit
def load_channels(x, start, o_r, m_r, i_h, H, D: tl.constexpr, o_d):
    """load_rows transposed, [BD, rows] float32."""
    p_x = x + start * (H * D) + (o_r[None, :] * (H * D) + (i_h * D + o_d)[:, None])
    return tl.load(p_x, mask=m_r[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_tile_channels(x, i, o_r, D: tl.constexpr, o_d):
    """load_tile transposed, [BD, rows]."""
    return tl.load(x + i * BT * D + (o_r[None, :] * D + o_d[:, None]))


@triton.jit
def sum_tokens(b_x, m_pairs, CT: tl.constexpr):
    """Column r: the sum of the columns s of b_x where m_pairs, [s, r], is true; float32, as sum_rows of decay.py."""
    if tl.bfloat16 == CT:
        high = b_x.to(tl.bfloat16)
        low = (b_x - high.to(tl.float32)).to(tl.bfloat16)
        ones = m_pairs.to(tl.bfloat16)
        return tl.dot(high, ones, tl.dot(low, ones))
    return tl.dot(b_x, m_pairs.to(tl.float32), input_precision="tf32x3")


@triton.jit
def shifted_decays(b_a, m_pairs, CT: tl.constexpr):
    """Column r: 2^SHIFT times the decay over the columns s where m_pairs is true, as shifted_decay of decay.py."""
    if tl.bfloat16 == CT:
        b_decay = tl.exp2(sum_tokens(b_a, m_pairs, CT) + SHIFT)
    else:
        b_whole = tl.floor(b_a + 0.5)
        b_decay = tl.exp2(sum_tokens(b_a - b_whole, m_pairs, CT)) * tl.exp2(sum_tokens(b_whole, m_pairs, CT) + SHIFT)
    return b_decay


@triton.jit
def halving_mask(o_r, step, BEFORE: tl.constexpr):
    """[s, r]: whether the decay of step s is in the factor of column r at a halving: from after the upper half's end
    through r, or if BEFORE through the column before, in a lower half; from after r to the end in an upper one."""
    half = o_r >> step
    in_lower = (half & 1) == 1
    after = tl.where(in_lower, half << step, o_r + 1)
    until = tl.where(in_lower, o_r + (0 if BEFORE else 1), (half + 1) << step)
    o_s = o_r[:, None]
    return (o_s >= after[None, :]) & (o_s < until[None, :])


@triton.jit
def product_with_vector(b_M, b_x, CT: tl.constexpr, PRECISION: tl.constexpr):
    """M x, [rows of M] float32, for a float32 vector x: a product with a narrow tile of it, in two halves where
    operands have 16 bits. (Its rows, transposed: see Tuning.launch of stages.py.)"""
    o = tl.arange(0, 16)[:, None]
    b_high = b_x.to(CT).to(tl.float32)
    b_rows = tl.where(o == 0, b_high[None, :], tl.where(o == 1, (b_x - b_high)[None, :], 0.0))
    return tl.sum(matmul(b_M, tl.trans(b_rows.to(CT)), CT, PRECISION), 1)


@triton.jit
def content_of_mean(
    content_down, content_up, bias, b_mean, i_map, i_h, o_k, o_v, o_c, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """tanh(D m), [RP], and U tanh(D m) with the bias, [K]."""
    b_code = content_code(load_matrix(content_down, i_map, o_v, o_c, V, R, True).to(tl.float32), b_mean)
    b_term = tl.sum(load_matrix(content_up, i_map, o_k, o_c, K, R, False).to(tl.float32) * b_code[None, :], 1)
    if bias is not None:
        b_term += load_columns(bias, i_h, K, o_k)
    return b_code, b_term


@triton.jit
def mean_gradient(
    content_down, content_up, codes, i_code, has_code, b_d_term, i_map, o_k, o_v, o_c,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """D^T ((U^T du) (1 - code^2)), [V]: the gradient of the mean behind a content term, from the term's, [K]."""
    b_code = tl.load(codes + i_code * R + o_c, mask=(o_c < R) & has_code, other=0.0)
    b_d_code = tl.sum(load_matrix(content_up, i_map, o_k, o_c, K, R, False).to(tl.float32) * b_d_term[:, None], 0)
    b_d_code *= 1.0 - b_code * b_code
    return tl.sum(load_matrix(content_down, i_map, o_v, o_c, V, R, True).to(tl.float32) * b_d_code[None, :], 1)


@triton.jit
def log2_decays(
    g, erase_logits, A_log, dt_bias, b_term, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k, RAW_DECAY: tl.constexpr
):  # fmt: skip
    """log2-decays with the erase, [K, BT] float32, of a chunk with this content term."""
    b_l = load_channels(erase_logits, start, o_r, m_r, i_h, H, K, o_k) + b_term[:, None]
    b_g = load_channels(g, start, o_r, m_r, i_h, H, K, o_k)
    if RAW_DECAY:
        b_g += load_columns(dt_bias, i_h, K, o_k)[:, None]
        b_g = -load_rate(A_log, i_h, K, o_k)[:, None] * softplus(b_g)
    b_a = tl.maximum((b_g - softplus(b_l)) * LOG2_E, STEEPEST_LOG2_DECAY)
    return tl.where(m_r[None, :], b_a, 0.0)


@triton.jit
def content_loop_kernel(
    q, k, v, g, erase_logits, w, A_log, dt_bias, content_down, content_up, bias,
    initial_S, initial_mean, initial_partial, initial_count,
    terms, codes, means, final_mean, final_partial, parked,
    table, first, content_chunk, H, content_heads,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence and value head; RP is R rounded up to a power of two, content_heads 0 or 1 where D and U
    are for all heads or one a head. Outputs as in ContentTerms; parked, [N, H, K, V] float32, is scratch."""
    i_n, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    i_nh, i_map = i_n * H + i_h, i_h * content_heads
    o_r, o_k, o_v, o_c = tl.arange(0, BT), tl.arange(0, K), tl.arange(0, V), tl.arange(0, RP)
    o_s = o_r[:, None]
    begin, end = tl.load(first + i_n), tl.load(first + i_n + 1)
    row_0, tokens_from, tokens_to = sequence_rows(table, begin, end)
    filled = tl.zeros([], tl.int64)
    if initial_count is not None:
        filled += tl.load(initial_count + i_n) // BT * BT
    filled = (filled % content_chunk).to(tl.int32)  # tokens of the running content chunk
    b_S = tl.zeros([V, K], tl.float32)
    b_mean = tl.zeros([V], tl.float32)
    b_partial = tl.zeros([V], tl.float32)
    if initial_S is not None:
        b_S += load_matrix(initial_S, i_nh, o_v, o_k, V, K, True)
        b_mean += load_columns(initial_mean, i_nh, V, o_v)
        b_partial += load_columns(initial_partial, i_nh, V, o_v)
    b_code, b_term = content_of_mean(content_down, content_up, bias, b_mean, i_map, i_h, o_k, o_v, o_c, K, V, R)
    for i_c in tl.range(begin, end, disable_licm=True):
        start = row_0 + (i_c - begin) * BT
        m_r = (start + o_r >= tokens_from) & (start + o_r < tokens_to)
        i_ch = i_c * H + i_h
        store_columns(means, i_ch, V, o_v, b_mean)
        store_columns(codes, i_ch, R, o_c, b_code)
        store_columns(terms, i_ch, K, o_k, b_term)

        b_a = log2_decays(g, erase_logits, A_log, dt_bias, b_term, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
        b_left = shifted_decays(b_a, o_s <= o_r[None, :], CT)
        first_steep = tl.min(tl.where(tl.min(b_left, 0) < UNSHIFT, o_r, BT), 0)
        b_total = tl.sum(tl.where(o_r[None, :] == 63, b_left, 0.0), 1)
        b_w = load_scalar_gate(w, start, o_r, m_r, i_h, H, LOGITS_W)
        b_k = load_channels(k, start, o_r, m_r, i_h, H, K, o_k)
        b_E = b_left
        if BEFORE:
            b_E = shifted_decays(b_a, o_s < o_r[None, :], CT)
        b_E = (b_E * b_k * b_w[None, :]).to(CT)
        b_k_right = b_k * right_factor(b_left)
        # T and A are transposed, as are all scores here
        b_T = matmul(tl.trans(b_k_right.to(CT)), b_E, CT, PRECISION)
        b_k_end = (b_k_right * b_total[:, None]).to(CT)
        b_q = load_channels(q, start, o_r, m_r, i_h, H, K, o_k)
        b_own = tl.sum(b_q * b_k, 0)  # a query meets the key of its own row without decay
        b_q *= b_left
        b_q_sum = tl.sum(b_q, 1) * UNSHIFT
        # sums over the queries of their scores with a key
        b_P_sum = b_own + tl.sum(b_k_right * sum_tokens(b_q, o_s > o_r[None, :], CT), 0)
        if first_steep < BT:
            store_matrix(parked, i_nh, o_v, o_k, V, K, True, b_S)
            tl.debug_barrier()  # S needs no registers meanwhile
            b_T = tl.where((o_r < first_steep)[None, :], b_T, 0.0)
            b_a = log2_decays(g, erase_logits, A_log, dt_bias, b_term, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
            b_left = shifted_decays(b_a, o_s <= o_r[None, :], CT)
            b_k = load_channels(k, start, o_r, m_r, i_h, H, K, o_k)
            b_q = load_channels(q, start, o_r, m_r, i_h, H, K, o_k)
            b_q_mild = tl.where((o_r < first_steep)[None, :], b_q * b_left, 0.0)
            b_P_sum = tl.sum(b_k * right_factor(b_left) * sum_tokens(b_q_mild, o_s > o_r[None, :], CT) + b_q * b_k, 0)
            for step in range(HALVINGS):
                m_pairs = pairs_of_halves(o_r, step, True) & (o_r >= first_steep)[None, :]
                b_e = tl.exp2(sum_tokens(b_a, halving_mask(o_r, step, False), CT))
                b_ke = b_k * b_e
                b_P_sum += tl.sum(b_ke * sum_tokens(b_q * b_e, tl.trans(m_pairs), CT), 0)
                if BEFORE:
                    b_e = tl.exp2(sum_tokens(b_a, halving_mask(o_r, step, True), CT))
                b_product = matmul(tl.trans(b_ke.to(CT)), b_e * b_k * b_w[None, :], CT, PRECISION)
                b_T += tl.where(m_pairs, b_product, 0.0)
            b_k_end = (b_k * tl.exp2(sum_tokens(b_a, o_s > o_r[None, :], CT))).to(CT)
            tl.debug_barrier()
            b_S = load_matrix(parked, i_nh, o_v, o_k, V, K, True)
        b_T = tl.where(o_r[None, :] > o_s, b_T, 0.0)
        b_A = unit_triangular_inverse(b_T, o_r, True, CT, PRECISION).to(CT)
        b_S_CT = b_S.to(CT)
        b_z = load_channels(v, start, o_r, m_r, i_h, H, V, o_v) * b_w[None, :]
        b_z -= matmul(b_S_CT, b_E, CT, PRECISION) * UNSHIFT
        b_R = matmul(b_z, b_A, CT, PRECISION).to(CT)
        b_partial += product_with_vector(b_S_CT, b_q_sum, CT, PRECISION)
        b_partial += product_with_vector(b_R, b_P_sum, CT, PRECISION)
        b_S = b_S * (b_total * UNSHIFT)[None, :] + matmul(b_R, tl.trans(b_k_end), CT, PRECISION)
        filled += BT
        if (start + BT <= tokens_to) & (filled == content_chunk):
            filled = 0
            b_mean = b_partial / content_chunk
            b_partial = tl.zeros([V], tl.float32)
            b_code, b_term = content_of_mean(content_down, content_up, bias, b_mean, i_map, i_h, o_k, o_v, o_c, K, V, R)
    store_columns(final_mean, i_nh, V, o_v, b_mean)
    store_columns(final_partial, i_nh, V, o_v, b_partial)


@triton.jit
def content_gradient_loop_kernel(
    q, k, g, erase_logits, w, A_log, dt_bias, content_down, content_up, terms, codes,
    left, last, steep_from, A, states, residuals, k_to_end, q_from_start, erasure, P_sum, d_residuals_here, do,
    d_final_S, d_final_mean, d_final_partial, initial_count,
    d_states, d_residuals, d_output_rows, d_initial_S, d_initial_mean, d_initial_partial, parked,
    table, first, content_chunk, scale, H, content_heads,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    HAS_INITIAL: tl.constexpr, DETACHED: tl.constexpr, BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr,
    LOGITS_W: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The reverse of content_loop_kernel, with the same programs; outputs as in ContentGradients; parked as there."""
    i_n, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    i_nh, i_map = i_n * H + i_h, i_h * content_heads
    o_r, o_k, o_v, o_c = tl.arange(0, BT), tl.arange(0, K), tl.arange(0, V), tl.arange(0, RP)
    begin, end = tl.load(first + i_n), tl.load(first + i_n + 1)
    row_0, tokens_from, tokens_to = sequence_rows(table, begin, end)
    token_share = 1.0 / (content_chunk * scale)  # of an output, which is scaled, in the mean
    filled = (end - begin) * BT
    if initial_count is not None:
        filled += tl.load(initial_count + i_n) // BT * BT
    filled = (filled % content_chunk).to(tl.int32)  # tokens of the running content chunk; 0 when it is full
    b_dS = tl.zeros([V, K], tl.float32)
    # Gradients of the content term of the running content chunk, summed up, and of an output, from the next one's mean.
    b_d_term = tl.zeros([K], tl.float32)
    b_d_row = tl.zeros([V], tl.float32)
    b_d_final = tl.zeros([V], tl.float32)
    # what the final mean's gradient weighs in that of an output: something in the last content chunk that is complete
    mean_pending = 1.0
    if d_final_S is not None:
        b_dS += load_matrix(d_final_S, i_nh, o_v, o_k, V, K, True)
        b_d_row += load_columns(d_final_partial, i_nh, V, o_v) / scale
        b_d_final += load_columns(d_final_mean, i_nh, V, o_v)
    for i_back in tl.range(0, end - begin, disable_licm=True):
        i_c = end - 1 - i_back
        start = row_0 + (i_c - begin) * BT
        m_r = (start + o_r >= tokens_from) & (start + o_r < tokens_to)
        i_ch = i_c * H + i_h
        if (start + BT <= tokens_to) & (filled == 0):
            # of the mean that the content chunk after this one saw, if there is one
            b_d_mean = mean_gradient(
                content_down, content_up, codes, i_ch + H, i_back > 0, b_d_term, i_map, o_k, o_v, o_c, K, V, R
            )  # fmt: skip
            b_d_row = (b_d_mean + mean_pending * b_d_final) * token_share
            b_d_term = tl.zeros([K], tl.float32)
            mean_pending = 0.0
        filled = tl.where(filled == 0, content_chunk, filled) - BT
        store_columns(d_output_rows, i_ch, V, o_v, b_d_row)
        store_matrix(d_states, i_ch, o_v, o_k, V, K, True, b_dS)
        b_do = load_channels(do, start, o_r, m_r, i_h, H, V, o_v)
        b_do = tl.where(m_r[None, :], b_do + b_d_row[:, None], 0.0).to(CT)
        b_dR = load_tile_channels(d_residuals_here, i_ch, o_r, V, o_v).to(tl.float32)
        b_dR += b_d_row[:, None] * load_columns(P_sum, i_ch, BT, o_r)[None, :]
        b_dR += matmul(b_dS, load_tile_channels(k_to_end, i_ch, o_r, K, o_k), CT, PRECISION)
        b_dR = b_dR.to(CT)
        store_matrix(d_residuals, i_ch, o_v, o_r, V, BT, True, b_dR)
        b_dS *= (load_columns(last, i_ch, K, o_k) * UNSHIFT)[None, :]
        b_dS += matmul(b_do, load_tile(q_from_start, i_ch, o_r, K, o_k), CT, PRECISION)
        b_dS -= matmul(b_dR, load_tile(erasure, i_ch, o_r, K, o_k), CT, PRECISION)
        # The first chunk's content is that of the initial state.
        if not DETACHED:  # noqa: SIM102  decided by the compiler
            if i_c > begin - HAS_INITIAL:
                store_matrix(parked, i_nh, o_v, o_k, V, K, True, b_dS)
                tl.debug_barrier()  # dS needs no registers meanwhile, and what follows reads what other threads stored
                b_d_term -= chunk_term_gradient(
                    q, k, g, erase_logits, terms, w, A_log, dt_bias, left, last, steep_from, A, k_to_end, states,
                    residuals, d_states, d_residuals, do, b_d_row, scale, i_ch, start, o_r, m_r, i_h, H, o_k, o_v,
                    K, V, BEFORE, RAW_DECAY, LOGITS_W, CT, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
                b_dS = load_matrix(parked, i_nh, o_v, o_k, V, K, True)
    if HAS_INITIAL:
        b_d_mean = mean_gradient(
            content_down, content_up, codes, begin * H + i_h, begin < end, b_d_term, i_map, o_k, o_v, o_c, K, V, R
        )  # fmt: skip
        store_matrix(d_initial_S, i_nh, o_v, o_k, V, K, True, b_dS)
        store_columns(d_initial_mean, i_nh, V, o_v, b_d_mean + mean_pending * b_d_final)
        store_columns(d_initial_partial, i_nh, V, o_v, b_d_row * scale)


@triton.jit
def chunk_term_gradient(
    q, k, g, erase_logits, terms, w, A_log, dt_bias, left, last, steep_from, A, k_to_end, states, residuals,
    d_states, d_residuals, do, b_d_row, scale, i_ch, start, o_r, m_r, i_h, H, o_k, o_v,
    K: tl.constexpr, V: tl.constexpr, BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_t b_t da_t of a chunk, [K], minus which is the gradient of its content term.

    With c_r the sum of b up to a row, every decay between two rows s < r counts c_r - c_s times in it: what c_r gives
    and c_s takes are of the same rounded factors, so that what is common to them cancels.
    """
    o_s = o_r[:, None]
    first_steep = tl.load(steep_from + i_ch)
    b_l = load_channels(erase_logits, start, o_r, m_r, i_h, H, K, o_k) + load_columns(terms, i_ch, K, o_k)[:, None]
    b_b = tl.where(m_r[None, :], tl.sigmoid(b_l), 0.0)
    b_count = sum_tokens(b_b, o_s <= o_r[None, :], CT)  # c
    b_all = tl.sum(b_b, 1)
    b_S = load_matrix(states, i_ch, o_k, o_v, K, V, False)
    b_R = load_tile_channels(residuals, i_ch, o_r, V, o_v)
    b_dS = load_matrix(d_states, i_ch, o_k, o_v, K, V, False)
    # keys to the chunk's end, and the whole chunk
    b_d = matmul(b_dS, b_R, CT, PRECISION) * load_tile_channels(k_to_end, i_ch, o_r, K, o_k).to(tl.float32)
    b_sum = tl.sum(sum_tokens(b_b, o_s > o_r[None, :], CT) * b_d, 1)  # not the difference of sums, which cancels
    b_sum += b_all * (load_columns(last, i_ch, K, o_k) * UNSHIFT) * tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)
    b_do = load_channels(do, start, o_r, m_r, i_h, H, V, o_v)
    b_do = tl.where(m_r[None, :], b_do + b_d_row[:, None], 0.0).to(CT)
    b_left = load_tile_channels(left, i_ch, o_r, K, o_k).to(tl.float32)
    b_k = load_channels(k, start, o_r, m_r, i_h, H, K, o_k)
    b_k_right = (b_k * right_factor(b_left)).to(CT)
    m_upper = o_r[None, :] > o_s
    m_mild = m_upper & (o_r < first_steep)[None, :]
    # rows of queries
    b_dP = tl.where(m_mild, matmul(tl.trans(b_R), b_do, CT, PRECISION), 0.0).to(CT)
    b_row = (load_channels(q, start, o_r, m_r, i_h, H, K, o_k) * scale * b_left).to(CT)
    b_d = matmul(b_S, b_do, CT, PRECISION) * UNSHIFT + matmul(b_k_right, b_dP, CT, PRECISION)
    b_sum += tl.sum(b_count * b_row.to(tl.float32) * b_d, 1)
    b_columns = matmul(b_row, tl.trans(b_dP), CT, PRECISION)
    # rows that predict
    b_dR = load_tile_channels(d_residuals, i_ch, o_r, V, o_v)
    b_dz = matmul(b_dR, load_tile(A, i_ch, o_r, BT, o_r), CT, PRECISION).to(CT)
    b_dT = tl.where(m_mild, -matmul(tl.trans(b_R), b_dz, CT, PRECISION), 0.0).to(CT)
    b_w = load_scalar_gate(w, start, o_r, m_r, i_h, H, LOGITS_W)[None, :]
    b_erase_left = b_left
    b_erase_count = b_count
    if BEFORE:
        b_erase_count -= b_b
        p_left = left + i_ch * BT * K + ((o_r[None, :] - 1) * K + o_k[:, None])
        b_erase_left = tl.load(p_left, mask=(o_r > 0)[None, :], other=0.0).to(tl.float32)
        b_erase_left = tl.where((o_r == 0)[None, :], SHIFTED, b_erase_left)
    b_row = (b_w * b_k * b_erase_left).to(CT)
    b_d = matmul(b_S, b_dz, CT, PRECISION) * -UNSHIFT + matmul(b_k_right, b_dT, CT, PRECISION)
    b_sum += tl.sum(b_erase_count * b_row.to(tl.float32) * b_d, 1)
    b_columns += matmul(b_row, tl.trans(b_dT), CT, PRECISION)
    b_sum -= tl.sum(b_count * b_k_right.to(tl.float32) * b_columns, 1)
    if first_steep < BT:
        b_a = log2_decays(
            g, erase_logits, A_log, dt_bias, load_columns(terms, i_ch, K, o_k), start, o_r, m_r, i_h, H, K, o_k,
            RAW_DECAY,
        )  # fmt: skip
        b_q = load_channels(q, start, o_r, m_r, i_h, H, K, o_k) * scale
        m_steep = m_upper & (o_r >= first_steep)[None, :]
        b_dP_steep = tl.where(m_steep, matmul(tl.trans(b_R), b_do, CT, PRECISION), 0.0)
        b_dT_steep = tl.where(m_steep, -matmul(tl.trans(b_R), b_dz, CT, PRECISION), 0.0)
        for step in range(HALVINGS):
            m_pairs = pairs_of_halves(o_r, step, True)
            b_dP_pairs, b_dT_pairs = tl.where(m_pairs, b_dP_steep, 0.0), tl.where(m_pairs, b_dT_steep, 0.0)
            m_steps = halving_mask(o_r, step, False)
            b_e, b_count = tl.exp2(sum_tokens(b_a, m_steps, CT)), sum_tokens(b_b, m_steps, CT)
            b_ke = b_k * b_e
            b_qe = (b_q * b_e).to(CT)
            b_sum += tl.sum(b_count * b_qe.to(tl.float32) * matmul(b_ke, b_dP_pairs, CT, PRECISION), 1)
            b_columns = matmul(b_qe, tl.trans(b_dP_pairs), CT, PRECISION)
            b_erase_count = b_count
            if BEFORE:
                m_steps = halving_mask(o_r, step, True)
                b_e, b_erase_count = tl.exp2(sum_tokens(b_a, m_steps, CT)), sum_tokens(b_b, m_steps, CT)
            b_ve = (b_w * b_k * b_e).to(CT)
            b_sum += tl.sum(b_erase_count * b_ve.to(tl.float32) * matmul(b_ke, b_dT_pairs, CT, PRECISION), 1)
            b_columns += matmul(b_ve, tl.trans(b_dT_pairs), CT, PRECISION)
            b_sum += tl.sum(b_count * b_ke * b_columns, 1)
    return b_sum


def content_sizes(call: Call, content: Content) -> dict[str, Any]:
    _, R, V = content.down.shape
    return {
        "K": call.K, "V": V, "R": R, "RP": triton.next_power_of_2(R),
        "BEFORE": call.before, "LOGITS_W": call.logits_w, **call.arithmetic,
        "num_warps": WARPS[max(call.K, V)], "num_stages": 1,
    }  # fmt: skip


def _parked(call: Call, like: Tensor) -> Tensor:
    """Where a loop leaves its state while its registers are needed."""
    return torch.empty(call.chunks.sequences, call.H, call.K, call.V, dtype=torch.float32, device=like.device)


def content_terms(
    call: Call, x: Inputs, decay: DecayInputs, content: Content, initial: tuple[Tensor | None, ...], content_chunk: int
) -> ContentTerms:
    """What content adds to the erase logits of every chunk.

    Args:
        x: queries, keys, values and write gate.
        initial: S, mean, partial and count to start from, or None each.
    """
    chunks, (_, R, V) = call.chunks, content.down.shape
    found = ContentTerms(
        # zeros: chunks beyond the last one enter the sums of the backward with weight zero
        *(call.floats(x.v, call.H, size).zero_() for size in (call.K, R, V)),
        *(call.floats(x.v, call.H, V).new_empty(chunks.sequences, call.H, V) for _ in range(2)),
    )
    content_loop_kernel[(chunks.sequences * call.H,)](
        x.q, x.k, x.v, decay.g, decay.erase_logits, x.w, decay.A_log, decay.dt_bias, *content, *initial, *found,
        _parked(call, x.v),
        chunks.table, chunks.first, content_chunk, call.H, content.by_head,
        RAW_DECAY=decay.A_log is not None, **content_sizes(call, content),
    )  # fmt: skip
    return found


def content_gradient(
    call: Call, x: Inputs, decay: DecayInputs, content: Content, code: Tensor, factors: Factors,
    operands: GradientOperands, A: Tensor, states: Tensor, do: Tensor,
    d_final: tuple[Tensor | None, ...], count: Tensor | None, has_initial: bool, content_chunk: int, detached: bool,
) -> ContentGradients:  # fmt: skip
    """The gradients that go from chunk to chunk.

    Args:
        decay: with the content terms of the forward.
        code: of the forward.
        d_final: gradients of the final S, mean and partial, or None each.
        count: of the initial state, or None.
        detached: no gradient reaches the means through the content terms.
    """
    chunks, V = call.chunks, content.down.shape[2]
    shapes = [(chunks.sequences, call.H, *tail) for tail in ((call.K, V), (V,), (V,))]
    if any(d is not None for d in d_final):
        d_final = tuple(
            factors.last.new_zeros(shape) if d is None else d.contiguous()
            for d, shape in zip(d_final, shapes, strict=True)
        )
    found = ContentGradients(
        call.tiles(do, call.H, call.K, V), call.tiles(do, call.H, CHUNK_TOKENS, V), call.floats(do, call.H, V),
        *(factors.last.new_empty(shape) if has_initial else None for shape in shapes),
    )  # fmt: skip
    content_gradient_loop_kernel[(chunks.sequences * call.H,)](
        x.q, x.k, decay.g, decay.erase_logits, x.w, decay.A_log, decay.dt_bias, content.down, content.up,
        decay.content, code, factors.left, factors.last, factors.steep_from, A, states,
        operands.residuals, operands.k_to_end,
        operands.q_from_start, operands.erasure, operands.P_sum, operands.d_residuals_here, do, *d_final, count, *found,
        _parked(call, do),
        chunks.table, chunks.first, content_chunk, call.scale, call.H, content.by_head,
        HAS_INITIAL=has_initial, DETACHED=detached, RAW_DECAY=decay.A_log is not None, **content_sizes(call, content),
    )  # fmt: skip
    return found
