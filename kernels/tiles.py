"""What the chunk kernels share: loads of rows, gates and decays, products, the triangular inverse.

A tile has the 64 rows of a chunk, in four blocks of 16. With g the log2-decay of each step, three factors per element
stand for every decay between two rows of a chunk:

    down = 2^(g_first + ... + g_r)      from the block's start through row r
    up   = 2^-(g_first + ... + g_s)     its inverse
    rest = 2^(g_(s+1) + ... + g_last)   from after row s through the block's end

and `blocks` holds the decay over each whole block. Row r and an earlier row s of one block: down_r * up_s. Of two
blocks: down_r * rest_s times the decay of the blocks in between. `up` grows with the decay, so it serves only rows r
whose block decayed little up to r (see decay_factors.py); nothing else can overflow, and every factor of row r lies in
its past.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# One step of this log2-decay is an exact 0 in float32, so stopping here changes no value; it keeps 0 * g finite.
STEEPEST_LOG2_DECAY = tl.constexpr(-256.0)

# How the erase gate is given: its values, its logits, or logits to which a content term is added.
GATE_VALUES = tl.constexpr(0)
GATE_LOGITS = tl.constexpr(1)
GATE_CONTENT = tl.constexpr(2)


@triton.jit
def matmul(a, b, CT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b with operands in the dtype CT, float32 sums."""
    return tl.dot(a.to(CT), b.to(CT), input_precision=PRECISION)


@triton.jit
def chunk_rows(table, i_c):
    """(token of row 0, first row that holds a token, row after the last one) of a chunk."""
    return tl.load(table + i_c * 4), tl.load(table + i_c * 4 + 1), tl.load(table + i_c * 4 + 2)


@triton.jit
def load_rows(x, start, o_r, m_r, stride, o_d):
    """Rows o_r of a token tensor from token `start` on, zero where m_r is false, [rows, columns].

    `start` is a 64-bit scalar; the offsets from there fit 32 bits.
    """
    p_x = x + start * stride + (o_r[:, None] * stride + o_d[None, :])
    return tl.load(p_x, mask=m_r[:, None], other=0.0)


@triton.jit
def store_rows(x, start, o_r, m_r, stride, o_d, b_x):
    """The counterpart of load_rows."""
    p_x = x + start * stride + (o_r[:, None] * stride + o_d[None, :])
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_r[:, None])


@triton.jit
def load_tile(x, i, o_r, D: tl.constexpr, o_d):
    """Rows o_r of tile i of a scratch tensor of [64, D] tiles; columns beyond D, where a block is wider, are zero."""
    p_x = x + i * 64 * D + (o_r[:, None] * D + o_d[None, :])
    if D & (D - 1) == 0:
        return tl.load(p_x)
    return tl.load(p_x, mask=o_d[None, :] < D, other=0.0)


@triton.jit
def store_tile(x, i, o_r, D: tl.constexpr, o_d, b_x):
    """The counterpart of load_tile."""
    p_x = x + i * 64 * D + (o_r[:, None] * D + o_d[None, :])
    if D & (D - 1) == 0:
        tl.store(p_x, b_x.to(x.dtype.element_ty))
    else:
        tl.store(p_x, b_x.to(x.dtype.element_ty), mask=o_d[None, :] < D)


@triton.jit
def load_erase_gate(
    b, content, start, o_r, m_r, i_h, H, i_content, K: tl.constexpr, o_k, erase_scale, GATE: tl.constexpr
):
    """The erase gate, [rows, BK] float32. Empty rows hold something finite: their keys are zero."""
    b_b = load_rows(b, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32)
    if GATE != GATE_VALUES:
        if GATE == GATE_CONTENT:
            b_b += tl.load(content + i_content * K + o_k)[None, :]
        b_b = erase_scale * tl.sigmoid(b_b)
    return b_b


@triton.jit
def load_write_gate(w, start, o_r, m_r, i_h, HV, V: tl.constexpr, o_v, SCALAR: tl.constexpr, LOGITS: tl.constexpr):
    """The write gate in float32, [rows, 1] where it is a scalar per head, else [rows, BV]."""
    if SCALAR:
        b_w = tl.load(w + start * HV + (o_r * HV + i_h), mask=m_r, other=0.0).to(tl.float32)[:, None]
    else:
        b_w = load_rows(w, start, o_r, m_r, HV * V, i_h * V + o_v).to(tl.float32)
    if LOGITS:
        b_w = tl.sigmoid(b_w)
    return b_w


@triton.jit
def load_blocks(blocks, i_ch, K: tl.constexpr, o_k):
    """The decay of each of a chunk's four blocks, four times [BK]."""
    p_d = blocks + i_ch * 4 * K + o_k
    if K & (K - 1) == 0:
        return tl.load(p_d), tl.load(p_d + K), tl.load(p_d + 2 * K), tl.load(p_d + 3 * K)
    m_k = o_k < K
    return (
        tl.load(p_d, mask=m_k, other=0.0),
        tl.load(p_d + K, mask=m_k, other=0.0),
        tl.load(p_d + 2 * K, mask=m_k, other=0.0),
        tl.load(p_d + 3 * K, mask=m_k, other=0.0),
    )


@triton.jit
def by_block(o_r, b_0, b_1, b_2, b_3):
    """Give the rows of each block their vector [BK] (or scalar), [64, BK]."""
    i_b = (o_r // 16)[:, None]
    return tl.where(i_b == 0, b_0, tl.where(i_b == 1, b_1, tl.where(i_b == 2, b_2, b_3)))


@triton.jit
def decay_before_block(o_r, b_0, b_1, b_2):
    """From the chunk's start to the start of the row's block, [64, BK]."""
    return by_block(o_r, 1.0, b_0[None, :], (b_0 * b_1)[None, :], (b_0 * b_1 * b_2)[None, :])


@triton.jit
def decay_after_block(o_r, b_1, b_2, b_3):
    """From the end of the row's block to the chunk's end, [64, BK]."""
    return by_block(o_r, (b_1 * b_2 * b_3)[None, :], (b_2 * b_3)[None, :], b_3[None, :], 1.0)


@triton.jit
def unit_lower_inverse(b_T, o_r, CT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + T)^-1 for a strictly lower T, [64, 64] float32.

    Goes from the inverse of the diagonal blocks of 2^step rows to that of twice as many. This is block substitution:
    stable where a series in T, whose powers may be huge, is not.
    """
    b_A = tl.where(o_r[:, None] == o_r[None, :], 1.0, tl.where(pairs_of_halves(o_r, 0), -b_T, 0.0))
    for step in range(1, 6):
        b_Th = tl.where(pairs_of_halves(o_r, step), b_T, 0.0)
        b_A -= matmul(b_A, matmul(b_Th, b_A, CT, PRECISION), CT, PRECISION)
    return b_A


@triton.jit
def pairs_of_halves(o_r, step):
    """Where row r, in a lower half of 2^step rows, meets a column of the upper half before it, [rows, rows]."""
    half = o_r >> step
    partner = tl.where((half & 1) == 1, half - 1, -1)
    return partner[:, None] == half[None, :]


@triton.jit
def pairs_of_halves_mirrored(o_r, step):
    """The transpose of pairs_of_halves: row r, in an upper half, meets a column of the lower half after it."""
    half = o_r >> step
    partner = tl.where((half & 1) == 0, half + 1, -1)
    return partner[:, None] == half[None, :]


@triton.jit
def reverse_cumsum(b_x, o_r, CT: tl.constexpr):
    """Sum of each row and those after it, in float32: a product with ones, faster here than a scan across warps."""
    later = o_r[None, :] >= o_r[:, None]
    if tl.bfloat16 == CT:
        # two halves of a float32's bits
        high = b_x.to(tl.bfloat16)
        low = (b_x - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(later.to(tl.bfloat16), low, tl.dot(later.to(tl.bfloat16), high))
    return tl.dot(later.to(tl.float32), b_x, input_precision="tf32x3")


@triton.jit
def load_steep_rows(steep, i_ch, o_r):
    """1 for the rows whose decay in their block is too steep for `up`, else 0, [rows] int32."""
    return (tl.load(steep + i_ch * 4 + o_r // 16) >> (o_r % 16)) & 1


@triton.jit
def pairs_in_block(o_r, b_steep):
    """Row r and an earlier row of its block, where r is not steep, [64, 64]."""
    first = tl.where(b_steep == 0, o_r & -16, 64)
    return (o_r[None, :] >= first[:, None]) & (o_r[None, :] < o_r[:, None])


@triton.jit
def later_pairs_in_block(o_r, b_steep):
    """The transpose of pairs_in_block: row s and a later row of its block that is not steep."""
    last = o_r | 15
    later = (o_r[None, :] > o_r[:, None]) & (o_r[None, :] <= last[:, None])
    return later & (b_steep[None, :] == 0)
