"""Short convolution, SiLU and the norm of queries and keys in Triton, as one pass over the tokens in each direction.

Without activation, as attention takes it, the convolution alone, of channels that are all treated as those of v.

Channels go in blocks: one head of q or k, or as many channels of v. A block needs nothing of its neighbours, so only
tokens are read more than once, and those of other programs come from a cache.

- token_age_kernel: how far each token of packed sequences is into its own; a tap reaches no further back.
- forward_kernel: rows of a tile are runs of tokens, and a loop takes one token of each run at a time. The tokens that
  the taps see move along in registers.
- backward_kernel: the same once more, with the gradients of x that later tokens still add to, which move along in
  registers too: what the forward computed is needed by W tokens, without a trip to memory in between.
"""
# mypy: disable-error-code="assignment, misc"
# Tuples that a kernel builds up change their type.

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch_backend.elementwise import L2_EPSILON
from .launching import launch
from .special import LOG2_E

EPSILON = tl.constexpr(L2_EPSILON)
AGE_BLOCK = 256


class Launch(NamedTuple):
    """How a kernel is launched.

    numbers: of a tile, a token of each of its runs. The backward's loop carries 3 * W such tiles, the forward's W.
    run: tokens of a run; W - 1 before it, and backward as many after it, are read and computed besides.
    ahead: tokens of a run whose loads are in flight. The loop is unrolled as many times, so that each has registers of
        its own: moving a value along would wait for its load.
    """

    numbers: int
    run: int
    ahead: int
    options: dict[str, int]


FORWARD = Launch(1024, 16, 4, {"num_warps": 4})
# Measured with blocks of 128 channels in bfloat16; other blocks take what was there before.
BACKWARD_128 = Launch(512, 64, 4, {"num_warps": 4, "maxnreg": 128})
BACKWARD = Launch(1024, 64, 2, {"num_warps": 8})


class ConvolveQKV(torch.autograd.Function):
    """x, weight, bias, cu_seqlens, then the sizes -> q, k, v; key_channels is 0 if it does not activate."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, key_channels: int,
        key_head_dim: int, activate: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        B, T, D = x.shape
        value_channels = D - 2 * key_channels
        q, k = (x.new_empty(B, T, key_channels) for _ in range(2))
        v = x.new_empty(B, T, value_channels)
        BD = triton.next_power_of_2(key_head_dim)
        BT = FORWARD.numbers // BD
        blocks = channel_blocks(key_channels, key_head_dim, value_channels, BD)
        with torch.cuda.device_of(x):
            launch(
                forward_kernel, (blocks * triton.cdiv(T, BT * FORWARD.run) * B,),
                x, weight.t().contiguous(), bias, token_age(cu_seqlens, T), q, k, v,
                x.stride(0), x.stride(1), T, key_channels, value_channels, blocks,
                K=key_head_dim, W=weight.shape[1], RUN=FORWARD.run, AHEAD=FORWARD.ahead, BT=BT, BD=BD, ACT=activate,
                **FORWARD.options,
            )  # fmt: skip
        ctx.sizes = key_channels, key_head_dim, activate
        ctx.save_for_backward(x, weight, bias, cu_seqlens)
        return q, k, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, cu_seqlens = ctx.saved_tensors
        key_channels, key_head_dim, activate = ctx.sizes
        (B, T, D), W = x.shape, weight.shape[1]
        value_channels = D - 2 * key_channels
        BD = triton.next_power_of_2(key_head_dim)
        tuned = BACKWARD_128 if x.dtype == torch.bfloat16 and BD == 128 else BACKWARD
        BT = tuned.numbers // BD
        blocks = channel_blocks(key_channels, key_head_dim, value_channels, BD)
        token_blocks = triton.cdiv(T, BT * tuned.run) * B
        dx = x.new_empty(B, T, D)
        d_parameters = x.new_empty(token_blocks, W + (bias is not None), D, dtype=torch.float32)
        with torch.cuda.device_of(x):
            launch(
                backward_kernel, (blocks * token_blocks,),
                x, weight.t().contiguous(), bias, token_age(cu_seqlens, T),
                dq.contiguous(), dk.contiguous(), dv.contiguous(), dx, d_parameters,
                x.stride(0), x.stride(1), T, key_channels, value_channels, blocks,
                K=key_head_dim, W=W, RUN=tuned.run, AHEAD=tuned.ahead, BT=BT, BD=BD, ACT=activate, **tuned.options,
            )  # fmt: skip
        d_parameters = d_parameters.sum(0)
        d_weight = d_parameters[:W].t().contiguous().to(weight.dtype)
        d_bias = None if bias is None else d_parameters[W].to(bias.dtype)
        return dx, d_weight, d_bias, None, None, None, None


def token_age(cu_seqlens: Tensor | None, T: int) -> Tensor | None:
    """How many tokens of its own sequence come before each token, [T] int32; None without packed sequences.

    Boundaries are not read on the host; where they fall or leave [0, T], ages stay within [0, t].
    """
    if cu_seqlens is None:
        return None
    age = cu_seqlens.new_empty(T, dtype=torch.int32)
    N = cu_seqlens.shape[0] - 1
    with torch.cuda.device_of(age):
        launch(
            token_age_kernel, (triton.cdiv(T, AGE_BLOCK),),
            cu_seqlens.contiguous(), age, T, N, N.bit_length(), BLOCK=AGE_BLOCK,
        )  # fmt: skip
    return age


def channel_blocks(key_channels: int, key_head_dim: int, value_channels: int, BD: int) -> int:
    """Blocks of at most BD channels: the heads of q, those of k, then v."""
    return 2 * key_channels // key_head_dim + triton.cdiv(value_channels, BD)


@triton.jit
def token_age_kernel(cu_seqlens, age, T, N, steps, BLOCK: tl.constexpr):
    """One program per block of tokens; halves the range of sequences that a token can be in `steps` times."""
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + N
    for _ in range(steps):
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens + middle) <= o_t
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle)
    start = tl.load(cu_seqlens + low).to(tl.int32)
    tl.store(age + o_t, o_t - tl.minimum(tl.maximum(start, 0), o_t), mask=o_t < T)


@triton.jit
def forward_kernel(
    x, taps, bias, age, q, k, v, x_batch, x_token, T, key_channels, value_channels, blocks,
    K: tl.constexpr, W: tl.constexpr, RUN: tl.constexpr, AHEAD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """One program per BT runs of RUN tokens of a batch entry and block of channels.

    x: [B, T, D] with strides x_batch and x_token; taps: [W, D]; bias: [D]; age: [T]; q, k: [B, T, key_channels];
    v: [B, T, value_channels]. Neighbouring programs take neighbouring channels.
    """
    i_d, i_bt = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    token_blocks = tl.cdiv(T, BT * RUN)
    i_b, i_t = (i_bt // token_blocks).to(tl.int64), i_bt % token_blocks
    x += i_b * x_batch
    D = 2 * key_channels + value_channels
    heads = key_channels // K
    o_run = (i_t * BT + tl.arange(0, BT)) * RUN
    if i_d < 2 * heads:
        out = tl.where(i_d < heads, q, k) + i_b * T * key_channels + i_d % heads * K
        convolve(
            x, taps, bias, age, out, x_token, D, key_channels, T, i_d * K, K, o_run,
            W, RUN, AHEAD, BT, BD, ACT, True,
        )  # fmt: skip
    else:
        i_v = (i_d - 2 * heads) * BD
        out = v + i_b * T * value_channels + i_v
        convolve(
            x, taps, bias, age, out, x_token, D, value_channels, T, 2 * key_channels + i_v, value_channels - i_v, o_run,
            W, RUN, AHEAD, BT, BD, ACT, False,
        )  # fmt: skip


@triton.jit
def convolve(
    x, taps, bias, age, out, x_token, D, out_token, T, first, channels, o_run,
    W: tl.constexpr, RUN: tl.constexpr, AHEAD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ACT: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Channels `first` to `first + channels` of the RUN tokens from each of o_run on, written to `out`, whose tokens
    lie out_token apart."""
    o_d = tl.arange(0, BD)
    m_d = o_d < channels
    b_bias = load_bias(bias, first, o_d, m_d, BT, BD)
    b_taps, b_x, b_next_x = (), (), ()
    for j in tl.static_range(W):
        b_taps += (load_channels(taps + j * D + first, o_d, m_d),)
    for j in tl.static_range(W - 1):
        o_t = o_run - (W - 1) + j
        b_x += (load_tokens(x + first, x_token, o_t, (o_t >= 0) & (o_t < T), o_d, m_d).to(tl.float32),)
    for j in tl.static_range(AHEAD):
        b_next_x += (load_tokens(x + first, x_token, o_run + j, o_run + j < T, o_d, m_d),)
    for i in tl.range(RUN, loop_unroll_factor=AHEAD):
        o_t = o_run + i
        b_age = load_age(age, o_t, o_t < T)
        b_next_x += (load_tokens(x + first, x_token, o_t + AHEAD, o_t + AHEAD < T, o_d, m_d),)
        b_x += (b_next_x[0].to(tl.float32),)
        b_y = b_bias
        for j in tl.static_range(W):
            b_y += b_taps[j] * within_reach(b_x[j], age, b_age, W - 1 - j)
        store_tokens(out, out_token, o_t, o_t < T, o_d, m_d, activated(b_y, ACT, NORM))
        b_x, b_next_x = b_x[1:], b_next_x[1:]


@triton.jit
def backward_kernel(
    x, taps, bias, age, dq, dk, dv, dx, d_parameters, x_batch, x_token, T, key_channels, value_channels, blocks,
    K: tl.constexpr, W: tl.constexpr, RUN: tl.constexpr, AHEAD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """One program per BT runs of RUN tokens of a batch entry and block of channels.

    The tensors of the forward; dx: [B, T, D]; d_parameters: the sums of each program over its tokens, float32,
    [B * blocks of tokens, W, D], or W + 1 with a bias, whose gradient comes last.
    """
    i_d, i_bt = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    token_blocks = tl.cdiv(T, BT * RUN)
    i_b, i_t = (i_bt // token_blocks).to(tl.int64), i_bt % token_blocks
    x += i_b * x_batch
    D = 2 * key_channels + value_channels
    dx += i_b * T * D
    d_parameters += i_bt.to(tl.int64) * (W if bias is None else W + 1) * D
    heads = key_channels // K
    o_t = (i_t * BT + tl.arange(0, BT)) * RUN
    if i_d < 2 * heads:
        d_out = tl.where(i_d < heads, dq, dk) + i_b * T * key_channels + i_d % heads * K
        convolve_gradient(
            x, taps, bias, age, d_out, dx, d_parameters, x_token, D, key_channels, T, i_d * K, K, o_t,
            W, RUN, AHEAD, BT, BD, ACT, True,
        )  # fmt: skip
    else:
        i_v = (i_d - 2 * heads) * BD
        d_out = dv + i_b * T * value_channels + i_v
        convolve_gradient(
            x, taps, bias, age, d_out, dx, d_parameters, x_token, D, value_channels, T,
            2 * key_channels + i_v, value_channels - i_v, o_t, W, RUN, AHEAD, BT, BD, ACT, False,
        )  # fmt: skip


@triton.jit
def convolve_gradient(
    x, taps, bias, age, d_out, dx, d_parameters, x_token, D, out_token, T, first, channels, o_run,
    W: tl.constexpr, RUN: tl.constexpr, AHEAD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ACT: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """The gradients of `convolve` for the RUN tokens from each of o_run on.

    Tuples hold a tile per tap j, which takes the token W - 1 - j before the present one: its x, what is known of its
    dx, the tap, the tap's gradient.
    """
    o_d = tl.arange(0, BD)
    m_d = o_d < channels
    b_bias = load_bias(bias, first, o_d, m_d, BT, BD)
    b_taps, b_x, b_dx, b_d_taps = (), (), (), ()
    b_zero = tl.zeros([BT, BD], tl.float32)
    b_d_bias = b_zero
    for j in tl.static_range(W):
        b_taps += (load_channels(taps + j * D + first, o_d, m_d),)
        b_d_taps += (b_zero,)
    for j in tl.static_range(W - 1):
        o_t = o_run - (W - 1) + j
        b_x += (load_tokens(x + first, x_token, o_t, (o_t >= 0) & (o_t < T), o_d, m_d).to(tl.float32),)
        b_dx += (b_zero,)
    b_next_x, b_next_d_out = (), ()
    for j in tl.static_range(AHEAD):
        b_next_x += (load_tokens(x + first, x_token, o_run + j, o_run + j < T, o_d, m_d),)
        b_next_d_out += (load_tokens(d_out, out_token, o_run + j, o_run + j < T, o_d, m_d),)
    # the last tokens of a run get parts of their dx from the first tokens of the next run
    for i in tl.range(RUN + W - 1, loop_unroll_factor=AHEAD):
        o_t = o_run + i
        b_age = load_age(age, o_t, o_t < T)
        m_next = o_t + AHEAD < T
        b_next_x += (load_tokens(x + first, x_token, o_t + AHEAD, m_next, o_d, m_d),)
        b_next_d_out += (load_tokens(d_out, out_token, o_t + AHEAD, m_next, o_d, m_d),)
        b_d_out = b_next_d_out[0].to(tl.float32)
        b_x += (b_next_x[0].to(tl.float32),)
        b_dx += (b_zero,)
        b_seen, b_more_dx, b_more_d_taps = (), (), ()
        b_y = b_bias
        for j in tl.static_range(W):
            b_seen += (within_reach(b_x[j], age, b_age, W - 1 - j),)
            b_y += b_taps[j] * b_seen[j]
        b_dy = activation_gradient(b_y, b_d_out, ACT, NORM)
        b_own = tl.where(i < RUN, b_dy, 0.0)
        for j in tl.static_range(W):
            b_more_dx += (b_dx[j] + within_reach(b_taps[j] * b_dy, age, b_age, W - 1 - j),)
            b_more_d_taps += (b_d_taps[j] + b_own * b_seen[j],)
        b_d_bias += b_own
        m_done = (i >= W - 1) & (o_t - (W - 1) < T)
        store_tokens(dx + first, D, o_t - (W - 1), m_done, o_d, m_d, b_more_dx[0])
        b_x, b_dx, b_d_taps = b_seen[1:], b_more_dx[1:], b_more_d_taps
        b_next_x, b_next_d_out = b_next_x[1:], b_next_d_out[1:]
    for j in tl.static_range(W):
        tl.store(d_parameters + j * D + first + o_d, tl.sum(b_d_taps[j], 0), mask=m_d)
    if bias is not None:
        tl.store(d_parameters + W * D + first + o_d, tl.sum(b_d_bias, 0), mask=m_d)


@triton.jit
def activated(b_y, ACT, NORM):
    """SiLU, then with NORM, which may be known at run time only, the L2 norm of each row; without ACT y as it is."""
    b_out = b_y
    if ACT:
        b_out = b_y * sigmoid(b_y)
        b_out *= tl.where(NORM, tl.rsqrt(tl.sum(b_out * b_out, 1) + EPSILON), 1.0)[:, None]
    return b_out


@triton.jit
def activation_gradient(b_y, b_d_out, ACT, NORM):
    """The gradient of y, [BT, BD], from that of `activated`."""
    if ACT:
        b_sigmoid = sigmoid(b_y)
        b_a = b_y * b_sigmoid
        b_inverse = tl.where(NORM, tl.rsqrt(tl.sum(b_a * b_a, 1) + EPSILON), 1.0)
        b_along = tl.where(NORM, tl.sum(b_a * b_d_out, 1) * b_inverse * b_inverse, 0.0)
        b_d_out = silu_gradient(b_a, b_sigmoid, (b_d_out - b_a * b_along[:, None]) * b_inverse[:, None])
    return b_d_out


@triton.jit
def silu_gradient(b_a, b_sigmoid, b_da):
    """The gradient of y from that of a = y sigmoid(y)."""
    return b_da * (b_sigmoid + b_a * (1.0 - b_sigmoid))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) to a few float32 roundings, in a third of the instructions of a division and an exponential."""
    b_root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return b_root * b_root


@triton.jit
def within_reach(b_tile, age, b_age, back: tl.constexpr):
    """A tile, zero for tokens whose sequence begins less than `back` tokens before them."""
    if age is None or back == 0:
        # without packed sequences nothing was loaded from before the first token
        return b_tile
    return tl.where((b_age >= back)[:, None], b_tile, 0.0)


@triton.jit
def load_age(age, o_t, m_t):
    """Tokens of the same sequence before each of o_t, [BT]."""
    if age is None:
        return o_t
    else:  # noqa: RET505  # Triton compiles what follows a return, and here that would load from None
        return tl.load(age + o_t, mask=m_t, other=0)


@triton.jit
def load_bias(bias, first, o_d, m_d, BT: tl.constexpr, BD: tl.constexpr):
    """The bias of some channels for every token, zeros if there is none, [BT, BD] float32."""
    b_bias = tl.zeros([BT, BD], tl.float32)
    if bias is not None:
        b_bias += load_channels(bias + first, o_d, m_d)
    return b_bias


@triton.jit
def load_channels(x, o_d, m_d):
    """Numbers o_d from x on in float32, zero where m_d is false, [1, BD]."""
    return tl.load(x + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_tokens(x, token_stride, o_t, m_t, o_d, m_d):
    """Tokens o_t of some channels, zero where m_t or m_d is false, [BT, BD]."""
    p_x = x + (o_t.to(tl.int64) * token_stride)[:, None] + o_d[None, :]
    return tl.load(p_x, mask=m_t[:, None] & m_d[None, :], other=0.0)


@triton.jit
def store_tokens(x, token_stride, o_t, m_t, o_d, m_d, b_x):
    """The counterpart of load_tokens."""
    p_x = x + (o_t.to(tl.int64) * token_stride)[:, None] + o_d[None, :]
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])
