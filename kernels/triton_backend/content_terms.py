"""CARVE with diagonal erase, forward: what content adds to the erase logits of every chunk; see content.py."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, sequence_chunks
from .content import content_sizes, halving_mask, load_channels, log2_decay, sum_tokens, team_of, with_erase
from .cooperation import announce, make_counters, take_place, wait_for
from .decay import SHIFT, UNSHIFT
from .erasing_decay import DecayInputs
from .gates import load_scalar_gate
from .launching import launch
from .products import content_code, matmul, pairs_of_halves, unit_triangular_inverse
from .stages import Call, Content, Inputs
from .steep import HALVINGS
from .tiles import load_columns, load_matrix, load_tile, store_columns, store_matrix

# Masks of tokens [s, r]: s in the half of the chunk that r is in, and not after r; before r; not before r; after r.
HALF_THROUGH, HALF_BEFORE, HALF_FROM, HALF_AFTER = (tl.constexpr(i) for i in range(4))
# The least sum of log2-decays over half a chunk whose factors, shifted, are in range.
STEEP = tl.constexpr(-180.0)


class ContentTerms(NamedTuple):
    """By chunk, float32: term [NC, H, K], what is added to its erase logits; code [NC, H, R], tanh(D m); mean
    [NC, H, V], m. And the final mean and partial sum, [N, H, V]."""

    term: Tensor
    code: Tensor
    mean: Tensor
    final_mean: Tensor
    final_partial: Tensor


class ChunkEffects(NamedTuple):
    """What a chunk does to any state S, and adds to the sum of its outputs, in a ring of chunks, [N H, ring, ...].

    erasure [K, C], update [V, C], k_to_end [K, C]: the transposes of chunk_operands_kernel's; total [K] float32, the
    decay over the chunk; the sum of its outputs, without their scale, is mean_weights S + mean_offset, [K] and [V]
    float32.
    """

    erasure: Tensor
    update: Tensor
    k_to_end: Tensor
    total: Tensor
    mean_weights: Tensor
    mean_offset: Tensor


@triton.jit
def shifted_exp2(b_x, shift, CT: tl.constexpr):
    """2^(x + shift)."""
    if tl.bfloat16 == CT:
        b_y = tl.exp2(b_x + shift)
    else:  # a float32 sum near 90 is coarser than the factor
        b_y = tl.exp2(b_x * 0.5) * tl.exp2(shift * 0.5)
        b_y *= b_y
    return b_y


@triton.jit
def product_with_vector(b_M, b_x, CT: tl.constexpr, PRECISION: tl.constexpr):
    """M x, [rows of M] float32, for a float32 vector x: a product with a narrow tile of it, in two halves where
    operands have 16 bits. (Its rows, transposed: see Tuning.launch of stages.py.)"""
    o = tl.arange(0, 16)[:, None]
    b_high = b_x.to(CT).to(tl.float32)
    b_rows = tl.where(o == 0, b_high[None, :], tl.where(o == 1, (b_x - b_high)[None, :], 0.0))
    return tl.sum(matmul(b_M, tl.trans(b_rows.to(CT)), CT, PRECISION), 1)


@triton.jit
def halved_scores_and_sums(
    q, k, g, erase_logits, A_log, dt_bias, b_term, b_w, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k,
    BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk with any decay: T transposed, sums over the queries of their scores with a key, [BT], and of the
    queries, decayed from the chunk's start, [K]."""
    b_g = load_channels(g, start, o_r, m_r, i_h, H, K, o_k)
    b_l = load_channels(erase_logits, start, o_r, m_r, i_h, H, K, o_k)
    b_a = with_erase(log2_decay(b_g, A_log, dt_bias, i_h, K, o_k, RAW_DECAY), b_l, b_term, m_r)
    b_k = load_channels(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_q = load_channels(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_T = tl.zeros([BT, BT], tl.float32)
    b_P_sum = tl.sum(b_q * b_k, 0)  # a query meets the key of its own row without decay
    for step in tl.range(HALVINGS, disable_licm=True):
        m_pairs = pairs_of_halves(o_r, step, True)
        b_e = tl.exp2(sum_tokens(b_a, halving_mask(o_r, step, False), CT))
        b_ke = b_k * b_e
        b_P_sum += tl.sum(b_ke * sum_tokens(b_q * b_e, tl.trans(m_pairs), CT), 0)
        if BEFORE:
            b_e = tl.exp2(sum_tokens(b_a, halving_mask(o_r, step, True), CT))
        b_T += tl.where(m_pairs, matmul(tl.trans(b_ke.to(CT)), b_e * b_k * b_w, CT, PRECISION), 0.0)
    return b_T, b_P_sum, tl.sum(b_q * tl.exp2(sum_tokens(b_a, o_r[:, None] <= o_r[None, :], CT)), 1)


@triton.jit
def prepare_chunk(
    q, k, v, g, erase_logits, w, A_log, dt_bias, content_down, content_up, bias,
    terms, codes, means, running_mean, p_finished, least_finished,
    erasure, update, k_to_end, total, mean_weights, mean_offset, token_masks,
    i_nh, i_h, i_ch, i_tile, start, m_r, H, content_heads,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk does to the state and adds to the mean, once the counter at p_finished tells that the mean is known
    which its content term takes. Outputs as in ChunkEffects, at i_tile."""
    o_r, o_k, o_v, o_c = tl.arange(0, BT), tl.arange(0, K), tl.arange(0, V), tl.arange(0, RP)
    o_s = o_r[:, None]
    # asked for before the wait
    b_g = load_channels(g, start, o_r, m_r, i_h, H, K, o_k)
    b_l = load_channels(erase_logits, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_k = load_channels(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_q = load_channels(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_w = load_scalar_gate(w, start, o_r, m_r, i_h, H, LOGITS_W)[None, :]
    b_down = load_matrix(content_down, i_h * content_heads, o_v, o_c, V, R, True)
    b_up = load_matrix(content_up, i_h * content_heads, o_k, o_c, K, R, False)
    b_g = log2_decay(b_g, A_log, dt_bias, i_h, K, o_k, RAW_DECAY)
    wait_for(p_finished, least_finished)
    b_mean = load_columns(running_mean, i_nh, V, o_v)
    b_code = content_code(b_down.to(tl.float32), b_mean)
    b_term = tl.sum(b_up.to(tl.float32) * b_code[None, :], 1)
    if bias is not None:
        b_term += load_columns(bias, i_h, K, o_k)
    store_columns(means, i_ch, V, o_v, b_mean)
    store_columns(codes, i_ch, R, o_c, b_code)
    store_columns(terms, i_ch, K, o_k, b_term)

    # Decays between columns of a half of the chunk are factors that count from the half's first column; over the middle
    # they are split there.
    m_half = (o_s >> 5) == (o_r[None, :] >> 5)
    m_first = (o_r < 32)[None, :]
    b_a = with_erase(b_g, b_l, b_term, m_r)
    b_first = tl.sum(tl.where(m_first, b_a, 0.0), 1)
    b_second = tl.sum(tl.where(m_first, 0.0, b_a), 1)
    store_columns(total, i_tile, K, o_k, tl.exp2(b_first + b_second))
    is_steep = tl.min(tl.minimum(b_first, b_second), 0) < STEEP
    b_G = sum_tokens(b_a, load_tile(token_masks, HALF_THROUGH, o_r, BT, o_r), CT)
    b_E_G = b_G
    if tl.bfloat16 == CT:
        if BEFORE:
            b_E_G -= b_a
        b_rest = tl.where(m_first, b_first[:, None], b_second[:, None]) - b_G
    else:  # differences lose what is small beside sums of steep decays
        if BEFORE:
            b_E_G = sum_tokens(b_a, load_tile(token_masks, HALF_BEFORE, o_r, BT, o_r), CT)
        b_rest = sum_tokens(b_a, load_tile(token_masks, HALF_AFTER, o_r, BT, o_r), CT)
    b_k_right = b_k * shifted_exp2(-b_G, -SHIFT, CT)
    b_E = (b_k * b_w * shifted_exp2(b_E_G, SHIFT, CT)).to(CT)
    # T and A are transposed, as are all scores here
    b_T = matmul(tl.trans(b_k_right.to(CT)), b_E, CT, PRECISION)
    b_k_middle = tl.where(m_first, b_k * tl.exp2(b_rest), 0.0)
    b_E = b_E.to(tl.float32) * UNSHIFT
    b_T = tl.where(m_half, b_T, matmul(tl.trans(b_k_middle.to(CT)), b_E, CT, PRECISION))
    b_q *= shifted_exp2(b_G, SHIFT, CT)
    # Sums over the queries of their scores with a key.
    b_P = b_k_right * matmul(b_q, load_tile(token_masks, HALF_FROM, o_r, BT, o_r), CT, PRECISION)
    b_q *= UNSHIFT
    b_q_second = tl.sum(tl.where(m_first, 0.0, b_q), 1)
    b_q_sum = tl.sum(tl.where(m_first, b_q, 0.0), 1) + tl.exp2(b_first) * b_q_second
    b_P_sum = tl.sum(b_P + b_k_middle * b_q_second[:, None], 0)
    b_rest += tl.where(m_first, b_second[:, None], 0.0)
    store_matrix(k_to_end, i_tile, o_k, o_r, K, BT, False, b_k * tl.exp2(b_rest))
    b_E = (b_k * b_w * tl.exp2(b_E_G + tl.where(m_first, 0.0, b_first[:, None]))).to(CT)
    b_v = load_channels(v, start, o_r, m_r, i_h, H, V, o_v)
    if is_steep:
        b_T, b_P_sum, b_q_sum = halved_scores_and_sums(
            q, k, g, erase_logits, A_log, dt_bias, b_term, b_w, start, o_r, m_r, i_h, H, K, o_k,
            BEFORE, RAW_DECAY, CT, PRECISION,
        )  # fmt: skip
    b_T = tl.where(o_s < o_r[None, :], b_T, 0.0)
    b_A = unit_triangular_inverse(b_T, o_r, True, CT, PRECISION)
    b_P_sum = tl.sum(b_A * b_P_sum[None, :], 1)
    b_A = b_A.to(CT)
    store_matrix(erasure, i_tile, o_k, o_r, K, BT, False, matmul(b_E, b_A, CT, PRECISION))
    b_q_sum -= tl.sum(b_E.to(tl.float32) * b_P_sum[None, :], 1)
    store_columns(mean_weights, i_tile, K, o_k, b_q_sum)
    b_z = b_v.to(tl.float32) * b_w
    store_matrix(update, i_tile, o_v, o_r, V, BT, False, matmul(b_z, b_A, CT, PRECISION))
    store_columns(mean_offset, i_tile, V, o_v, tl.sum(b_z * b_P_sum[None, :], 1))


@triton.jit
def content_terms_kernel(
    q, k, v, g, erase_logits, w, A_log, dt_bias, content_down, content_up, bias,
    initial_S, initial_mean, initial_partial, initial_count,
    terms, codes, means, final_mean, final_partial,
    erasure, update, k_to_end, total, mean_weights, mean_offset, running_mean, finished, prepared, tickets, token_masks,
    table, first, content_chunk, ring, H, content_heads,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, TEAM: tl.constexpr,
    BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A team of TEAM programs per sequence and value head; RP is R rounded up to a power of two, content_heads 0 or 1
    where D and U are for all heads or one a head, ring that of ChunkEffects. Outputs as in ContentTerms.

    The programs of a team prepare the chunks of a content chunk side by side, as soon as the mean of the one before is
    known; the first one carries the state through those chunks, one after another, and in a team of more than two does
    nothing else.
    """
    WORKERS: tl.constexpr = TEAM - (TEAM > 2)
    i_nh, role = take_place(tickets, TEAM)
    i_n, i_h = i_nh // H, i_nh % H
    o_r, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), tl.arange(0, V)
    begin, end, row_0, tokens_from, tokens_to = sequence_chunks(table, first, i_n)
    chunks = (end - begin).to(tl.int32)
    slots = content_chunk // BT
    b_S = tl.zeros([V, K], tl.float32)
    b_mean = tl.zeros([V], tl.float32)
    b_partial = tl.zeros([V], tl.float32)
    filled = tl.zeros([], tl.int64)  # chunks of the running content chunk
    if initial_S is not None:
        b_S += load_matrix(initial_S, i_nh, o_v, o_k, V, K, True)
        b_mean += load_columns(initial_mean, i_nh, V, o_v)
        b_partial += load_columns(initial_partial, i_nh, V, o_v)
        filled += tl.load(initial_count + i_n) // BT % slots
    filled = filled.to(tl.int32)
    if role == 0:
        store_columns(running_mean, i_nh, V, o_v, b_mean)
        announce(finished + i_nh, 1)
    # A content chunk at a time; the first one may have begun before this call.
    for i_from in tl.range(-filled, chunks, slots, disable_licm=True):
        i_since, i_to = tl.maximum(i_from, 0), tl.minimum(i_from + slots, chunks)
        if (role > 0) | (WORKERS == TEAM):
            worker = role - (TEAM - WORKERS)
            i_own = i_since + (worker + (i_since + filled) * (WORKERS - 1)) % WORKERS
            for i in tl.range(i_own, i_to, WORKERS, disable_licm=True):
                start = row_0 + i * BT
                prepare_chunk(
                    q, k, v, g, erase_logits, w, A_log, dt_bias, content_down, content_up, bias,
                    terms, codes, means, running_mean, finished + i_nh, i_since + 1,
                    erasure, update, k_to_end, total, mean_weights, mean_offset, token_masks,
                    i_nh, i_h, (begin + i) * H + i_h, i_nh * ring + i % ring, start,
                    (start + o_r >= tokens_from) & (start + o_r < tokens_to), H, content_heads,
                    K, V, R, RP, BEFORE, RAW_DECAY, LOGITS_W, CT, PRECISION,
                )  # fmt: skip
                announce(prepared + i_nh * WORKERS + worker, i + 1)
        if role == 0:
            for i in tl.range(i_since, i_to, disable_licm=True):
                wait_for(prepared + i_nh * WORKERS + (i + filled) % WORKERS, i + 1)
                i_tile = i_nh * ring + i % ring
                b_W = load_matrix(erasure, i_tile, o_k, o_r, K, BT, False)
                b_R = load_matrix(update, i_tile, o_v, o_r, V, BT, False)
                b_k_end = load_matrix(k_to_end, i_tile, o_k, o_r, K, BT, False)
                b_S_CT = b_S.to(CT)
                b_partial += load_columns(mean_offset, i_tile, V, o_v)
                b_weights = load_columns(mean_weights, i_tile, K, o_k)
                b_partial += product_with_vector(b_S_CT, b_weights, CT, PRECISION)
                if (i == i_from + slots - 1) & (row_0 + (i + 1) * BT <= tokens_to):
                    # before the state goes on, which the next content terms do not wait for
                    b_mean = b_partial / content_chunk
                    b_partial = tl.zeros([V], tl.float32)
                    store_columns(running_mean, i_nh, V, o_v, b_mean)
                    announce(finished + i_nh, i + 2)
                b_R = b_R.to(tl.float32) - matmul(b_S_CT, b_W, CT, PRECISION)
                b_S *= load_columns(total, i_tile, K, o_k)[None, :]
                b_S += matmul(b_R, tl.trans(b_k_end), CT, PRECISION)
    if role == 0:
        store_columns(final_mean, i_nh, V, o_v, b_mean)
        store_columns(final_partial, i_nh, V, o_v, b_partial)


@functools.cache
def token_masks(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[4, C, C] of the names above."""
    r = torch.arange(CHUNK_TOKENS, device=device)
    s = r[:, None]
    half = s // 32 == r // 32
    return torch.stack([half & (s <= r), half & (s < r), half & (s >= r), half & (s > r)]).to(dtype)


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
    # The tiles of a content chunk stay while the next one's are prepared.
    ring = min(2 * slots, chunks.count)
    tile = functools.partial(torch.empty, device=device, dtype=call.tile_dtype)
    floats = functools.partial(torch.empty, device=device, dtype=torch.float32)
    effects = ChunkEffects(
        *(tile((heads, ring, channels, CHUNK_TOKENS)) for channels in (call.K, V, call.K)),
        *(floats((heads, ring, channels)) for channels in (call.K, call.K, V)),
    )
    team = team_of(heads, slots, 3, device)
    launch(
        content_terms_kernel, (heads * team,),
        x.q, x.k, x.v, decay.g, decay.erase_logits, x.w, decay.A_log, decay.dt_bias, *content, *initial, *found,
        *effects, floats((heads, V)), *make_counters(device, heads, heads * team, 1),
        token_masks(device, call.tile_dtype), chunks.table, chunks.first, content_chunk, ring, call.H, content.by_head,
        TEAM=team, RAW_DECAY=decay.A_log is not None, **content_sizes(call, content),
    )  # fmt: skip
    return found
