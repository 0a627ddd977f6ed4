"""The gates of a chunk's tokens, from what the op was given of them."""

import triton
import triton.language as tl

from .special import fast_sigmoid
from .tiles import load_rows

# How the erase gate is given: its values, its logits, or logits to which a content term is added; or one value, or one
# logit, per head.
GATE_VALUES = tl.constexpr(0)
GATE_LOGITS = tl.constexpr(1)
GATE_CONTENT = tl.constexpr(2)
GATE_SCALAR = tl.constexpr(3)
GATE_SCALAR_LOGITS = tl.constexpr(4)


@triton.jit
def load_erase_gate(
    b, content, start, o_r, m_r, i_h, H, i_content, K: tl.constexpr, o_k, erase_scale, GATE: tl.constexpr
):
    """The erase gate, [rows, BK] float32, [rows, 1] where it is a scalar. Empty rows hold something finite: their keys
    are zero."""
    if (GATE == GATE_SCALAR) | (GATE == GATE_SCALAR_LOGITS):
        b_b = tl.load(b + start * H + (o_r * H + i_h), mask=m_r, other=0.0).to(tl.float32)[:, None]
    else:
        b_b = load_rows(b, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    if (GATE != GATE_VALUES) & (GATE != GATE_SCALAR):
        if GATE == GATE_CONTENT:
            b_b += tl.load(content + i_content * K + o_k)[None, :]
        b_b = erase_scale * fast_sigmoid(b_b)
    return b_b


@triton.jit
def load_write_gate(
    w, start, o_r, m_r, i_hv, HV, V: tl.constexpr, o_v, SPLIT: tl.constexpr, SCALAR: tl.constexpr, LOGITS: tl.constexpr
):
    """The write gate in float32, [rows, 1] where it is a scalar, shared by SPLIT heads, else [rows, BV]."""
    if SCALAR:
        p_w = w + start * (HV // SPLIT) + (o_r * (HV // SPLIT) + i_hv // SPLIT)
        b_w = tl.load(p_w, mask=m_r, other=0.0).to(tl.float32)[:, None]
    else:
        b_w = load_rows(w, start, o_r, m_r, i_hv, HV, V, o_v).to(tl.float32)
    if LOGITS:
        b_w = fast_sigmoid(b_w)
    return b_w


@triton.jit
def load_scalar_gate(x, start, o_r, m_r, i_h, H, LOGITS: tl.constexpr):
    """A gate of one number per head and token, [rows] float32; 0 in empty rows, or half where LOGITS are given."""
    b_x = tl.load(x + start * H + (o_r * H + i_h), mask=m_r, other=0.0).to(tl.float32)
    # With the faster one, which 64 numbers do not need, Triton 3.8 lets no products of content_terms overlap.
    return tl.sigmoid(b_x) if LOGITS else b_x
