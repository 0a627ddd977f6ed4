"""Stage 2 of GDN-2's forward: what a chunk does to any state, for all chunks at once."""

import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, chunk_rows
from .decay import UNSHIFT, erase_left, load_decay_to_end, load_left, right_factor
from .gates import load_erase_gate, load_write_gate
from .launching import launch
from .products import matmul, unit_triangular_inverse
from .stages import HOPPER, Call, Factors, Inputs, Tuning
from .steep import merge_scores, scores_of_steep_rows
from .tiles import load_key_and_query, load_rows, store_tile

TUNING = {HOPPER: Tuning(64, 64, 4, 3)}


@triton.jit
def chunk_operands_kernel(
    q, k, v, b, w, left, last, rest, steep_from,
    A, P, erasure, update, k_to_end, q_from_start,
    table, scale, erase_scale, H, HV,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr,
    GATE: tl.constexpr, BEFORE: tl.constexpr, SCALAR_W: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and key head.

    Writes, with C = BT rows per chunk and G the sum of log-decays from the chunk's start, in erased keys up to the row
    before if BEFORE:
        A [NC, H, C, C]: (I + T)^-1, T the scores of the erased keys b k. On entry A and P hold those of steep rows.
        P [NC, H, C, C]: scores of the scaled queries.
        erasure [NC, H, C, K]: A (exp(G) b k), what the chunk erases of the state.
        update [NC, HV, C, V]: A (w v), what it would write into an empty one.
        k_to_end [NC, H, C, K]: keys decayed to the chunk's end.
        q_from_start [NC, H, C, K]: scale * exp(G) q.
    """
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, o_r, m_r = chunk_rows(table, i_c)
    i_ch = i_c * H + i_h
    first_steep = tl.load(steep_from + i_ch)

    b_T = tl.zeros([BT, BT], tl.float32)
    b_own = tl.zeros([BT], tl.float32)  # a query meets the key of its own row without decay
    b_P = tl.zeros([BT, BT], tl.float32)
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_k, b_q = load_key_and_query(k, q, start, o_r, m_r, i_h, H, K, o_k, scale)
        b_left = load_left(left, i_ch, o_r, K, o_k)
        b_columns = tl.trans((b_k * right_factor(b_left)).to(CT))
        b_own += tl.sum(b_q * b_k, 1)
        b_q *= b_left
        store_tile(q_from_start, i_ch, o_r, K, o_k, b_q * UNSHIFT)
        b_P += matmul(b_q, b_columns, CT, PRECISION)
        b_k *= load_erase_gate(b, b, start, o_r, m_r, i_h, H, 0, K, o_k, erase_scale, GATE)
        b_k *= erase_left(b_left, left, i_ch, o_r, K, o_k, BEFORE)
        b_T += matmul(b_k, b_columns, CT, PRECISION)
    o_square = i_ch * BT * BT + (o_r[:, None] * BT + o_r[None, :])
    b_P = merge_scores(b_P, P + o_square, first_steep, o_r)
    tl.store(P + o_square, tl.where(o_r[:, None] == o_r[None, :], b_own[:, None], b_P).to(P.dtype.element_ty))
    b_T = merge_scores(b_T, A + o_square, first_steep, o_r)
    b_A = unit_triangular_inverse(b_T, o_r, False, CT, PRECISION).to(CT)
    tl.store(A + o_square, b_A)

    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        b_left = load_left(left, i_ch, o_r, K, o_k)
        b_to_end = load_decay_to_end(b_left, last, rest, first_steep, i_ch, o_r, K, o_k)
        store_tile(k_to_end, i_ch, o_r, K, o_k, b_k * b_to_end)
        b_k *= load_erase_gate(b, b, start, o_r, m_r, i_h, H, 0, K, o_k, erase_scale, GATE)
        b_k *= erase_left(b_left, left, i_ch, o_r, K, o_k, BEFORE) * UNSHIFT
        store_tile(erasure, i_ch, o_r, K, o_k, matmul(b_A, b_k, CT, PRECISION))
    G = HV // H
    for i_hv in range(i_h * G, i_h * G + G):
        for i_v in range(V // BV):
            o_v = i_v * BV + tl.arange(0, BV)
            b_w = load_write_gate(w, start, o_r, m_r, i_hv, HV, V, o_v, SPLIT, SCALAR_W, LOGITS_W)
            b_z = b_w * load_rows(v, start, o_r, m_r, i_hv, HV, V, o_v).to(tl.float32)
            store_tile(update, i_c * HV + i_hv, o_r, V, o_v, matmul(b_A, b_z, CT, PRECISION))


def chunk_operands(call: Call, x: Inputs, factors: Factors) -> tuple[Tensor, ...]:
    """A, P, erasure, update, k_to_end, q_from_start."""
    A = call.tiles(x.k, call.H, CHUNK_TOKENS, CHUNK_TOKENS)
    P = scores_of_steep_rows(call, x, factors, A)
    erasure, k_to_end, q_from_start = (call.tiles(x.k, call.H, CHUNK_TOKENS, call.K) for _ in range(3))
    operands = A, P, erasure, call.tiles(x.k, call.HV, CHUNK_TOKENS, call.V), k_to_end, q_from_start
    BK, BV = call.key_block(TUNING), call.value_block(TUNING)
    launch(
        chunk_operands_kernel, (call.chunks.count, call.H),
        x.q, x.k, x.v, x.b, x.w, *factors.of_rows, *operands,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV,
        K=call.K, BK=BK, V=call.V, BV=BV, **call.gates, **call.launch(TUNING, BK, BV),
    )  # fmt: skip
    return operands
