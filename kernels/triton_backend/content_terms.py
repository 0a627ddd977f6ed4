"""CARVE with diagonal erase, forward: what content adds to the erase logits of every chunk; see content.py."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, sequence_chunks
from .content import content_sizes, halving_mask, here, load_channels, log2_decay, sum_tokens, with_erase
from .cooperation import (
    announce,
    announce_one_more,
    announced,
    cooperates,
    make_counters,
    multiprocessors,
    take_place,
    wait_for,
)
from .decay import SHIFT, UNSHIFT
from .gates import load_scalar_gate
from .launching import launch
from .products import matmul, pairs_of_halves, tanh, unit_triangular_inverse
from .special import LOG2_E, fast_exp2, reciprocal
from .stages import HOPPER, Call, Content, DecayInputs, Inputs, Tuning
from .steep import HALVINGS
from .tiles import load_columns, load_matrix, store_columns, store_matrix

# Warps are few so that two programs share an SM, and each does something while the other waits.
TUNING = {HOPPER: Tuning(64, 64, 4)}
# Tokens of half a chunk.
HALF = tl.constexpr(CHUNK_TOKENS // 2)


class ContentTerms(NamedTuple):
    """By chunk, float32: term [NC, H, K], what is added to its erase logits; code [NC, H, R], tanh(D m); mean
    [NC, H, V], m. And the final mean and partial sum, [N, H, V]."""

    term: Tensor
    code: Tensor
    mean: Tensor
    final_mean: Tensor
    final_partial: Tensor


class Team(NamedTuple):
    """Programs of a head: those that prepare chunks, and those that carry the state, or `alone` one that does both;
    and the multiprocessors that there are for the programs of all heads."""

    workers: int = 1
    states: int = 1
    alone: bool = True
    multiprocessors: int = 1

    @property
    def programs(self) -> int:
        return 1 if self.alone else self.workers + self.states


class ChunkEffects(NamedTuple):
    """What a chunk does to any state S, and adds to the sum of its outputs, in a ring of chunks, [N H, ring, ...].

    With z the rows that it writes, before the inverse A, its residuals are R = A (z - E S), the next state is
    total S + k_to_end^T R, and the sum of its outputs, without their scale, q_sum S + P_sum R. erased keys E, times
    2^SHIFT, and k_to_end [K, C], inverse [C, C], A, all transposed; float32 of_channels [2, K], total and q_sum, and
    P_sum [C].
    """

    erased: Tensor
    inverse: Tensor
    k_to_end: Tensor
    of_channels: Tensor
    P_sum: Tensor


class Turned(NamedTuple):
    """The key side of the chunk that a worker prepares, [N H workers, K, C], tokens side by side: 1 / the decay of a
    step without the erase, float32; erase logits, of empty columns such that erase nothing; keys; queries."""

    growth: Tensor
    logits: Tensor
    keys: Tensor
    queries: Tensor


@triton.jit
def product_with_vector(b_M, b_x, CT: tl.constexpr, PRECISION: tl.constexpr):
    """M x, [rows of M] float32, for a float32 vector x: a product with a narrow tile of it, in two halves where
    operands have 16 bits. (Its rows, transposed: see Tuning.launch of stages.py.)"""
    o = tl.arange(0, 16)[:, None]
    b_high = b_x.to(CT).to(tl.float32)
    b_rows = tl.where(o == 0, b_high[None, :], tl.where(o == 1, (b_x - b_high)[None, :], 0.0))
    return tl.sum(matmul(b_M, tl.trans(b_rows.to(CT)), CT, PRECISION), 1)


@triton.jit
def load_logits(erase_logits, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k):
    """Erase logits in units of log2, [BK, BT] float32; of empty columns such that erase nothing."""
    p_l = erase_logits + start * (H * K) + (o_r[None, :] * (H * K) + (i_h * K + o_k)[:, None])
    return tl.load(p_l, mask=m_r[None, :], other=float("-inf")).to(tl.float32) * LOG2_E


@triton.jit
def load_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k, RAW_DECAY: tl.constexpr):
    """log2 of the decay per step without the erase, [BK, BT] float32, 0 in empty columns."""
    b_g = log2_decay(load_channels(g, start, o_r, m_r, i_h, H, K, o_k), A_log, dt_bias, i_h, K, o_k, RAW_DECAY)
    return tl.where(m_r[None, :], b_g, 0.0)


@triton.jit
def load_bias(bias, i_h, K: tl.constexpr, o_k):
    b_bias = tl.zeros([o_k.shape[0]], tl.float32)
    if bias is not None:  # after a return in such a branch Triton 3.6 goes on
        b_bias += load_columns(bias, i_h, K, o_k)
    return b_bias


@triton.jit
def content_term(b_up, b_code, b_bias):
    """U code and the bias, [BK] float32."""
    return b_bias + tl.sum(b_up.to(tl.float32) * b_code[None, :], 1)


@triton.jit
def by_halves(x, i, o_k, K: tl.constexpr):
    """Where the numbers of some channels are in tile i of a tensor of [K, BT] tiles, [BK, 2, HALF]."""
    o_half, o_t = tl.arange(0, 2)[None, :, None], tl.arange(0, HALF)[None, None, :]
    return x + i * K * BT + (o_k[:, None, None] * BT + o_half * HALF + o_t)


@triton.jit
def turn_key_side(
    q, k, g, erase_logits, A_log, dt_bias, growth, logits, keys, queries,
    start, o_r, m_r, i_h, H, i_slot, K: tl.constexpr, o_k, RAW_DECAY: tl.constexpr,
):  # fmt: skip
    """Store what Turned has: what follows from it goes along the tokens of a channel, which here become neighbours in
    memory, hence in a thread. (All channels at once: they come from far.)"""
    b_l = tl.where(m_r[None, :], load_channels(erase_logits, start, o_r, m_r, i_h, H, K, o_k), float("-inf"))
    b_k = load_channels(k, start, o_r, m_r, i_h, H, K, o_k)
    b_q = load_channels(q, start, o_r, m_r, i_h, H, K, o_k)
    b_g = load_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
    # Finite: what a step of 2^-127 leaves is as little as what one of less does.
    store_matrix(growth, i_slot, o_k, o_r, K, BT, False, fast_exp2(tl.minimum(-b_g, 127.0)))
    store_matrix(logits, i_slot, o_k, o_r, K, BT, False, b_l)
    store_matrix(keys, i_slot, o_k, o_r, K, BT, False, b_k)
    store_matrix(queries, i_slot, o_k, o_r, K, BT, False, b_q)


@triton.jit
def load_turned(growth, logits, keys, queries, i_slot, K: tl.constexpr, o_k):
    return (
        tl.load(by_halves(growth, i_slot, o_k, K)), tl.load(by_halves(logits, i_slot, o_k, K)),
        tl.load(by_halves(keys, i_slot, o_k, K)), tl.load(by_halves(queries, i_slot, o_k, K)),
    )  # fmt: skip


@triton.jit
def prepare_channels(
    b_growth, b_l, b_k, b_q, b_w, b_term, erased, k_to_end, of_channels, i_tile, o_k,
    K: tl.constexpr, BEFORE: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Operands of scores of a block of channels, [BK, BT] in the dtype CT: keys, erased keys of the same half of the
    chunk, those from across its middle, queries; and by channel whether no half decays beyond the range of factors. If
    one does, what is returned and stored here is not to be used, but for the total decay.

    Decays between tokens of a half are factors that count from its start; where they meet over the middle the later
    ones count from the chunk's start. They are products of the steps' own: there is no sum of logarithms.
    """
    BK: tl.constexpr = o_k.shape[0]
    o_half, o_t = tl.arange(0, 2)[None, :], tl.arange(0, HALF)[None, None, :]
    m_first = o_half == 0
    b_step = b_growth + b_growth * fast_exp2(b_l.to(tl.float32) * LOG2_E + (b_term * LOG2_E)[:, None, None])
    b_right = tl.cumprod(tl.where(o_t == 0, b_step * UNSHIFT, b_step), 2)
    b_left = reciprocal(b_right)
    b_halves = tl.sum(tl.where(o_t == HALF - 1, b_left, 0.0), 2)  # decays over them, shifted
    b_first = tl.sum(tl.where(m_first, b_halves, 0.0), 1)
    b_second = tl.sum(tl.where(m_first, 0.0, b_halves), 1)
    b_q = b_q.to(tl.float32) * b_left
    b_q_halves = tl.sum(b_q, 2) * UNSHIFT
    b_q_first = tl.sum(tl.where(m_first, b_q_halves, 0.0), 1)
    b_q_second = tl.sum(tl.where(m_first, 0.0, b_q_halves), 1)
    b_of_channels = tl.join((b_first * UNSHIFT) * (b_second * UNSHIFT), b_q_first + b_first * UNSHIFT * b_q_second)
    tl.store(of_channels + i_tile * 2 * K + (o_k[:, None] + K * o_half), b_of_channels)
    b_k = b_k.to(tl.float32)
    b_k_right = b_k * b_right
    b_to_end = b_k_right * (b_halves * tl.where(m_first, (b_second * UNSHIFT)[:, None], 1.0))[:, :, None]
    tl.store(by_halves(k_to_end, i_tile, o_k, K), b_to_end.to(CT))
    b_E = b_k * b_w * b_left
    if BEFORE:
        b_E *= b_step
    b_erased = b_E * tl.where(m_first, 1.0, UNSHIFT)[:, :, None] * tl.where(m_first, 1.0, b_first[:, None])[:, :, None]
    tl.store(by_halves(erased, i_tile, o_k, K), b_erased.to(CT))
    # Scores over the middle are asked of the second half's columns alone; the first of the others is free for the sum
    # of the second half's queries.
    b_across = tl.where(m_first[:, :, None] & (o_t == 0), (b_first * b_q_second)[:, None, None], b_erased)
    return (
        tl.reshape(b_k_right.to(CT), (BK, BT)), tl.reshape(b_E.to(CT), (BK, BT)),
        tl.reshape(b_across.to(CT), (BK, BT)), tl.reshape(b_q.to(CT), (BK, BT)),
        (b_first >= UNSHIFT) & (b_second >= UNSHIFT),  # which no NaN is
    )  # fmt: skip


@triton.jit
def scores_of_channels(b_k, b_E, b_across, b_q, o_r, CT: tl.constexpr, PRECISION: tl.constexpr):
    """What they add to T transposed, [BT, BT], and to sums over the queries of their scores with a key, [BT]."""
    o_s = o_r[:, None]
    m_half = (o_s // HALF) == (o_r[None, :] // HALF)
    b_k = tl.trans(b_k)
    b_across = matmul(b_k, b_across, CT, PRECISION)
    b_P = tl.where((o_s < HALF) & (o_r[None, :] == 0), b_across, 0.0)
    b_P += tl.where(m_half & (o_s <= o_r[None, :]), matmul(b_k, b_q, CT, PRECISION), 0.0)
    return tl.where(m_half, matmul(b_k, b_E, CT, PRECISION), b_across), tl.sum(b_P, 1)


@triton.jit
def prepare_steep_chunk(
    q, k, g, erase_logits, w, A_log, dt_bias, terms, erased, k_to_end, of_channels,
    start, o_r, m_r, i_h, H, i_ch, i_tile, K: tl.constexpr, BK: tl.constexpr,
    BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr, LOGITS_W: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of all channels of a chunk with any decay, by halving; returns T transposed and P_sum."""
    b_T = tl.zeros([BT, BT], tl.float32)
    b_P_sum = tl.zeros([BT], tl.float32)
    o_s = o_r[:, None]
    b_w = load_scalar_gate(w, start, o_r, m_r, i_h, H, LOGITS_W)[None, :]
    for i_k in tl.range(K // BK, disable_licm=True):
        o_k = i_k * BK + tl.arange(0, BK)
        b_a = with_erase(
            load_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY),
            load_logits(erase_logits, start, o_r, m_r, i_h, H, K, o_k),
            load_columns(terms, i_ch, K, o_k) * LOG2_E,
        )  # fmt: skip
        b_k = load_channels(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        b_q = load_channels(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        b_P_sum += tl.sum(b_q * b_k, 0)  # a query meets the key of its own row without decay
        for step in tl.range(HALVINGS, disable_licm=True):
            m_pairs = pairs_of_halves(o_r, step, True)
            b_e = tl.exp2(sum_tokens(b_a, halving_mask(o_r, step, False), CT))
            b_ke = b_k * b_e
            b_P_sum += tl.sum(b_ke * sum_tokens(b_q * b_e, tl.trans(m_pairs), CT), 0)
            if BEFORE:
                b_e = tl.exp2(sum_tokens(b_a, halving_mask(o_r, step, True), CT))
            b_T += tl.where(m_pairs, matmul(tl.trans(b_ke.to(CT)), b_e * b_k * b_w, CT, PRECISION), 0.0)
        b_E = sum_tokens(b_a, o_s < o_r[None, :] if BEFORE else o_s <= o_r[None, :], CT)
        store_matrix(erased, i_tile, o_k, o_r, K, BT, False, b_k * b_w * tl.exp2(b_E + SHIFT))
        b_to_end = b_k * tl.exp2(sum_tokens(b_a, o_s > o_r[None, :], CT))
        store_matrix(k_to_end, i_tile, o_k, o_r, K, BT, False, b_to_end)
        b_q *= tl.exp2(sum_tokens(b_a, o_s <= o_r[None, :], CT))
        store_columns(of_channels, i_tile * 2 + 1, K, o_k, tl.sum(b_q, 1))
    return b_T, b_P_sum


@triton.jit
def prepare_chunk(
    q, k, g, erase_logits, w, A_log, dt_bias, content_down, content_up, bias,
    terms, codes, means, running_mean, p_finished, least_finished,
    erased, inverse, k_to_end, of_channels, P_sum, growth, logits, keys, queries, p_prepared, number,
    i_nh, i_h, i_ch, i_tile, i_slot, start, tokens_from, tokens_to, H, content_heads,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk does to the state and adds to the mean, once the counter at p_finished tells that the mean is known
    which its content term takes. Outputs as in ChunkEffects, at i_tile; the counter at p_prepared tells twice the
    chunk's number and 1 when all but the inverse are there, and one more when that is."""
    tl.static_assert((K == BK) | (K == 2 * BK))
    o_r, o_k, o_v, o_c = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, V), tl.arange(0, RP)
    o_k_2 = o_k + (K - BK)
    i_map = i_h * content_heads
    # before the wait, what does not depend on the mean
    m_r = (start + o_r >= tokens_from) & (start + o_r < tokens_to)
    turn_key_side(
        q, k, g, erase_logits, A_log, dt_bias, growth, logits, keys, queries,
        start, o_r, m_r, i_h, H, i_slot, K, tl.arange(0, K), RAW_DECAY,
    )  # fmt: skip
    o_h = tl.arange(0, 2)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    m_h = (start + o_h >= tokens_from) & (start + o_h < tokens_to)
    b_w = load_scalar_gate(w, start, o_h, m_h, i_h, H, LOGITS_W)[None, :, :]
    b_down = load_matrix(content_down, i_map, o_c, o_v, R, V, False)
    b_up = load_matrix(content_up, i_map, o_k, o_c, K, R, False)
    b_bias = load_bias(bias, i_h, K, o_k)
    if K > BK:
        b_up_2 = load_matrix(content_up, i_map, o_k_2, o_c, K, R, False)
        b_bias_2 = load_bias(bias, i_h, K, o_k_2)
    tl.debug_barrier()  # all threads have stored their part
    b_growth, b_l, b_k, b_q = load_turned(growth, logits, keys, queries, i_slot, K, o_k)
    b_growth, b_w = here(b_growth), here(b_w)
    wait_for(p_finished, least_finished)
    b_mean = load_columns(running_mean, i_nh, V, o_v)
    b_rows = tl.load(running_mean + i_nh * V + (o_v[None, :] + 0 * o_c[:, None]))  # the same beside each row of D
    b_code = tanh(tl.sum(b_down.to(tl.float32) * b_rows, 1))
    b_term = content_term(b_up, b_code, b_bias)
    b_k_right, b_E, b_across, b_q_left, m_mild = prepare_channels(
        b_growth, b_l, b_k, b_q, b_w, b_term, erased, k_to_end, of_channels, i_tile, o_k, K, BEFORE, CT
    )  # fmt: skip
    if K > BK:
        b_term_2 = content_term(b_up_2, b_code, b_bias_2)
        b_growth_2, b_l_2, b_k_2, b_q_2 = load_turned(growth, logits, keys, queries, i_slot, K, o_k_2)
    b_T, b_P_sum = scores_of_channels(b_k_right, b_E, b_across, b_q_left, o_r, CT, PRECISION)
    if K > BK:
        b_k_right, b_E, b_across, b_q_left, m_mild_2 = prepare_channels(
            b_growth_2, b_l_2, b_k_2, b_q_2, b_w, b_term_2, erased, k_to_end, of_channels, i_tile, o_k_2, K, BEFORE, CT
        )  # fmt: skip
        b_T_2, b_P_sum_2 = scores_of_channels(b_k_right, b_E, b_across, b_q_left, o_r, CT, PRECISION)
        b_T += b_T_2
        b_P_sum += b_P_sum_2
        m_mild &= m_mild_2
    if tl.min(m_mild.to(tl.int32), 0) == 0:
        store_columns(terms, i_ch, K, o_k, b_term)
        if K > BK:
            store_columns(terms, i_ch, K, o_k_2, b_term_2)
        tl.debug_barrier()  # all threads have stored their part
        b_T, b_P_sum = prepare_steep_chunk(
            q, k, g, erase_logits, w, A_log, dt_bias, terms, erased, k_to_end, of_channels,
            start, o_r, m_r, i_h, H, i_ch, i_tile, K, BK, BEFORE, RAW_DECAY, LOGITS_W, CT, PRECISION,
        )  # fmt: skip
    store_columns(P_sum, i_tile, BT, o_r, b_P_sum)
    announce(p_prepared, 2 * number + 1)
    # T and A are transposed, as are all scores here
    b_T = tl.where(o_r[:, None] < o_r[None, :], b_T, 0.0)
    store_matrix(inverse, i_tile, o_r, o_r, BT, BT, False, unit_triangular_inverse(b_T, o_r, True, CT, PRECISION))
    announce(p_prepared, 2 * number + 2)
    # nobody waits for these
    store_columns(means, i_ch, V, o_v, b_mean)
    store_columns(codes, i_ch, R, o_c, b_code)
    store_columns(terms, i_ch, K, o_k, b_term)
    if K > BK:
        store_columns(terms, i_ch, K, o_k_2, b_term_2)


@triton.jit
def load_written(
    v, w, start, o_r, tokens_from, tokens_to, i_h, H, V: tl.constexpr, o_v, LOGITS_W: tl.constexpr
):  # fmt: skip
    """What a chunk writes, w v transposed, [BV, BT] float32."""
    m_r = (start + o_r >= tokens_from) & (start + o_r < tokens_to)
    b_v = load_channels(v, start, o_r, m_r, i_h, H, V, o_v).to(tl.float32)
    return here(b_v * load_scalar_gate(w, start, o_r, m_r, i_h, H, LOGITS_W)[None, :])


@triton.jit
def carry_state(
    v, w, b_S, b_z, b_partial, p_prepared, number, p_finished,
    erased, inverse, k_to_end, of_channels, P_sum, running_mean, i_nh, i_h, i_tile, next_start, tokens_from, tokens_to,
    H, ends, content_chunk, o_v, K: tl.constexpr, V: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the state, [BV, K], and the sum of the outputs of a content chunk, [BV], through a chunk that writes b_z, as
    far as p_prepared tells that it has been prepared. Where it `ends` a content chunk the mean is stored and announced
    before the state goes on, which the next content terms do not wait for.

    Returns them, and what the next chunk writes.
    """
    o_r, o_k = tl.arange(0, BT), tl.arange(0, K)
    ready = announced(p_prepared, 2 * number + 2)
    if not ready:
        wait_for(p_prepared, 2 * number + 1)
    b_E = load_matrix(erased, i_tile, o_k, o_r, K, BT, False)
    b_weights = load_columns(of_channels, i_tile * 2 + 1, K, o_k)
    b_P_sum = load_columns(P_sum, i_tile, BT, o_r)[None, :]
    b_k_end = load_matrix(k_to_end, i_tile, o_k, o_r, K, BT, False)
    b_total = load_columns(of_channels, i_tile * 2, K, o_k)[None, :]
    b_S_CT = b_S.to(CT)
    b_R = b_z - matmul(b_S_CT, b_E, CT, PRECISION) * UNSHIFT
    b_partial += product_with_vector(b_S_CT, b_weights, CT, PRECISION)
    if not ends:  # the inverse is awaited
        b_z = load_written(v, w, next_start, o_r, tokens_from, tokens_to, i_h, H, V, o_v, LOGITS_W)
    if not ready:
        wait_for(p_prepared, 2 * number + 2)
    b_A = load_matrix(inverse, i_tile, o_r, o_r, BT, BT, False)
    b_R = matmul(b_R, b_A, CT, PRECISION)
    b_partial += tl.sum(b_R * b_P_sum, 1)
    if ends:
        store_columns(running_mean, i_nh, V, o_v, b_partial / content_chunk)
        announce_one_more(p_finished)
        b_partial = tl.zeros_like(b_partial)
        b_z = load_written(v, w, next_start, o_r, tokens_from, tokens_to, i_h, H, V, o_v, LOGITS_W)
    b_S *= b_total
    b_S += matmul(b_R, tl.trans(b_k_end), CT, PRECISION)
    return b_S, b_z, b_partial


@triton.jit
def content_terms_kernel(
    q, k, v, g, erase_logits, w, A_log, dt_bias, content_down, content_up, bias,
    initial_S, initial_mean, initial_partial, initial_count,
    terms, codes, means, final_mean, final_partial,
    erased, inverse, k_to_end, of_channels, P_sum, growth, logits, keys, queries,
    running_mean, finished, prepared, tickets, table, first, content_chunk, ring, H, content_heads, multiprocessors,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    WORKERS: tl.constexpr, STATES: tl.constexpr, ALONE: tl.constexpr,
    BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A team of programs per sequence and value head; RP is R rounded up to a power of two, content_heads 0 or 1
    where D and U are for all heads or one a head, ring that of ChunkEffects. Outputs as in ContentTerms.

    WORKERS programs prepare the chunks of a content chunk side by side, as soon as the mean of the one before is known;
    STATES others carry the state through those chunks, each a part of its columns, one chunk after another. ALONE: one
    program does both.

    Each of a GPU's `multiprocessors` has room for two programs, and gets its second one when all have their first: from
    there on places are dealt out the other way, so that one is shared by programs that work in turns.
    """
    TEAM: tl.constexpr = 1 if ALONE else WORKERS + STATES
    i_nh, role = take_place(tickets, TEAM)
    role = (role + (i_nh * TEAM // multiprocessors).to(tl.int32) * (TEAM // 2)) % TEAM
    given = (
        q, k, v, g, erase_logits, w, A_log, dt_bias, content_down, content_up, bias,
        initial_S, initial_mean, initial_partial, initial_count, terms, codes, means, final_mean, final_partial,
        erased, inverse, k_to_end, of_channels, P_sum, growth, logits, keys, queries,
        running_mean, finished, prepared, table, first, content_chunk, ring, H, content_heads, i_nh,
    )  # fmt: skip
    if ALONE:
        content_chunks(
            *given, 0, 0, K, BK, V, R, RP, 1, 1, True, True, BEFORE, RAW_DECAY, LOGITS_W, CT, PRECISION
        )  # fmt: skip
    elif role < STATES:
        content_chunks(
            *given, 0, role, K, BK, V, R, RP, WORKERS, STATES, False, True, BEFORE, RAW_DECAY, LOGITS_W, CT, PRECISION
        )  # fmt: skip
    else:
        content_chunks(
            *given, role - STATES, 0,
            K, BK, V, R, RP, WORKERS, STATES, True, False, BEFORE, RAW_DECAY, LOGITS_W, CT, PRECISION,
        )  # fmt: skip


@triton.jit
def content_chunks(
    q, k, v, g, erase_logits, w, A_log, dt_bias, content_down, content_up, bias,
    initial_S, initial_mean, initial_partial, initial_count, terms, codes, means, final_mean, final_partial,
    erased, inverse, k_to_end, of_channels, P_sum, growth, logits, keys, queries,
    running_mean, finished, prepared, table, first, content_chunk, ring, H, content_heads, i_nh, worker, part,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    WORKERS: tl.constexpr, STATES: tl.constexpr, PREPARES: tl.constexpr, CARRIES: tl.constexpr,
    BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program's way through its sequence, a content chunk at a time; it PREPARES chunks as a worker, CARRIES a part
    of the state, or both. What it does not do costs it no registers."""
    BV: tl.constexpr = V // STATES
    i_n, i_h = i_nh // H, i_nh % H
    o_r, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), part * BV + tl.arange(0, BV)
    begin, end, row_0, tokens_from, tokens_to = sequence_chunks(table, first, i_n)
    chunks = (end - begin).to(tl.int32)
    slots = content_chunk // BT
    finished += i_nh
    prepared += i_nh * WORKERS
    filled = tl.zeros([], tl.int64)  # chunks of the running content chunk
    if initial_S is not None:
        filled += tl.load(initial_count + i_n) // BT % slots
    filled = filled.to(tl.int32)
    if CARRIES:
        b_S = tl.zeros([BV, K], tl.float32)
        b_mean = tl.zeros([BV], tl.float32)
        b_partial = tl.zeros([BV], tl.float32)
        if initial_S is not None:
            b_S += load_matrix(initial_S, i_nh, o_v, o_k, V, K, True)
            b_mean += load_columns(initial_mean, i_nh, V, o_v)
            b_partial += load_columns(initial_partial, i_nh, V, o_v)
        store_columns(running_mean, i_nh, V, o_v, b_mean)
        announce_one_more(finished)
        b_z = load_written(v, w, row_0, o_r, tokens_from, tokens_to, i_h, H, V, o_v, LOGITS_W)
    # The first content chunk may have begun before this call.
    for i_from in tl.range(-filled, chunks, slots, disable_licm=True):
        i_since, i_to = tl.maximum(i_from, 0), tl.minimum(i_from + slots, chunks)
        if PREPARES:
            i_own = i_since + (worker + (i_since + filled) * (WORKERS - 1)) % WORKERS
            for i in tl.range(i_own, i_to, WORKERS, disable_licm=True):
                prepare_chunk(
                    q, k, g, erase_logits, w, A_log, dt_bias, content_down, content_up, bias,
                    terms, codes, means, running_mean, finished, STATES * (i_from + filled) // slots + STATES,
                    erased, inverse, k_to_end, of_channels, P_sum, growth, logits, keys, queries, prepared + worker, i,
                    i_nh, i_h, (begin + i) * H + i_h, i_nh * ring + i % ring, i_nh * WORKERS + worker, row_0 + i * BT,
                    tokens_from, tokens_to, H, content_heads,
                    K, BK, V, R, RP, BEFORE, RAW_DECAY, LOGITS_W, CT, PRECISION,
                )  # fmt: skip
        if CARRIES:
            for i in tl.range(i_since, i_to, disable_licm=True):
                b_S, b_z, b_partial = carry_state(
                    v, w, b_S, b_z, b_partial, prepared + (i + filled) % WORKERS, i, finished,
                    erased, inverse, k_to_end, of_channels, P_sum, running_mean,
                    i_nh, i_h, i_nh * ring + i % ring, row_0 + (i + 1) * BT, tokens_from, tokens_to, H,
                    (i == i_from + slots - 1) & (row_0 + (i + 1) * BT <= tokens_to), content_chunk, o_v,
                    K, V, LOGITS_W, CT, PRECISION,
                )  # fmt: skip
    if CARRIES:
        # what this program stored of it, to which its threads came together before they announced it
        store_columns(final_mean, i_nh, V, o_v, load_columns(running_mean, i_nh, V, o_v))
        store_columns(final_partial, i_nh, V, o_v, b_partial)


def team_of_terms(heads: int, side_by_side: int, V: int, device: torch.device) -> Team:
    """The team of each of so many heads with V value columns.

    Args:
        side_by_side: chunks that can be prepared at a time.
    """
    if not cooperates(device):
        return Team()
    team = Team(min(side_by_side, 2), max(V // TUNING[HOPPER].BV, 1), False, multiprocessors(device))
    # what a team of two does only partly at the same time, one does in less if not all heads have room at once
    return Team() if team.programs == 2 and heads > team.multiprocessors else team


def content_terms(
    call: Call, x: Inputs, decay: DecayInputs, content: Content, initial: tuple[Tensor | None, ...], content_chunk: int
) -> ContentTerms:
    """What content adds to the erase logits of every chunk.

    Args:
        x: queries, keys, values and write gate.
        initial: S, mean, partial and count to start from, or None each.
    """
    chunks, (_, R, V), device = call.chunks, content.down.shape, x.v.device
    found = ContentTerms(
        *(call.floats_of_chunks(x.v, call.H, size) for size in (call.K, R, V)),
        *(call.floats(x.v, call.H, V).new_empty(chunks.sequences, call.H, V) for _ in range(2)),
    )
    heads, slots = chunks.sequences * call.H, content_chunk // CHUNK_TOKENS
    team = team_of_terms(heads, slots, V, device)
    # The tiles of a content chunk stay while the next one's are prepared.
    ring = min(2 * slots, chunks.count)
    tile = functools.partial(torch.empty, device=device, dtype=call.tile_dtype)
    floats = functools.partial(torch.empty, device=device, dtype=torch.float32)
    effects = ChunkEffects(
        *(tile((heads, ring, rows, CHUNK_TOKENS)) for rows in (call.K, CHUNK_TOKENS, call.K)),
        *(floats((heads, ring, size)) for size in (2 * call.K, CHUNK_TOKENS)),
    )
    slots_of_workers = functools.partial(torch.empty, (heads * team.workers, call.K, CHUNK_TOKENS), device=device)
    turned = Turned(
        *(slots_of_workers(dtype=dtype) for dtype in (torch.float32, decay.erase_logits.dtype, x.k.dtype, x.q.dtype))
    )
    BK, sizes = call.key_block(TUNING), content_sizes(call, content)
    sizes["RP"] = max(sizes["RP"], 16)  # narrower tiles were not tried on a GPU
    launch(
        content_terms_kernel, (heads * team.programs,),
        x.q, x.k, x.v, decay.g, decay.erase_logits, x.w, decay.A_log, decay.dt_bias, *content, *initial, *found,
        *effects, *turned, floats((heads, V)), *make_counters(device, heads, heads * team.workers, 1),
        chunks.table, chunks.first, content_chunk, ring, call.H, content.by_head, team.multiprocessors,
        BK=BK, WORKERS=team.workers, STATES=team.states, ALONE=team.alone, RAW_DECAY=decay.A_log is not None,
        **sizes | call.launch(TUNING, BK, V // team.states),
    )  # fmt: skip
    return found
