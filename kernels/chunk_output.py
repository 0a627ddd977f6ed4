"""The last stage of the forward: outputs of all chunks at once, from the states before them and their residuals."""

import triton
import triton.language as tl

from .tiles import UNSHIFT, chunk_rows, load_matrix, load_rows, load_tile, matmul, store_rows


@triton.jit
def chunk_output_kernel(
    q, left, P, states, residuals, o, table, scale, H, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TRANSPOSED: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and value head: o = scale * (exp(G) q) S + P R, [B, T, HV, V].

    TRANSPOSED: the states are [V, K] and the residuals [V, C].
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_h = i_hv // (HV // H)
    i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    b_P = load_tile(P, i_ch, o_r, 64, o_r)
    for i_v in range(V // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_o = tl.zeros([64, BV], tl.float32)
        for i_k in range(K // BK):
            o_k = i_k * BK + tl.arange(0, BK)
            b_q = load_rows(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale
            b_q *= load_tile(left, i_ch, o_r, K, o_k).to(tl.float32) * UNSHIFT
            b_S = load_matrix(states, i_chv, o_k, o_v, K, V, TRANSPOSED)
            b_o += matmul(b_q, b_S, CT, PRECISION)
        b_o += matmul(b_P, load_matrix(residuals, i_chv, o_r, o_v, 64, V, TRANSPOSED), CT, PRECISION)
        store_rows(o, start, o_r, m_r, i_hv, HV, V, o_v, b_o)
