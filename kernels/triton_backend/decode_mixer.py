"""What a mixer computes between its projections for one token of every sequence, in one Triton kernel.

A program has a key head of a sequence and its value heads: the short convolution with SiLU and norms, the gates, the
recurrence, tile after tile of S, and the gated output norm. It alone reads and writes what is kept of its channels, so
everything is brought up to date in place. The first tiles and the weights are on their way before the program waits for
the projection (overlap.py).

Values are rounded to the dtype of the projection where separate ops would hand them on.
"""
# mypy: disable-error-code="assignment, misc"
# Tuples that a kernel builds up change their type.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..decoding import FEW_SEQUENCES, TokenCall
from ..state import CarveState
from ..torch_backend.elementwise import L2_EPSILON
from .decay import LARGEST, softplus
from .decode import DONE, RANK_BLOCK, TOKEN_BITS, advance, content_term
from .overlap import overlaps, wait_for_launch_before
from .short_convolution import sigmoid

EPSILON = tl.constexpr(L2_EPSILON)


class Tuning(NamedTuple):
    """How the kernel is launched.

    columns: of a tile of S.
    ahead: tiles whose loads are in flight.
    """

    columns: int
    ahead: int
    options: dict[str, int]


# With no more threads than key channels Triton computes what belongs to those once, elsewhere once for each column.
KEYS_OF_A_WARP = 32
# Features of a tile of a map of low rank.
FEATURES = 32
# Of few sequences a program has an SM to itself and brings its whole head at once.
FEW, MANY = Tuning(32, 4, {}), Tuning(32, 1, {"maxnreg": 160})


def mix_token(call: TokenCall) -> Tensor:
    """See kernels/decoding.py."""
    x, S = call.convolved, call.state[0]
    N, (HV, K, V) = x.shape[0], S.shape[1:]
    H, carve = call.key_heads, isinstance(call.state, CarveState)
    out = x.new_empty(N, HV * V)
    mean, partial, count = call.state[1:] if isinstance(call.state, CarveState) else (None, None, None)
    R = 1 if call.content_down is None else call.content_down.shape[0]
    tuning, overlap = FEW if N <= FEW_SEQUENCES else MANY, overlaps(x.device)
    BK, BV = triton.next_power_of_2(K), min(tuning.columns, V & -V)
    blocks = {
        "GROUP": HV // H, "K": K, "V": V, "R": R, "F": call.features, "W": call.kept.shape[1] + 1,
        "BK": BK, "BV": BV, "VP": triton.next_power_of_2(V), "BF": min(FEATURES, triton.next_power_of_2(call.features)),
        "BR": min(triton.next_power_of_2(R), RANK_BLOCK), "AHEAD": min(tuning.ahead, HV // H * V // BV),
    }  # fmt: skip
    diagonal = carve and call.erase_form == "diagonal"
    form = {
        "CARVE": carve, "DIAGONAL": diagonal, "BEFORE": diagonal and call.prediction == "previous",
        "RATES": call.A_log.ndim == 2, "ERASE": call.erase is not None, "WRITE": call.write_gates,
        "ACTIVATION": call.activation,
    }  # fmt: skip
    with torch.cuda.device_of(x):
        mixer_token_kernel[(N * H,)](
            x, call.erase, call.write, call.decay, call.gate, x.stride(0), call.write.stride(0), call.decay.stride(0),
            0 if call.gate is None else call.gate.stride(0),
            call.kept, call.kept.stride(0), call.taps, call.convolution_bias,
            call.decay_up, call.gate_up, call.gate_bias, call.A_log, call.dt_bias,
            call.erase_bias, call.content_down, call.content_up,
            S, S.stride(0), mean, partial, 0 if mean is None else mean.stride(0),
            count if call.positions is None else None, call.positions, call.rows,
            call.norm_weight, call.eps, out, K**-0.5, call.erase_scale, call.content_chunk, H,
            **blocks, **form, **tuning.options, OVERLAP=overlap, launch_pdl=overlap,
            num_warps=max(BK // KEYS_OF_A_WARP, 1),
        )  # fmt: skip
    return out


@triton.jit
def mixer_token_kernel(
    x, erase, write, decay, gate, x_stride, write_stride, decay_stride, gate_stride,
    kept, kept_stride, taps, conv_bias, decay_up, gate_up, gate_bias, A_log, dt_bias,
    erase_bias, content_down, content_up, S, S_stride, mean, partial, mean_stride, count, positions, rows,
    norm_weight, eps, out, scale, erase_scale, content_chunk, H,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, F: tl.constexpr, W: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr, AHEAD: tl.constexpr,
    CARVE: tl.constexpr, DIAGONAL: tl.constexpr, BEFORE: tl.constexpr, RATES: tl.constexpr, ERASE: tl.constexpr,
    WRITE: tl.constexpr, ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per sequence and key head; the tensors of TokenCall, x the convolved sections."""
    NV: tl.constexpr = V // BV
    i_n, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    D = (2 * K + GROUP * V) * H
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    out += (i_n * H + i_h) * GROUP * V
    row = i_n
    if rows is not None:
        row = tl.load(rows + i_n).to(tl.int64)
        if row < 0:
            wait_for_launch_before(OVERLAP)
            for b in tl.static_range(GROUP * NV):
                tl.store(out + b * BV + o_v, tl.zeros([BV], out.dtype.element_ty))
            return
    x += i_n * x_stride
    write += i_n * write_stride
    decay += i_n * decay_stride
    kept += row * kept_stride
    S += row * S_stride + i_h * GROUP * K * V
    o_mean = row * mean_stride + i_h * GROUP * V
    first_k, first_v = (H + i_h) * K, 2 * H * K + i_h * GROUP * V
    b_ahead = ()
    for b in tl.static_range(AHEAD):
        b_ahead += (load_state(S, b, o_k, o_v, m_k, K, V, BV),)
    b_old_q, b_old_k = load_kept(kept + i_h * K, o_k, m_k, D, W), load_kept(kept + first_k, o_k, m_k, D, W)
    b_dt_bias = tl.load(dt_bias + i_h * K + o_k, mask=m_k, other=0.0)
    b_rate = tl.exp(tl.minimum(load_rates(A_log, i_h, o_k, m_k, K, RATES), LARGEST))
    wait_for_launch_before(OVERLAP)
    ends = False
    if CARVE:
        ends = ends_content_chunk(count, positions, i_n, H, content_chunk)
    b_q, b_new_q = convolved(x, taps, conv_bias, b_old_q, i_h * K, o_k, m_k, W, True)
    b_k, b_new_k = convolved(x, taps, conv_bias, b_old_k, first_k, o_k, m_k, W, True)
    if decay_up is not None:
        b_decay = through_map(decay_up + i_h * K * F, decay, o_k, m_k, F, BF).to(x.dtype.element_ty).to(tl.float32)
    else:
        b_decay = tl.load(decay + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_g = -b_rate * softplus(b_decay + b_dt_bias)
    if ERASE:
        b_erase = tl.load(erase + i_n * x_stride + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        if erase_bias is not None:
            b_erase += tl.load(erase_bias + i_h * K + o_k, mask=m_k, other=0.0)
    # several threads can hold the same number: all have read what is written now
    tl.debug_barrier()
    keep(kept, b_old_q, b_new_q, i_h * K, o_k, m_k, D, W)
    keep(kept, b_old_k, b_new_k, first_k, o_k, m_k, D, W)
    for j in tl.static_range(GROUP):
        i_hv = i_h * GROUP + j
        if CARVE:
            b_logits = b_erase
            if content_down is not None:
                b_logits += content_term(
                    mean + o_mean + j * V, content_down, content_up, i_h * 0, o_k, K, V, R, BK, BR, VP
                )  # fmt: skip
        b_log_decay = b_g
        if CARVE and DIAGONAL:  # log(1 - sigmoid(x)) is -softplus(x)
            b_log_decay -= softplus(b_logits)
        b_decay = tl.exp(b_log_decay)
        if WRITE == "value_heads":
            b_w = write_gate(tl.load(write + i_hv))
        elif WRITE == "key_heads":
            b_w = write_gate(tl.load(write + i_h))
        if CARVE and DIAGONAL:
            b_b = b_w
        elif CARVE:
            b_b = erase_scale * tl.sigmoid(b_logits)
        elif ERASE:
            b_b = erase_scale * tl.sigmoid(b_erase)
        else:  # one gate of a key head erases and writes
            b_b = erase_scale * tl.sigmoid(tl.load(write + i_h).to(tl.float32))
        b_outs, squares = (), 0.0
        for i in tl.static_range(NV):
            b_S = b_ahead[0]
            b_ahead = b_ahead[1:]
            if j * NV + i + AHEAD < GROUP * NV:
                b_ahead += (load_state(S, j * NV + i + AHEAD, o_k, o_v, m_k, K, V, BV),)
            first = j * V + i * BV
            b_old_v = load_kept(kept + first_v + first, o_v, m_v, D, W)
            if content_down is not None:
                b_partial = tl.load(partial + o_mean + first + o_v)
            b_v, b_new_v = convolved(x, taps, conv_bias, b_old_v, first_v + first, o_v, m_v, W, False)
            if WRITE == "value_channels":
                b_w = write_gate(tl.load(write + i_h * GROUP * V + first + o_v))
            if WRITE == "key_heads":
                b_v = (erase_scale * b_v).to(x.dtype.element_ty).to(tl.float32)
            b_S, b_y = advance(b_S, b_q, b_k, b_decay, b_b, b_w * b_v, CARVE and BEFORE)
            tl.debug_barrier()
            store_state(S, j * NV + i, b_S, o_k, o_v, m_k, K, V, BV)
            keep(kept, b_old_v, b_new_v, first_v + first, o_v, m_v, D, W)
            if content_down is not None:
                b_partial += b_y
                tl.store(mean + o_mean + first + o_v, b_partial / content_chunk, mask=m_v & ends)
                tl.store(partial + o_mean + first + o_v, tl.where(ends, 0.0, b_partial))
            b_out = (scale * b_y).to(x.dtype.element_ty).to(tl.float32)
            squares += tl.sum(b_out * b_out, 0)
            b_outs += (b_out,)
        b_inverse = tl.rsqrt(squares / V + eps)
        for i in tl.static_range(NV):
            b_out = b_outs[i] * b_inverse * tl.load(norm_weight + i * BV + o_v).to(tl.float32)
            if ACTIVATION != "none":
                first = i_hv * V + i * BV
                if gate_up is not None:
                    b_gate = through_map(gate_up + first * F, gate + i_n * gate_stride, o_v, m_v, F, BF)
                    b_gate += tl.load(gate_bias + first + o_v).to(tl.float32)
                    b_gate = b_gate.to(x.dtype.element_ty).to(tl.float32)
                else:
                    b_gate = tl.load(gate + i_n * gate_stride + first + o_v).to(tl.float32)
                b_out *= sigmoid(b_gate)
                if ACTIVATION == "silu":
                    b_out *= b_gate
            tl.store(out + j * V + i * BV + o_v, b_out.to(out.dtype.element_ty))


@triton.jit
def load_rates(A_log, i_h, o_k, m_k, K: tl.constexpr, RATES: tl.constexpr):
    """A_log of a key head: of its channels, [BK], or one number."""
    if RATES:
        return tl.load(A_log + i_h * K + o_k, mask=m_k, other=0.0)
    else:  # noqa: RET505  # Triton compiles what follows a return
        return tl.load(A_log + i_h)


@triton.jit
def load_state(S, b: tl.constexpr, o_k, o_v, m_k, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """Tile number b of a key head's value heads, zero in rows beyond K, [BK, BV]."""
    p_S = S + (b * BV // V * K + o_k[:, None]) * V + b * BV % V + o_v[None, :]
    return tl.load(p_S, mask=m_k[:, None], other=0.0)


@triton.jit
def store_state(S, b: tl.constexpr, b_S, o_k, o_v, m_k, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """The counterpart of load_state."""
    tl.store(S + (b * BV // V * K + o_k[:, None]) * V + b * BV % V + o_v[None, :], b_S, mask=m_k[:, None])


@triton.jit
def through_map(up, features, o_c, m_c, F: tl.constexpr, BF: tl.constexpr):
    """Rows o_c of a map from F features times those, [channels] float32."""
    b_sum = tl.zeros([o_c.shape[0], BF], tl.float32)
    for i in tl.static_range((F + BF - 1) // BF):
        o_f = i * BF + tl.arange(0, BF)
        m_f = o_f < F
        b_up = tl.load(up + o_c[:, None] * F + o_f[None, :], mask=m_c[:, None] & m_f[None, :], other=0.0)
        b_sum += b_up.to(tl.float32) * tl.load(features + o_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
    return tl.sum(b_sum, 1)


@triton.jit
def load_kept(kept, o_c, m_c, D, W: tl.constexpr):
    """Of some channels the tuple of the last W - 1 tokens, oldest first, [channels] each."""
    b_kept = ()
    for j in tl.static_range(W - 1):
        b_kept += (tl.load(kept + j * D + o_c, mask=m_c, other=0.0),)
    return b_kept


@triton.jit
def convolved(x, taps, bias, b_kept, first, o_c, m_c, W: tl.constexpr, NORM: tl.constexpr):
    """Channels from `first` on after convolution, SiLU and, with NORM, the L2 norm, [channels] float32, rounded to the
    dtype of x; and before all that."""
    b_x = tl.load(x + first + o_c, mask=m_c, other=0.0)
    b_y = b_x.to(tl.float32) * load_tap(taps, first, o_c, m_c, W - 1, W)
    for j in tl.static_range(W - 1):
        b_y += b_kept[j].to(tl.float32) * load_tap(taps, first, o_c, m_c, j, W)
    if bias is not None:
        b_y += tl.load(bias + first + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y *= sigmoid(b_y)
    if NORM:
        b_y *= tl.rsqrt(tl.sum(b_y * b_y, 0) + EPSILON)
    return b_y.to(x.dtype.element_ty).to(tl.float32), b_x


@triton.jit
def keep(kept, b_kept, b_x, first, o_c, m_c, D, W: tl.constexpr):
    """What is kept of some channels goes one token on."""
    for j in tl.static_range(1, W - 1):
        tl.store(kept + first + (j - 1) * D + o_c, b_kept[j], mask=m_c)
    if W > 1:
        tl.store(kept + first + (W - 2) * D + o_c, b_x, mask=m_c)


@triton.jit
def load_tap(taps, first, o_c, m_c, j: tl.constexpr, W: tl.constexpr):
    """Tap j of channels, 1 where there is no convolution."""
    if taps is None:
        return tl.where(m_c, 1.0, 0.0)
    else:  # noqa: RET505  # Triton compiles what follows a return
        return tl.load(taps + (first + o_c) * W + j, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def write_gate(b_logits):
    """Sigmoid, rounded to the dtype of the logits, float32."""
    return tl.sigmoid(b_logits.to(tl.float32)).to(b_logits.dtype).to(tl.float32)


@triton.jit
def ends_content_chunk(count, positions, i_n, H, content_chunk):
    """Whether the token ends a content chunk; the place in it follows from positions, or it is counted.

    A program announces with its read of `count`, in the upper half, that it has read it; the last one of a sequence to
    do so writes the next count over that. Nobody waits, and nothing has to be reset between launches.
    """
    if positions is not None:
        return (tl.load(positions + i_n) + 1) % content_chunk == 0
    else:  # noqa: RET505  # Triton compiles what follows a return, and here that would use None
        before = tl.atomic_add(count + i_n, DONE, sem="relaxed")
        tokens = (before & TOKEN_BITS) + 1
        ends = tokens >= content_chunk
        if (before >> 32) == H - 1:
            tl.store(count + i_n, tl.where(ends, 0, tokens))
        return ends
