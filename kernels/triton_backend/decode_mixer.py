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

from ..state import CarveState
from ..token_call import FEW_SEQUENCES, TokenCall
from ..torch_backend.elementwise import L2_EPSILON
from .decay import LARGEST
from .decode import DONE, TOKEN_BITS, advance, content_term, load_content_maps, load_keys, through_content_maps
from .overlap import overlaps, wait_for_launch_before
from .short_convolution import sigmoid
from .special import softplus

EPSILON = tl.constexpr(L2_EPSILON)


class Tuning(NamedTuple):
    """How the kernel is launched.

    numbers: in a tile of S.
    keys_of_a_warp: a warp for so many key channels.
    ahead: tiles of S whose loads are in flight.
    """

    numbers: int
    keys_of_a_warp: int
    ahead: int
    options: dict[str, int]


# Of few sequences a program has an SM to itself. What loads no more numbers than there are threads, Triton loads once
# for every thread that needs it, which is slow: queries and keys are one tile.
FEW, MANY = Tuning(16384, 16, 1, {}), Tuning(4096, 32, 1, {"maxnreg": 168})
# Features of the content term's maps that are loaded at once.
RANK_BLOCK = 32


def mix_token(call: TokenCall) -> Tensor:
    """See kernels/decoding.py."""
    x, S = call.convolved, call.state[0]
    N, (HV, K, V) = x.shape[0], S.shape[1:]
    H, carve = call.key_heads, isinstance(call.state, CarveState)
    out = x.new_empty(N, HV * V)
    mean, partial, count = call.state[1:] if isinstance(call.state, CarveState) else (None, None, None)
    R = 1 if call.content_down is None else call.content_down.shape[0]
    tuning, overlap = FEW if N <= FEW_SEQUENCES else MANY, overlaps(x.device)
    BK = triton.next_power_of_2(K)
    BV = min(max(tuning.numbers // BK, 1), V & -V)
    blocks = {
        "GROUP": HV // H, "K": K, "V": V, "R": R, "F": call.features, "W": call.kept.shape[1] + 1,
        "BK": BK, "BV": BV, "VP": triton.next_power_of_2(V), "BF": triton.next_power_of_2(call.features),
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
            num_warps=max(BK // tuning.keys_of_a_warp, 1),
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
    """One program per sequence and key head; the tensors of TokenCall, x the convolved sections.

    Loads come long before what they are for: no load passes a barrier, and sums have those.
    """
    NV: tl.constexpr = V // BV
    i_n, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    D = (2 * K + GROUP * V) * H
    o_k, o_v, o_f, o_mean_v = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BF), tl.arange(0, VP)
    m_k, m_v, m_f = o_k < K, o_v < V, o_f < F
    # queries and keys of this head are the rows of a tile
    o_row = tl.arange(0, 2)[:, None]
    o_qk, m_qk = (o_row * H + i_h) * K + o_k[None, :], m_k[None, :] & (o_row < 2)
    out += (i_n * H + i_h) * GROUP * V
    row = i_n
    if rows is not None:
        row = tl.load(rows + i_n).to(tl.int64)
        if row < 0:
            wait_for_launch_before(OVERLAP)
            store_zeros(out, o_v, GROUP * NV, BV)
            return
    x += i_n * x_stride
    write += i_n * write_stride
    decay += i_n * decay_stride
    gate_row = i_n * gate_stride
    kept += row * kept_stride
    S += row * S_stride + i_h * GROUP * K * V
    o_mean = row * mean_stride + i_h * GROUP * V
    first_v = 2 * H * K + i_h * GROUP * V

    b_ahead = ()
    for b in tl.static_range(AHEAD):
        b_ahead += (load_state(S, b, o_k, o_v, m_k, K, V, BV),)
    b_kept_qk, b_taps_qk = load_kept(kept, o_qk, m_qk, D, W), load_taps(taps, o_qk, m_qk, W)
    b_kept_v, b_taps_v = load_kept(kept, first_v + o_v, m_v, D, W), load_taps(taps, first_v + o_v, m_v, W)
    b_dt_bias = tl.load(dt_bias + i_h * K + o_k, mask=m_k, other=0.0)
    b_rate = load_rates(A_log, i_h, o_k, m_k, K, RATES)
    if decay_up is not None:
        b_decay_up = load_map(decay_up + i_h * K * F, o_k, m_k, o_f, m_f, F)
    if gate_up is not None:
        b_gate_up = load_map(gate_up + i_h * GROUP * V * F, o_v, m_v, o_f, m_f, F)
        b_gate_bias = tl.load(gate_bias + i_h * GROUP * V + o_v)
    b_next_factor = tl.load(norm_weight + o_v)
    if erase_bias is not None:
        b_erase_bias = tl.load(erase_bias + i_h * K + o_k, mask=m_k, other=0.0)
    if content_down is not None:
        b_next_partial = tl.load(partial + o_mean + o_v)
        b_mean = load_keys(mean + o_mean, o_mean_v, V, VP)
        b_down, b_up = load_content_maps(content_down, content_up, i_h * 0, 0, o_k, o_mean_v, K, V, R, BR)
    ends = False
    if CARVE:
        ends = ends_content_chunk(count, positions, i_n, row, H, content_chunk)

    wait_for_launch_before(OVERLAP)
    b_new_qk = tl.load(x + o_qk, mask=m_qk, other=0.0)
    b_new_v = tl.load(x + first_v + o_v, mask=m_v, other=0.0)
    b_decay_in = load_decay_input(decay, i_h, o_f, m_f, o_k, m_k, K, decay_up is not None)
    o_hv = i_h * GROUP * V
    if gate_up is not None:
        b_gate_in = tl.load(gate + gate_row + o_f, mask=m_f, other=0.0)
    elif ACTIVATION != "none":
        b_next_gate = tl.load(gate + gate_row + o_hv + o_v)
    b_next_write = load_write_logits(write, i_h, i_h * GROUP, o_hv + o_v, WRITE)
    b_erase = tl.zeros([BK], tl.float32)
    if ERASE:
        b_erase = tl.load(erase + i_n * x_stride + i_h * K + o_k, mask=m_k, other=0.0)

    b_content = tl.zeros([BK], tl.float32)
    if content_down is not None:
        b_content = through_content_maps(b_mean, b_down, b_up)
        for i_r in range(1, (R + BR - 1) // BR):
            b_down, b_up = load_content_maps(content_down, content_up, i_h * 0, i_r, o_k, o_mean_v, K, V, R, BR)
            b_content += through_content_maps(b_mean, b_down, b_up)
    b_q, b_k = normed_rows(convolved(b_new_qk, b_kept_qk, b_taps_qk, conv_bias, o_qk, m_qk, W), o_row, x)
    b_erase = b_erase.to(tl.float32)
    if erase_bias is not None:
        b_erase += b_erase_bias
    b_decay_in = b_decay_in.to(tl.float32)
    if decay_up is not None:
        b_decay_in = rounded(through_map(b_decay_up, b_decay_in), x)
    b_g = -tl.exp(tl.minimum(b_rate, LARGEST)) * softplus(b_decay_in + b_dt_bias)
    keep(kept, b_kept_qk, b_new_qk, o_qk, m_qk, D, W)

    b_outs, b_factors, squares = (), (), 0.0
    for b in tl.static_range(GROUP * NV):
        j, o_c = b // NV, b * BV + o_v
        b_S = b_ahead[0]
        b_ahead = b_ahead[1:]
        if b + AHEAD < GROUP * NV:
            b_ahead += (load_state(S, b + AHEAD, o_k, o_v, m_k, K, V, BV),)
        b_old_v, b_x_v, b_w_v, b_write = b_kept_v, b_new_v, b_taps_v, b_next_write
        if content_down is not None:
            b_partial = b_next_partial
        b_factor = b_next_factor.to(tl.float32)
        if ACTIVATION != "none" and gate_up is None:
            b_gate = b_next_gate.to(tl.float32)
        if b + 1 < GROUP * NV:
            o_next = first_v + BV + o_c
            b_kept_v, b_taps_v = load_kept(kept, o_next, m_v, D, W), load_taps(taps, o_next, m_v, W)
            b_new_v = tl.load(x + o_next, mask=m_v, other=0.0)
            b_next_write = load_write_logits(write, i_h, i_h * GROUP + (b + 1) // NV, o_hv + BV + o_c, WRITE)
            b_next_factor = tl.load(norm_weight + (b + 1) % NV * BV + o_v)
            if content_down is not None:
                b_next_partial = tl.load(partial + o_mean + BV + o_c)
            if ACTIVATION != "none" and gate_up is None:
                b_next_gate = tl.load(gate + gate_row + o_hv + BV + o_c)
        if gate_up is not None:
            if b > 0:
                b_gate_up = load_map(gate_up + (o_hv + b * BV) * F, o_v, m_v, o_f, m_f, F)
                b_gate_bias = tl.load(gate_bias + o_hv + o_c)
            b_gate = rounded(through_map(b_gate_up, b_gate_in.to(tl.float32)) + b_gate_bias.to(tl.float32), x)
        if ACTIVATION != "none":
            b_factor = through_gate(b_factor, b_gate, ACTIVATION == "silu")
        b_w = write_gate(b_write)
        if b % NV == 0:
            if content_down is not None and b > 0:
                b_content = content_term(
                    mean + o_mean + j * V, content_down, content_up, i_h * 0, o_k, K, V, R, BK, BR, VP
                )  # fmt: skip
            b_decay, b_b = decay_and_erase_gate(
                b_g, b_erase, b_content, b_w, write + i_h, erase_scale, CARVE and DIAGONAL, ERASE
            )
        b_v = rounded(convolved(b_x_v, b_old_v, b_w_v, conv_bias, first_v + o_c, m_v, W), x)
        if WRITE == "key_heads":
            b_v = rounded(erase_scale * b_v, x)
        b_S, b_y = advance(b_S, b_q, b_k, b_decay, b_b, b_w * b_v, CARVE and BEFORE)
        # several threads can hold the same number: all have read what is written now
        tl.debug_barrier()
        store_state(S, b, b_S, o_k, o_v, m_k, K, V, BV)
        keep(kept, b_old_v, b_x_v, first_v + o_c, m_v, D, W)
        if content_down is not None:
            store_content(mean + o_mean + o_c, partial + o_mean + o_c, b_partial + b_y, m_v, ends, content_chunk)
        b_out = rounded(scale * b_y, x)
        squares += tl.sum(b_out * b_out, 0)
        b_outs += (b_out,)
        b_factors += (b_factor,)
        if b % NV == NV - 1:
            store_normed(out + j * V, b_outs, b_factors, squares, eps, o_v, V, BV)
            b_outs, b_factors, squares = (), (), 0.0


@triton.jit
def store_zeros(out, o_v, BLOCKS: tl.constexpr, BV: tl.constexpr):
    """The outputs of a sequence that has no row of the state."""
    for b in tl.static_range(BLOCKS):
        tl.store(out + b * BV + o_v, tl.zeros([BV], out.dtype.element_ty))


@triton.jit
def load_decay_input(decay, i_h, o_f, m_f, o_k, m_k, K: tl.constexpr, FEATURES: tl.constexpr):
    """The features that the raw decay is made of, or that of a key head itself."""
    if FEATURES:
        b_decay = tl.load(decay + o_f, mask=m_f, other=0.0)
    else:
        b_decay = tl.load(decay + i_h * K + o_k, mask=m_k, other=0.0)
    return b_decay


@triton.jit
def normed_rows(b_qk, o_row, x):
    """Both rows of a tile through their norm, [BK] each, rounded to the dtype of x."""
    b_qk *= tl.rsqrt(tl.sum(b_qk * b_qk, 1) + EPSILON)[:, None]
    b_qk = rounded(b_qk, x)
    return tl.sum(tl.where(o_row == 0, b_qk, 0.0), 0), tl.sum(tl.where(o_row == 1, b_qk, 0.0), 0)


@triton.jit
def decay_and_erase_gate(
    b_g, b_erase, b_content, b_w, shared_gate, erase_scale, DIAGONAL: tl.constexpr, ERASE: tl.constexpr
):
    """Of a value head: DIAGONAL has the erase in its decays, and the write gate b_w erases; without ERASE, logits of
    its own, one gate of a key head erases and writes, whose logit is at shared_gate."""
    b_log_decay = b_g
    if DIAGONAL:  # log(1 - sigmoid(x)) is -softplus(x)
        b_log_decay -= softplus(b_erase + b_content)
        b_b = b_w
    elif ERASE:
        b_b = erase_scale * tl.sigmoid(b_erase + b_content)
    else:
        b_b = erase_scale * tl.sigmoid(tl.load(shared_gate).to(tl.float32))
    return tl.exp(b_log_decay), b_b


@triton.jit
def through_gate(b_factor, b_gate, SILU: tl.constexpr):
    b_factor *= sigmoid(b_gate)
    if SILU:
        b_factor *= b_gate
    return b_factor


@triton.jit
def store_content(mean, partial, b_partial, m_v, ends, content_chunk):
    """The sum of a content chunk's outputs so far or, where it ends, its mean and an empty sum."""
    tl.store(mean, b_partial / content_chunk, mask=m_v & ends)
    tl.store(partial, tl.where(ends, 0.0, b_partial))


@triton.jit
def store_normed(out, b_outs, b_factors, squares, eps, o_v, V: tl.constexpr, BV: tl.constexpr):
    """Outputs of a value head through the norm, times factors; tuples of their tiles. squares: their sum."""
    b_inverse = tl.rsqrt(squares / V + eps)
    for i in tl.static_range(V // BV):
        b_out = b_outs[i] * b_inverse * b_factors[i]
        tl.store(out + i * BV + o_v, b_out.to(out.dtype.element_ty))


@triton.jit
def rounded(b_x, x):
    """float32 rounded to the dtype of x, float32."""
    return b_x.to(x.dtype.element_ty).to(tl.float32)


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
def load_map(up, o_c, m_c, o_f, m_f, F: tl.constexpr):
    """Rows o_c of a map from F features, zero beyond, [channels, BF]."""
    return tl.load(up + o_c[:, None] * F + o_f[None, :], mask=m_c[:, None] & m_f[None, :], other=0.0)


@triton.jit
def through_map(b_up, b_features):
    """[channels] float32."""
    return tl.sum(b_up.to(tl.float32) * b_features[None, :], 1)


@triton.jit
def load_kept(kept, o_c, m_c, D, W: tl.constexpr):
    """Of some channels the tuple of the last W - 1 tokens, oldest first, each of the shape of o_c."""
    b_kept = ()
    for j in tl.static_range(W - 1):
        b_kept += (tl.load(kept + j * D + o_c, mask=m_c, other=0.0),)
    return b_kept


@triton.jit
def load_taps(taps, o_c, m_c, W: tl.constexpr):
    """The tuple of the taps of some channels, ones where there is no convolution, each of the shape of o_c."""
    b_taps = ()
    for j in tl.static_range(W):
        if taps is None:
            b_taps += (tl.where(m_c, 1.0, 0.0),)
        else:
            b_taps += (tl.load(taps + o_c * W + j, mask=m_c, other=0.0),)
    return b_taps


@triton.jit
def convolved(b_x, b_kept, b_taps, bias, o_c, m_c, W: tl.constexpr):
    """Some channels after convolution and SiLU, float32 in the shape of o_c."""
    b_y = b_x.to(tl.float32) * b_taps[W - 1].to(tl.float32)
    for j in tl.static_range(W - 1):
        b_y += b_kept[j].to(tl.float32) * b_taps[j].to(tl.float32)
    if bias is not None:
        b_y += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_y * sigmoid(b_y)


@triton.jit
def keep(kept, b_kept, b_x, o_c, m_c, D, W: tl.constexpr):
    """What is kept of some channels goes one token on."""
    for j in tl.static_range(1, W - 1):
        tl.store(kept + (j - 1) * D + o_c, b_kept[j], mask=m_c)
    if W > 1:
        tl.store(kept + (W - 2) * D + o_c, b_x, mask=m_c)


@triton.jit
def load_write_logits(write, i_h, i_hv, o_c, WRITE: tl.constexpr):
    """Of some channels of a value head, [BV], or one number, of it or of its key head."""
    if WRITE == "value_channels":
        return tl.load(write + o_c)
    elif WRITE == "value_heads":  # noqa: RET505  # Triton compiles what follows a return
        return tl.load(write + i_hv)
    else:
        return tl.load(write + i_h)


@triton.jit
def write_gate(b_logits):
    """Sigmoid, rounded to the dtype of the logits, float32."""
    return tl.sigmoid(b_logits.to(tl.float32)).to(b_logits.dtype).to(tl.float32)


@triton.jit
def ends_content_chunk(count, positions, i_n, row, H, content_chunk):
    """Whether the token ends a content chunk; the place in it follows from positions, or it is counted.

    A program announces with its read of `count`, in the upper half, that it has read it; the last one of a sequence to
    do so writes the next count over that. Nobody waits, and nothing has to be reset between launches. No other kernel
    has anything to do with a layer's count, so this may come before the wait for the launch before.
    """
    if positions is not None:
        return (tl.load(positions + i_n) + 1) % content_chunk == 0
    else:  # noqa: RET505  # Triton compiles what follows a return, and here that would use None
        before = tl.atomic_add(count + row, DONE, sem="relaxed")
        tokens = (before & TOKEN_BITS) + 1
        ends = tokens >= content_chunk
        if (before >> 32) == H - 1:
            tl.store(count + row, tl.where(ends, 0, tokens))
        return ends
