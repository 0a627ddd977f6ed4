"""Short convolution whose taps depend on the token, in Triton; SiLU and norms as in short_convolution.

The taps of a token are products of its features and a table, formed where they are used and never written. Blocks of
channels as in short_convolution; of attention's heads, GROUP of them a group of queries, every head is one, and there
is no activation.

Rows of a tile are runs of tokens, as in short_convolution's backward, and a loop takes one token of each run at a time:
tokens that taps see move along in registers. Tiles are in the layout of products throughout, see product_tiles.

- dynamic_forward_kernel: once over the tokens.
- dynamic_gradient: the kernels of the backward. What is left of their sums the host adds up, in one order.
"""
# mypy: disable-error-code="assignment, misc"
# Tuples that a kernel builds up change their type.

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dynamic_gradient import dynamic_sum_kernel, dynamic_tap_gradient_kernel, dynamic_token_gradient_kernel
from .dynamic_taps import (
    age_of_runs,
    channels_of_block,
    load_features,
    load_table,
    load_taps,
    mixed,
    outputs_of_block,
    part_of_block,
    place,
)
from .launching import launch
from .product_tiles import anew, load_product_tile, packed, store_product_tile
from .products import arithmetic_of
from .short_convolution import EPSILON, token_age
from .special import fast_sigmoid


class Tuning(NamedTuple):
    """How a kernel is launched.

    columns: of a group of a tile.
    warps: at most so many; those beyond the groups would do the same again.
    step: tokens of a run that a loop takes at a time, one or two; the sums across warps are of all of them.
    ahead: steps whose loads are in flight throughout, in shared memory; those of one more are begun at a step's end.
    """

    columns: int
    warps: int
    step: int
    ahead: int


FORWARD = Tuning(32, 8, 2, 2)
TOKEN_GRADIENT = Tuning(32, 8, 1, 2)
TAP_GRADIENT = Tuning(32, 8, 2, 2)
SUM_BLOCK = 512
# Rows of a tile: the fewest that a product has.
RUNS = tl.constexpr(16)
# Tokens of a run; beside them W - 1 are read before it, and computed once more after it.
LONGEST_RUN = 64
SHORTEST_RUN = 16
# Of four taps and 16 features, for which this was measured.
TABLE_ROWS = 64
NARROW = (tl.bfloat16,)
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
        age = token_age(cu_seqlens, T)
        dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
        dx = x.new_empty(B, T, D)
        # attention's heads are what taps make of x; float16 would lack the range of what a norm does to gradients
        dy = (
            dv
            if call.options["GROUP"]
            else x.new_empty(B, T, D, dtype=torch.float32 if x.dtype == torch.float16 else None)
        )
        # where a section has fewer blocks than another, nothing is written
        created = x.new_empty if len(set(call.sections)) == 1 else x.new_zeros
        d_features = created(max(call.sections), B, T, 3 * R, dtype=torch.float32)
        token_blocks = call.programs // call.blocks
        d_parameters = x.new_empty(token_blocks, D, W * (R + 1) + (bias is not None), dtype=torch.float32)
        strides = *x.stride()[:2], *features.stride()[:2]
        with torch.cuda.device_of(x):
            launch(
                dynamic_token_gradient_kernel, (call.programs,), x, features, weight, up, bias, age, dq, dk, dv, dx, dy,
                *strides, *call.sizes, **call.options, **call.tuned(TOKEN_GRADIENT),
            )  # fmt: skip
            launch(
                dynamic_tap_gradient_kernel, (call.programs,), x, features, up, age, dy, d_features, d_parameters,
                *strides, B, *call.sizes, **call.options, **call.tuned(TAP_GRADIENT), BIAS=bias is not None,
                SUMS=max(8, triton.next_power_of_2(W + (bias is not None))),
            )  # fmt: skip
            parts, d_features = d_features, features.new_empty(B, T, 3 * R)
            d_weight, d_up = torch.empty_like(weight), torch.empty_like(up)
            d_bias = None if bias is None else torch.empty_like(bias)
            blocks = [triton.cdiv(n, SUM_BLOCK) for n in (d_features.numel(), d_parameters[0].numel())]
            launch(
                dynamic_sum_kernel, (sum(blocks),),
                parts, d_features, parts.shape[0], d_features.numel(),
                d_parameters, d_up, d_weight, d_bias, token_blocks, D, TABLE=W * R, W=W, BLOCK=SUM_BLOCK,
            )  # fmt: skip
        return dx, d_features, d_weight, d_up, d_bias, None, None, None, None


class _Call(NamedTuple):
    """What the kernels of a call have in common.

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
        run = 2 * triton.cdiv(T, 2 * rows * spans)  # loops take up to two tokens at a time
        RP = max(16, triton.next_power_of_2(R))
        whole = rows * run * spans == T and key_head_dim == BD == VD and value_channels % BD == 0 and R == RP
        options = {
            "K": key_head_dim, "VD": VD, "GROUP": group, "W": W, "RP": RP, "BD": BD,
            "ROWS": rows, "WHOLE": whole, **arithmetic_of(x.dtype),
        }  # fmt: skip
        sizes = T, R, run, key_channels, value_channels, blocks
        return cls(blocks * triton.cdiv(T, rows * run) * B, sections, sizes, options)

    @property
    def blocks(self) -> int:
        return sum(self.sections)

    def tuned(self, tuning: Tuning) -> dict[str, int]:
        """Launch options of one kernel: fewer columns and tokens at a time where there are more or wider numbers."""
        large = self.options["W"] * self.options["RP"] > TABLE_ROWS or self.options["CT"] not in NARROW
        columns, step, ahead = (16, 1, 0) if large else (tuning.columns, tuning.step, tuning.ahead)
        warps = min(tuning.warps, self.options["BD"] // columns)
        # given no bound, the assembler at times leaves most registers unused and spills instead
        registers = min(255, REGISTERS // (32 * warps))
        options = {"P": columns, "STEP": step, "AHEAD": ahead, "num_warps": warps, "num_stages": 1}
        return {**options, "maxnreg": registers}


@triton.jit(do_not_specialize=["run"])
def dynamic_forward_kernel(
    x, features, weight, up, bias, age, q, k, v, x_batch, x_token, z_batch, z_token, T, R, run, key_channels,
    value_channels, blocks, K: tl.constexpr, VD: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, RP: tl.constexpr,
    BD: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, WHOLE: tl.constexpr, STEP: tl.constexpr,
    AHEAD: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per ROWS runs of `run` tokens of a batch entry and block of channels.

    x: [B, T, D] with strides x_batch and x_token; features: [B, T, 3 R] with strides z_batch and z_token; weight:
    [D, W]; up: [D, W, R]; bias: [D]; age: [T]; q, k: [B, T, key_channels]; v: [B, T, value_channels].
    """
    GROUPS: tl.constexpr = BD // P
    i_d, _, i_b, start = place(blocks, T, ROWS * run)
    first, channels = channels_of_block(i_d, key_channels, value_channels, K, VD)
    # None: no bound
    last, width, features_width = None if WHOLE else T, None if WHOLE else channels, None if WHOLE else R
    of_keys, out, out_token = outputs_of_block(q, k, v, i_d, i_b, T, key_channels, value_channels, K, VD)
    x += i_b * x_batch + first
    features += i_b * z_batch + part_of_block(i_d, key_channels // K, GROUP)[0] * R
    b_taps, b_bias = load_taps(weight, bias, first, channels, GROUPS, P, W)
    b_up = load_table(up, first, channels, R, GROUPS, P, RP, W, CT)
    b_x = ()
    for j in tl.static_range(W - 1):
        i_t = start - (W - 1) + j
        b_x += (packed(load_product_tile(x, x_token, i_t, T, run, channels, ROWS, GROUPS, P, True)),)
    for i in tl.range(0, run, STEP, num_stages=AHEAD + 2):
        b_outs = ()
        for step in tl.static_range(STEP):
            i_t = start + i + step
            b_age = age_of_runs(age, i_t, T, run, ROWS)
            b_x += (packed(load_product_tile(x, x_token, i_t, last, run, width, ROWS, GROUPS, P)),)
            b_z = load_features(features, z_token, i_t, last, run, features_width, ROWS, GROUPS, RP)
            b_x, _b_mixing, b_out = mixed(b_x, b_z, b_taps, b_up, b_bias, age, b_age, W, CT, PRECISION)
            b_outs += (b_out * fast_sigmoid(b_out) if GROUP == 0 else b_out,)
            b_x = b_x[1:]
        if GROUP == 0:
            b_outs = normed(b_outs, of_keys)
        for step in tl.static_range(STEP):
            store_product_tile(out, out_token, start + i + step, last, run, width, b_outs[step])
        b_x = anew(b_x)


@triton.jit
def normed(b_tiles, norm):
    """One or two tiles whose rows have the L2 norm 1, if `norm`; two with one sum across warps."""
    if len(b_tiles) == 1:
        b_inverse = tl.full([b_tiles[0].shape[1]], 1.0, tl.float32)
        if norm:
            b_inverse = tl.rsqrt(tl.sum(tl.sum(b_tiles[0] * b_tiles[0], 2), 0) + EPSILON)
        return (b_tiles[0] * b_inverse[None, :, None],)
    else:  # noqa: RET505  # Triton compiles what follows a return
        b_both = tl.join(b_tiles[0], b_tiles[1])
        b_inverse = tl.full([b_both.shape[1], 2], 1.0, tl.float32)
        if norm:
            b_inverse = tl.rsqrt(tl.sum(tl.sum(b_both * b_both, 2), 0) + EPSILON)
        return tl.split(b_both * b_inverse[None, :, None, :])
