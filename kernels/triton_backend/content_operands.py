"""CARVE with diagonal erase, backward: what of the gradients that go from chunk to chunk waits for no later chunk, for
all chunks at once; see content.py.

With z the rows that a chunk writes, before the inverse A, dz their gradient, E the erased keys, S the state before the
chunk, dS the gradient of the one after it, and d_row what the mean adds to the gradient of every output,

    dz = A^T (k_to_end dS + P^T do + P_sum d_row^T)
    gradient of S = total dS + q_from_start^T (do + d_row) - E^T dz

Of these gradient_operands.py gives A^T k_to_end, A^T P^T do and A^T P_sum; here follow q_from_start^T do -
E^T A^T P^T do, and the sum of the rows of q_from_start.

The gradient of a content term is minus the sum of b_t da_t over its tokens. With c_r the sum of b up to a row, a decay
from row s to row r counts c_r - c_s times in it. It is linear in do, d_row, dS and dz: the first three meet a vector
and two matrices that are formed here; what dz gives follows in content_gradient.py.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, chunk_rows
from .content import halving_mask, load_channels, load_tile_channels, sum_tokens
from .decay import UNSHIFT
from .launching import launch
from .products import matmul, pairs_of_halves
from .special import LOG2_E, fast_sigmoid
from .stages import HOPPER, Call, DecayInputs, Factors, GradientOperands, Inputs, Tuning
from .steep import GROUP, HALVINGS, group_is_mild, group_of_chunks
from .tiles import load_columns, load_matrix, load_rows, load_tile, store_columns, store_matrix

TUNING = {HOPPER: Tuning(64, 0, 4)}
STEEP_TUNING = {HOPPER: Tuning(64, 0, 4)}


class ContentOperands(NamedTuple):
    """By chunk and head; the last four only where a gradient reaches the means through the content terms.

    d_states [K, V]: what the chunk's own outputs give the gradient of the state before it; row_weights [K] float32:
    what that gains of d_row; counts [C, K], c; and of the sum of b_t da_t: local [K] float32, what the outputs give;
    of_states [K, V]: weights of dS, to be summed up over V; of_rows [K, V]: what multiplies d_row.
    """

    d_states: Tensor
    row_weights: Tensor
    counts: Tensor | None
    local: Tensor | None
    of_states: Tensor | None
    of_rows: Tensor | None


@triton.jit
def content_operands_kernel(
    k, erase_logits, terms, last, rest, steep_from, states, do,
    q_from_start, erasure, k_right, residuals, d_written_here, written_rows,
    d_states, row_weights, counts, local, of_states, of_rows, ones_through,
    table, H,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, DETACHED: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of key columns, chunk and head; outputs as in ContentOperands, without the scores of steep
    rows. ones_through [C, C], [s, r]: one where s is not after r."""
    i_c, i_h = tl.program_id(0).to(tl.int64) // (K // BK), tl.program_id(1)
    i_ch = i_c * H + i_h
    start, o_r, m_r = chunk_rows(table, i_c)
    o_k, o_v = (tl.program_id(0) % (K // BK)) * BK + tl.arange(0, BK), tl.arange(0, V)
    b_q = load_tile_channels(q_from_start, i_ch, o_r, K, o_k)
    b_E = load_tile_channels(erasure, i_ch, o_r, K, o_k)
    b_do = load_rows(do, start, o_r, m_r, i_h, H, V, o_v)
    b_dz = load_tile(d_written_here, i_ch, o_r, V, o_v)
    if not DETACHED:  # asked for before the first product
        first_steep = tl.load(steep_from + i_ch)
        b_R = load_tile(residuals, i_ch, o_r, V, o_v)
        b_S = load_matrix(states, i_ch, o_k, o_v, K, V, False)
        b_through = load_tile(ones_through, 0, o_r, BT, o_r)
        b_k = load_tile_channels(k_right, i_ch, o_r, K, o_k)
        b_last = load_columns(last, i_ch, K, o_k)
        b_b = load_erase_gates(erase_logits, terms, i_ch, start, o_r, m_r, i_h, H, K, o_k).to(CT)
    b_dS = matmul(b_q, b_do, CT, PRECISION)
    b_dS -= matmul(b_E, b_dz, CT, PRECISION)
    store_matrix(d_states, i_ch, o_k, o_v, K, V, False, b_dS * UNSHIFT)
    b_row = load_columns(written_rows, i_ch, BT, o_r)[None, :]
    b_row = tl.sum(b_q.to(tl.float32) - b_row * b_E.to(tl.float32), 1) * UNSHIFT
    store_columns(row_weights, i_ch, K, o_k, b_row)
    if not DETACHED:
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
        b_M = matmul(b_weights, b_R, CT, PRECISION) + b_all[:, None] * b_S.to(tl.float32)
        store_matrix(of_states, i_ch, o_k, o_v, K, V, False, b_M)
        # rows of queries: what c_r gives and c_s takes are of the same rounded factors, so that what is common cancels
        m_mild = (o_r < first_steep)[None, :]
        b_dP = matmul(b_R, tl.trans(b_do), CT, PRECISION)
        b_dP = tl.where((o_r[None, :] > o_r[:, None]) & m_mild, b_dP, 0.0).to(CT)
        b_d = matmul(b_S, tl.trans(b_do), CT, PRECISION) * UNSHIFT + matmul(b_k, b_dP, CT, PRECISION)
        b_columns = matmul(b_q, tl.trans(b_dP), CT, PRECISION)
        b_q_count = b_count * b_q.to(tl.float32)
        store_columns(local, i_ch, K, o_k, tl.sum(b_q_count * b_d - b_count * b_k.to(tl.float32) * b_columns, 1))
        # d_row meets all queries alike: a key's sum of (c_r - c_s) q_r over later rows is one of b_t times those from t
        b_pairs = matmul(tl.where(m_mild, b_q, 0.0), tl.trans(b_through), CT, PRECISION)
        b_pairs = (b_pairs * b_b.to(tl.float32)).to(CT)
        b_pairs = matmul(b_pairs, tl.trans(b_through), CT, PRECISION) - b_pairs.to(tl.float32)
        b_pairs *= b_k.to(tl.float32)
        b_q_sum = tl.sum(b_q_count, 1) * UNSHIFT
        b_M = matmul(b_pairs, b_R, CT, PRECISION) + b_q_sum[:, None] * b_S.to(tl.float32)
        store_matrix(of_rows, i_ch, o_k, o_v, K, V, False, b_M)


@triton.jit
def load_erase_gates(erase_logits, terms, i_ch, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k):
    """b, [BK, BT] float32, 0 in empty rows."""
    b_l = load_channels(erase_logits, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_l += load_columns(terms, i_ch, K, o_k)[:, None]
    return tl.where(m_r[None, :], fast_sigmoid(b_l), 0.0)


@triton.jit
def steep_content_operands_kernel(
    q, k, log_decay, erase_logits, terms, steep_from, do, residuals, local, of_rows,
    table, scale, chunks, H, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, CT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per group of chunks and head: adds what the scores of steep rows give `local` and `of_rows`."""
    i_h = tl.program_id(1)
    if group_is_mild(steep_from, i_h, H, chunks):
        return
    begin, end = group_of_chunks(chunks)
    o_v = tl.arange(0, V)
    for i_c in range(begin, end):
        i_ch = i_c * H + i_h
        first_steep = tl.load(steep_from + i_ch)
        if first_steep < BT:
            start, o_r, m_r = chunk_rows(table, i_c)
            b_R = load_tile(residuals, i_ch, o_r, V, o_v)
            b_dP = matmul(b_R, tl.trans(load_rows(do, start, o_r, m_r, i_h, H, V, o_v)), CT, PRECISION).to(CT)
            for i_k in range(K // BK):
                o_k = i_k * BK + tl.arange(0, BK)
                b_a = load_channels(log_decay, start, o_r, m_r, i_h, H, K, o_k) * LOG2_E
                b_b = load_erase_gates(erase_logits, terms, i_ch, start, o_r, m_r, i_h, H, K, o_k)
                b_k = load_channels(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
                b_q = load_channels(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale
                b_sum = tl.zeros([BK], tl.float32)
                b_pairs = tl.zeros([BK, BT], tl.float32)
                for step in range(HALVINGS):
                    m_pairs = pairs_of_halves(o_r, step, True) & (o_r >= first_steep)[None, :]
                    m_steps = halving_mask(o_r, step, False)
                    b_e, b_count = tl.exp2(sum_tokens(b_a, m_steps, CT)), matmul(b_b, m_steps, CT, PRECISION)
                    b_ke = b_k * b_e
                    b_qe = (b_q * b_e).to(CT)
                    b_dP_pairs = tl.where(m_pairs, b_dP, 0.0).to(CT)
                    b_d = b_qe.to(tl.float32) * matmul(b_ke, b_dP_pairs, CT, PRECISION)
                    b_d += b_ke * matmul(b_qe, tl.trans(b_dP_pairs), CT, PRECISION)
                    b_sum += tl.sum(b_count * b_d, 1)
                    m_rows = tl.trans(m_pairs)
                    b_q_count = matmul(b_count * b_qe.to(tl.float32), m_rows, CT, PRECISION)
                    b_pairs += b_ke * (b_q_count + b_count * matmul(b_qe, m_rows, CT, PRECISION))
                store_columns(local, i_ch, K, o_k, load_columns(local, i_ch, K, o_k) + b_sum)
                b_M = matmul(b_pairs, b_R, CT, PRECISION)
                b_M += load_matrix(of_rows, i_ch, o_k, o_v, K, V, False).to(tl.float32)
                store_matrix(of_rows, i_ch, o_k, o_v, K, V, False, b_M)


@functools.cache
def ones_through(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.ones(CHUNK_TOKENS, CHUNK_TOKENS, device=device, dtype=dtype).triu()


def content_operands(
    call: Call, x: Inputs, decay: DecayInputs, factors: Factors, operands: GradientOperands, states: Tensor,
    do: Tensor, detached: bool,
) -> ContentOperands:  # fmt: skip
    """
    Args:
        x: with the log-decay that the erase is part of.
        decay: with the content terms of the forward.
        operands: for content.
        detached: no gradient reaches the means through the content terms.
    """

    def tile() -> Tensor:
        return call.tiles(do, call.H, CHUNK_TOKENS, call.K)

    def vector() -> Tensor:
        return call.floats(do, call.H, call.K)

    def matrix() -> Tensor:
        return call.tiles(do, call.H, call.K, call.V)

    # of counts up to 64 float16 keeps more than bfloat16
    count_dtype = torch.float16 if call.tile_dtype == torch.bfloat16 else torch.float32
    made = ContentOperands(
        matrix(), vector(),
        *((None,) * 4 if detached else (tile().view(count_dtype), vector(), matrix(), matrix())),
    )  # fmt: skip
    BK = call.key_block(TUNING)
    launch(
        content_operands_kernel, (call.chunks.count * (call.K // BK), call.H),
        x.k, decay.erase_logits, decay.content, factors.last, factors.rest, factors.steep_from, states, do,
        operands.q_from_start, operands.erasure, operands.k_right,
        operands.residuals, operands.d_residuals_here, operands.P_sum, *made, ones_through(do.device, call.tile_dtype),
        call.chunks.table, call.H,
        K=call.K, BK=BK, V=call.V, DETACHED=detached, **call.launch(TUNING, BK, call.V),
    )  # fmt: skip
    if not detached:
        BK = call.key_block(STEEP_TUNING)
        launch(
            steep_content_operands_kernel, (triton.cdiv(call.chunks.count, GROUP.value), call.H),
            x.q, x.k, x.g, decay.erase_logits, decay.content, factors.steep_from, do, operands.residuals,
            made.local, made.of_rows, call.chunks.table, call.scale, call.chunks.count, call.H,
            K=call.K, BK=BK, V=call.V, **call.launch(STEEP_TUNING, BK, call.V),
        )  # fmt: skip
    return made
