"""Stage 1, forward and backward: the decays of a chunk as factors, formed from the log-decays.

With G the sum of log2-decays from the chunk's start through a row, two factors per element stand for every decay
between two rows:

    left  = 2^(G + SHIFT)     right = 1 / left

The decay from row s to a later row r is left_r * right_s. SHIFT centres their exponents in the range that float32 and
bfloat16 share; a power of two rounds nothing, and a constant one tells a row nothing about later rows. Rows that have
decayed below 2^(-2 SHIFT) in some channel, where left is below UNSHIFT, are steep: all from the first such row on take
the path of steep.py. Of these are

    late    rows of the chunk's second half that have not decayed as far since its middle: their factors count from
            there. Of a row of the first half whose decay to the middle is below 2^(SHIFT - 126) = 2^-36, right becomes
            zero: as much of a term of a late row's scores is lost.
    halved  the others.

Which kind a row is depends on its past alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS, LARGEST_A_LOG
from .chunks import BT, chunk_sequence, chunk_span
from .launching import launch
from .special import INTERPRETED, LOG2_E, fast_exp2, log2_softplus, reciprocal
from .stages import HOPPER, Call, DecayInputs, Factors, Inputs, Tuning
from .tiles import load_columns, load_rows, load_tile, store_rows, store_tile

TUNING = {HOPPER: Tuning(128, 0, 1)}

LARGEST = tl.constexpr(LARGEST_A_LOG)
# One step of this log2-decay is an exact 0 in float32, so stopping here changes no value; it keeps 0 * g finite.
STEEPEST_LOG2_DECAY = tl.constexpr(-256.0)
# left and right of rows that are not halved stay within 2^-90 and 2^90 (to late rows, right of the first half's may be
# smaller). What is left up to the ends 2^-126 and 2^127 is for what they multiply: gradients of the outputs may be as
# small as 2^-36 at no loss.
SHIFT = tl.constexpr(90.0)
UNSHIFT = tl.constexpr(2.0**-90)
SHIFTED = tl.constexpr(2.0**90)


@triton.jit
def load_rate(A_log, i_h, K: tl.constexpr, o_k):
    """exp(A_log) of channels, [BK] float32."""
    return tl.exp(tl.minimum(load_columns(A_log, i_h, K, o_k), LARGEST))


@triton.jit
def load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k, RAW: tl.constexpr):
    """log2 of the decay per step, [rows, BK] float32, 0 in empty rows; RAW forms it from the raw projection."""
    b_g = load_rows(g, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    if RAW:
        b_g += load_columns(dt_bias, i_h, K, o_k)[None, :]
        b_g = -load_rate(A_log, i_h, K, o_k)[None, :] * log2_softplus(b_g)
        b_g = tl.where(m_r[:, None], b_g, 0.0)
    else:
        b_g *= LOG2_E
    return tl.maximum(b_g, STEEPEST_LOG2_DECAY)


@triton.jit
def load_erase_logits(erase_logits, content, i_ch, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k):
    """Erase logits with what content adds, [rows, BK] float32."""
    b_l = load_rows(erase_logits, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    if content is not None:
        b_l += load_columns(content, i_ch, K, o_k)[None, :]
    return b_l


@triton.jit
def load_step(
    g, A_log, dt_bias, erase_logits, content, i_ch, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k, RAW: tl.constexpr
):
    """load_log2_decay, of CARVE's diagonal form, which has erase_logits, times 1 - sigmoid(logits)."""
    if erase_logits is None:
        b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW)
    else:
        b_g = load_rows(g, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        if RAW:
            b_g = log2_softplus(b_g + load_columns(dt_bias, i_h, K, o_k)[None, :])
            b_g *= -load_rate(A_log, i_h, K, o_k)[None, :]
        else:
            b_g *= LOG2_E
        b_g -= log2_softplus(load_erase_logits(erase_logits, content, i_ch, start, o_r, m_r, i_h, H, K, o_k))
        b_g = tl.where(m_r[:, None], tl.maximum(b_g, STEEPEST_LOG2_DECAY), 0.0)
    return b_g


@triton.jit
def sum_rows(m_pairs, b_x, CT: tl.constexpr):
    """Row r: the sum of the rows s of b_x where m_pairs is true, in float32, as a product with ones.

    Faster here than a scan across warps. Terms left out count as exact zeros, for b_x is finite.
    """
    if tl.bfloat16 == CT:
        # two halves of a float32's bits
        high = b_x.to(tl.bfloat16)
        low = (b_x - high.to(tl.float32)).to(tl.bfloat16)
        ones = m_pairs.to(tl.bfloat16)
        return tl.dot(ones, low, tl.dot(ones, high))
    return tl.dot(m_pairs.to(tl.float32), b_x, input_precision="tf32x3")


@triton.jit
def sum_tile(b_before, b_x, REVERSE: tl.constexpr):
    """(b_before and a tile's rows through each one, or REVERSE from each one on, summed, [rows, BK]; all, [1, BK])"""
    if b_x.shape[0] == 1:
        b_sum = b_before + b_x
        b_all = b_sum
    else:
        b_sum = b_before + tl.cumsum(b_x, 0, reverse=REVERSE)
        b_all = b_before + tl.sum(b_x, 0, keep_dims=True)
    return b_sum, b_all


@triton.jit
def decays_along(b_sum, b_part, b_g, REVERSE: tl.constexpr, CT: tl.constexpr):
    """(2^ the sums of sum_tile, of log2-decays, which begin with b_sum + b_part; these two with the tile in them)"""
    if tl.bfloat16 == CT:
        b_sums, b_sum = sum_tile(b_sum, b_g, REVERSE)
        b_decay = fast_exp2(b_sums)
    else:
        # a float32 sum near -100 is coarser than the factor; the small parts of the steps, summed apart, are not
        b_whole = tl.floor(b_g + 0.5)
        b_sums, b_sum = sum_tile(b_sum, b_whole, REVERSE)
        b_parts, b_part = sum_tile(b_part, b_g - b_whole, REVERSE)
        b_decay = fast_exp2(b_parts) * fast_exp2(b_sums)
    return b_decay, b_sum, b_part


@triton.jit
def right_factor(b_left):
    """1 / left, to 23 bits; something finite where left is below UNSHIFT."""
    return reciprocal(tl.maximum(b_left, UNSHIFT))


@triton.jit
def load_left(left, i_ch, o_r, K: tl.constexpr, o_k):
    return load_tile(left, i_ch, o_r, K, o_k).to(tl.float32)


@triton.jit
def erase_left(b_left, left, i_ch, o_r, K: tl.constexpr, o_k, BEFORE: tl.constexpr, FIRST: tl.constexpr = 0):
    """left of the rows that predict: that of their own, b_left, or if BEFORE their own decay that of the rows before.

    FIRST: the row from which the factors count, where nothing has decayed yet; rows before it get 0.
    """
    if BEFORE:
        p_left = left + i_ch * BT * K + ((o_r[:, None] - 1) * K + o_k[None, :])
        b_left = tl.load(p_left, mask=(o_r > FIRST)[:, None], other=0.0).to(tl.float32)
        b_left = tl.where((o_r == FIRST)[:, None], SHIFTED, b_left)
    return b_left


@triton.jit
def load_late_factors(late, i_ch, o_r, K: tl.constexpr, o_k):
    """left of late rows, and right of them and all before them, [BT, BK] float32; something finite elsewhere."""
    b_late = load_tile(late, i_ch, o_r, K, o_k).to(tl.float32)
    return b_late, tl.where((o_r >= 32)[:, None], right_factor(b_late), b_late)


@triton.jit
def halved_rows(o_r, first_steep, first_halved):
    """Which rows of a chunk are halved, [BT]."""
    return ((o_r >= first_steep) & (o_r < 32)) | (o_r >= first_halved)


@triton.jit
def has_halved_rows(first_steep, first_halved):
    return (first_steep < BT // 2) | (first_halved < BT)


@triton.jit
def first_chunks_of(first_chunks, i_n, i_h, H):
    """Where a sequence's first chunk with steep rows is kept, and after it the first one with halved rows."""
    return first_chunks + (i_n * H + i_h) * 2


@triton.jit
def load_first_chunks(first_chunks, i_n, i_h, H, end):
    """A sequence's first chunk with steep rows and its first one with halved rows, or `end`."""
    p_first = first_chunks_of(first_chunks, i_n, i_h, H)
    return tl.minimum(tl.load(p_first), end), tl.minimum(tl.load(p_first + 1), end)


@triton.jit
def takes_loop_for_steep_rows(first_chunks, table, i_c, i_h, H):
    """Whether a chunk of CARVE's delta form has steep rows or comes after one of its sequence that has."""
    return i_c >= tl.load(first_chunks_of(first_chunks, chunk_sequence(table, i_c), i_h, H))


@triton.jit
def load_decay_to_end(b_left, last, rest, first_steep, i_ch, o_r, K: tl.constexpr, o_k):
    """From after each row to the chunk's end, [BT, BK] float32."""
    if first_steep == BT:
        b_decay = right_factor(b_left) * load_columns(last, i_ch, K, o_k)[None, :]
    else:
        b_decay = load_tile(rest, i_ch, o_r, K, o_k).to(tl.float32)
    return b_decay


@triton.jit
def load_total_decay(last, i_ch, K: tl.constexpr, o_k):
    """Over the whole chunk, [BK] float32."""
    return load_columns(last, i_ch, K, o_k) * UNSHIFT


@triton.jit
def load_steps(
    g, A_log, dt_bias, erase_logits, content, i_ch, start, row, low, high, i_h, H, K: tl.constexpr, o_k,
    ROWS: tl.constexpr, TILE: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """load_step of ROWS rows from `row` on, in tiles of TILE rows: all are asked for at once."""
    steps = ()
    for i in tl.static_range(0, ROWS, TILE):
        o_r = row + i + tl.arange(0, TILE)
        m_r = (o_r >= low) & (o_r < high)
        b_g = load_step(g, A_log, dt_bias, erase_logits, content, i_ch, start, o_r, m_r, i_h, H, K, o_k, RAW)
        steps += (b_g,)  # type: ignore[assignment]
    return steps


@triton.jit
def first_below(b_first, b_decay, o_r):
    """b_first, or by column the first row in which a factor is below UNSHIFT, [1, BK]."""
    b_row = tl.where(b_decay < UNSHIFT, o_r[:, None], BT)
    return tl.minimum(b_first, b_row if o_r.shape[0] == 1 else tl.min(b_row, 0, keep_dims=True))


@triton.jit
def store_steep_rows(
    g, A_log, dt_bias, erase_logits, content, log_decay, rest, late,
    i_ch, start, low, high, i_h, H, K: tl.constexpr, o_k, ROWS: tl.constexpr, TILE: tl.constexpr,
    RAW_DECAY: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """What decay_kernel writes of a chunk with steep rows alone; returns by column the first row of the second half in
    which a factor that counts from the middle is below UNSHIFT."""
    o_tile = tl.arange(0, TILE)
    b_zero = tl.zeros([1, o_k.shape[0]], tl.float32)
    b_first = tl.full([1, o_k.shape[0]], BT, tl.int32)
    b_sum, b_part = b_zero + SHIFT, b_zero
    for row in range(0, BT, ROWS):
        steps = load_steps(
            g, A_log, dt_bias, erase_logits, content, i_ch, start, row, low, high, i_h, H, K, o_k,
            ROWS, TILE, RAW_DECAY,
        )  # fmt: skip
        for i in tl.static_range(ROWS // TILE):
            o_r = row + i * TILE + o_tile
            if log_decay is not None:
                m_r = (o_r >= low) & (o_r < high)
                store_rows(log_decay, start, o_r, m_r, i_h, H, K, o_k, steps[i] / LOG2_E)
            if row >= BT // 2:
                b_late, b_sum, b_part = decays_along(b_sum, b_part, steps[i], False, CT)
                store_tile(late, i_ch, o_r, K, o_k, b_late)
                b_first = first_below(b_first, b_late, o_r)
    b_sum, b_part, b_sum_to_middle, b_part_to_middle = b_zero, b_zero, b_zero - SHIFT, b_zero
    for row_from_end in range(0, BT, ROWS):
        row = BT - ROWS - row_from_end
        # from after a row: the steps of those that follow
        steps = load_steps(
            g, A_log, dt_bias, erase_logits, content, i_ch, start, row + 1, low, high, i_h, H, K, o_k,
            ROWS, TILE, RAW_DECAY,
        )  # fmt: skip
        for i in tl.static_range(ROWS // TILE - 1, -1, -1):
            o_r = row + i * TILE + o_tile
            b_rest, b_sum, b_part = decays_along(b_sum, b_part, steps[i], True, CT)
            store_tile(rest, i_ch, o_r, K, o_k, b_rest)
            if row < BT // 2:
                b_g = tl.where((o_r + 1 < BT // 2)[:, None], steps[i], 0.0)
                b_late, b_sum_to_middle, b_part_to_middle = decays_along(
                    b_sum_to_middle, b_part_to_middle, b_g, True, CT
                )
                store_tile(late, i_ch, o_r, K, o_k, b_late)
    return b_first


@triton.jit
def decay_kernel(
    g, A_log, dt_bias, erase_logits, content, log_decay,
    left, last, rest, late, steep_from, halved_from, first_chunks, table, H,
    K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, RAW_DECAY: tl.constexpr,
    CT: tl.constexpr,
):  # fmt: skip
    """One program per chunk and key head, which goes through the rows with sums by column in registers, TILE rows at a
    time, and asks for ROWS of them at once. erase_logits are CARVE's, whose diagonal form has the erase in the decay.

    Writes left [NC, H, C, K]; last [NC, H, K] float32, left's last row; [NC, H] int32, BT if there is none: steep_from,
    the first steep row, and halved_from, the first halved row of the second half; and, only for a chunk with steep
    rows, [NC, H, C, K]: rest, the decay from after each row to the chunk's end, and late, left of the second half's
    rows and right of the first half's, counted from the chunk's middle; for the diagonal form its log_decay
    [B, T, H, K] float32 too, natural, with the erase in it.
    For CARVE's delta form it lowers first_chunks [N, H, 2] int32, on entry NC, to the first chunks with steep and with
    halved rows.
    """
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_ch = i_c * H + i_h
    start, low, high = chunk_span(table, i_c)
    b_first = tl.full([1, BK], BT, tl.int32)
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_sum = tl.full([1, BK], SHIFT, tl.float32)
        b_part = tl.zeros([1, BK], tl.float32)
        for row in range(0, BT, ROWS):
            steps = load_steps(
                g, A_log, dt_bias, erase_logits, content, i_ch, start, row, low, high, i_h, H, K, o_k,
                ROWS, TILE, RAW_DECAY,
            )  # fmt: skip
            for i in tl.static_range(ROWS // TILE):
                o_r = row + i * TILE + tl.arange(0, TILE)
                b_left, b_sum, b_part = decays_along(b_sum, b_part, steps[i], False, CT)
                store_tile(left, i_ch, o_r, K, o_k, b_left)
                b_first = first_below(b_first, b_left, o_r)
        tl.store(last + i_ch * K + o_k[None, :], fast_exp2(b_part) * fast_exp2(b_sum))
    first_steep = tl.min(tl.min(b_first, 1), 0)
    first_halved = tl.full([], BT, tl.int32)
    if first_steep < BT:
        b_first = tl.full([1, BK], BT, tl.int32)
        for i_k in range(K // BK):
            o_k = i_k * BK + tl.arange(0, BK)
            b_below = store_steep_rows(
                g, A_log, dt_bias, erase_logits, content, log_decay, rest, late,
                i_ch, start, low, high, i_h, H, K, o_k, ROWS, TILE, RAW_DECAY, CT,
            )  # fmt: skip
            b_first = tl.minimum(b_first, b_below)
        first_halved = tl.maximum(tl.min(tl.min(b_first, 1), 0), first_steep)
    tl.store(steep_from + i_ch, first_steep)
    tl.store(halved_from + i_ch, first_halved)
    if first_chunks is not None:  # noqa: SIM102  decided by the compiler
        if first_steep < BT:
            p_first = first_chunks_of(first_chunks, chunk_sequence(table, i_c), i_h, H)
            tl.atomic_min(p_first, i_c.to(tl.int32), sem="relaxed")
            if has_halved_rows(first_steep, first_halved):
                tl.atomic_min(p_first + 1, i_c.to(tl.int32), sem="relaxed")


def decay_factors(call: Call, x: Inputs, decay: DecayInputs | None = None) -> Factors:
    """
    Args:
        decay: of CARVE's diagonal form. x.g is its log-decay, of which the chunks with steep rows are written here.
    """
    BK = call.key_block(TUNING)
    left, rest, late = (call.tiles(x.g, call.H, CHUNK_TOKENS, call.K) for _ in range(3))
    steep_from, halved_from = (
        torch.empty(call.chunks.count, call.H, dtype=torch.int32, device=x.g.device) for _ in range(2)
    )  # fmt: skip
    first_chunks = None
    if call.sees_content:
        shape = call.chunks.sequences, call.H, 2
        first_chunks = torch.full(shape, call.chunks.count, dtype=torch.int32, device=x.g.device)
    factors = Factors(left, call.floats(x.g, call.H, call.K), rest, late, steep_from, halved_from, first_chunks)
    given: tuple[Tensor | None, ...] = x.g, x.A_log, x.dt_bias, None, None, None
    if decay is not None:
        given = decay.g, decay.A_log, decay.dt_bias, decay.erase_logits, decay.content, x.g
    # sums of single rows take neither shuffles nor shared memory; the interpreter takes its time for every tile
    rows, tile = (32, 32) if INTERPRETED.value else (4, 1)
    launch(
        decay_kernel, (call.chunks.count, call.H),
        *given, *factors, call.chunks.table, call.H,
        K=call.K, BK=BK, ROWS=rows, TILE=tile, RAW_DECAY=given[1] is not None, CT=call.arithmetic["CT"],
        **call.tuning(TUNING).launch(call.tile_dtype, BK),
    )  # fmt: skip
    return factors
