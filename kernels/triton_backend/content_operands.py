"""CARVE with diagonal erase, backward: what of the gradients that go from chunk to chunk waits for no later chunk, for
all chunks at once; see content.py.

With z the rows that a chunk writes, before the inverse A, dz their gradient, E the erased keys, S the state before the
chunk, dS the gradient of the one after it, and d_row what the mean adds to the gradient of every output,

    dz = A^T (k_to_end dS + P^T do + P_sum d_row^T)
    gradient of S = total dS + q_from_start^T (do + d_row) - E^T dz

Of these gradient_operands.py gives A^T k_to_end, P A and A^T P_sum. d_row is the same in all chunks of a content chunk:
so what it gives dz and dS of each is its product with a vector, formed here, and dz and dS without it can be found
before it is known.

The gradient of a content term is minus the sum of b_t da_t over its tokens. With c_r the sum of b up to a row, a decay
from row s to row r counts c_r - c_s times in it. It is linear in do, d_row, dS and dz: what do gives, a vector, is
formed here, and a matrix each that d_row, with what it gives dS and dz, and dS without that are multiplied with; what
dz without it gives follows in content_gradient.py.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, chunk_rows, chunk_sequence
from .content import (
    both_ways,
    in_lower_half,
    load_channels,
    load_tile_channels,
    neighbours,
    sum_tokens,
)
from .cooperation import announce_one_more
from .decay import UNSHIFT
from .gates import load_scalar_gate
from .launching import launch
from .overlap import let_next_launch_begin
from .products import matmul
from .special import LOG2_E, fast_exp2, fast_sigmoid
from .stages import HOPPER, Call, DecayInputs, Factors, GradientOperands, Inputs, Tuning
from .steep import GROUP, HALVINGS, group_is_mild, group_of_chunks
from .tiles import load_columns, load_matrix, load_rows, load_tile, store_columns, store_matrix

TUNING = {HOPPER: Tuning(64, 0, 4)}
ROWS_TUNING = {HOPPER: Tuning(0, 0, 4)}


class RowWeights(NamedTuple):
    """What d_row of a content chunk is multiplied with in gradients, by chunk and head, float32: in that of what the
    chunk writes, dz, written [C]; of the state after it, after [K]; of the state before it, before [K], of the first
    chunk of a content chunk alone."""

    written: Tensor
    after: Tensor
    before: Tensor


class ContentOperands(NamedTuple):
    """By chunk and head: counts [C, K], c; and of the sum of b_t da_t: local [K] float32, what the outputs give;
    of_states [K, V]: weights of dS, to be summed up over V; of_rows [K, V]: what multiplies d_row."""

    counts: Tensor
    local: Tensor
    of_states: Tensor
    of_rows: Tensor


@triton.jit
def content_rows_kernel(
    last, erasure, written_to_end, P_sum, rows_here, initial_count, written, after, before,
    table, first, content_chunk, H, K: tl.constexpr,
):  # fmt: skip
    """A program per chunk and head; those of the last chunks of content chunks find RowWeights of all their chunks."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_n = chunk_sequence(table, i_c)
    begin, end = tl.load(first + i_n), tl.load(first + i_n + 1)
    slots = content_chunk // BT
    i_slot = i_c - begin
    if initial_count is not None:
        i_slot += tl.load(initial_count + i_n) // BT
    i_slot %= slots
    if (i_c >= end) | ((i_c + 1 < end) & (i_slot + 1 < slots)):
        return
    o_r, o_k = tl.arange(0, BT), tl.arange(0, K)
    since = tl.maximum(i_c - i_slot, begin)
    i_ch = i_c * H + i_h
    store_columns(after, i_ch, K, o_k, tl.zeros([K], tl.float32))
    store_columns(written, i_ch, BT, o_r, load_columns(P_sum, i_ch, BT, o_r))
    b_row = load_columns(rows_here, i_ch, K, o_k) * UNSHIFT
    for i_back in tl.range(1, (i_c + 1 - since).to(tl.int32)):
        i_ch = (i_c - i_back) * H + i_h
        b_to_end = load_tile(written_to_end, i_ch, o_r, K, o_k).to(tl.float32)
        b_E = load_tile(erasure, i_ch, o_r, K, o_k).to(tl.float32)
        store_columns(after, i_ch, K, o_k, b_row)
        b_later = tl.sum(b_to_end * b_row[None, :], 1)
        store_columns(written, i_ch, BT, o_r, load_columns(P_sum, i_ch, BT, o_r) + b_later)
        b_row = load_columns(last, i_ch, K, o_k) * b_row + load_columns(rows_here, i_ch, K, o_k)
        b_row = (b_row - tl.sum(b_later[:, None] * b_E, 0)) * UNSHIFT
    store_columns(before, since * H + i_h, K, o_k, b_row)


@triton.jit
def content_operands_kernel(
    k, erase_logits, terms, last, rest, steep_from, states, do,
    q_from_start, erasure, k_right, residuals, rows_written, rows_after,
    counts, local, of_states, of_rows, ones_through,
    table, H, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BEFORE: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of key columns, chunk and head; outputs as in ContentOperands, without the scores of steep
    rows. ones_through [C, C], [s, r]: one where s is not after r."""
    i_c, i_h = tl.program_id(0).to(tl.int64) // (K // BK), tl.program_id(1)
    o_k = (tl.program_id(0) % (K // BK)) * BK + tl.arange(0, BK)
    block_operands(
        k, erase_logits, terms, last, rest, steep_from, states, do,
        q_from_start, erasure, k_right, residuals, rows_written, rows_after,
        counts, local, of_states, of_rows, ones_through, table, i_c, i_h, H, o_k, K, V, BEFORE, CT, PRECISION,
    )  # fmt: skip


@triton.jit
def steep_content_operands_kernel(
    q, k, log_decay, erase_logits, w, terms, steep_from, do, residuals, rows_written, local, of_rows, halvings,
    table, scale, chunks, H, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
    BEFORE: tl.constexpr, LOGITS_W: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per group of chunks, head and block of key columns: adds what the scores of steep rows give."""
    i_h = tl.program_id(1)
    if group_is_mild(steep_from, i_h, H, chunks):
        return
    begin, end = group_of_chunks(chunks)
    o_k = tl.program_id(2) * BK + tl.arange(0, BK)
    for i_c in tl.range(begin, end, disable_licm=True):
        add_steep_scores(
            q, k, log_decay, erase_logits, w, terms, steep_from, do, residuals, rows_written, local, of_rows, halvings,
            table, scale, i_c, i_h, H, o_k, K, V, BEFORE, LOGITS_W, CT, PRECISION,
        )  # fmt: skip


@triton.jit
def content_operands_in_turn_kernel(
    q, k, log_decay, erase_logits, w, terms, last, rest, steep_from, states, do,
    q_from_start, erasure, k_right, residuals, rows_written, rows_after,
    counts, local, of_states, of_rows, ones_through, halvings, formed,
    table, scale, content_chunk, sequences, chunks, H,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BEFORE: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs that take turns at all that the other two do, for so many sequences of as many chunks, in the order in
    which content_gradient_kernel comes to it. That may begin as soon as all of these have: of `formed`, counters of
    zeros by chunk and head, that of a content chunk's first chunk counts the blocks of its chunks that are there."""
    BLOCKS: tl.constexpr = K // BK
    let_next_launch_begin()
    for i in tl.range(tl.program_id(0), chunks * sequences * H * BLOCKS, tl.num_programs(0), disable_licm=True):
        i_h, i_n, i_back = i // BLOCKS % H, i // (BLOCKS * H) % sequences, i // (BLOCKS * H * sequences)
        i_c = (i_n + 1).to(tl.int64) * chunks - 1 - i_back
        o_k = i % BLOCKS * BK + tl.arange(0, BK)
        block_operands(
            k, erase_logits, terms, last, rest, steep_from, states, do,
            q_from_start, erasure, k_right, residuals, rows_written, rows_after,
            counts, local, of_states, of_rows, ones_through, table, i_c, i_h, H, o_k, K, V, BEFORE, CT, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # `local` and of_rows are read again
        add_steep_scores(
            q, k, log_decay, erase_logits, w, terms, steep_from, do, residuals, rows_written, local, of_rows, halvings,
            table, scale, i_c, i_h, H, o_k, K, V, BEFORE, LOGITS_W, CT, PRECISION,
        )  # fmt: skip
        i_first = i_c - (chunks - 1 - i_back) % (content_chunk // BT)
        announce_one_more(formed + i_first * H + i_h)


@triton.jit
def block_operands(
    k, erase_logits, terms, last, rest, steep_from, states, do,
    q_from_start, erasure, k_right, residuals, rows_written, rows_after,
    counts, local, of_states, of_rows, ones_through, table, i_c, i_h, H, o_k,
    K: tl.constexpr, V: tl.constexpr, BEFORE: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The operands of a block of key columns, chunk and head, without the scores of steep rows."""
    i_ch = i_c * H + i_h
    start, o_r, m_r = chunk_rows(table, i_c)
    o_v = tl.arange(0, V)
    b_q = load_tile_channels(q_from_start, i_ch, o_r, K, o_k)
    b_E = load_tile_channels(erasure, i_ch, o_r, K, o_k)
    b_do = load_rows(do, start, o_r, m_r, i_h, H, V, o_v)
    first_steep = tl.load(steep_from + i_ch)
    b_R = load_tile(residuals, i_ch, o_r, V, o_v)
    b_S = load_matrix(states, i_ch, o_k, o_v, K, V, False)
    b_through = load_tile(ones_through, 0, o_r, BT, o_r)
    b_k = load_tile_channels(k_right, i_ch, o_r, K, o_k)
    b_last = load_columns(last, i_ch, K, o_k)
    b_b = load_erase_gates(erase_logits, terms, i_ch, start, o_r, m_r, i_h, H, K, o_k).to(CT)
    b_count = matmul(b_b, b_through, CT, PRECISION)
    store_matrix(counts, i_ch, o_k, o_r, K, BT, True, b_count)
    # keys to the chunk's end, with the sum of b after them
    b_weights = matmul(b_b, tl.trans(b_through), CT, PRECISION) - b_b.to(tl.float32)
    if first_steep == BT:
        b_weights *= b_k.to(tl.float32) * b_last[:, None]
    else:
        b_weights *= load_channels(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        b_weights *= load_tile_channels(rest, i_ch, o_r, K, o_k).to(tl.float32)
    b_all = tl.sum(tl.where((o_r == BT - 1)[None, :], b_count, 0.0), 1) * (b_last * UNSHIFT)
    b_M = sum_of_products(b_weights, b_R, b_all, b_S, CT, PRECISION)
    store_matrix(of_states, i_ch, o_k, o_v, K, V, False, b_M)
    m_mild = (o_r < first_steep)[None, :]
    # d_row meets all queries alike, and erased keys by its weights in dz: a key's sum of (c_r - c_s) x_r over later
    # rows is one of b_t times the x_r from t, or of erased keys BEFORE their own decay those after t
    b_row = load_columns(rows_after, i_ch, K, o_k)
    b_erased = load_columns(rows_written, i_ch, BT, o_r)[None, :] * b_E.to(tl.float32)
    b_pairs = tl.where(m_mild, b_q.to(tl.float32) - b_erased, 0.0)
    b_pairs = matmul(b_pairs, tl.trans(b_through), CT, PRECISION)
    b_rows = b_count * (b_q.to(tl.float32) - b_erased)
    if BEFORE:
        b_pairs += tl.where(m_mild, b_erased, 0.0)
        b_rows += b_b.to(tl.float32) * b_erased
    b_pairs = (b_pairs * b_b.to(tl.float32)).to(CT)
    b_pairs = matmul(b_pairs, tl.trans(b_through), CT, PRECISION) - b_pairs.to(tl.float32)
    b_pairs = b_pairs * b_k.to(tl.float32) + b_weights * b_row[:, None]
    b_rows = tl.sum(b_rows, 1) * UNSHIFT + b_all * b_row
    b_M = sum_of_products(b_pairs, b_R, b_rows, b_S, CT, PRECISION)
    store_matrix(of_rows, i_ch, o_k, o_v, K, V, False, b_M)
    # rows of queries: what c_r gives and c_s takes are of the same rounded factors, so that what is common cancels
    b_dP = matmul(b_R, tl.trans(b_do), CT, PRECISION)
    b_dP = tl.where((o_r[None, :] > o_r[:, None]) & m_mild, b_dP, 0.0).to(CT)
    b_d = matmul(b_S, tl.trans(b_do), CT, PRECISION) * UNSHIFT + matmul(b_k, b_dP, CT, PRECISION)
    b_columns = matmul(b_q, tl.trans(b_dP), CT, PRECISION)
    b_d = b_q.to(tl.float32) * b_d - b_k.to(tl.float32) * b_columns
    store_columns(local, i_ch, K, o_k, tl.sum(b_count * b_d, 1))


@triton.jit
def sum_of_products(b_a, b_x, b_row, b_S, CT: tl.constexpr, PRECISION: tl.constexpr):
    """b_a b_x + diag(b_row) b_S. Both as products: S then lies in shared memory alone."""
    o = tl.arange(0, b_row.shape[0])
    b_diagonal = tl.where(o[:, None] == o[None, :], b_row[:, None], 0.0)
    return tl.dot(b_diagonal.to(CT), b_S.to(CT), matmul(b_a, b_x, CT, PRECISION), input_precision=PRECISION)


@triton.jit
def load_erase_gates(erase_logits, terms, i_ch, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k):
    """b, [BK, BT] float32, 0 in empty rows."""
    b_l = load_channels(erase_logits, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_l += load_columns(terms, i_ch, K, o_k)[:, None]
    return tl.where(m_r[None, :], fast_sigmoid(b_l), 0.0)


@triton.jit
def add_steep_scores(
    q, k, log_decay, erase_logits, w, terms, steep_from, do, residuals, rows_written, local, of_rows, halvings,
    table, scale, i_c, i_h, H, o_k, K: tl.constexpr, V: tl.constexpr,
    BEFORE: tl.constexpr, LOGITS_W: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the scores of steep rows give to `local` and of_rows, of a block of key columns, chunk and head."""
    i_ch = i_c * H + i_h
    first_steep = tl.load(steep_from + i_ch)
    if first_steep < BT:
        start, o_r, m_r = chunk_rows(table, i_c)
        o_v = tl.arange(0, V)
        b_R = load_tile(residuals, i_ch, o_r, V, o_v)
        b_dP = matmul(b_R, tl.trans(load_rows(do, start, o_r, m_r, i_h, H, V, o_v)), CT, PRECISION)
        m_steep = o_r >= first_steep
        b_dP = both_ways(tl.where((o_r[None, :] > o_r[:, None]) & m_steep[None, :], b_dP, 0.0)).to(CT)
        b_w = load_scalar_gate(w, start, o_r, m_r, i_h, H, LOGITS_W) * load_columns(rows_written, i_ch, BT, o_r)
        b_a = load_channels(log_decay, start, o_r, m_r, i_h, H, K, o_k) * LOG2_E
        b_b = load_erase_gates(erase_logits, terms, i_ch, start, o_r, m_r, i_h, H, K, o_k).to(CT)
        b_sum = tl.zeros([o_k.shape[0]], tl.float32)
        b_pairs = tl.zeros([o_k.shape[0], BT], tl.float32)
        p_ones = halvings + (o_r[:, None] * BT + o_r[None, :])
        for step in tl.range(HALVINGS, disable_licm=True):
            tl.debug_barrier()  # so that what is loaded here takes no registers from one halving to the next
            b_ones = tl.load(p_ones)
            b_k = load_channels(k, start, o_r, m_r, i_h, H, K, o_k)
            b_q = load_channels(q, start, o_r, m_r, i_h, H, K, o_k)
            b_steps, b_count = sum_tokens(b_a, b_ones, CT), matmul(b_b, b_ones, CT, PRECISION)
            # queries of lower halves, keys of upper ones: either has the other's products with the same matrix
            m_lower = in_lower_half(o_r, step)
            b_e = fast_exp2(b_steps)
            b_x = tl.where(m_lower, b_q, b_k).to(tl.float32) * (b_e * tl.where(m_lower, scale, 1.0))
            b_x = b_x.to(CT)
            if BEFORE:
                b_ones = tl.load(p_ones + HALVINGS * BT * BT)
            b_d = matmul(b_x, tl.where(neighbours(o_r, step), b_dP, 0.0), CT, PRECISION) * b_x.to(tl.float32)
            b_sum += tl.sum(b_count * b_d, 1)
            b_erase_count = b_count
            if BEFORE:
                b_e = fast_exp2(sum_tokens(b_a, b_ones, CT))
                b_erase_count = matmul(b_b, b_ones, CT, PRECISION)
            b_ones = tl.load(p_ones + 2 * HALVINGS * BT * BT, mask=m_steep[:, None], other=0.0)
            b_v = (b_k.to(tl.float32) * (b_e * b_w[None, :])).to(CT).to(tl.float32)
            b_row_count = (b_count * b_x.to(tl.float32) - b_erase_count * b_v).to(CT)
            b_rows = b_count * matmul(b_x.to(tl.float32) - b_v, b_ones, CT, PRECISION)
            b_rows = tl.dot(b_row_count, b_ones.to(CT), b_rows, input_precision=PRECISION)
            b_pairs += b_x.to(tl.float32) * b_rows
            p_ones += BT * BT
        store_columns(local, i_ch, K, o_k, load_columns(local, i_ch, K, o_k) + b_sum)
        # loaded again it takes no registers meanwhile
        b_M = matmul(b_pairs, load_tile(residuals, i_ch, o_r, V, o_v), CT, PRECISION)
        b_M += load_matrix(of_rows, i_ch, o_k, o_v, K, V, False).to(tl.float32)
        store_matrix(of_rows, i_ch, o_k, o_v, K, V, False, b_M)


@functools.cache
def ones_through(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.ones(CHUNK_TOKENS, CHUNK_TOKENS, device=device, dtype=dtype).triu()


@functools.cache
def ones_of_halvings(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[3, halvings, C, C], [s, r], of ones where the decay of step s is in the factor of column r, see halving_mask;
    where it is in that of a column BEFORE its own; where s is of a lower half and r of the upper one before it."""
    r = torch.arange(CHUNK_TOKENS, device=device)
    s = r[:, None]
    through, before, pairs = [], [], []
    for step in range(HALVINGS.value):
        half = r >> step
        lower = half % 2 == 1
        after, until = torch.where(lower, half << step, r + 1), torch.where(lower, r + 1, (half + 1) << step)
        through.append((s >= after) & (s < until))
        before.append(through[-1] & ~(lower & (s == r)))
        pairs.append(((s >> step) - 1 == half) & ~lower)
    return torch.stack(through + before + pairs).to(dtype)


def content_rows(
    call: Call, factors: Factors, operands: GradientOperands, count: Tensor | None, content_chunk: int
) -> RowWeights:
    """
    Args:
        operands: for content.
        count: of the initial state, or None.
    """
    like = factors.last
    rows = RowWeights(*(call.floats(like, call.H, size) for size in (CHUNK_TOKENS, call.K, call.K)))
    launch(
        content_rows_kernel, (call.chunks.count, call.H),
        factors.last, operands.erasure, operands.k_to_end, operands.P_sum, operands.rows_here, count, *rows,
        call.chunks.table, call.chunks.first, content_chunk, call.H,
        K=call.K, **call.tuning(ROWS_TUNING).launch(call.tile_dtype, call.K),
    )  # fmt: skip
    return rows


def blocks_of(call: Call) -> int:
    """Blocks of key columns of a chunk and head."""
    return call.K // call.key_block(TUNING)


def content_operands(
    call: Call, x: Inputs, decay: DecayInputs, factors: Factors, operands: GradientOperands, rows: RowWeights,
    states: Tensor, do: Tensor, formed: Tensor | None, programs: int | None, content_chunk: int,
) -> ContentOperands:  # fmt: skip
    """
    Args:
        x: with the log-decay that the erase is part of.
        decay: with the content terms of the forward.
        operands: for content.
        formed: see content_operands_in_turn_kernel; None where no programs take turns.
        programs: that take turns, or None.
    """

    def tile() -> Tensor:
        return call.tiles(do, call.H, CHUNK_TOKENS, call.K)

    def vector() -> Tensor:
        return call.floats(do, call.H, call.K)

    def matrix() -> Tensor:
        return call.tiles(do, call.H, call.K, call.V)

    # of counts up to 64 float16 keeps more than bfloat16
    count_dtype = torch.float16 if call.tile_dtype == torch.bfloat16 else torch.float32
    made = ContentOperands(tile().view(count_dtype), vector(), matrix(), matrix())
    chunks, BK, blocks = call.chunks, call.key_block(TUNING), blocks_of(call)
    halvings = ones_of_halvings(do.device, call.tile_dtype)
    given = (
        operands.q_from_start, operands.erasure, operands.k_right, operands.residuals, rows.written, rows.after,
        *made, ones_through(do.device, call.tile_dtype),
    )  # fmt: skip
    options = {"K": call.K, "BK": BK, "V": call.V, "BEFORE": call.before, **call.launch(TUNING, BK, call.V)}
    if formed is None:
        launch(
            content_operands_kernel, (chunks.count * blocks, call.H),
            x.k, decay.erase_logits, decay.content, factors.last, factors.rest, factors.steep_from, states, do,
            *given, chunks.table, call.H, **options,
        )  # fmt: skip
        launch(
            steep_content_operands_kernel, (triton.cdiv(chunks.count, GROUP.value), call.H, blocks),
            x.q, x.k, x.g, decay.erase_logits, x.w, decay.content, factors.steep_from, do, operands.residuals,
            rows.written, made.local, made.of_rows, halvings, chunks.table, call.scale, chunks.count, call.H,
            LOGITS_W=call.logits_w, **options,
        )  # fmt: skip
    else:
        launch(
            content_operands_in_turn_kernel, (min(programs or 1, chunks.count * call.H * blocks),),
            x.q, x.k, x.g, decay.erase_logits, x.w, decay.content, factors.last, factors.rest, factors.steep_from,
            states, do, *given, halvings, formed,
            chunks.table, call.scale, content_chunk, chunks.sequences, chunks.count // chunks.sequences, call.H,
            LOGITS_W=call.logits_w, **options,
        )  # fmt: skip
    return made
