"""CARVE with diagonal erase: what the stages share that go from content chunk to content chunk, forward and backward.

The decays of a content chunk wait for the mean of the one before it. So one stage goes through the chunks of a sequence
and value head and finds the means alone; once all content terms are known, everything else is GDN-2's stages for all
chunks at once, with the erase in the decays and the write gate as erase gate. Backward it is the same: one stage
carries the gradients of the state and of the means from chunk to chunk, with operands of which content_operands.py
prepares all that wait for no later chunk, then all others follow at once. Every value head has decays of its own here,
so that H is the number of them, and key-side tensors are given for each.

A team of programs works on a head (see cooperation.py). What the chunks of a content chunk do does not depend on each
other once their content term is known: forward it is found side by side. Backward one program carries the gradients,
and another sums up what they give the content terms.

Tiles are transposed: rows are channels, which warps divide without copies, columns the BT tokens of a chunk.
Rows that have decayed beyond the range of factors, the steep ones, take halvings of the chunk as in steep.py.
"""

from typing import Any

import triton
import triton.language as tl

from .chunks import BT
from .decay import STEEPEST_LOG2_DECAY, load_rate
from .special import INTERPRETED, LOG2_E, fast_exp2, fast_log2
from .stages import HOPPER, Call, Content, Tuning, next_power_of_2
from .tiles import load_columns

# By the larger head width.
TUNINGS = {width: {HOPPER: Tuning(width, width, warps)} for width, warps in ((32, 4), (64, 4), (128, 8))}


@triton.jit
def load_channels(x, start, o_r, m_r, i_h, H, D: tl.constexpr, o_d):
    """load_rows transposed, [BD, rows]."""
    p_x = x + start * (H * D) + (o_r[None, :] * (H * D) + (i_h * D + o_d)[:, None])
    return tl.load(p_x, mask=m_r[None, :], other=0.0)


@triton.jit
def load_tile_channels(x, i, o_r, D: tl.constexpr, o_d):
    """load_tile transposed, [BD, rows]."""
    return tl.load(x + i * BT * D + (o_r[None, :] * D + o_d[:, None]))


@triton.jit
def load_before(x, i, o_r, D: tl.constexpr, o_d):
    """What a tile's rows before those of o_r hold, as load_tile_channels; zero before row 0."""
    p_x = x + i * BT * D + ((o_r[None, :] - 1) * D + o_d[:, None])
    return tl.load(p_x, mask=(o_r > 0)[None, :], other=0.0)


@triton.jit
def sum_tokens(b_x, b_ones, CT: tl.constexpr):
    """Column r: the sum of the columns s of b_x where b_ones, [s, r], is one; float32, as sum_rows of decay.py."""
    if tl.bfloat16 == CT:
        b_high = b_x.to(tl.bfloat16)
        b_low = (b_x - b_high.to(tl.float32)).to(tl.bfloat16)
        b_sum = tl.dot(b_high, b_ones.to(tl.bfloat16), tl.dot(b_low, b_ones.to(tl.bfloat16)))
    else:
        b_sum = tl.dot(b_x, b_ones.to(tl.float32), input_precision="tf32x3")
    return b_sum


@triton.jit
def halving_mask(o_r, step, BEFORE: tl.constexpr):
    """[s, r]: whether the decay of step s is in the factor of column r at a halving: from after the upper half's end
    through r, or if BEFORE through the column before, in a lower half; from after r to the end in an upper one."""
    half = o_r >> step
    in_lower = (half & 1) == 1
    after = tl.where(in_lower, half << step, o_r + 1)
    until = tl.where(in_lower, o_r + (0 if BEFORE else 1), (half + 1) << step)
    o_s = o_r[:, None]
    return (o_s >= after[None, :]) & (o_s < until[None, :])


@triton.jit
def in_lower_half(o_r, step):
    """[1, columns]: whether a column is in a lower half."""
    return (((o_r >> step) & 1) == 1)[None, :]


@triton.jit
def neighbours(o_r, step):
    """[s, r]: whether one is in the upper, the other in the lower half of the same two."""
    half = o_r >> step
    return (half[:, None] ^ half[None, :]) == 1


@triton.jit
def both_ways(b_x):
    """What is above the diagonal, below it too."""
    return b_x + tl.trans(b_x)


@triton.jit
def here(x):
    """x, float32, computed where this is called: a compiler moves it past a wait to where it is needed first."""
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def log2_of_one_plus_exp2(x):
    """softplus in units of log2, to the rounding of a float32 near 1: for what is added to other logarithms."""
    return tl.maximum(x, 0.0) + fast_log2(1.0 + fast_exp2(-tl.abs(x)))


@triton.jit
def log2_decay(b_g, A_log, dt_bias, i_h, K: tl.constexpr, o_k, RAW_DECAY: tl.constexpr):
    """log2 of the decay per step without the erase, [K, BT] float32."""
    b_g = b_g.to(tl.float32)
    if RAW_DECAY:
        b_g = log2_of_one_plus_exp2((b_g + load_columns(dt_bias, i_h, K, o_k)[:, None]) * LOG2_E)
        b_g *= -load_rate(A_log, i_h, K, o_k)[:, None]
    else:
        b_g *= LOG2_E
    return b_g


@triton.jit
def with_erase(b_g, b_l, b_term):
    """The same with the erase of these logits and their chunk's content term, both in units of log2."""
    return tl.maximum(b_g - log2_of_one_plus_exp2(b_l + b_term[:, None]), STEEPEST_LOG2_DECAY)


def content_sizes(call: Call, content: Content) -> dict[str, Any]:
    _, R, V = content.down.shape
    return {
        "K": call.K, "V": V, "R": R, "RP": next_power_of_2(R),
        "BEFORE": call.before, "LOGITS_W": call.logits_w,
        **call.launch(TUNINGS[max(call.K, V)], call.K, V),
    }  # fmt: skip
