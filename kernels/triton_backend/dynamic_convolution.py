"""Short convolution whose taps depend on the token, in Triton; SiLU and norms as in short_convolution.

The taps of a tile of tokens are products of its features and a table, formed where they are used and never written.
Blocks of channels as in short_convolution; of attention's heads, GROUP of them a group of queries, every head is one,
and there is no activation.

- dynamic_forward_kernel: tiles of tokens one after another, each read once per tap.
- dynamic_taps_gradient_kernel: the same once more, then the gradients of y, which it writes, and of what taps are made
  of: sums over its tokens for the parameters, over its channels for the features. The host adds them up in one order.
- dynamic_tokens_gradient_kernel: dx from the gradients of y of a token and those that follow.
"""
# mypy: disable-error-code="assignment, misc"
# Tuples that a kernel builds up change their type.

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .products import arithmetic_of, matmul
from .short_convolution import (
    activated,
    activation_gradient,
    channel_blocks,
    load_age,
    load_bias,
    load_channels,
    load_tokens,
    store_tokens,
    token_age,
)


class Tunings(NamedTuple):
    """How the three kernels are launched.

    BT: rows of a tile; with fewer than 64 no product is a warp group's, whose narrow ones Triton has got wrong.
    TILES: of a program, which loads tables once for them, and has a set of sums where there are sums.
    """

    forward: dict[str, int]
    taps_gradient: dict[str, int]
    tokens_gradient: dict[str, int]


ALIKE = {"BT": 32, "TILES": 4, "num_warps": 8}
TAPS_GRADIENT = {"BT": 32, "TILES": 16, "num_warps": 8, "num_stages": 1}
TUNINGS = Tunings(ALIKE, TAPS_GRADIENT, ALIKE)
# Attention's: without an activation before it, larger tiles of the taps' gradient have too few registers.
TUNINGS_OF_HEADS = Tunings(ALIKE, {**TAPS_GRADIENT, "BT": 16, "TILES": 32}, ALIKE)
# Measured with heads of 128 channels and 16 features, in bfloat16.
TUNINGS_128 = Tunings(
    {**ALIKE, "TILES": 8, "maxnreg": 80},
    {**TAPS_GRADIENT, "BT": 16, "TILES": 32, "num_warps": 4},
    {**ALIKE, "num_warps": 4},
)
# Fewest rows of a product: the tap's gradients and the bias's share one.
FEWEST_ROWS = tl.constexpr(16)


class DynamicConvolveQKV(torch.autograd.Function):
    """x, features, weight, up, bias, cu_seqlens, then the sizes -> q, k, v.

    Of attention's heads key_channels is 0, key_head_dim is the width of all and `group` their number in a group: its
    queries', then that of its key and that of its value. Then v is what becomes of all.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, features: Tensor, weight: Tensor, up: Tensor, bias: Tensor | None,
        cu_seqlens: Tensor | None, key_channels: int, key_head_dim: int, group: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        B, T, value_channels = *x.shape[:2], x.shape[2] - 2 * key_channels
        q, k = (x.new_empty(B, T, key_channels) for _ in range(2))
        v = x.new_empty(B, T, value_channels)
        launch = _Launch.of(x, up, key_channels, key_head_dim, group)
        with torch.cuda.device_of(x):
            dynamic_forward_kernel[launch.grid(launch.tunings.forward, T, B)](
                x, features, *_tables(weight, up), bias, token_age(cu_seqlens, T), q, k, v,
                *x.stride()[:2], *features.stride()[:2], *launch.sizes, **launch.options, **launch.tunings.forward,
            )  # fmt: skip
        ctx.sizes = key_channels, key_head_dim, group
        ctx.save_for_backward(x, features, weight, up, bias, cu_seqlens)
        return q, k, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, features, weight, up, bias, cu_seqlens = ctx.saved_tensors
        key_channels, key_head_dim, group = ctx.sizes
        (B, T, D), (_, W, R) = x.shape, up.shape
        launch = _Launch.of(x, up, key_channels, key_head_dim, group)
        strides = *x.stride()[:2], *features.stride()[:2]
        tables, age = _tables(weight, up), token_age(cu_seqlens, T)
        taps, tokens = launch.tunings.taps_gradient, launch.tunings.tokens_gradient
        programs = launch.grid(taps, T, B)[0] // launch.blocks
        dy, dx = dv.contiguous() if group else x.new_empty(B, T, D), x.new_empty(B, T, D)
        d_features = x.new_empty(launch.blocks, B, T, R, dtype=torch.float32)
        d_up = x.new_empty(programs, W, R, D, dtype=torch.float32)
        d_shared = x.new_empty(programs, W + (bias is not None), D, dtype=torch.float32)
        with torch.cuda.device_of(x):
            dynamic_taps_gradient_kernel[launch.grid(taps, T, B)](
                x, features, *tables, bias, age, dq.contiguous(), dk.contiguous(), dv.contiguous(),
                dy, d_features, d_up, d_shared, *strides, B, *launch.sizes, **launch.options, **taps,
            )  # fmt: skip
            dynamic_tokens_gradient_kernel[launch.grid(tokens, T, B)](
                features, *tables, age, dy, dx, *strides[2:], *launch.sizes, **launch.options, **tokens,
            )  # fmt: skip
        of_sections: Any
        if group:
            of_sections = (
                part.flatten(0, 1) for part in d_features.unflatten(0, (-1, group)).split([group - 2, 1, 1], 1)
            )
        else:
            heads = key_channels // key_head_dim
            of_sections = d_features.split([heads, heads, launch.blocks - 2 * heads])
        d_shared = d_shared.sum(0)
        return (
            dx,
            torch.cat([part.sum(0) for part in of_sections], -1).to(features.dtype),
            d_shared[:W].t().contiguous().to(weight.dtype),
            d_up.sum(0).permute(2, 0, 1).contiguous().to(up.dtype),
            None if bias is None else d_shared[W].to(bias.dtype),
            None, None, None, None,
        )  # fmt: skip


class _Launch(NamedTuple):
    """What the kernels of a call have in common."""

    blocks: int
    sizes: tuple[int, ...]
    options: dict[str, Any]
    tunings: Tunings

    @classmethod
    def of(cls, x: Tensor, up: Tensor, key_channels: int, key_head_dim: int, group: int) -> "_Launch":
        T, value_channels, (_, W, R) = x.shape[1], x.shape[2] - 2 * key_channels, up.shape
        BD = triton.next_power_of_2(key_head_dim)
        VD = key_head_dim if group else BD
        blocks = channel_blocks(key_channels, key_head_dim, value_channels, VD)
        RP, narrow = max(16, triton.next_power_of_2(R)), x.dtype == torch.bfloat16
        options = {
            "K": key_head_dim, "VD": VD, "GROUP": group, "W": W, "RP": RP, "BD": BD, **arithmetic_of(x.dtype),
        }  # fmt: skip
        tunings = TUNINGS_OF_HEADS if group else TUNINGS_128 if narrow and BD == 128 and RP == 16 else TUNINGS
        # Several stages of larger tiles exceed a Hopper SM's shared memory.
        stages = {"num_stages": 2 if narrow and BD <= 128 else 1}
        tunings = Tunings(*(stages | tuning for tuning in tunings))
        return cls(blocks, (T, R, key_channels, value_channels, blocks), options, tunings)

    def grid(self, tuning: dict[str, int], T: int, B: int) -> tuple[int]:
        return (self.blocks * triton.cdiv(T, tuning["BT"] * tuning["TILES"]) * B,)


def _tables(weight: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The taps that all tokens share, [W, D], and what features add, [W, R, D]."""
    return weight.t().contiguous(), up.permute(1, 2, 0).contiguous()


@triton.jit
def dynamic_forward_kernel(
    x, features, taps, up, bias, age, q, k, v, x_batch, x_token, z_batch, z_token, T, R, key_channels, value_channels,
    blocks, K: tl.constexpr, VD: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program per TILES tiles of BT tokens of a batch entry and block of channels.

    x: [B, T, D] with strides x_batch and x_token; features: [B, T, 3 R] with strides z_batch and z_token; taps: [W, D];
    up: [W, R, D]; bias: [D]; age: [T]; q, k: [B, T, key_channels]; v: [B, T, value_channels].
    """
    i_d, _, i_b, start = place(blocks, T, BT * TILES)
    D = 2 * key_channels + value_channels
    first, channels = channels_of_block(i_d, key_channels, value_channels, K, VD)
    of_keys, out, out_token = outputs_of_block(q, k, v, i_d, i_b, T, key_channels, value_channels, K, VD)
    x += i_b * x_batch + first
    features += i_b * z_batch + section_of_block(i_d, key_channels // K, GROUP) * R
    o_d, o_r = tl.arange(0, BD), tl.arange(0, RP)
    m_d, m_r = o_d < channels, o_r < R
    b_taps, b_up = load_tables(taps + first, up + first, D, R, o_d, m_d, o_r, m_r, W, CT)
    for i in range(tl.minimum(TILES, tl.cdiv(T - start, BT))):
        o_t, m_t, b_y = mixed_tokens(
            x, features, b_taps, b_up, bias, age, x_token, z_token, first, start + i * BT, T,
            o_d, m_d, o_r, m_r, W, BT, BD, CT, PRECISION,
        )[:3]  # fmt: skip
        store_tokens(out, out_token, o_t, m_t, o_d, m_d, activated(b_y, GROUP == 0, of_keys))


@triton.jit
def dynamic_taps_gradient_kernel(
    x, features, taps, up, bias, age, dq, dk, dv, dy, d_features, d_up, d_shared, x_batch, x_token, z_batch, z_token, B,
    T, R, key_channels, value_channels, blocks,
    K: tl.constexpr, VD: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program per TILES tiles of BT tokens of a batch entry and block of channels.

    The tensors of the forward; dy: [B, T, D], the gradient before the activation, of heads that of the output, which
    is dv; float32 sums: d_features [blocks, B, T, R] over a block's channels, d_up [programs, W, R, D] and d_shared
    [programs, W, D], or W + 1 with a bias, whose gradient comes last, over the tokens of the programs of a block.
    """
    i_d, i_bt, i_b, start = place(blocks, T, BT * TILES)
    first, channels = channels_of_block(i_d, key_channels, value_channels, K, VD)
    of_keys, d_out, out_token = outputs_of_block(dq, dk, dv, i_d, i_b, T, key_channels, value_channels, K, VD)
    x += i_b * x_batch + first
    features += i_b * z_batch + section_of_block(i_d, key_channels // K, GROUP) * R
    D = 2 * key_channels + value_channels
    dy += i_b * T * D + first
    d_features += (i_d.to(tl.int64) * B + i_b) * T * R
    d_up += i_bt.to(tl.int64) * W * R * D + first
    d_shared += i_bt.to(tl.int64) * (W if bias is None else W + 1) * D + first
    o_d, o_r, o_row = tl.arange(0, BD), tl.arange(0, RP), tl.arange(0, FEWEST_ROWS)
    m_d, m_r = o_d < channels, o_r < R
    b_taps, b_up = load_tables(taps + first, up + first, D, R, o_d, m_d, o_r, m_r, W, CT)
    b_d_shared = tl.zeros([FEWEST_ROWS, BD], tl.float32)
    b_d_up = ()
    for _ in tl.static_range(W):
        b_d_up += (tl.zeros([RP, BD], tl.float32),)
    for i in range(tl.minimum(TILES, tl.cdiv(T - start, BT))):
        o_t, m_t, b_y, b_x, b_z = mixed_tokens(
            x, features, b_taps, b_up, bias, age, x_token, z_token, first, start + i * BT, T,
            o_d, m_d, o_r, m_r, W, BT, BD, CT, PRECISION,
        )  # fmt: skip
        b_d_out = load_tokens(d_out, out_token, o_t, m_t, o_d, m_d).to(tl.float32)
        b_dy = activation_gradient(b_y, b_d_out, GROUP == 0, of_keys)
        if GROUP == 0:
            store_tokens(dy, D, o_t, m_t, o_d, m_d, b_dy)
        b_dz = tl.zeros([BT, RP], tl.float32)
        b_more_d_up = ()
        for j in tl.static_range(W):
            b_d_taps = (b_dy * b_x[j].to(tl.float32)).to(CT)
            b_dz += matmul(b_d_taps, tl.trans(b_up[j]), CT, PRECISION)
            b_more_d_up += (b_d_up[j] + matmul(tl.trans(b_z), b_d_taps, CT, PRECISION),)
            b_d_shared += matmul(sums_into_row(o_row, j, BT), b_d_taps, CT, PRECISION)
        if bias is not None:
            b_d_shared += matmul(sums_into_row(o_row, W, BT), b_dy, CT, PRECISION)
        b_d_up = b_more_d_up
        store_tokens(d_features, R, o_t, m_t, o_r, m_r, b_dz)
    for j in tl.static_range(W):
        store_tokens(d_up + j * R * D, D, o_r, m_r, o_d, m_d, b_d_up[j])
    store_tokens(d_shared, D, o_row, o_row < (W if bias is None else W + 1), o_d, m_d, b_d_shared)


@triton.jit
def dynamic_tokens_gradient_kernel(
    features, taps, up, age, dy, dx, z_batch, z_token, T, R, key_channels, value_channels, blocks,
    K: tl.constexpr, VD: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program per TILES tiles of BT tokens of a batch entry and block of channels; dy, dx: [B, T, D]."""
    i_d, _, i_b, start = place(blocks, T, BT * TILES)
    D = 2 * key_channels + value_channels
    first, channels = channels_of_block(i_d, key_channels, value_channels, K, VD)
    o_d, o_r = tl.arange(0, BD), tl.arange(0, RP)
    m_d, m_r = o_d < channels, o_r < R
    features += i_b * z_batch + section_of_block(i_d, key_channels // K, GROUP) * R
    dy += i_b * T * D + first
    dx += i_b * T * D + first
    b_taps, b_up = load_tables(taps + first, up + first, D, R, o_d, m_d, o_r, m_r, W, CT)
    for i in range(tl.minimum(TILES, tl.cdiv(T - start, BT))):
        o_t = start + i * BT + tl.arange(0, BT)
        b_mixing, b_dx = (), tl.zeros([BT, BD], tl.float32)
        for j in tl.static_range(W):
            o_later = o_t + (W - 1 - j)
            m_t = o_later < T
            m_t = m_t & (load_age(age, o_later, m_t) >= W - 1 - j)
            b_z = load_tokens(features, z_token, o_later, m_t, o_r, m_r)
            b_mixing += (spread(matmul(b_z, b_up[j], CT, PRECISION), CT),)
        for j in tl.static_range(W):
            o_later = o_t + (W - 1 - j)
            m_t = o_later < T
            m_t = m_t & (load_age(age, o_later, m_t) >= W - 1 - j)
            b_dy = load_tokens(dy, D, o_later, m_t, o_d, m_d).to(tl.float32)
            b_dx += (b_mixing[j] + b_taps[j]) * b_dy
            if j == W - 1:
                b_dx += b_dy
        store_tokens(dx, D, o_t, o_t < T, o_d, m_d, b_dx)


@triton.jit
def place(blocks, T, SPAN: tl.constexpr):
    """(block of channels, program of that block, batch entry, first token) of a program with SPAN tokens."""
    i_d, i_bt = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    spans = tl.cdiv(T, SPAN)
    return i_d, i_bt, (i_bt // spans).to(tl.int64), i_bt % spans * SPAN


@triton.jit
def channels_of_block(i_d, key_channels, value_channels, K: tl.constexpr, VD: tl.constexpr):
    """Of block i_d: (first channel, how many)."""
    heads = key_channels // K
    of_keys, i_v = i_d < 2 * heads, (i_d - 2 * heads) * VD
    first = tl.where(of_keys, i_d * K, 2 * key_channels + i_v)
    return first, tl.where(of_keys, K, tl.minimum(value_channels - i_v, VD))


@triton.jit
def outputs_of_block(q, k, v, i_d, i_b, T, key_channels, value_channels, K: tl.constexpr, VD: tl.constexpr):
    """Of block i_d: (whether it is a head of q or k, where its q, k or v of a batch entry begin, how far tokens lie
    apart there).
    """
    heads = key_channels // K
    of_keys = i_d < 2 * heads
    out_token = tl.where(of_keys, key_channels, value_channels)
    i_out = tl.where(of_keys, i_d % tl.maximum(heads, 1) * K, (i_d - 2 * heads) * VD)
    return of_keys, tl.where(of_keys, tl.where(i_d < heads, q, k), v) + i_b * T * out_token + i_out, out_token


@triton.jit
def section_of_block(i_d, heads, GROUP: tl.constexpr):
    """Whose channels block i_d has: of queries 0, of keys 1, of values 2."""
    return tl.minimum(i_d // heads, 2) if GROUP == 0 else tl.maximum(i_d % GROUP - (GROUP - 3), 0)


@triton.jit
def load_tables(taps, up, D, R, o_d, m_d, o_r, m_r, W: tl.constexpr, CT: tl.constexpr):
    """Tuples over the taps: what all tokens share, [1, BD] float32, and what features add, [RP, BD] in the dtype CT."""
    b_taps, b_up = (), ()
    for j in tl.static_range(W):
        b_taps += (load_channels(taps + j * D, o_d, m_d),)
        b_up += (load_tokens(up + j * R * D, D, o_r, m_r, o_d, m_d).to(CT),)
    return b_taps, b_up


@triton.jit
def mixed_tokens(
    x, features, b_taps, b_up, bias, age, x_token, z_token, first, start, T, o_d, m_d, o_r, m_r,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens from `start` on: (which, which of them are there, a tile of them before the activation, [BT, BD] float32,
    the tuple of what each tap meets, features).
    """
    o_t = start + tl.arange(0, BT)
    m_t = o_t < T
    b_age = load_age(age, o_t, m_t)
    b_z = load_tokens(features, z_token, o_t, m_t, o_r, m_r)
    b_mixing, b_x = (), ()
    for j in tl.static_range(W):
        b_mixing += (spread(matmul(b_z, b_up[j], CT, PRECISION), CT),)
    b_y = load_bias(bias, first, o_d, m_d, BT, BD)
    for j in tl.static_range(W):
        # the last tap's is the token itself
        m_x = m_t & (b_age >= W - 1 - j) if j < W - 1 else m_t
        b_x += (load_tokens(x, x_token, o_t - (W - 1) + j, m_x, o_d, m_d),)
        b_y += (b_mixing[j] + b_taps[j]) * b_x[j].to(tl.float32)
    b_y += b_x[W - 1].to(tl.float32)
    return o_t, m_t, b_y, b_x, b_z


@triton.jit
def sums_into_row(o_row, row: tl.constexpr, BT: tl.constexpr):
    """What a tile of BT tokens is multiplied by for their sum in one row, [rows, BT] float32."""
    return tl.zeros([o_row.shape[0], BT], tl.float32) + tl.where(o_row == row, 1.0, 0.0)[:, None]


@triton.jit
def spread(b_product, CT: tl.constexpr):
    """A product, rounded to the dtype CT, in float32; through a view, for which Triton moves it to the layout of loads
    instead of all loads, and what is summed along rows, to that of products.
    """
    rows: tl.constexpr = b_product.shape[0]
    columns: tl.constexpr = b_product.shape[1]
    b_pairs = tl.reshape(b_product, [rows, columns // 2, 2]).to(CT)
    return tl.reshape(b_pairs, [rows, columns]).to(tl.float32)
