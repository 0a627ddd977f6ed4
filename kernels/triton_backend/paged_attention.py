"""One token of every sequence attends to keys and values that lie in blocks, in Triton; forward only.

A step reads every key and value once: a program per sequence and head goes through its sequence's, tile by tile, with
the sum of exponentials so far and the largest score. How long a sequence is, is read on the device: a captured CUDA
graph serves whatever lengths there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers in a tile of keys, and warps of its program, as decoding's.
TILE_NUMBERS = 8192
NUM_WARPS = 4


@torch.no_grad()
def attend_to_blocks(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, positions: Tensor, *, block_tokens: int, scale: float,
    window: int | None,
) -> Tensor:  # fmt: skip
    """[N, heads, D], in the dtype of query.

    Args:
        query: [N, heads, D] of the tokens at `positions`, [N] int32, from 0 on.
        keys, values: [places, groups, D], each place in one piece; heads are a multiple of groups.
        blocks: [N, blocks] int32, where a sequence's tokens are: place blocks[n, p // block_tokens] * block_tokens +
            p % block_tokens. What is less than 0 counts as 0: padding's output means nothing.
        scale: of the products of queries and keys.
        window: tokens that one attends to, itself included; None for all.
    """
    N, heads, D = query.shape
    query, out = query.contiguous(), query.new_empty(query.shape)
    BD = triton.next_power_of_2(D)
    with torch.cuda.device_of(query):
        attend_kernel[(N * heads,)](
            query, keys, values, blocks, positions, out, keys.stride(0), values.stride(0), blocks.stride(0),
            block_tokens, scale, 0 if window is None else window, heads, heads // keys.shape[1],
            D=D, BD=BD, BT=max(16, min(128, TILE_NUMBERS // BD)), num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


@triton.jit
def attend_kernel(
    query, keys, values, blocks, positions, out, key_stride, value_stride, blocks_stride,
    block_tokens, scale, window, heads, heads_a_group,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One head of one sequence; window 0 means all tokens."""
    i_n, i_head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    group = (i_head // heads_a_group) * D
    p_row = (i_n * heads + i_head) * D + o_d
    b_q = tl.load(query + p_row, mask=m_d, other=0.0).to(tl.float32) * scale
    end = tl.load(positions + i_n) + 1
    first = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    b_sum = tl.zeros([BD], tl.float32)
    for start in range(first, end, BT):
        o_t = start + tl.arange(0, BT)
        m_t = o_t < end
        block = tl.load(blocks + i_n * blocks_stride + o_t // block_tokens, mask=m_t, other=0).to(tl.int64)
        place = tl.maximum(block, 0) * block_tokens + o_t % block_tokens
        mask = m_t[:, None] & m_d[None, :]
        b_k = tl.load(keys + place[:, None] * key_stride + group + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_v = tl.load(values + place[:, None] * value_stride + group + o_d[None, :], mask=mask, other=0.0)
        scores = tl.where(m_t, tl.sum(b_k * b_q[None, :], 1), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp(scores - new_largest)
        kept = tl.exp(largest - new_largest)
        total = total * kept + tl.sum(weights, 0)
        b_sum = b_sum * kept + tl.sum(weights[:, None] * b_v.to(tl.float32), 0)
        largest = new_largest
    tl.store(out + p_row, (b_sum / total).to(out.dtype.element_ty), mask=m_d)
