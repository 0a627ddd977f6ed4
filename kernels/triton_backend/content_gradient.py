"""CARVE with diagonal erase, backward: the gradients that go from chunk to chunk; see content.py."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, sequence_chunks
from .content import (
    content_sizes,
    halving_mask,
    load_before,
    load_channels,
    load_tile_channels,
    sum_tokens,
)
from .content_operands import ContentOperands
from .cooperation import announce, cooperates, make_counters, take_place, wait_for
from .decay import UNSHIFT
from .gates import load_scalar_gate
from .launching import launch
from .products import matmul, pairs_of_halves
from .special import LOG2_E
from .stages import Call, Content, DecayInputs, Factors, GradientOperands, Inputs
from .steep import HALVINGS
from .tiles import load_columns, load_matrix, load_tile, store_columns, store_matrix

# What counters count: content chunks that a team has begun; chunks that the state's gradient has come through; chunks
# up to the last one whose part of the content term's gradient the second program has added up.
BEGUN, STEPPED, SUMMED = (tl.constexpr(i) for i in range(3))


class ContentGradients(NamedTuple):
    """d_states [NC, H, K, V] as GDN-2's stage gives it; d_written [NC, H, C, V], A^T times its d_residuals;
    d_output_rows [NC, H, V] float32, what the means add to the gradient of every output of a chunk; those of the
    initial state or None."""

    d_states: Tensor
    d_written: Tensor
    d_output_rows: Tensor
    d_S: Tensor | None
    d_mean: Tensor | None
    d_partial: Tensor | None


@triton.jit
def mean_gradient(b_down, b_up, b_code, b_d_term):
    """D^T ((U^T du) (1 - code^2)), [V]: the gradient of the mean behind a content term, from the term's, [K]."""
    b_d_code = tl.sum(b_up.to(tl.float32) * b_d_term[:, None], 0) * (1.0 - b_code * b_code)
    return tl.sum(b_down.to(tl.float32) * b_d_code[None, :], 1)


@triton.jit
def content_gradient_kernel(
    k, log_decay, erase_logits, w, content_down, content_up, terms, codes, last, steep_from, states, residuals,
    erased, k_right, written_to_end, d_written_here, written_rows,
    d_states_here, row_weights, counts, local, of_states, of_rows,
    d_final_S, d_final_mean, d_final_partial, initial_count,
    d_states, d_written, d_output_rows, d_initial_S, d_initial_mean, d_initial_partial,
    d_terms, low_bits, counters, tickets,
    table, first, content_chunk, scale, H, content_heads,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, TEAM: tl.constexpr,
    HAS_INITIAL: tl.constexpr, BEFORE: tl.constexpr, LOGITS_W: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The reverse of content_terms_kernel, a team of TEAM programs, at most two, per sequence and value head; outputs
    as in ContentGradients, and scratch: d_terms [N, H, K] float32, low_bits [N, H, K, V], counters [N, H, 3] of zeros.

    Of two programs one carries the state's gradient through a chunk while the other forms what the chunk gives the
    gradient of its content term; with the next chunk they change places. Between them the state's gradient passes
    through memory, in two halves of its bits where d_states has 16.
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
    counters += i_nh * 3
    # Gradients of the mean that the content chunk after the running one saw, and of an output.
    b_d_mean = tl.zeros([V], tl.float32)
    b_d_row = tl.zeros([V], tl.float32)
    b_d_final = tl.zeros([V], tl.float32)
    # what the final mean's gradient weighs in that of a mean: something in the last content chunk that is complete
    mean_pending = 1.0
    if role == 0:
        b_dS = tl.zeros([V, K], tl.float32)
        if d_final_S is not None:
            b_dS += load_matrix(d_final_S, i_nh, o_v, o_k, V, K, True)
            b_d_row += load_columns(d_final_partial, i_nh, V, o_v) / scale
            b_d_final += load_columns(d_final_mean, i_nh, V, o_v)
        store_state_gradient(
            d_states, low_bits, d_initial_S, (end - 1) * H + i_h, i_nh, chunks > 0, o_v, o_k, V, K, HAS_INITIAL, b_dS
        )
    for i_back in tl.range(0, (filled + chunks + slots - 1) // slots, disable_licm=True):
        i_from = ((filled + chunks - 1) // slots - i_back) * slots - filled
        i_since, i_to = tl.maximum(i_from, 0), tl.minimum(i_from + slots, chunks)
        if role == 0:
            if (i_to == i_from + slots) & (row_0 + i_to * BT <= tokens_to):
                b_d_row = (b_d_mean + mean_pending * b_d_final) * token_share
                mean_pending = 0.0
            for i in tl.range(i_since, i_to, disable_licm=True):
                store_columns(d_output_rows, (begin + i) * H + i_h, V, o_v, b_d_row)
            announce(counters + BEGUN, i_back + 1)
        b_d_term = tl.zeros([K], tl.float32)
        for j in tl.range(0, i_to - i_since, disable_licm=True):
            i = i_to - 1 - j
            i_ch = (begin + i) * H + i_h
            whose = (i + filled) % TEAM
            # Before a content chunk begins, the step that leads to it is done.
            begins = (role > 0) & (j == 0)
            if (role != whose) | (TEAM == 1):
                step_state_gradient(
                    last, written_to_end, erased, d_states_here, row_weights, d_output_rows,
                    d_states, low_bits, d_initial_S, counters + tl.where(begins, BEGUN, STEPPED),
                    tl.where(begins, i_back + 1, chunks - 1 - i), i_ch, i_nh, H, i > 0, o_r, o_k, o_v,
                    K, V, HAS_INITIAL, CT, PRECISION,
                )  # fmt: skip
                announce(counters + STEPPED, chunks - i)
            if role == whose:
                start = row_0 + i * BT
                b_d_term -= chunk_term_gradient(
                    k, log_decay, erase_logits, w, terms, steep_from, states, residuals,
                    written_to_end, d_written_here, written_rows, erased, k_right, counts, local, of_states, of_rows,
                    d_output_rows, d_states, d_written, counters + BEGUN, i_back + 1, begins, i_ch, start,
                    o_r, (start + o_r >= tokens_from) & (start + o_r < tokens_to), i_h, H, o_k, o_v,
                    K, V, BEFORE, LOGITS_W, CT, PRECISION,
                )  # fmt: skip
                if d_terms is not None:  # noqa: SIM102  decided by the compiler
                    if role > 0:
                        store_columns(d_terms, i_nh, K, o_k, b_d_term)
                        announce(counters + SUMMED, chunks - i)
        if d_terms is not None:  # noqa: SIM102  decided by the compiler
            if role == 0:
                b_code = tl.load(codes + ((begin + i_since) * H + i_h) * R + o_c, mask=o_c < R, other=0.0)
                b_down = load_matrix(content_down, i_map, o_v, o_c, V, R, True)
                b_up = load_matrix(content_up, i_map, o_k, o_c, K, R, False)
                i_others = i_since + 1 - (i_since + filled) % 2  # the last one that the second program sums up
                if (TEAM > 1) & (i_others < i_to):
                    wait_for(counters + SUMMED, chunks - i_others)
                    b_d_term += load_columns(d_terms, i_nh, K, o_k)
                b_d_mean = mean_gradient(b_down, b_up, b_code, b_d_term)
    if HAS_INITIAL and role == 0:
        store_columns(d_initial_mean, i_nh, V, o_v, b_d_mean + mean_pending * b_d_final)
        store_columns(d_initial_partial, i_nh, V, o_v, b_d_row * scale)


@triton.jit
def store_state_gradient(
    d_states, low_bits, d_initial_S, i_ch, i_nh, has_chunk, o_v, o_k, V: tl.constexpr, K: tl.constexpr,
    HAS_INITIAL: tl.constexpr, b_dS,
):  # fmt: skip
    """Keep the gradient of the state after chunk i_ch, or, where the sequence has none, of the initial one."""
    if has_chunk:
        store_matrix(d_states, i_ch, o_v, o_k, V, K, True, b_dS)
        if low_bits is not None:
            b_low = b_dS - b_dS.to(d_states.dtype.element_ty).to(tl.float32)
            store_matrix(low_bits, i_nh, o_v, o_k, V, K, True, b_low)
    elif HAS_INITIAL:
        store_matrix(d_initial_S, i_nh, o_v, o_k, V, K, True, b_dS)


@triton.jit
def step_state_gradient(
    last, written_to_end, erased, d_states_here, row_weights, d_output_rows, d_states, low_bits, d_initial_S,
    p_counter, least, i_ch, i_nh, H, has_chunk_before, o_r, o_k, o_v,
    K: tl.constexpr, V: tl.constexpr, HAS_INITIAL: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of the state after a chunk, once p_counter tells that it is there, to that of the one before
    it."""
    b_to_end = load_tile_channels(written_to_end, i_ch, o_r, K, o_k)
    b_E = load_tile(erased, i_ch, o_r, K, o_k)
    b_here = load_matrix(d_states_here, i_ch, o_v, o_k, V, K, True)
    b_weights = load_columns(row_weights, i_ch, K, o_k)[None, :]
    b_total = (load_columns(last, i_ch, K, o_k) * UNSHIFT)[None, :]
    wait_for(p_counter, least)
    b_dS = load_matrix(d_states, i_ch, o_v, o_k, V, K, True)
    b_d_row = load_columns(d_output_rows, i_ch, V, o_v)
    if low_bits is not None:
        b_low = load_matrix(low_bits, i_nh, o_v, o_k, V, K, True)
    b_dz = matmul(b_dS, b_to_end, CT, PRECISION)
    b_step = matmul(b_dz, b_E, CT, PRECISION) * -UNSHIFT
    b_step += b_d_row[:, None] * b_weights
    b_step += b_here.to(tl.float32)
    b_step += b_total * b_dS.to(tl.float32)
    if low_bits is not None:
        b_step += b_total * b_low.to(tl.float32)
    store_state_gradient(
        d_states, low_bits, d_initial_S, i_ch - H, i_nh, has_chunk_before, o_v, o_k, V, K, HAS_INITIAL, b_step
    )


@triton.jit
def chunk_term_gradient(
    k, log_decay, erase_logits, w, terms, steep_from, states, residuals,
    written_to_end, d_written_here, written_rows, erased, k_right, counts, local, of_states, of_rows,
    d_output_rows, d_states, d_written, p_begun, least_begun, begins, i_ch, start, o_r, m_r, i_h, H, o_k, o_v,
    K: tl.constexpr, V: tl.constexpr, BEFORE: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_t b_t da_t of a chunk, [K], minus which is the gradient of its content term (0 where that is not wanted);
    stores the gradient of what it writes. If it begins a content chunk, p_begun tells when it can. The gradient of the
    state after the chunk is there: the program that comes here has made the step to it.

    What c_r gives and c_s takes are of the same rounded factors, so that what is common to them cancels.
    """
    b_to_end = load_tile_channels(written_to_end, i_ch, o_r, K, o_k)
    b_here = load_tile_channels(d_written_here, i_ch, o_r, V, o_v)
    b_weights = load_columns(written_rows, i_ch, BT, o_r)[None, :]
    if of_states is not None:
        b_R = load_tile(residuals, i_ch, o_r, V, o_v)
        b_S = load_matrix(states, i_ch, o_k, o_v, K, V, False)
        b_E = load_tile_channels(erased, i_ch, o_r, K, o_k)
        b_k_right = load_tile_channels(k_right, i_ch, o_r, K, o_k)
        first_steep = tl.load(steep_from + i_ch)
        b_sum = load_columns(local, i_ch, K, o_k)
        b_count = load_tile_channels(counts, i_ch, o_r, K, o_k)
        b_erase_count = load_before(counts, i_ch, o_r, K, o_k) if BEFORE else b_count
        b_of_rows = load_matrix(of_rows, i_ch, o_k, o_v, K, V, False)
        b_of_states = load_matrix(of_states, i_ch, o_k, o_v, K, V, False)
    if begins:
        wait_for(p_begun, least_begun)
    b_dS = load_matrix(d_states, i_ch, o_k, o_v, K, V, False)
    b_d_row = load_columns(d_output_rows, i_ch, V, o_v)
    b_dz = matmul(tl.trans(b_dS), b_to_end, CT, PRECISION)
    b_dz += b_here.to(tl.float32)
    b_dz += b_d_row[:, None] * b_weights
    b_dz = b_dz.to(CT)
    store_matrix(d_written, i_ch, o_v, o_r, V, BT, True, b_dz)
    if of_states is None:
        b_sum = tl.zeros([K], tl.float32)
    else:
        b_weighted = b_of_states.to(tl.float32) * b_dS.to(tl.float32) + b_of_rows.to(tl.float32) * b_d_row[None, :]
        b_sum += tl.sum(b_weighted, 1)
        b_dT = tl.where(o_r[None, :] > o_r[:, None], -matmul(b_R, b_dz, CT, PRECISION), 0.0)
        b_dT_mild = tl.where((o_r < first_steep)[None, :], b_dT, 0.0).to(CT)
        b_d = matmul(b_S, b_dz, CT, PRECISION) * -UNSHIFT
        b_d += matmul(b_k_right, b_dT_mild, CT, PRECISION)
        b_columns = matmul(b_E, tl.trans(b_dT_mild), CT, PRECISION)
        b_d *= b_erase_count.to(tl.float32) * b_E.to(tl.float32)
        b_sum += tl.sum(b_d - b_count.to(tl.float32) * b_k_right.to(tl.float32) * b_columns, 1)
        if first_steep < BT:
            b_sum += steep_term_gradient(
                k, log_decay, erase_logits, w, terms, tl.where((o_r >= first_steep)[None, :], b_dT, 0.0),
                start, o_r, m_r, i_ch, i_h, H, K, o_k, BEFORE, LOGITS_W, CT, PRECISION,
            )  # fmt: skip
    return b_sum


@triton.jit
def steep_term_gradient(
    k, log_decay, erase_logits, w, terms, b_dT, start, o_r, m_r, i_ch, i_h, H, K: tl.constexpr, o_k,
    BEFORE: tl.constexpr, LOGITS_W: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of scores of erased keys whose rows are steep, from their gradient, transposed, [s, r]."""
    b_k = load_channels(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_w = load_scalar_gate(w, start, o_r, m_r, i_h, H, LOGITS_W)[None, :]
    b_b = load_channels(erase_logits, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_b = tl.where(m_r[None, :], tl.sigmoid(b_b + load_columns(terms, i_ch, K, o_k)[:, None]), 0.0)
    b_a = load_channels(log_decay, start, o_r, m_r, i_h, H, K, o_k) * LOG2_E
    b_sum = tl.zeros([K], tl.float32)
    for step in tl.range(HALVINGS, disable_licm=True):
        b_dT_pairs = tl.where(pairs_of_halves(o_r, step, True), b_dT, 0.0).to(CT)
        m_steps = halving_mask(o_r, step, False)
        b_e, b_count = tl.exp2(sum_tokens(b_a, m_steps, CT)), matmul(b_b, m_steps, CT, PRECISION)
        b_ke = b_k * b_e
        b_erase_count = b_count
        if BEFORE:
            m_steps = halving_mask(o_r, step, True)
            b_e, b_erase_count = tl.exp2(sum_tokens(b_a, m_steps, CT)), matmul(b_b, m_steps, CT, PRECISION)
        b_ve = (b_w * b_k * b_e).to(CT)
        b_sum += tl.sum(b_erase_count * b_ve.to(tl.float32) * matmul(b_ke, b_dT_pairs, CT, PRECISION), 1)
        b_sum += tl.sum(b_count * b_ke * matmul(b_ve, tl.trans(b_dT_pairs), CT, PRECISION), 1)
    return b_sum


def team_of(side_by_side: int, device: torch.device) -> int:
    """Programs of a head, where that many chunks can be worked on at a time."""
    return 2 if side_by_side > 1 and cooperates(device) else 1


def content_gradient(
    call: Call, x: Inputs, decay: DecayInputs, content: Content, code: Tensor, factors: Factors,
    operands: GradientOperands, of_content: ContentOperands, states: Tensor,
    d_final: tuple[Tensor | None, ...], count: Tensor | None, has_initial: bool, content_chunk: int,
) -> ContentGradients:  # fmt: skip
    """The gradients that go from chunk to chunk.

    Args:
        x: with the log-decay that the erase is part of.
        decay: with the content terms of the forward.
        code: of the forward.
        operands: for content.
        d_final: gradients of the final S, mean and partial, or None each.
        count: of the initial state, or None.
    """
    chunks, V = call.chunks, content.down.shape[2]
    shapes = [(chunks.sequences, call.H, *tail) for tail in ((call.K, V), (V,), (V,))]
    if any(d is not None for d in d_final):
        d_final = tuple(
            factors.last.new_zeros(shape) if d is None else d.contiguous()
            for d, shape in zip(d_final, shapes, strict=True)
        )
    found = ContentGradients(
        call.tiles(states, call.H, call.K, V), call.tiles(states, call.H, CHUNK_TOKENS, V),
        call.floats(states, call.H, V),
        *(factors.last.new_empty(shape) if has_initial else None for shape in shapes),
    )  # fmt: skip
    heads = chunks.sequences * call.H
    team = team_of(content_chunk // CHUNK_TOKENS, states.device)
    low_bits = None if call.tile_dtype == torch.float32 else states.new_empty(heads, call.K, V)
    d_terms = None if of_content.of_rows is None else factors.last.new_empty(heads, call.K)
    launch(
        content_gradient_kernel, (heads * team,),
        x.k, x.g, decay.erase_logits, x.w, content.down, content.up, decay.content, code,
        factors.last, factors.steep_from, states, operands.residuals,
        operands.erasure, operands.k_right, operands.k_to_end, operands.d_residuals_here, operands.P_sum,
        *of_content, *d_final, count, *found, d_terms, low_bits, *make_counters(states.device, 3 * heads, 1),
        chunks.table, chunks.first, content_chunk, call.scale, call.H, content.by_head,
        TEAM=team, HAS_INITIAL=has_initial, **content_sizes(call, content),
    )  # fmt: skip
    return found
