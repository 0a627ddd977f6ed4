"""Tiles in the layout of tensor cores from memory on, so that nothing between loads, products and stores is moved.

A tile [GROUPS, ROWS, P] is a group of P columns for each warp. Of every eight columns of a product a thread holds two
that lie side by side; so columns are numbered anew, such that all of a thread's are neighbours in memory, and loads and
stores number what threads hold as tensor cores number threads: Triton gives each thread what it has in a product. A
product with the identity turns what one product has left into what the next takes, where Triton would go through shared
memory.
"""
# mypy: disable-error-code="assignment, misc"
# Tuples that a kernel builds up change their type.

import triton
import triton.language as tl

from .products import matmul
from .special import INTERPRETED


@triton.jit
def load_product_tile(x, row_stride, first, last, rows_apart, channels, ROWS: tl.constexpr, GROUPS: tl.constexpr,
                      P: tl.constexpr, BEFORE: tl.constexpr = False, SHARED: tl.constexpr = False):  # fmt: skip
    """Rows `first`, `first + rows_apart`, ... of x, zero from row `last` and column `channels` on, of which None is
    beyond all; with BEFORE, below row 0 too.

    With SHARED all groups get the first P columns, otherwise each its own.
    """
    o_row, o_column = places_of_product_tile(ROWS, GROUPS, P, SHARED)
    o_row *= rows_apart
    m_x = within(first + o_row, o_column, last, channels)
    if BEFORE:
        m_x &= first + o_row >= 0
    p_x = x + first.to(tl.int64) * row_stride + (o_row.to(tl.int64) * row_stride + o_column)
    b_x = tl.reshape(tl.load(p_x, mask=m_x, other=0.0), [ROWS // 8, GROUPS, 8, 4, P // 8, 2])
    return tl.reshape(tl.permute(b_x, (1, 0, 2, 4, 3, 5)), [GROUPS, ROWS, P])


@triton.jit
def store_product_tile(x, row_stride, first, last, rows_apart, channels, b_x, keep=True):
    """The counterpart of load_product_tile, unless not to `keep` it."""
    GROUPS: tl.constexpr = b_x.shape[0]
    ROWS: tl.constexpr = b_x.shape[1]
    P: tl.constexpr = b_x.shape[2]
    o_row, o_column = places_of_product_tile(ROWS, GROUPS, P, False)
    o_row *= rows_apart
    m_x = within(first + o_row, o_column, last, channels) & keep
    p_x = x + first.to(tl.int64) * row_stride + (o_row.to(tl.int64) * row_stride + o_column)
    b_x = tl.permute(tl.reshape(b_x.to(x.dtype.element_ty), [GROUPS, ROWS // 8, 8, P // 8, 4, 2]), (1, 0, 2, 4, 3, 5))
    tl.store(p_x, tl.reshape(b_x, [4 * ROWS * GROUPS, P // 4]), mask=m_x)


@triton.jit
def within(o_row, o_column, last, channels):
    """Which rows lie before `last` and which columns before `channels`, if there is a bound."""
    m_x = (o_row == o_row) & (o_column == o_column)
    if last is not None:
        m_x &= o_row < last
    if channels is not None:
        m_x &= o_column < channels
    return m_x


@triton.jit
def places_of_product_tile(ROWS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, SHARED: tl.constexpr):
    """(rows, columns) of what a tile's threads hold, quarters of a group's columns side by side, [4 * ROWS * GROUPS, 1]
    and [4 * ROWS * GROUPS, P // 4]: four threads have a row, eight rows a warp, then come the other groups and rows.
    """
    o_part = tl.arange(0, 4 * ROWS * GROUPS)[:, None]
    o_row = o_part // 4 % 8 + o_part // (32 * GROUPS) * 8
    o_column = o_part % 4 * (P // 4) + tl.arange(0, P // 4)[None, :]
    return o_row, o_column if SHARED else o_column + o_part // 32 % GROUPS * P


@triton.jit
def columns_of_product_tile(P: tl.constexpr):
    """Where in memory the columns of a group of a tile lie, [P]."""
    o_p = tl.arange(0, P)
    return o_p // 2 % 4 * (P // 4) + o_p // 8 * 2 + o_p % 2


@triton.jit
def identities(COLUMNS: tl.constexpr, CT: tl.constexpr):
    """An identity for every 16 of so many columns, [COLUMNS / 16, 16, 16]."""
    o_p = tl.arange(0, 16)
    return tl.broadcast_to(tl.where(o_p[:, None] == o_p[None, :], 1.0, 0.0)[None], [COLUMNS // 16, 16, 16]).to(CT)


@triton.jit
def turned(b_x, b_identity, CT: tl.constexpr, PRECISION: tl.constexpr):
    """The transposes of the groups of a tile of the dtype CT; the identities are for 16 columns each."""
    if b_x.dtype == tl.bfloat16:
        GROUPS: tl.constexpr = b_x.shape[0]
        ROWS: tl.constexpr = b_x.shape[1]
        PARTS: tl.constexpr = b_x.shape[2] // 16
        b_x = tl.permute(tl.reshape(b_x, [GROUPS, ROWS, PARTS, 16]), (2, 0, 3, 1))
        b_x = matmul(b_identity, tl.reshape(b_x, [PARTS * GROUPS, 16, ROWS]), CT, PRECISION).to(CT)
        b_x = tl.permute(tl.reshape(b_x, [PARTS, GROUPS, 16, ROWS]), (1, 0, 2, 3))
        b_x = tl.reshape(b_x, [GROUPS, PARTS * 16, ROWS])
    else:
        b_x = tl.permute(b_x, (0, 2, 1))
    return b_x


@triton.jit
def packed(b_x):
    """A tile as a loop is to move it along: of bfloat16 two numbers a register, where Triton would give each its own;
    of other dtypes in float32.
    """
    if b_x.dtype == tl.bfloat16 and not INTERPRETED:
        b_low, b_high = tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], b_x.shape[2] // 2, 2]))
        b_x = tl.inline_asm_elementwise(
            "mov.b32 $0, {$1, $2};", "=r,h,h", [b_low, b_high], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def unpacked(b_x, dtype: tl.constexpr):
    """The tile that `packed` was given, in a dtype that holds its numbers.

    Of tl.join, Triton would take products in another layout; of halves of a register it makes float32 in two steps.
    Triton may choose a layout in which a thread's numbers are no neighbours: whether a number's column is odd tells
    which half it is. In the layouts of products the compiler knows that, and drops the condition.
    """
    if b_x.dtype == tl.int32:
        GROUPS: tl.constexpr = b_x.shape[0]
        ROWS: tl.constexpr = b_x.shape[1]
        PAIRS: tl.constexpr = b_x.shape[2]
        b_x = tl.reshape(tl.broadcast_to(b_x[:, :, :, None], [GROUPS, ROWS, PAIRS, 2]), [GROUPS, ROWS, 2 * PAIRS])
        b_odd = tl.broadcast_to((tl.arange(0, 2 * PAIRS) % 2)[None, None, :], b_x.shape)
        if dtype == tl.bfloat16:
            # of two numbers the first even and the second odd are a pair, still in one register
            b_x = tl.inline_asm_elementwise(
                """{ .reg .pred pair; .reg .b32 halves;
                setp.lt.u32 pair, $3, $4;
                mad.lo.u32 halves, $3, 0x22, 0x5410; mad.lo.u32 halves, $4, 0x2200, halves;
                @pair mov.b32 $0, $1; @!pair prmt.b32 $0, $1, $2, halves; }""",
                "=r,r,r,r,r", [b_x, b_odd], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            b_x = tl.inline_asm_elementwise(
                """{ .reg .pred odd;
                setp.ne.u32 odd, $2, 0; @odd and.b32 $0, $1, 0xffff0000; @!odd shl.b32 $0, $1, 16; }""",
                "=r,r,r", [b_x, b_odd], dtype=tl.int32, is_pure=True, pack=1,
            ).to(tl.float32, bitcast=True)  # fmt: skip
    return b_x.to(dtype)


@triton.jit
def anew(b_tiles):
    """A tuple of packed tiles for the next step of a loop; Triton loads nothing ahead in one that hands on as it is
    what it got.
    """
    b_moved = ()
    for j in tl.static_range(len(b_tiles)):
        b_x = b_tiles[j]
        if not INTERPRETED:
            if b_x.dtype == tl.int32:
                b_x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b_x], tl.int32, is_pure=True, pack=1)
            else:
                b_x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [b_x], tl.float32, is_pure=True, pack=1)
        b_moved += (b_x,)
    return b_moved


@triton.jit
def side_by_side(b_tiles):
    """One tile of one or two [GROUPS, A, B], whose columns alternate."""
    if len(b_tiles) == 1:
        return b_tiles[0]
    else:  # noqa: RET505  # Triton compiles what follows a return
        GROUPS: tl.constexpr = b_tiles[0].shape[0]
        A: tl.constexpr = b_tiles[0].shape[1]
        B: tl.constexpr = b_tiles[0].shape[2]
        return tl.reshape(tl.join(b_tiles[0], b_tiles[1]), [GROUPS, A, 2 * B])


@triton.jit
def sum_of_groups(b_x):
    """[GROUPS, A, B] -> the sum over groups turned round, [B, A].

    Half the groups are added up in a thread: Triton's sums across warps take five times the instructions.
    """
    GROUPS: tl.constexpr = b_x.shape[0]
    b_x = tl.permute(b_x, (2, 1, 0))
    if GROUPS > 1:
        b_even, b_odd = tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], GROUPS // 2, 2]))
        b_x = b_even + b_odd
    return tl.sum(b_x, 2)
