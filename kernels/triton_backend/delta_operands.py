"""Stage 2 of CARVE's forward with delta erase: what about a chunk needs neither its erase gate nor a state."""

import triton
import triton.language as tl

from ..checks import CHUNK_TOKENS
from .chunks import BT, chunk_rows
from .decay import UNSHIFT, load_decay_to_end, load_left, right_factor, takes_loop_for_steep_rows
from .launching import launch
from .products import matmul
from .stages import HOPPER, Call, DeltaOperands, Factors, Inputs, Tuning
from .steep import merge_scores, scores_of_steep_rows
from .tiles import load_key_and_query, store_tile

TUNING = {HOPPER: Tuning(64, 0, 4)}

# Rows of a tile that holds a vector for a product: the narrowest that the products take.
SUM_ROWS = tl.constexpr(16)


@triton.jit
def store_sum(x, i, D: tl.constexpr, o_d, b_sum):
    """Store a float32 vector as a tile whose rows add up to it, two of them if they have 16 bits; i counts tiles.

    A product of rows with the tile's transpose, summed over its columns, is their product with the vector.
    """
    o_s = tl.arange(0, SUM_ROWS)
    b_high = b_sum.to(x.dtype.element_ty)
    b_low = b_sum - b_high.to(tl.float32)
    b_tile = tl.where(o_s[:, None] == 0, b_high.to(tl.float32)[None, :], 0.0)
    b_tile = tl.where(o_s[:, None] == 1, b_low[None, :], b_tile)
    p_x = x + i * SUM_ROWS * D + (o_s[:, None] * D + o_d[None, :])
    tl.store(p_x, b_tile.to(x.dtype.element_ty))


@triton.jit
def delta_operands_kernel(
    q, k, left, last, rest, steep_from, first_chunks,
    P, q_sum, P_sum, k_left, k_right, k_to_end, q_from_start,
    table, scale, H,
    K: tl.constexpr, BK: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and key head.

    Writes
        P [NC, H, C, C], q_from_start, k_to_end [NC, H, C, K] as GDN-2's stage; on entry P holds that of steep rows; the
            loop for mild rows takes k_right times last in place of k_to_end, which is written for the others alone,
        k_left, k_right [NC, H, C, K]: left k and right k (shifted, see decay.py),
        q_sum [NC, H, SUM_ROWS, K], P_sum [NC, H, SUM_ROWS, C]: column sums of q_from_start and P (see store_sum), of
            which the sum of the chunk's outputs is made.
    """
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, o_r, m_r = chunk_rows(table, i_c)
    i_ch = i_c * H + i_h
    first_steep = tl.load(steep_from + i_ch)
    wants_k_to_end = takes_loop_for_steep_rows(first_chunks, table, i_c, i_h, H)
    b_P = tl.zeros([BT, BT], tl.float32)
    b_own = tl.zeros([BT], tl.float32)  # a query meets the key of its own row without decay
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_k, b_q = load_key_and_query(k, q, start, o_r, m_r, i_h, H, K, o_k, scale)
        b_left = load_left(left, i_ch, o_r, K, o_k)
        b_own += tl.sum(b_q * b_k, 1)
        store_tile(k_left, i_ch, o_r, K, o_k, b_k * b_left)
        if wants_k_to_end:
            b_to_end = load_decay_to_end(b_left, last, rest, first_steep, i_ch, o_r, K, o_k)
            store_tile(k_to_end, i_ch, o_r, K, o_k, b_k * b_to_end)
        b_k_right = (b_k * right_factor(b_left)).to(CT)
        store_tile(k_right, i_ch, o_r, K, o_k, b_k_right)
        b_q *= b_left
        b_start = (b_q * UNSHIFT).to(CT)
        store_tile(q_from_start, i_ch, o_r, K, o_k, b_start)
        store_sum(q_sum, i_ch, K, o_k, tl.sum(b_start.to(tl.float32), 0))
        b_P += matmul(b_q, tl.trans(b_k_right), CT, PRECISION)
    o_square = i_ch * BT * BT + (o_r[:, None] * BT + o_r[None, :])
    b_P = merge_scores(b_P, P + o_square, first_steep, o_r)
    b_P = tl.where(o_r[:, None] == o_r[None, :], b_own[:, None], b_P).to(CT)
    tl.store(P + o_square, b_P)
    store_sum(P_sum, i_ch, BT, o_r, tl.sum(b_P.to(tl.float32), 0))


def delta_operands(call: Call, x: Inputs, factors: Factors) -> DeltaOperands:
    operands = DeltaOperands(
        scores_of_steep_rows(call, x, factors, None),
        call.tiles(x.q, call.H, SUM_ROWS.value, call.K), call.tiles(x.q, call.H, SUM_ROWS.value, CHUNK_TOKENS),
        *(call.tiles(x.q, call.H, CHUNK_TOKENS, call.K) for _ in range(4)),
    )  # fmt: skip
    BK = call.key_block(TUNING)
    launch(
        delta_operands_kernel, (call.chunks.count, call.H),
        x.q, x.k, *factors.of_rows, factors.first_chunks, *operands, call.chunks.table, call.scale, call.H,
        K=call.K, BK=BK, **call.launch(TUNING, BK),
    )  # fmt: skip
    return operands
