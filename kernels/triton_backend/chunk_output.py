"""The last stage of the forward: outputs of all chunks at once, from the states before them and their residuals."""

import triton
import triton.language as tl
from torch import Tensor

from .chunks import BT, chunk_rows
from .launching import launch
from .products import matmul
from .stages import HOPPER, Call, Inputs, Tuning
from .tiles import load_matrix, load_tile, store_rows

TUNING = {HOPPER: Tuning(64, 128, 4, 1, 168)}


@triton.jit
def chunk_output_kernel(
    q_from_start, P, states, residuals, o, table, H, HV,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    TRANSPOSED: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and value head: o = scale * (exp(G) q) S + P R, [B, T, HV, V].

    TRANSPOSED: the states are [V, K] and the residuals [V, C].
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_h = i_hv // (HV // H)
    i_ch, i_chv = i_c * H + i_h, i_c * HV + i_hv
    start, o_r, m_r = chunk_rows(table, i_c)
    b_P = load_tile(P, i_ch, o_r, BT, o_r)
    for i_v in range(V // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_o = matmul(b_P, load_matrix(residuals, i_chv, o_r, o_v, BT, V, TRANSPOSED), CT, PRECISION)
        for i_k in range(K // BK):
            o_k = i_k * BK + tl.arange(0, BK)
            b_q = load_tile(q_from_start, i_ch, o_r, K, o_k)
            b_o += matmul(b_q, load_matrix(states, i_chv, o_k, o_v, K, V, TRANSPOSED), CT, PRECISION)
        store_rows(o, start, o_r, m_r, i_hv, HV, V, o_v, b_o)


def chunk_output(call: Call, x: Inputs, q_from_start: Tensor, P: Tensor, states: Tensor, residuals: Tensor) -> Tensor:
    BK, BV = call.key_block(TUNING), call.value_block(TUNING)
    o = call.of_tokens(x.v)
    launch(
        chunk_output_kernel, (call.chunks.count, call.HV),
        q_from_start, P, states, residuals, o, call.chunks.table, call.H, call.HV,
        K=call.K, BK=BK, V=call.V, BV=BV, TRANSPOSED=call.sees_content, **call.launch(TUNING, BK, BV),
    )  # fmt: skip
    return o
