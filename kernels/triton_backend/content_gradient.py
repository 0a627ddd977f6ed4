"""CARVE with diagonal erase, backward: the gradients that go from chunk to chunk; see content.py."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, sequence_chunks
from .content import (
    both_ways,
    content_sizes,
    halving_mask,
    in_lower_half,
    load_before,
    load_channels,
    load_tile_channels,
    neighbours,
    sum_tokens,
)
from .content_operands import RowWeights, blocks_of, content_operands, load_erase_gates
from .cooperation import announce, cooperates, make_counters, multiprocessors, take_place, wait_for
from .decay import UNSHIFT
from .gates import load_scalar_gate
from .launching import launch
from .overlap import end_after_launch_before, overlaps
from .products import matmul
from .special import LOG2_E, fast_exp2
from .stages import Call, Content, DecayInputs, Factors, GradientOperands, Inputs
from .steep import HALVINGS
from .tiles import load_columns, load_matrix, load_rows, load_tile, store_columns, store_matrix

# What counters count: chunks that the state's gradient has come through, and content chunks that it has left, of which
# d_output_rows are there; content chunks of which the sums are there.
STEPPED, SUMMED = (tl.constexpr(i) for i in range(2))


class ContentGradients(NamedTuple):
    """d_states [NC, H, K, V] as GDN-2's stage gives it, and d_written [NC, H, C, V], of what the chunks write, both but
    for what d_output_rows gives them; d_output_rows [NC, H, V] float32, what the means add to the gradient of every
    output of a chunk; those of the initial state or None. See also RowWeights."""

    d_states: Tensor
    d_written: Tensor
    d_output_rows: Tensor
    d_S: Tensor | None
    d_mean: Tensor | None
    d_partial: Tensor | None


@triton.jit
def content_gradient_kernel(
    k, log_decay, erase_logits, w, content_down, content_up, terms, codes, last, steep_from, states, residuals,
    erased, k_right, written_to_end, q_from_start, P, do,
    rows_before, counts, local, of_states, of_rows,
    d_final_S, d_final_mean, d_final_partial, initial_count,
    d_states, d_written, d_output_rows, d_initial_S, d_initial_mean, d_initial_partial,
    d_terms, formed, counters, tickets,
    table, first, content_chunk, scale, H, content_heads, blocks,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, TEAM: tl.constexpr,
    HAS_INITIAL: tl.constexpr, BEFORE: tl.constexpr, LOGITS_W: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The reverse of content_terms_kernel, a team of TEAM programs, one or two, per sequence and value head; outputs as
    in ContentGradients, and scratch: d_terms [NC, H, K] float32, counters [N, H, 2] of zeros. `formed` is given where
    content_operands_in_turn_kernel runs beside it.

    Of two programs one carries the state's gradient, and finds those of the means; the other forms what the chunks that
    the first has come through give the content terms.
    """
    i_nh, role = take_place(tickets, TEAM)
    given = (
        k, log_decay, erase_logits, w, content_down, content_up, terms, codes, last, steep_from, states, residuals,
        erased, k_right, written_to_end, q_from_start, P, do,
        rows_before, counts, local, of_states, of_rows,
        d_final_S, d_final_mean, d_final_partial, initial_count,
        d_states, d_written, d_output_rows, d_initial_S, d_initial_mean, d_initial_partial,
        d_terms, formed, counters, table, first, content_chunk, scale, H, content_heads, blocks, i_nh,
    )  # fmt: skip
    if TEAM == 1:
        go_back(*given, K, V, R, RP, True, d_terms is not None, HAS_INITIAL, BEFORE, LOGITS_W, CT, PRECISION)
    elif role == 0:
        go_back(*given, K, V, R, RP, True, False, HAS_INITIAL, BEFORE, LOGITS_W, CT, PRECISION)
    else:
        go_back(*given, K, V, R, RP, False, True, HAS_INITIAL, BEFORE, LOGITS_W, CT, PRECISION)
    if formed is not None:
        end_after_launch_before()


@triton.jit
def go_back(
    k, log_decay, erase_logits, w, content_down, content_up, terms, codes, last, steep_from, states, residuals,
    erased, k_right, written_to_end, q_from_start, P, do,
    rows_before, counts, local, of_states, of_rows,
    d_final_S, d_final_mean, d_final_partial, initial_count,
    d_states, d_written, d_output_rows, d_initial_S, d_initial_mean, d_initial_partial,
    d_terms, formed, counters, table, first, content_chunk, scale, H, content_heads, blocks, i_nh,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, CARRIES: tl.constexpr, SUMS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, BEFORE: tl.constexpr, LOGITS_W: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program's way through its sequence, a content chunk at a time; it CARRIES the state's gradient, SUMS what
    chunks give the content terms, or both. What it does not do costs it no registers.

    What the outputs of a content chunk gain from the mean behind them, a row, is wanted last: the state's gradient goes
    through the chunks without it, and gains what RowWeights makes of it when it leaves the content chunk. So the sums
    have the time in which it goes through a content chunk, and what the row gives them is added to them as it is found.
    What a chunk is multiplied with first is asked for while the one after it is in hand.
    """
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
    # none of a sequence without tokens, though its state may be within one
    content_chunks = tl.where(chunks > 0, (filled + chunks + slots - 1) // slots, 0)
    counters += i_nh * 2
    i_ch = tl.maximum(begin + chunks - 1, 0) * H + i_h
    if CARRIES:
        b_dS = tl.zeros([V, K], tl.float32)
        # Gradients of the mean that the content chunk after the running one saw, and of an output.
        b_d_mean = tl.zeros([V], tl.float32)
        b_d_row = tl.zeros([V], tl.float32)
        b_d_final = tl.zeros([V], tl.float32)
        if d_final_S is not None:
            b_dS += load_matrix(d_final_S, i_nh, o_v, o_k, V, K, True)
            b_d_row += load_columns(d_final_partial, i_nh, V, o_v) / scale
            b_d_final += load_columns(d_final_mean, i_nh, V, o_v)
        # what the final mean's gradient weighs in that of a mean: something in the last content chunk that is complete
        mean_pending = 1.0
        b_to_end, b_do, b_P = load_written_operands(
            written_to_end, do, P, i_ch, row_0 + (chunks - 1) * BT, tokens_from, tokens_to, o_r, i_h, H, K, V, o_k, o_v
        )
        b_q, b_E = load_tile(q_from_start, i_ch, o_r, K, o_k), load_tile(erased, i_ch, o_r, K, o_k)
        if d_terms is not None:
            # minus the gradient of a content term, but for what d_terms holds
            b_of_state = tl.zeros([K], tl.float32)
            b_down = load_matrix(content_down, i_map, o_v, o_c, V, R, True)
            b_up = load_matrix(content_up, i_map, o_k, o_c, K, R, False)
    elif not HAS_INITIAL:
        content_chunks -= 1  # the first one's mean is of nothing
    if SUMS:
        b_R = load_tile(residuals, i_ch, o_r, V, o_v)
        b_S = load_matrix(states, i_ch, o_k, o_v, K, V, False)
    for i_back in tl.range(0, content_chunks, disable_licm=True):
        i_from = ((filled + chunks - 1) // slots - i_back) * slots - filled
        i_since, i_to = tl.maximum(i_from, 0), tl.minimum(i_from + slots, chunks)
        i_first = (begin + i_since) * H + i_h
        b_sum = tl.zeros([K], tl.float32)
        if formed is not None:
            if i_back < 2:
                wait_for(formed + i_first, (i_to - i_since) * blocks)
            if SUMS:
                # for the other program too, which waits for these sums before it comes there
                i_ahead = tl.maximum(i_from - 2 * slots, 0)
                wait_for(formed + (begin + i_ahead) * H + i_h, (i_from - slots - i_ahead) * blocks)
        if CARRIES and d_terms is not None:
            b_of_state_after = b_of_state
            b_of_state = tl.zeros([K], tl.float32)
        for j in tl.range(0, i_to - i_since, disable_licm=True):
            i = i_to - 1 - j
            i_ch = (begin + i) * H + i_h
            i_next = (begin + tl.maximum(i - 1, 0)) * H + i_h
            start = row_0 + i * BT
            m_r = (start + o_r >= tokens_from) & (start + o_r < tokens_to)
            if CARRIES:
                b_total = (load_columns(last, i_ch, K, o_k) * UNSHIFT)[None, :]
                b_do_T = tl.trans(b_do.to(CT))
                b_dz = matmul(b_dS, b_to_end, CT, PRECISION)
                b_dz = tl.dot(b_do_T, b_P.to(CT), b_dz, input_precision=PRECISION)
                if d_terms is not None:  # the stores of what came before this chunk have come as far by now
                    announce(counters + STEPPED, chunks - i - 1 + i_back)
                store_matrix(d_states, i_ch, o_v, o_k, V, K, True, b_dS)
                # not asked for before b_dS is stored: there would be no registers, and a spill waits for what is loaded
                b_to_end, b_do, b_P = load_written_operands(
                    written_to_end, do, P, i_next, start - BT, tokens_from, tokens_to, o_r, i_h, H, K, V, o_k, o_v
                )
                store_matrix(d_written, i_ch, o_v, o_r, V, BT, True, b_dz)
                if d_terms is not None:
                    b_of = load_matrix(of_states, i_ch, o_k, o_v, K, V, False)
                b_dS *= b_total
                b_dS = tl.dot(b_do_T, (b_q.to(tl.float32) * UNSHIFT).to(CT), b_dS, input_precision=PRECISION)
                if d_terms is not None:  # loaded again it has a layout that suits the sum
                    tl.debug_barrier()
                    b_after = load_matrix(d_states, i_ch, o_k, o_v, K, V, False)
                b_dS = tl.dot(b_dz.to(CT), (b_E.to(tl.float32) * -UNSHIFT).to(CT), b_dS, input_precision=PRECISION)
                b_q, b_E = load_tile(q_from_start, i_next, o_r, K, o_k), load_tile(erased, i_next, o_r, K, o_k)
                if d_terms is not None:
                    b_of_state += tl.sum(b_of.to(tl.float32) * b_after.to(tl.float32), 1)
            if SUMS:
                b_chunk, b_R, b_S = chunk_term_gradient(
                    k, log_decay, erase_logits, w, terms, steep_from, states, residuals,
                    erased, k_right, counts, local, d_written,
                    counters + STEPPED, 0 if CARRIES else chunks - i + i_back,
                    b_R, b_S, i_ch, i_next, start, o_r, m_r, i_h, H,
                    o_k, o_v, K, V, BEFORE, LOGITS_W, CT, PRECISION,
                )  # fmt: skip
                b_sum += b_chunk
        if CARRIES:
            b_before = load_columns(rows_before, i_first, K, o_k)[None, :]
            if d_terms is not None:
                announce(counters + STEPPED, chunks - i_since + i_back)
                if i_back > 0:
                    b_d_mean = mean_gradient(
                        codes, d_terms, counters + SUMMED, i_back, b_of_state_after, b_down, b_up,
                        (begin + i_to) * H + i_h, o_k, o_c, K, R,
                    )  # fmt: skip
            if (i_to == i_from + slots) & (row_0 + i_to * BT <= tokens_to):
                b_d_row = (b_d_mean + mean_pending * b_d_final) * token_share
                mean_pending = 0.0
            b_dS += b_d_row[:, None] * b_before
            for i in tl.range(i_since, i_to, disable_licm=True):
                store_columns(d_output_rows, (begin + i) * H + i_h, V, o_v, b_d_row)
        if SUMS:
            b_sum = add_row_term_gradient(
                b_sum, of_rows, d_output_rows,
                counters + STEPPED, 0 if CARRIES else chunks - i_since + i_back + 1,
                begin, i_since, i_to, i_h, H, o_k, o_v, K, V,
            )  # fmt: skip
            store_columns(d_terms, i_first, K, o_k, b_sum)
            announce(counters + SUMMED, i_back + 1)
    if CARRIES and HAS_INITIAL:
        if d_terms is not None:  # noqa: SIM102  decided by the compiler
            if chunks > 0:
                announce(counters + STEPPED, chunks + content_chunks)
                b_d_mean = mean_gradient(
                    codes, d_terms, counters + SUMMED, content_chunks, b_of_state, b_down, b_up,
                    begin * H + i_h, o_k, o_c, K, R,
                )  # fmt: skip
        store_matrix(d_initial_S, i_nh, o_v, o_k, V, K, True, b_dS)
        store_columns(d_initial_mean, i_nh, V, o_v, b_d_mean + mean_pending * b_d_final)
        store_columns(d_initial_partial, i_nh, V, o_v, b_d_row * scale)


@triton.jit
def load_written_operands(
    written_to_end, do, P, i_ch, start, tokens_from, tokens_to, o_r, i_h, H,
    K: tl.constexpr, V: tl.constexpr, o_k, o_v,
):  # fmt: skip
    """What the gradient of what a chunk writes is formed with."""
    m_r = (start + o_r >= tokens_from) & (start + o_r < tokens_to)
    b_do = load_rows(do, start, o_r, m_r, i_h, H, V, o_v)
    return load_tile_channels(written_to_end, i_ch, o_r, K, o_k), b_do, load_tile(P, i_ch, o_r, BT, o_r)


@triton.jit
def mean_gradient(
    codes, d_terms, p_summed, least_summed, b_of_state, b_down, b_up, i_ch, o_k, o_c, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """D^T ((U^T du) (1 - code^2)), [V]: the gradient of the mean behind the content term of the content chunk that
    begins with chunk i_ch. -du is b_of_state, [K], and what d_terms holds as soon as p_summed tells so."""
    b_code = tl.load(codes + i_ch * R + o_c, mask=o_c < R, other=0.0)
    wait_for(p_summed, least_summed)
    b_d_term = -b_of_state - load_columns(d_terms, i_ch, K, o_k)
    b_d_code = tl.sum(b_up.to(tl.float32) * b_d_term[:, None], 0) * (1.0 - b_code * b_code)
    return tl.sum(b_down.to(tl.float32) * b_d_code[None, :], 1)


@triton.jit
def add_row_term_gradient(
    b_sum, of_rows, d_output_rows, p_stepped, least_stepped, begin, i_since, i_to, i_h, H, o_k, o_v,
    K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """b_sum, [K], and what d_row of a content chunk, of the sequence's chunks from i_since to i_to, gives the same sum,
    once p_stepped tells that it is there."""
    i_first = (begin + i_since) * H + i_h
    b_M = load_matrix(of_rows, i_first, o_k, o_v, K, V, False)
    wait_for(p_stepped, least_stepped)
    b_row = load_columns(d_output_rows, i_first, V, o_v)[None, :]
    for i in tl.range(i_since, i_to, disable_licm=True):
        # asked for before the one in hand is used
        i_next = (begin + tl.minimum(i + 1, i_to - 1)) * H + i_h
        b_next = load_matrix(of_rows, i_next, o_k, o_v, K, V, False)
        b_sum += tl.sum(b_M.to(tl.float32) * b_row, 1)
        b_M = b_next
    return b_sum


@triton.jit
def chunk_term_gradient(
    k, log_decay, erase_logits, w, terms, steep_from, states, residuals,
    erased, k_right, counts, local, d_written, p_stepped, least_stepped,
    b_R, b_S, i_ch, i_next, start, o_r, m_r, i_h, H, o_k, o_v,
    K: tl.constexpr, V: tl.constexpr, BEFORE: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_t b_t da_t of a chunk, [K], but for what d_row of its content chunk and the state's gradient after it give,
    once p_stepped tells that the latter has come through; and the residuals and the state, which are given, of the next
    chunk.

    What c_r gives and c_s takes are of the same rounded factors, so that what is common to them cancels.
    """
    # asked for before the wait
    b_E = load_tile_channels(erased, i_ch, o_r, K, o_k)
    b_k_right = load_tile_channels(k_right, i_ch, o_r, K, o_k)
    first_steep = tl.load(steep_from + i_ch)
    b_sum = load_columns(local, i_ch, K, o_k)
    b_count = load_tile_channels(counts, i_ch, o_r, K, o_k)
    b_erase_count = load_before(counts, i_ch, o_r, K, o_k) if BEFORE else b_count
    wait_for(p_stepped, least_stepped)
    b_dz = load_tile_channels(d_written, i_ch, o_r, V, o_v)
    b_dT = tl.where(o_r[None, :] > o_r[:, None], -matmul(b_R, b_dz, CT, PRECISION), 0.0)
    b_dT_mild = tl.where((o_r < first_steep)[None, :], b_dT, 0.0).to(CT)
    b_d = matmul(b_S, b_dz, CT, PRECISION) * -UNSHIFT
    b_R = load_tile(residuals, i_next, o_r, V, o_v)
    b_S = load_matrix(states, i_next, o_k, o_v, K, V, False)
    b_d += matmul(b_k_right, b_dT_mild, CT, PRECISION)
    b_columns = matmul(b_E, tl.trans(b_dT_mild), CT, PRECISION)
    b_d *= b_erase_count.to(tl.float32) * b_E.to(tl.float32)
    b_sum += tl.sum(b_d - b_count.to(tl.float32) * b_k_right.to(tl.float32) * b_columns, 1)
    if first_steep < BT:
        b_sum += steep_term_gradient(
            k, log_decay, erase_logits, w, terms, tl.where((o_r >= first_steep)[None, :], b_dT, 0.0),
            start, o_r, m_r, i_ch, i_h, H, K, o_k, BEFORE, LOGITS_W, CT, PRECISION,
        )  # fmt: skip
        # asked for again: they take no registers meanwhile
        b_R = load_tile(residuals, i_next, o_r, V, o_v)
        b_S = load_matrix(states, i_next, o_k, o_v, K, V, False)
    return b_sum, b_R, b_S


@triton.jit
def steep_term_gradient(
    k, log_decay, erase_logits, w, terms, b_dT, start, o_r, m_r, i_ch, i_h, H, K: tl.constexpr, o_k,
    BEFORE: tl.constexpr, LOGITS_W: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of scores of erased keys whose rows are steep, from their gradient, transposed, [s, r]."""
    b_k = load_channels(k, start, o_r, m_r, i_h, H, K, o_k)
    b_w = load_scalar_gate(w, start, o_r, m_r, i_h, H, LOGITS_W)[None, :]
    b_b = load_erase_gates(erase_logits, terms, i_ch, start, o_r, m_r, i_h, H, K, o_k).to(CT)
    b_a = load_channels(log_decay, start, o_r, m_r, i_h, H, K, o_k) * LOG2_E
    b_dT = both_ways(b_dT).to(CT)
    b_sum = tl.zeros([K], tl.float32)
    for step in tl.range(HALVINGS, disable_licm=True):
        m_steps = halving_mask(o_r, step, BEFORE)
        b_count = matmul(b_b, m_steps, CT, PRECISION)
        # erased keys of lower halves, keys of upper ones: either has the other's products with the same matrix
        b_x = fast_exp2(sum_tokens(b_a, m_steps, CT)) * tl.where(in_lower_half(o_r, step), b_w, 1.0)
        b_x = (b_k.to(tl.float32) * b_x).to(CT)
        b_d = matmul(b_x, tl.where(neighbours(o_r, step), b_dT, 0.0), CT, PRECISION)
        b_sum += tl.sum(b_count * b_x.to(tl.float32) * b_d, 1)
    return b_sum


def team_of(wants_terms: bool, device: torch.device) -> int:
    """Programs of a head."""
    return 2 if wants_terms and cooperates(device) else 1


def programs_beside(call: Call, programs: int) -> int | None:
    """Programs of content_operands that run beside so many of content_gradient, which may take a multiprocessor each;
    None where it comes before, because too few would be left.

    Those of content_gradient begin when all of content_operands run, which wait for nobody: so they can wait for these,
    however few programs a GPU has room for. Sequences whose lengths are known on the device alone come in no order that
    would suit.
    """
    device = call.chunks.first.device
    left = multiprocessors(device) - programs
    return left if overlaps(device) and not call.chunks.spare and left >= programs > 0 else None


def content_gradient(
    call: Call, x: Inputs, decay: DecayInputs, content: Content, code: Tensor, factors: Factors,
    operands: GradientOperands, rows: RowWeights, states: Tensor, do: Tensor, d_final: tuple[Tensor | None, ...],
    count: Tensor | None, has_initial: bool, content_chunk: int, detached: bool,
) -> ContentGradients:  # fmt: skip
    """The gradients that go from chunk to chunk.

    Args:
        x: with the log-decay that the erase is part of.
        decay: with the content terms of the forward.
        code: of the forward.
        operands: for content.
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
        call.tiles(states, call.H, call.K, V), call.tiles(states, call.H, CHUNK_TOKENS, V),
        call.floats(states, call.H, V),
        *(factors.last.new_empty(shape) if has_initial else None for shape in shapes),
    )  # fmt: skip
    heads = chunks.sequences * call.H
    d_terms = None if detached else call.floats(states, call.H, call.K)
    team = team_of(not detached, states.device)
    beside = None if detached else programs_beside(call, heads * team)
    of_chunks, counters, tickets = make_counters(states.device, chunks.count * call.H if beside else 0, 2 * heads, 1)
    formed = of_chunks if beside else None
    # all else that is launched comes before: programs that take turns run beside the launch that follows
    of_content = None
    if not detached:
        of_content = content_operands(
            call, x, decay, factors, operands, rows, states, do, formed, beside, content_chunk
        )
    launch(
        content_gradient_kernel, (heads * team,),
        x.k, x.g, decay.erase_logits, x.w, content.down, content.up, decay.content, code,
        factors.last, factors.steep_from, states, operands.residuals,
        operands.erasure, operands.k_right, operands.k_to_end, operands.q_from_start, operands.P, do,
        rows.before, *(of_content or (None,) * 4), *d_final, count, *found,
        d_terms, formed, counters, tickets,
        chunks.table, chunks.first, content_chunk, call.scale, call.H, content.by_head, blocks_of(call),
        TEAM=team, HAS_INITIAL=has_initial, launch_pdl=formed is not None, **content_sizes(call, content),
    )  # fmt: skip
    return found
