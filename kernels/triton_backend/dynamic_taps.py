"""What the kernels of dynamic_convolution and of its gradient have in common: where a program's tokens and channels
lie, and the taps of tokens.
"""
# mypy: disable-error-code="assignment, misc"
# Tuples that a kernel builds up change their type.

import triton
import triton.language as tl

from .product_tiles import columns_of_product_tile, unpacked, within
from .products import matmul
from .short_convolution import load_age


@triton.jit
def place(blocks, T, span):
    """(block of channels, program of that block, batch entry, first token) of a program with `span` tokens."""
    i_d, i_bt = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    spans = tl.cdiv(T, span)
    return i_d, i_bt, (i_bt // spans).to(tl.int64), i_bt % spans * span


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
def part_of_block(i_d, heads, GROUP: tl.constexpr):
    """Of block i_d: (whose channels it has, of queries 0, of keys 1, of values 2; which block of theirs it is)."""
    if GROUP == 0:
        i_section = tl.minimum(i_d // heads, 2)
        return i_section, i_d - i_section * heads
    else:  # noqa: RET505  # Triton compiles what follows a return
        i_group, i_head = i_d // GROUP, i_d % GROUP
        i_section = tl.maximum(i_head - (GROUP - 3), 0)
        return i_section, tl.where(i_section == 0, i_group * (GROUP - 2) + i_head, i_group)


@triton.jit
def columns_of_groups(channels, GROUPS: tl.constexpr, P: tl.constexpr):
    """(the channels of a block in the order of a tile's columns, which of them are there), [GROUPS, P]."""
    o_d = tl.arange(0, GROUPS)[:, None] * P + columns_of_product_tile(P)[None, :]
    return o_d, o_d < channels


@triton.jit
def load_taps(weight, bias, first, channels, GROUPS: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """Of `channels` channels from the first on: the taps that all tokens share, the token itself included, a tuple of
    [GROUPS, 1, P] float32; the bias, as a tap.
    """
    o_d, m_d = columns_of_groups(channels, GROUPS, P)
    o_d += first
    b_taps = ()
    for j in tl.static_range(W):
        b_tap = tl.load(weight + o_d * W + j, mask=m_d, other=0.0).to(tl.float32)[:, None, :]
        b_taps += (b_tap + 1.0 if j == W - 1 else b_tap,)
    b_bias = tl.zeros([GROUPS, 1, P], tl.float32)
    if bias is not None:
        b_bias += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)[:, None, :]
    return b_taps, b_bias


@triton.jit
def load_table(up, first, channels, R, GROUPS: tl.constexpr, P: tl.constexpr, RP: tl.constexpr, W: tl.constexpr,
               CT: tl.constexpr):  # fmt: skip
    """Of `channels` channels from the first on what features add to each tap, a tuple of [GROUPS, RP, P] in CT."""
    o_d, m_d = columns_of_groups(channels, GROUPS, P)
    o_r = tl.arange(0, RP)[None, :, None]
    b_up = ()
    for j in tl.static_range(W):
        p_up = up + ((o_d + first)[:, None, :] * W + j) * R + o_r
        b_up += (tl.load(p_up, mask=m_d[:, None, :] & (o_r < R), other=0.0).to(CT),)
    return b_up


@triton.jit
def load_features(features, z_token, first, last, run, R, ROWS: tl.constexpr, GROUPS: tl.constexpr, RP: tl.constexpr):
    """Features of token `first` of each run for every group, zero from token `last` and feature R on, of which None is
    beyond all; tensor cores take them as they are.
    """
    o_t, o_r = tl.arange(0, ROWS)[:, None] * run, tl.arange(0, RP)[None, :]
    p_z = features + first.to(tl.int64) * z_token + o_t.to(tl.int64) * z_token + o_r
    b_z = tl.load(p_z, mask=within(first + o_t, o_r, last, R), other=0.0)
    return tl.broadcast_to(b_z[None], [GROUPS, ROWS, RP])


@triton.jit
def store_features(features, z_token, first, last, run, R, b_z, STEP: tl.constexpr):
    """The same of STEP neighbouring tokens each, [STEP * ROWS, RP]."""
    o_row, o_r = tl.arange(0, b_z.shape[0])[:, None], tl.arange(0, b_z.shape[1])[None, :]
    o_t = o_row // STEP * run + o_row % STEP
    p_z = features + first.to(tl.int64) * z_token + (o_t.to(tl.int64) * z_token + o_r)
    tl.store(p_z, b_z, mask=within(first + o_t, o_r, last, R))


@triton.jit
def age_of_runs(age, i_t, T, run, ROWS: tl.constexpr):
    """Tokens of the same sequence before token i_t of each run, [ROWS]."""
    o_t = i_t + tl.arange(0, ROWS) * run
    return load_age(age, o_t, o_t < T)


@triton.jit
def mixed(b_x, b_z, b_taps, b_up, b_bias, age, b_age, W: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr):
    """(b_x without what lies in another sequence, the taps of tokens with features b_z, what they make of b_x)."""
    b_seen, b_mixing = (), ()
    b_y = tl.zeros([b_bias.shape[0], b_z.shape[1], b_bias.shape[2]], tl.float32) + b_bias
    for j in tl.static_range(W):
        b_seen += (within_reach(b_x[j], age, b_age[None, :, None], W - 1 - j),)
        b_mixing += (matmul(b_z, b_up[j], CT, PRECISION) + b_taps[j],)
        b_y += b_mixing[j] * unpacked(b_seen[j], tl.float32)
    return b_seen, b_mixing, b_y


@triton.jit
def within_reach(b_tile, age, b_age, back: tl.constexpr):
    """A tile, zero for tokens whose sequence begins less than `back` tokens before them; ages of the tile's shape."""
    if age is None or back == 0:
        # without packed sequences nothing was loaded from before the first token
        return b_tile
    return tl.where(b_age >= back, b_tile, 0)
