"""The backward of dynamic_convolution, as two kernels in each of which a program takes runs of tokens of a block of
channels, with tiles in the layout of products throughout, see product_tiles.

- dynamic_token_gradient_kernel: what the forward computed once more, then the gradient of y, what taps make of x, and
  with it that of x, to which later tokens still add and which so moves along in registers.
- dynamic_tap_gradient_kernel: the gradient of a tap is the product of a token and that of y, which is an operand of the
  products for the gradients of features, a sum over channels, and of the table, a sum over tokens.
- dynamic_sum_kernel: the gradients of features, of which blocks of channels have a part each, and those of parameters,
  of which blocks of tokens have.

One kernel for all of it needs all registers that a multiprocessor has for a single program, whose warps then wait for
each other; the gradient of y in between is as many bytes as x.
"""
# mypy: disable-error-code="assignment, misc"
# Tuples that a kernel builds up change their type.

import triton
import triton.language as tl

from .dynamic_taps import (
    age_of_runs,
    channels_of_block,
    columns_of_groups,
    load_features,
    load_table,
    load_taps,
    mixed,
    outputs_of_block,
    part_of_block,
    place,
    store_features,
    within_reach,
)
from .product_tiles import (
    anew,
    columns_of_product_tile,
    identities,
    load_product_tile,
    packed,
    side_by_side,
    store_product_tile,
    sum_of_groups,
    turned,
    unpacked,
)
from .products import matmul
from .short_convolution import EPSILON, silu_gradient
from .special import fast_sigmoid


@triton.jit(do_not_specialize=["run"])
def dynamic_token_gradient_kernel(
    x, features, weight, up, bias, age, dq, dk, dv, dx, dy, x_batch, x_token, z_batch, z_token, T, R, run,
    key_channels, value_channels, blocks, K: tl.constexpr, VD: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr,
    RP: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, WHOLE: tl.constexpr,
    STEP: tl.constexpr, AHEAD: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per ROWS runs of `run` tokens of a batch entry and block of channels.

    The tensors of the forward; dx, dy: [B, T, D], the gradients of x and of y. Of attention's heads dy is what is
    given, and not written.

    Tuples hold a tile per tap j, which takes the token W - 1 - j before the present one: its x, what is known of its
    dx, the tap.
    """
    tl.static_assert(STEP == 1)  # two tokens at a time have no room in registers
    GROUPS: tl.constexpr = BD // P
    i_d, _, i_b, start = place(blocks, T, ROWS * run)
    D = 2 * key_channels + value_channels
    first, channels = channels_of_block(i_d, key_channels, value_channels, K, VD)
    # None: no bound
    last, width, features_width = None if WHOLE else T, None if WHOLE else channels, None if WHOLE else R
    of_keys, d_out, out_token = outputs_of_block(dq, dk, dv, i_d, i_b, T, key_channels, value_channels, K, VD)
    x += i_b * x_batch + first
    features += i_b * z_batch + part_of_block(i_d, key_channels // K, GROUP)[0] * R
    dx += i_b * T * D + first
    dy += i_b * T * D + first
    b_taps, b_bias = load_taps(weight, bias, first, channels, GROUPS, P, W)
    b_up = load_table(up, first, channels, R, GROUPS, P, RP, W, CT)
    b_zero = tl.zeros([GROUPS, ROWS, P], tl.float32)
    b_x, b_dx = (), ()
    for j in tl.static_range(W - 1):
        i_t = start - (W - 1) + j
        b_x += (packed(load_product_tile(x, x_token, i_t, T, run, channels, ROWS, GROUPS, P, True)),)
        b_dx += (b_zero,)
    # the last tokens of a run get parts of their dx from the first tokens of the next run
    for i in tl.range(run + W - 1, num_stages=AHEAD + 2):
        i_t = start + i
        b_age = age_of_runs(age, i_t, T, run, ROWS)
        b_x += (packed(load_product_tile(x, x_token, i_t, T, run, width, ROWS, GROUPS, P)),)
        b_z = load_features(features, z_token, i_t, T, run, features_width, ROWS, GROUPS, RP)
        b_d_out = load_product_tile(d_out, out_token, i_t, T, run, width, ROWS, GROUPS, P)
        b_d_out = unpacked(packed(b_d_out), tl.float32)
        b_x, b_mixing, b_y = mixed(b_x, b_z, b_taps, b_up, b_bias, age, b_age, W, CT, PRECISION)
        b_dy = activation_gradient(b_y, b_d_out, GROUP == 0, of_keys)
        # no token before the run's first is the program's, nor one after its last
        if GROUP == 0:
            store_product_tile(dy, D, i_t, last, run, width, b_dy, i < run)
        b_dx += (b_zero,)
        b_more_dx = ()
        for j in tl.static_range(W):
            b_more_dx += (b_dx[j] + within_reach(b_mixing[j] * b_dy, age, b_age[None, :, None], W - 1 - j),)
        store_product_tile(dx, D, i_t - (W - 1), last, run, width, b_more_dx[0], i >= W - 1)
        b_x, b_dx = anew(b_x[1:]), b_more_dx[1:]


@triton.jit(do_not_specialize=["run"])
def dynamic_tap_gradient_kernel(
    x, features, up, age, dy, d_features, d_parameters, x_batch, x_token, z_batch, z_token, B, T, R, run, key_channels,
    value_channels, blocks, BIAS: tl.constexpr, K: tl.constexpr, VD: tl.constexpr, GROUP: tl.constexpr,
    W: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, WHOLE: tl.constexpr,
    STEP: tl.constexpr, AHEAD: tl.constexpr, SUMS: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per ROWS runs of `run` tokens of a batch entry and block of channels.

    The tensors of dynamic_token_gradient_kernel; float32 sums: d_features [blocks of a section, B, T, 3 R] over a
    block's channels, d_parameters [programs of a block, D, W R + W], or one more with a BIAS, over a program's tokens:
    of the table, the taps that all tokens share, the bias.

    Tuples hold a tile per tap j, which takes the token W - 1 - j before the present one: its x, the same turned, the
    gradient of its table.
    """
    GROUPS: tl.constexpr = BD // P
    i_d, i_bt, i_b, start = place(blocks, T, ROWS * run)
    D = 2 * key_channels + value_channels
    first, channels = channels_of_block(i_d, key_channels, value_channels, K, VD)
    # None: no bound
    last, width, features_width = None if WHOLE else T, None if WHOLE else channels, None if WHOLE else R
    i_section, i_in_section = part_of_block(i_d, key_channels // K, GROUP)
    x += i_b * x_batch + first
    features += i_b * z_batch + i_section * R
    dy += i_b * T * D + first
    d_features += ((i_in_section.to(tl.int64) * B + i_b) * T * 3 + i_section) * R
    b_up = load_table(up, first, channels, R, GROUPS, P, RP, W, CT)
    b_identity, b_feature_identity = identities(BD, CT), identities(GROUPS * RP, CT)
    b_d_sums = tl.zeros([GROUPS, P, SUMS], tl.float32)
    b_x, b_turned_x, b_d_up, b_into_sum = (), (), (), ()
    for j in tl.static_range(W - 1):
        i_t = start - (W - 1) + j
        b_token = load_product_tile(x, x_token, i_t, T, run, channels, ROWS, GROUPS, P, True).to(CT)
        b_x += (packed(b_token),)
        b_turned_x += (packed(turned(b_token, b_identity, CT, PRECISION)),)
    for j in tl.static_range(W):
        b_d_up += (tl.zeros([GROUPS, P, RP], tl.float32),)
        b_into_sum += (ones_in_column(j, GROUPS, ROWS, SUMS, CT),)
    b_into_last_sum = ones_in_column(W, GROUPS, ROWS, SUMS, CT)
    for i in tl.range(0, run, STEP, num_stages=AHEAD + 2):
        b_dzs = ()
        for step in tl.static_range(STEP):
            i_t = start + i + step
            b_age = age_of_runs(age, i_t, T, run, ROWS)
            b_token = load_product_tile(x, x_token, i_t, last, run, width, ROWS, GROUPS, P).to(CT)
            b_dy = load_product_tile(dy, D, i_t, last, run, width, ROWS, GROUPS, P).to(CT)
            b_z = load_product_tile(
                features, z_token, i_t, last, run, features_width, ROWS, GROUPS, RP, SHARED=True
            )  # fmt: skip
            b_turned_z = tl.permute(turned(b_z.to(CT), b_feature_identity, CT, PRECISION), (0, 2, 1))
            b_x += (packed(b_token),)
            b_turned_x += (packed(turned(b_token, b_identity, CT, PRECISION)),)
            b_turned_dy = turned(b_dy, b_identity, CT, PRECISION)
            b_dz = tl.zeros([GROUPS, RP, ROWS], tl.float32)
            b_seen, b_turned_seen, b_more_d_up = (), (), ()
            for j in tl.static_range(W):
                b_seen += (within_reach(b_x[j], age, b_age[None, :, None], W - 1 - j),)
                b_d_tap = b_dy * unpacked(b_seen[j], CT)
                b_dz += matmul(b_up[j], tl.permute(b_d_tap, (0, 2, 1)), CT, PRECISION)
                # of a turned tile a pair is of two tokens
                b_turned_token = within_reach(unpacked(b_turned_x[j], CT), age, b_age[None, None, :], W - 1 - j)
                b_turned_seen += (packed(b_turned_token),)
                b_d_tap = b_turned_dy * b_turned_token
                b_more_d_up += (b_d_up[j] + matmul(b_d_tap, b_turned_z, CT, PRECISION),)
                b_d_sums += matmul(b_d_tap, b_into_sum[j], CT, PRECISION)
            if BIAS:
                b_d_sums += matmul(b_turned_dy, b_into_last_sum, CT, PRECISION)
            b_x, b_turned_x, b_d_up = b_seen[1:], b_turned_seen[1:], b_more_d_up
            b_dzs += (b_dz,)
        b_sum = sum_of_groups(side_by_side(b_dzs))
        store_features(d_features, 3 * R, start + i, last, run, features_width, b_sum, STEP)
        b_x, b_turned_x = anew(b_x), anew(b_turned_x)
    o_d, m_d = columns_of_groups(channels, GROUPS, P)
    o_r, o_sum = columns_of_product_tile(RP), tl.arange(0, SUMS)
    width = W * (R + 1) + 1 if BIAS else W * (R + 1)
    p_parameters = d_parameters + (i_bt.to(tl.int64) * D + first + o_d[:, :, None]) * width
    for j in tl.static_range(W):
        tl.store(p_parameters + j * R + o_r[None, None, :], b_d_up[j], mask=m_d[:, :, None] & (o_r < R)[None, None, :])
    m_sum = o_sum < width - W * R
    tl.store(p_parameters + W * R + o_sum[None, None, :], b_d_sums, mask=m_d[:, :, None] & m_sum[None, None, :])


@triton.jit
def dynamic_sum_kernel(
    d_features, out, blocks_of_channels, numbers, d_parameters, d_up, d_weight, d_bias, blocks_of_tokens, D,
    TABLE: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the first dimensions of what dynamic_tap_gradient_kernel writes: one program per BLOCK of the `numbers`
    of `out`, [B, T, 3 R], then one per BLOCK of the parameters' gradients, of which a channel has TABLE, W and one for
    its bias if there is any.
    """
    i_block = tl.program_id(0)
    blocks = tl.cdiv(numbers, BLOCK)
    if i_block < blocks:
        o_number = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_sum = sum_of_parts(d_features, o_number, blocks_of_channels, numbers)
        tl.store(out + o_number, b_sum.to(out.dtype.element_ty), mask=o_number < numbers)
    else:
        PARAMETERS: tl.constexpr = TABLE + W + (0 if d_bias is None else 1)
        o_number = (i_block - blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_sum = sum_of_parts(d_parameters, o_number, blocks_of_tokens, D * PARAMETERS)
        o_d, o_parameter = o_number // PARAMETERS, o_number % PARAMETERS
        o_tap = o_parameter - TABLE
        tl.store(d_up + o_d * TABLE + o_parameter, b_sum.to(d_up.dtype.element_ty), mask=(o_d < D) & (o_tap < 0))
        m_tap = (o_d < D) & (o_tap >= 0)
        tl.store(d_weight + o_d * W + o_tap, b_sum.to(d_weight.dtype.element_ty), mask=m_tap & (o_tap < W))
        if d_bias is not None:
            tl.store(d_bias + o_d, b_sum.to(d_bias.dtype.element_ty), mask=m_tap & (o_tap == W))


@triton.jit
def sum_of_parts(parts, o_number, count, numbers):
    """Of `count` parts of `numbers` numbers each, one after another."""
    parts += o_number
    b_sum = tl.zeros([o_number.shape[0]], tl.float32)
    for _ in tl.range(count, loop_unroll_factor=8):
        b_sum += tl.load(parts, mask=o_number < numbers, other=0.0)
        parts += numbers
    return b_sum


@triton.jit
def activation_gradient(b_y, b_d_out, ACT: tl.constexpr, norm):
    """The gradient of y, a tile, from that of SiLU, of the L2 norm of each token too if `norm`; without ACT b_d_out."""
    if ACT:
        b_sigmoid = fast_sigmoid(b_y)
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
