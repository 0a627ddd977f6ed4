"""What the chunk kernels share: loads and stores of tiles, gates, products, the triangular inverse.

A tile has BT rows, one for each token of a chunk.
"""

import triton
import triton.language as tl

from ..checks import CHUNK_TOKENS

BT = tl.constexpr(CHUNK_TOKENS)

# How the erase gate is given: its values, its logits, or logits to which a content term is added; or one value, or one
# logit, per head.
GATE_VALUES = tl.constexpr(0)
GATE_LOGITS = tl.constexpr(1)
GATE_CONTENT = tl.constexpr(2)
GATE_SCALAR = tl.constexpr(3)
GATE_SCALAR_LOGITS = tl.constexpr(4)


@triton.jit
def matmul(a, b, CT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b with operands in the dtype CT, float32 sums."""
    return tl.dot(a.to(CT), b.to(CT), input_precision=PRECISION)


@triton.jit
def chunk_rows(table, i_c):
    """(token of row 0, first row that holds a token, row after the last one) of a chunk."""
    return tl.load(table + i_c * 4), tl.load(table + i_c * 4 + 1), tl.load(table + i_c * 4 + 2)


@triton.jit
def chunk_sequence(table, i_c):
    return tl.load(table + i_c * 4 + 3)


@triton.jit
def sequence_rows(table, begin, end):
    """(token of row 0 of a sequence's first chunk, its first token, the one after its last); chunks begin to end.

    For loops over a sequence's chunks, whose addresses then wait for no load.
    """
    row_0, low, _ = chunk_rows(table, tl.maximum(tl.minimum(begin, end - 1), 0))
    last_row_0, _, high = chunk_rows(table, tl.maximum(end - 1, 0))
    return row_0, row_0 + low, last_row_0 + high


@triton.jit
def load_rows(x, start, o_r, m_r, i_h, H, D: tl.constexpr, o_d):
    """Rows o_r of head i_h of a token tensor [..., H, D] from token `start` on, zero where m_r is false, [rows, BD].

    `start` is a 64-bit scalar; the offsets from there fit 32 bits.
    """
    p_x = x + start * (H * D) + (o_r[:, None] * (H * D) + (i_h * D + o_d)[None, :])
    return tl.load(p_x, mask=m_r[:, None], other=0.0)


@triton.jit
def store_rows(x, start, o_r, m_r, i_h, H, D: tl.constexpr, o_d, b_x):
    """The counterpart of load_rows."""
    p_x = x + start * (H * D) + (o_r[:, None] * (H * D) + (i_h * D + o_d)[None, :])
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_r[:, None])


@triton.jit
def load_tile(x, i, o_r, D: tl.constexpr, o_d):
    """Rows o_r of tile i of a scratch tensor of [BT, D] tiles."""
    return tl.load(x + i * BT * D + (o_r[:, None] * D + o_d[None, :]))


@triton.jit
def store_tile(x, i, o_r, D: tl.constexpr, o_d, b_x):
    """The counterpart of load_tile."""
    tl.store(x + i * BT * D + (o_r[:, None] * D + o_d[None, :]), b_x.to(x.dtype.element_ty))


@triton.jit
def load_matrix(x, i, o_a, o_b, A: tl.constexpr, B: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Rows o_a and columns o_b of matrix i of a tensor of [A, B] matrices, or [B, A] if TRANSPOSED.

    What lies beyond A or B, where a block is wider, is zero.
    """
    if TRANSPOSED:
        p_x = x + i * A * B + (o_a[:, None] + o_b[None, :] * A)
    else:
        p_x = x + i * A * B + (o_a[:, None] * B + o_b[None, :])
    if ((o_a.shape[0] - 1) & A) + ((o_b.shape[0] - 1) & B) == 0:
        return tl.load(p_x)
    return tl.load(p_x, mask=(o_a < A)[:, None] & (o_b < B)[None, :], other=0.0)


@triton.jit
def store_matrix(x, i, o_a, o_b, A: tl.constexpr, B: tl.constexpr, TRANSPOSED: tl.constexpr, b_x):
    """The counterpart of load_matrix."""
    if TRANSPOSED:
        p_x = x + i * A * B + (o_a[:, None] + o_b[None, :] * A)
    else:
        p_x = x + i * A * B + (o_a[:, None] * B + o_b[None, :])
    if ((o_a.shape[0] - 1) & A) + ((o_b.shape[0] - 1) & B) == 0:
        tl.store(p_x, b_x.to(x.dtype.element_ty))
    else:
        tl.store(p_x, b_x.to(x.dtype.element_ty), mask=(o_a < A)[:, None] & (o_b < B)[None, :])


@triton.jit
def load_columns(x, i, D: tl.constexpr, o_d):
    """Vector i of a tensor of [D] vectors; columns beyond D, where a block is wider, are zero."""
    if (o_d.shape[0] - 1) & D == 0:  # the block divides D
        return tl.load(x + i * D + o_d)
    return tl.load(x + i * D + o_d, mask=o_d < D, other=0.0)


@triton.jit
def store_columns(x, i, D: tl.constexpr, o_d, b_x):
    """The counterpart of load_columns."""
    tl.store(x + i * D + o_d, b_x.to(x.dtype.element_ty), mask=o_d < D)


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
        b_b = erase_scale * tl.sigmoid(b_b)
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
        b_w = tl.sigmoid(b_w)
    return b_w


@triton.jit
def load_scalar_gate(x, start, o_r, m_r, i_h, H, LOGITS: tl.constexpr):
    """A gate of one number per head and token, [rows] float32; 0 in empty rows, or half where LOGITS are given."""
    b_x = tl.load(x + start * H + (o_r * H + i_h), mask=m_r, other=0.0).to(tl.float32)
    return tl.sigmoid(b_x) if LOGITS else b_x


@triton.jit
def unit_triangular_inverse(b_T, o_r, UPPER: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + T)^-1 for a strictly lower T, or a strictly upper one, [BT, BT] float32.

    Goes from the inverse of the diagonal blocks of 2^step rows to that of twice as many. This is block substitution:
    stable where a series in T, whose powers may be huge, is not. The inverse so far, A, is block-diagonal: the blocks
    that a step adds, of A T A, come from the same blocks of T alone.
    """
    b_A = -tl.where(pairs_of_halves(o_r, 0, UPPER), b_T, 0.0)
    b_A = tl.where(o_r[:, None] == o_r[None, :], 1.0, b_A)
    for step in tl.static_range(1, 6):
        b_step = matmul(b_A, matmul(b_T, b_A, CT, PRECISION), CT, PRECISION)
        b_A -= tl.where(pairs_of_halves(o_r, step, UPPER), b_step, 0.0)
    return b_A


@triton.jit
def pairs_of_halves(o_r, step, UPPER: tl.constexpr = False):
    """Where a row of a lower half of 2^step rows meets a column of the upper half before it, or UPPER the transpose."""
    half = o_r >> step
    lower, upper = (half[None, :], half[:, None]) if UPPER else (half[:, None], half[None, :])
    return ((lower & 1) == 1) & (lower - 1 == upper)


@triton.jit
def tanh(x):
    """tanh to float32 rounding, small arguments included."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0, -large, large)
    s = x * x
    small = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(s < 0.05, small, large)


@triton.jit
def content_code(b_down, b_mean):
    """tanh(D m) from D as [V, RP]."""
    return tanh(tl.sum(b_down * b_mean[:, None], 0))
