"""CARVE with diagonal erase, backward: the gradients that go from chunk to chunk; see content.py."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, sequence_chunks
from .content import (
    INTERPRETED,
    content_sizes,
    halving_mask,
    load_channels,
    log2_decay,
    sum_tokens,
    team_of,
    with_erase,
)
from .cooperation import announce, take_place, wait_for
from .decay import SHIFTED, UNSHIFT
from .erasing_decay import DecayInputs
from .gates import load_scalar_gate
from .products import matmul, pairs_of_halves
from .stages import Call, Content, Factors, GradientOperands, Inputs
from .steep import HALVINGS
from .tiles import load_columns, load_matrix, load_tile, store_columns, store_matrix


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
def load_tile_channels(x, i, o_r, D: tl.constexpr, o_d):
    """load_tile transposed, [BD, rows]."""
    return tl.load(x + i * BT * D + (o_r[None, :] * D + o_d[:, None]))


@triton.jit
def reciprocal(x):
    """The GPU's own, of 23 bits."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


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
def content_gradient_kernel(
    q, k, g, erase_logits, w, A_log, dt_bias, content_down, content_up, terms, codes,
    left, last, steep_from, A, states, residuals, k_to_end, q_from_start, erasure, P_sum, d_residuals_here, do,
    d_final_S, d_final_mean, d_final_partial, initial_count,
    d_states, d_residuals, d_output_rows, d_initial_S, d_initial_mean, d_initial_partial,
    d_terms, parked, passed, summed, tickets,
    table, first, content_chunk, scale, H, content_heads,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, TEAM: tl.constexpr,
    HAS_INITIAL: tl.constexpr, DETACHED: tl.constexpr, BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr,
    LOGITS_W: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The reverse of content_terms_kernel, a team of TEAM programs per sequence and value head; outputs as in
    ContentGradients, and scratch: d_terms [NC, H, K] float32, parked [N, H, K, V] float32.

    The first program carries the state's gradient through the chunks of a content chunk; then all form what these
    chunks give the gradient of its content term, side by side.
    """
    i_nh, role = take_place(tickets, TEAM)
    i_n, i_h = i_nh // H, i_nh % H
    i_map = i_h * content_heads
    o_r, o_k, o_v, o_c = tl.arange(0, BT), tl.arange(0, K), tl.arange(0, V), tl.arange(0, RP)
    begin, end, row_0, tokens_from, tokens_to = sequence_chunks(table, first, i_n)
    chunks = (end - begin).to(tl.int32)
    slots = content_chunk // BT
    token_share = 1.0 / (content_chunk * scale)  # of an output, which is scaled, in the mean
    filled = tl.zeros([], tl.int64)  # chunks of the first content chunk before this call
    if initial_count is not None:
        filled += tl.load(initial_count + i_n) // BT % slots
    filled = filled.to(tl.int32)
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
    for i_back in tl.range(0, (filled + chunks + slots - 1) // slots, disable_licm=True):
        i_from = ((filled + chunks - 1) // slots - i_back) * slots - filled
        i_since, i_to = tl.maximum(i_from, 0), tl.minimum(i_from + slots, chunks)
        if role == 0:
            if (i_to == i_from + slots) & (row_0 + i_to * BT <= tokens_to):
                # of the mean that the content chunk after this one saw, if there is one
                b_d_mean = mean_gradient(
                    content_down, content_up, codes, (begin + i_to) * H + i_h, i_to < chunks, b_d_term,
                    i_map, o_k, o_v, o_c, K, V, R,
                )  # fmt: skip
                b_d_row = (b_d_mean + mean_pending * b_d_final) * token_share
                mean_pending = 0.0
            for j in tl.range(0, i_to - i_since, disable_licm=True):
                i = i_to - 1 - j
                i_ch = (begin + i) * H + i_h
                start = row_0 + i * BT
                m_r = (start + o_r >= tokens_from) & (start + o_r < tokens_to)
                store_columns(d_output_rows, i_ch, V, o_v, b_d_row)
                store_matrix(d_states, i_ch, o_v, o_k, V, K, True, b_dS)
                b_do = load_channels(do, start, o_r, m_r, i_h, H, V, o_v).to(tl.float32)
                b_do = tl.where(m_r[None, :], b_do + b_d_row[:, None], 0.0).to(CT)
                b_dR = load_tile_channels(d_residuals_here, i_ch, o_r, V, o_v).to(tl.float32)
                b_dR += b_d_row[:, None] * load_columns(P_sum, i_ch, BT, o_r)[None, :]
                b_dR += matmul(b_dS, load_tile_channels(k_to_end, i_ch, o_r, K, o_k), CT, PRECISION)
                b_dR = b_dR.to(CT)
                store_matrix(d_residuals, i_ch, o_v, o_r, V, BT, True, b_dR)
                b_dS *= (load_columns(last, i_ch, K, o_k) * UNSHIFT)[None, :]
                b_dS += matmul(b_do, load_tile(q_from_start, i_ch, o_r, K, o_k), CT, PRECISION)
                b_dS -= matmul(b_dR, load_tile(erasure, i_ch, o_r, K, o_k), CT, PRECISION)
                announce(passed + i_nh, chunks - i)
        # The first content chunk's term is that of the initial state.
        if not DETACHED:  # noqa: SIM102  decided by the compiler
            if i_from > -slots * HAS_INITIAL:
                if role == 0:
                    store_matrix(parked, i_nh, o_v, o_k, V, K, True, b_dS)  # dS needs no registers meanwhile
                i_own = i_since + (role + (i_since + filled) * (TEAM - 1)) % TEAM
                for i in tl.range(i_own, i_to, TEAM, disable_licm=True):
                    start = row_0 + i * BT
                    b_sum = chunk_term_gradient(
                        q, k, g, erase_logits, terms, w, A_log, dt_bias, left, last, steep_from, A, k_to_end, states,
                        residuals, d_states, d_residuals, do, d_output_rows, passed + i_nh, chunks - i,
                        scale, (begin + i) * H + i_h, start,
                        o_r, (start + o_r >= tokens_from) & (start + o_r < tokens_to), i_h, H, o_k, o_v,
                        K, V, BEFORE, RAW_DECAY, LOGITS_W, CT, PRECISION,
                    )  # fmt: skip
                    store_columns(d_terms, (begin + i) * H + i_h, K, o_k, b_sum)
                if role == 0:
                    tl.debug_barrier()
                    b_d_term = tl.zeros([K], tl.float32)
                    if TEAM > 1:
                        wait_for(summed + i_nh, i_back + 1)
                    for i in tl.range(i_since, i_to, disable_licm=True):
                        b_d_term -= load_columns(d_terms, (begin + i) * H + i_h, K, o_k)
                    b_dS = load_matrix(parked, i_nh, o_v, o_k, V, K, True)
                else:
                    announce(summed + i_nh, i_back + 1)
    if HAS_INITIAL and role == 0:
        b_d_mean = mean_gradient(
            content_down, content_up, codes, begin * H + i_h, begin < end, b_d_term, i_map, o_k, o_v, o_c, K, V, R
        )  # fmt: skip
        store_matrix(d_initial_S, i_nh, o_v, o_k, V, K, True, b_dS)
        store_columns(d_initial_mean, i_nh, V, o_v, b_d_mean + mean_pending * b_d_final)
        store_columns(d_initial_partial, i_nh, V, o_v, b_d_row * scale)


@triton.jit
def chunk_term_gradient(
    q, k, g, erase_logits, terms, w, A_log, dt_bias, left, last, steep_from, A, k_to_end, states, residuals,
    d_states, d_residuals, do, d_output_rows, p_passed, least_passed, scale, i_ch, start, o_r, m_r, i_h, H, o_k, o_v,
    K: tl.constexpr, V: tl.constexpr, BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_t b_t da_t of a chunk, [K], minus which is the gradient of its content term, once the counter at p_passed
    tells that the gradients of its residuals and of the state after it are known.

    With c_r the sum of b up to a row, every decay between two rows s < r counts c_r - c_s times in it: what c_r gives
    and c_s takes are of the same rounded factors, so that what is common to them cancels.
    """
    o_s = o_r[:, None]
    first_steep = tl.load(steep_from + i_ch)
    b_l = load_channels(erase_logits, start, o_r, m_r, i_h, H, K, o_k)
    b_term = load_columns(terms, i_ch, K, o_k)
    b_b = tl.where(m_r[None, :], tl.sigmoid(b_l.to(tl.float32) + b_term[:, None]), 0.0)
    b_count = sum_tokens(b_b, o_s <= o_r[None, :], CT)  # c
    b_all = tl.sum(b_b, 1)
    b_S = load_matrix(states, i_ch, o_k, o_v, K, V, False)
    b_R = load_tile_channels(residuals, i_ch, o_r, V, o_v)
    wait_for(p_passed, least_passed)
    b_d_row = load_columns(d_output_rows, i_ch, V, o_v)
    b_dS = load_matrix(d_states, i_ch, o_k, o_v, K, V, False)
    # keys to the chunk's end, and the whole chunk
    b_d = matmul(b_dS, b_R, CT, PRECISION) * load_tile_channels(k_to_end, i_ch, o_r, K, o_k).to(tl.float32)
    b_sum = tl.sum(sum_tokens(b_b, o_s > o_r[None, :], CT) * b_d, 1)  # not the difference of sums, which cancels
    b_sum += b_all * (load_columns(last, i_ch, K, o_k) * UNSHIFT) * tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)
    b_do = load_channels(do, start, o_r, m_r, i_h, H, V, o_v).to(tl.float32)
    b_do = tl.where(m_r[None, :], b_do + b_d_row[:, None], 0.0).to(CT)
    b_left = load_tile_channels(left, i_ch, o_r, K, o_k).to(tl.float32)
    b_k = load_channels(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_k_right = (b_k * reciprocal(tl.maximum(b_left, UNSHIFT))).to(CT)
    m_upper = o_r[None, :] > o_s
    m_mild = m_upper & (o_r < first_steep)[None, :]
    # rows of queries
    b_dP = tl.where(m_mild, matmul(tl.trans(b_R), b_do, CT, PRECISION), 0.0).to(CT)
    b_row = (load_channels(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale * b_left).to(CT)
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
        b_g = load_channels(g, start, o_r, m_r, i_h, H, K, o_k)
        b_a = with_erase(log2_decay(b_g, A_log, dt_bias, i_h, K, o_k, RAW_DECAY), b_l, b_term, m_r)
        b_q = load_channels(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale
        m_steep = m_upper & (o_r >= first_steep)[None, :]
        b_dP_steep = tl.where(m_steep, matmul(tl.trans(b_R), b_do, CT, PRECISION), 0.0)
        b_dT_steep = tl.where(m_steep, -matmul(tl.trans(b_R), b_dz, CT, PRECISION), 0.0)
        for step in tl.range(HALVINGS, disable_licm=True):
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
    heads = chunks.sequences * call.H
    team = team_of(heads, content_chunk // CHUNK_TOKENS, 2, do.device)
    parked = torch.empty(heads, call.K, V, dtype=torch.float32, device=do.device)
    counters = torch.zeros(2 * heads + 1, dtype=torch.int32, device=do.device)
    content_gradient_kernel[(heads * team,)](
        x.q, x.k, decay.g, decay.erase_logits, x.w, decay.A_log, decay.dt_bias, content.down, content.up,
        decay.content, code, factors.left, factors.last, factors.steep_from, A, states,
        operands.residuals, operands.k_to_end,
        operands.q_from_start, operands.erasure, operands.P_sum, operands.d_residuals_here, do, *d_final, count, *found,
        call.floats(do, call.H, call.K), parked, *counters.split((heads, heads, 1)),
        chunks.table, chunks.first, content_chunk, call.scale, call.H, content.by_head,
        TEAM=team, HAS_INITIAL=has_initial, DETACHED=detached, RAW_DECAY=decay.A_log is not None,
        **content_sizes(call, content),
    )  # fmt: skip
    return found
