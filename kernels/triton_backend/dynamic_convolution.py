"""Short convolution whose taps depend on the token, in Triton; SiLU and norms as in short_convolution.

The taps of a token are products of its features and a table, formed where they are used and never written. Blocks of
channels as in short_convolution; of attention's heads, GROUP of them a group of queries, every head is one, and there
is no activation.

Rows of a tile are runs of tokens, as in short_convolution's backward, and a loop takes one token of each run at a time:
tokens that taps see move along in registers. Tiles are in the layout of products throughout, see product_tiles.

- dynamic_forward_kernel: once over the tokens.
- dynamic_backward_kernel: the same once more, then the gradients: of a tap the product of a token and that of y, which
  are an operand of the products for those of features, a sum over channels, and of the table, a sum over tokens. The
  gradients of x that later tokens still add to move along in registers. The host adds up the sums in one order.
"""
# mypy: disable-error-code="assignment, misc"
# Tuples that a kernel builds up change their type.

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .product_tiles import (
    columns_of_product_tile,
    identities,
    load_product_tile,
    store_product_tile,
    sum_of_groups,
    turned,
)
from .products import arithmetic_of, matmul
from .short_convolution import EPSILON, load_age, sigmoid, silu_gradient, token_age


class Tuning(NamedTuple):
    """How a kernel is launched.

    columns: of a group of a tile.
    warps: at most so many; those beyond the groups would do the same again.
    ahead: tokens of a run whose loads are in flight. The loop is unrolled as many times, so that each has registers of
        its own: moving a value along would wait for its load.
    options: further ones of Triton's.
    """

    columns: int
    warps: int
    ahead: int
    options: dict[str, int]


FORWARD = Tuning(32, 8, 2, {})
# With more columns a thread's sums for the table would take more registers than it has.
BACKWARD = Tuning(16, 16, 1, {})
# Rows of a tile: the fewest that a product has.
RUNS = tl.constexpr(16)
# Tokens of a run; beside them W - 1 are read before it, and computed once more after it.
LONGEST_RUN = 64
SHORTEST_RUN = 16
# Of four taps and 16 features, for which this was measured.
TABLE_ROWS = 64
# Of an SM.
REGISTERS = 65536
# Enough for every multiprocessor of a large GPU.
PROGRAMS = 264


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
        weight, up = weight.contiguous(), up.contiguous()
        q, k = (x.new_empty(B, T, key_channels) for _ in range(2))
        v = x.new_empty(B, T, value_channels)
        call = _Call.of(x, up, key_channels, key_head_dim, group)
        with torch.cuda.device_of(x):
            launch(
                dynamic_forward_kernel, (call.programs,), x, features, weight, up, bias, token_age(cu_seqlens, T),
                q, k, v, *x.stride()[:2], *features.stride()[:2], *call.sizes, **call.options, **call.tuned(FORWARD),
            )  # fmt: skip
        ctx.sizes = key_channels, key_head_dim, group
        ctx.save_for_backward(x, features, weight, up, bias, cu_seqlens)
        return q, k, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, features, weight, up, bias, cu_seqlens = ctx.saved_tensors
        (B, T, D), (_, W, R) = x.shape, up.shape
        call = _Call.of(x, up, *ctx.sizes)
        dx = x.new_empty(B, T, D)
        # where a section has fewer blocks than another, nothing is written
        created = x.new_empty if len(set(call.sections)) == 1 else x.new_zeros
        d_features = created(max(call.sections), B, T, 3 * R, dtype=torch.float32)
        token_blocks = call.programs // call.blocks
        d_parameters = x.new_empty(token_blocks, D, W * (R + 1) + (bias is not None), dtype=torch.float32)
        with torch.cuda.device_of(x):
            launch(
                dynamic_backward_kernel, (call.programs,), x, features, weight, up, bias, token_age(cu_seqlens, T),
                dq.contiguous(), dk.contiguous(), dv.contiguous(), dx, d_features, d_parameters,
                *x.stride()[:2], *features.stride()[:2], B, *call.sizes, **call.options, **call.tuned(BACKWARD),
                SUMS=max(8, triton.next_power_of_2(W + (bias is not None))),
            )  # fmt: skip
        d_up, d_weight, d_bias = d_parameters.sum(0).split([W * R, W, int(bias is not None)], 1)
        return (
            dx,
            d_features.sum(0).to(features.dtype),
            d_weight.to(weight.dtype),
            d_up.unflatten(1, (W, R)).to(up.dtype),
            None if bias is None else d_bias.flatten().to(bias.dtype),
            None, None, None, None,
        )  # fmt: skip


class _Call(NamedTuple):
    """What both kernels of a call have in common.

    sections: blocks of channels of queries, of keys, of values.
    """

    programs: int
    sections: tuple[int, int, int]
    sizes: tuple[int, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, x: Tensor, up: Tensor, key_channels: int, key_head_dim: int, group: int) -> "_Call":
        B, T, value_channels, (D, W, R) = *x.shape[:2], x.shape[2] - 2 * key_channels, up.shape
        BD = max(32, triton.next_power_of_2(key_head_dim))
        if group:
            VD, groups = key_head_dim, D // (key_head_dim * group)
            sections = groups * (group - 2), groups, groups
        else:
            VD, heads = BD, key_channels // key_head_dim
            sections = heads, heads, triton.cdiv(value_channels, BD)
        blocks = sum(sections)
        rows = RUNS.value
        spans = max(
            triton.cdiv(T, rows * LONGEST_RUN),
            min(triton.cdiv(T, rows * SHORTEST_RUN), triton.cdiv(PROGRAMS, blocks * B)),
        )
        run = triton.cdiv(T, rows * spans)
        options = {
            "K": key_head_dim, "VD": VD, "GROUP": group, "W": W, "RP": max(16, triton.next_power_of_2(R)), "BD": BD,
            "ROWS": rows, **arithmetic_of(x.dtype),
        }  # fmt: skip
        sizes = T, R, run, key_channels, value_channels, blocks
        return cls(blocks * triton.cdiv(T, rows * run) * B, sections, sizes, options)

    @property
    def blocks(self) -> int:
        return sum(self.sections)

    def tuned(self, tuning: Tuning) -> dict[str, int]:
        """Launch options of one kernel: fewer columns and tokens in flight where there are more or wider numbers."""
        large = self.options["W"] * self.options["RP"] > TABLE_ROWS or self.options["CT"] != tl.bfloat16
        columns, ahead = (16, 1) if large else (tuning.columns, tuning.ahead)
        warps = min(tuning.warps, self.options["BD"] // columns)
        # given no bound, the assembler at times leaves most registers unused and spills instead
        registers = min(255, REGISTERS // (32 * warps))
        options = {"P": columns, "AHEAD": ahead, "num_warps": warps, "num_stages": 1, "maxnreg": registers}
        return options | tuning.options


@triton.jit(do_not_specialize=["run"])
def dynamic_forward_kernel(
    x, features, weight, up, bias, age, q, k, v, x_batch, x_token, z_batch, z_token, T, R, run, key_channels,
    value_channels, blocks, K: tl.constexpr, VD: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, RP: tl.constexpr,
    BD: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, AHEAD: tl.constexpr, CT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per ROWS runs of `run` tokens of a batch entry and block of channels.

    x: [B, T, D] with strides x_batch and x_token; features: [B, T, 3 R] with strides z_batch and z_token; weight:
    [D, W]; up: [D, W, R]; bias: [D]; age: [T]; q, k: [B, T, key_channels]; v: [B, T, value_channels].
    """
    GROUPS: tl.constexpr = BD // P
    i_d, _, i_b, start = place(blocks, T, ROWS * run)
    first, channels = channels_of_block(i_d, key_channels, value_channels, K, VD)
    of_keys, out, out_token = outputs_of_block(q, k, v, i_d, i_b, T, key_channels, value_channels, K, VD)
    x += i_b * x_batch + first
    features += i_b * z_batch + part_of_block(i_d, key_channels // K, GROUP)[0] * R
    b_taps, b_up, b_bias = load_tables(weight, up, bias, first, channels, R, GROUPS, P, RP, W, CT)
    b_x, b_next_x, b_next_z = (), (), ()
    for j in tl.static_range(W - 1):
        b_token = load_product_tile(x, x_token, start - (W - 1) + j, T, run, channels, ROWS, GROUPS, P)
        b_x += (b_token.to(tl.float32),)
    for j in tl.static_range(AHEAD):
        b_next_x += (load_product_tile(x, x_token, start + j, T, run, channels, ROWS, GROUPS, P),)
        b_next_z += (load_product_tile(features, z_token, start + j, T, run, R, ROWS, GROUPS, RP, True),)
    for i in tl.range(run, loop_unroll_factor=AHEAD):
        i_t = start + i
        b_age = age_of_runs(age, i_t, T, run, ROWS)
        b_x += (b_next_x[0].to(tl.float32),)
        b_x, _b_mixing, b_out = mixed(b_x, b_next_z[0], b_taps, b_up, b_bias, age, b_age, W, CT, PRECISION)
        i_next = i_t + AHEAD
        b_next_x += (load_product_tile(x, x_token, i_next, T, run, channels, ROWS, GROUPS, P),)
        b_next_z += (load_product_tile(features, z_token, i_next, T, run, R, ROWS, GROUPS, RP, True),)
        if GROUP == 0:
            b_out *= sigmoid(b_out)
            b_inverse = tl.full([ROWS], 1.0, tl.float32)
            if of_keys:
                b_inverse = tl.rsqrt(tl.sum(tl.sum(b_out * b_out, 2), 0) + EPSILON)
            b_out *= b_inverse[None, :, None]
        store_product_tile(out, out_token, i_t, T, run, channels, b_out)
        b_x, b_next_x, b_next_z = b_x[1:], b_next_x[1:], b_next_z[1:]


@triton.jit(do_not_specialize=["run"])
def dynamic_backward_kernel(
    x, features, weight, up, bias, age, dq, dk, dv, dx, d_features, d_parameters, x_batch, x_token, z_batch, z_token, B,
    T, R, run, key_channels, value_channels, blocks,
    K: tl.constexpr, VD: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr, P: tl.constexpr, AHEAD: tl.constexpr, SUMS: tl.constexpr, CT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per ROWS runs of `run` tokens of a batch entry and block of channels.

    The tensors of the forward; dx: [B, T, D]; float32 sums: d_features [blocks of a section, B, T, 3 R] over a block's
    channels, d_parameters [programs of a block, D, W R + W], or one more with a bias, over a program's tokens: of the
    table, the taps that all tokens share, the bias.

    Tuples hold a tile per tap j, which takes the token W - 1 - j before the present one: its x, what is known of its
    dx, the tap, the gradient of its table.
    """
    GROUPS: tl.constexpr = BD // P
    i_d, i_bt, i_b, start = place(blocks, T, ROWS * run)
    D = 2 * key_channels + value_channels
    first, channels = channels_of_block(i_d, key_channels, value_channels, K, VD)
    of_keys, d_out, out_token = outputs_of_block(dq, dk, dv, i_d, i_b, T, key_channels, value_channels, K, VD)
    i_section, i_in_section = part_of_block(i_d, key_channels // K, GROUP)
    x += i_b * x_batch + first
    features += i_b * z_batch + i_section * R
    dx += i_b * T * D + first
    d_features += ((i_in_section.to(tl.int64) * B + i_b) * T * 3 + i_section) * R
    b_taps, b_up, b_bias = load_tables(weight, up, bias, first, channels, R, GROUPS, P, RP, W, CT)
    b_column_identity, b_feature_identity = identities(GROUPS, P, CT), identities(GROUPS, RP, CT)
    b_zero = tl.zeros([GROUPS, ROWS, P], tl.float32)
    b_d_sums = tl.zeros([GROUPS, P, SUMS], tl.float32)
    b_x, b_dx, b_d_up, b_into_sum = (), (), (), ()
    b_next_x, b_next_z, b_next_d_out = (), (), ()
    for j in tl.static_range(W - 1):
        b_token = load_product_tile(x, x_token, start - (W - 1) + j, T, run, channels, ROWS, GROUPS, P)
        b_x += (b_token.to(tl.float32),)
        b_dx += (b_zero,)
    for j in tl.static_range(AHEAD):
        b_next_x += (load_product_tile(x, x_token, start + j, T, run, channels, ROWS, GROUPS, P),)
        b_next_z += (load_product_tile(features, z_token, start + j, T, run, R, ROWS, GROUPS, RP, True),)
        b_next_d_out += (load_product_tile(d_out, out_token, start + j, T, run, channels, ROWS, GROUPS, P),)
    for j in tl.static_range(W):
        b_d_up += (tl.zeros([GROUPS, P, RP], tl.float32),)
        b_into_sum += (ones_in_column(j, GROUPS, ROWS, SUMS, CT),)
    b_into_last_sum = ones_in_column(W, GROUPS, ROWS, SUMS, CT)
    # the last tokens of a run get parts of their dx from the first tokens of the next run
    for i in tl.range(run + W - 1, loop_unroll_factor=AHEAD):
        i_t = start + i
        b_age = age_of_runs(age, i_t, T, run, ROWS)
        b_x += (b_next_x[0].to(tl.float32),)
        b_z, b_d_out = b_next_z[0], b_next_d_out[0].to(tl.float32)
        i_next = i_t + AHEAD
        b_next_x += (load_product_tile(x, x_token, i_next, T, run, channels, ROWS, GROUPS, P),)
        b_next_z += (load_product_tile(features, z_token, i_next, T, run, R, ROWS, GROUPS, RP, True),)
        b_next_d_out += (load_product_tile(d_out, out_token, i_next, T, run, channels, ROWS, GROUPS, P),)
        b_x, b_mixing, b_y = mixed(b_x, b_z, b_taps, b_up, b_bias, age, b_age, W, CT, PRECISION)
        b_dy = activation_gradient(b_y, b_d_out, GROUP == 0, of_keys)
        b_dx += (b_zero,)
        b_more_dx = ()
        for j in tl.static_range(W):
            b_more_dx += (b_dx[j] + within_reach(b_mixing[j] * b_dy, age, b_age, W - 1 - j),)
        # no token before the run's first is the program's
        last = tl.where(i >= W - 1, T, 0)
        store_product_tile(dx, D, i_t - (W - 1), last, run, channels, b_more_dx[0])
        if i < run:
            b_dy_operand = b_dy.to(CT)
            b_turned_z = tl.permute(turned(b_z.to(CT), b_feature_identity, CT, PRECISION), (0, 2, 1))
            b_dz = tl.zeros([GROUPS, RP, ROWS], tl.float32)
            b_more_d_up = ()
            for j in tl.static_range(W):
                b_d_tap = b_dy_operand * b_x[j].to(CT)
                b_dz += matmul(b_up[j], tl.permute(b_d_tap, (0, 2, 1)), CT, PRECISION)
                b_d_tap = turned(b_d_tap, b_column_identity, CT, PRECISION)
                b_more_d_up += (b_d_up[j] + matmul(b_d_tap, b_turned_z, CT, PRECISION),)
                b_d_sums += matmul(b_d_tap, b_into_sum[j], CT, PRECISION)
            if bias is not None:
                b_dy_operand = turned(b_dy_operand, b_column_identity, CT, PRECISION)
                b_d_sums += matmul(b_dy_operand, b_into_last_sum, CT, PRECISION)
            b_d_up = b_more_d_up
            store_product_tile(d_features, 3 * R, i_t, T, run, R, sum_of_groups(b_dz)[None])
        b_x, b_dx = b_x[1:], b_more_dx[1:]
        b_next_x, b_next_z, b_next_d_out = b_next_x[1:], b_next_z[1:], b_next_d_out[1:]
    o_d, m_d = columns_of_groups(channels, GROUPS, P)
    o_r, o_sum = columns_of_product_tile(RP), tl.arange(0, SUMS)
    width = W * (R + 1) if bias is None else W * (R + 1) + 1
    p_parameters = d_parameters + (i_bt.to(tl.int64) * D + first + o_d[:, :, None]) * width
    for j in tl.static_range(W):
        tl.store(p_parameters + j * R + o_r[None, None, :], b_d_up[j], mask=m_d[:, :, None] & (o_r < R)[None, None, :])
    m_sum = o_sum < width - W * R
    tl.store(p_parameters + W * R + o_sum[None, None, :], b_d_sums, mask=m_d[:, :, None] & m_sum[None, None, :])


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
def load_tables(weight, up, bias, first, channels, R, GROUPS: tl.constexpr, P: tl.constexpr, RP: tl.constexpr,
                W: tl.constexpr, CT: tl.constexpr):  # fmt: skip
    """Of `channels` channels from the first on: tuples over the taps of what all tokens share, the token itself
    included, [GROUPS, 1, P] float32, and of what features add, [GROUPS, RP, P] in the dtype CT; the bias, as the taps.
    """
    o_d, m_d = columns_of_groups(channels, GROUPS, P)
    o_d += first
    o_r = columns_of_product_tile(RP)[None, :, None]
    b_taps, b_up = (), ()
    for j in tl.static_range(W):
        b_tap = tl.load(weight + o_d * W + j, mask=m_d, other=0.0).to(tl.float32)[:, None, :]
        b_taps += (b_tap + 1.0 if j == W - 1 else b_tap,)
        p_up = up + (o_d[:, None, :] * W + j) * R + o_r
        b_up += (tl.load(p_up, mask=m_d[:, None, :] & (o_r < R), other=0.0).to(CT),)
    b_bias = tl.zeros([GROUPS, 1, P], tl.float32)
    if bias is not None:
        b_bias += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)[:, None, :]
    return b_taps, b_up, b_bias


@triton.jit
def age_of_runs(age, i_t, T, run, ROWS: tl.constexpr):
    """Tokens of the same sequence before token i_t of each run, [ROWS]."""
    o_t = i_t + tl.arange(0, ROWS) * run
    return load_age(age, o_t, o_t < T)


@triton.jit
def mixed(b_x, b_z, b_taps, b_up, b_bias, age, b_age, W: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr):
    """(b_x without what lies in another sequence, the taps of tokens with features b_z, what they make of b_x)."""
    b_seen, b_mixing = (), ()
    b_y = tl.zeros_like(b_x[0]) + b_bias
    for j in tl.static_range(W):
        b_seen += (within_reach(b_x[j], age, b_age, W - 1 - j),)
        b_mixing += (matmul(b_z, b_up[j], CT, PRECISION) + b_taps[j],)
        b_y += b_mixing[j] * b_seen[j]
    return b_seen, b_mixing, b_y


@triton.jit
def within_reach(b_tile, age, b_age, back: tl.constexpr):
    """A tile, zero for tokens whose sequence begins less than `back` tokens before them."""
    if age is None or back == 0:
        # without packed sequences nothing was loaded from before the first token
        return b_tile
    return tl.where((b_age >= back)[None, :, None], b_tile, 0.0)


@triton.jit
def activation_gradient(b_y, b_d_out, ACT: tl.constexpr, norm):
    """The gradient of y, a tile, from that of SiLU, of the L2 norm of each token too if `norm`; without ACT b_d_out."""
    if ACT:
        b_sigmoid = sigmoid(b_y)
        b_a = b_y * b_sigmoid
        b_inverse = tl.full([b_y.shape[1]], 1.0, tl.float32)
        b_along = tl.zeros([b_y.shape[1]], tl.float32)
        if norm:
            b_squares, b_products = tl.split(tl.sum(tl.sum(tl.join(b_a * b_a, b_a * b_d_out), 2), 0))
            b_inverse = tl.rsqrt(b_squares + EPSILON)
            b_along = b_products * b_inverse * b_inverse
        b_da = (b_d_out - b_a * b_along[None, :, None]) * b_inverse[None, :, None]
        b_d_out = silu_gradient(b_a, b_sigmoid, b_da)
    return b_d_out


@triton.jit
def ones_in_column(column: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, SUMS: tl.constexpr,
                   CT: tl.constexpr):  # fmt: skip
    """What a tile's rows are multiplied by for their sum in one column, [GROUPS, ROWS, SUMS]."""
    b_one = tl.where(tl.arange(0, SUMS) == column, 1.0, 0.0)[None, None, :]
    return tl.broadcast_to(b_one, [GROUPS, ROWS, SUMS]).to(CT)
