"""Products of weights with one token of every sequence in Triton, with the norm before and what follows, forward only.

The time of such a product is that of reading its weights. Of few tokens a program forms a few outputs itself, in
float32 registers: it has its weights on their way before it waits for the launch before (overlap.py), and enough
programs share an SM to keep loads in flight. Of a tile, loads come before sums, whose barriers no load passes.
More tokens are tensor cores' work, which cuBLAS divides well; there only what surrounds the product is ours.

Values are rounded where separate modules would: after the norm, after the product, after SiLU times its partner.
"""
# mypy: disable-error-code="assignment, misc"
# Tuples that a kernel builds up change their type.

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..token_call import Norm
from .overlap import overlaps, wait_for_launch_before
from .short_convolution import sigmoid

# Tokens up to which a program multiplies them itself.
FEW_TOKENS = 2


class Tuning(NamedTuple):
    """How few tokens are multiplied.

    rows: outputs of a program.
    block: inputs of a tile of weights, of which a program has two in registers where a row is longer.
    """

    rows: int
    block: int
    num_warps: int


# LONG: of one token with more inputs than LONG_FROM, without a norm. Two tokens take too many registers for it.
PLAIN, GATED, LONG, LONG_FROM = Tuning(4, 1024, 4), Tuning(4, 2048, 4), Tuning(2, 8192, 4), 2048
# Inputs whose products a thread sums up at once: as many weights as it loads.
RUN = tl.constexpr(8)
# Numbers of a program of swiglu_kernel.
SWIGLU_BLOCK = 1024


def normed_product(x: Tensor, norm: Norm, weight: Tensor, gated: bool) -> Tensor:
    """See kernels/decoding.py."""
    with torch.cuda.device_of(x):
        if x.shape[0] <= FEW_TOKENS:
            out = x.new_empty(x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0])
            _product_of_few(x, norm, weight, None, out, gated)
            return out
        out = F.linear(_normalised(x, norm), weight)
        return _swiglu(out) if gated else out


def add_product(hidden: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """See kernels/decoding.py."""
    if x.shape[0] > FEW_TOKENS:
        return torch.addmm(hidden, x, weight.t())
    hidden = hidden.contiguous()
    out = torch.empty_like(hidden)
    with torch.cuda.device_of(x):
        _product_of_few(x, None, weight, hidden, out, False)
    return out


def _product_of_few(
    x: Tensor, norm: Norm | None, weight: Tensor, residual: Tensor | None, out: Tensor, gated: bool
) -> None:
    (M, D), N = x.shape, out.shape[1]
    is_long = norm is None and M == 1 and D > LONG_FROM
    tuning, overlap = GATED if gated else LONG if is_long else PLAIN, overlaps(x.device)
    BD = min(tuning.block, max(triton.next_power_of_2(D), RUN.value))
    product_kernel[(triton.cdiv(N, tuning.rows),)](
        x, None if norm is None else norm.weight, weight, residual, out, x.stride(0), out.stride(0), N, D,
        0.0 if norm is None else norm.eps,
        M=M, BN=tuning.rows, BD=BD, BX=triton.next_power_of_2(D), WHOLE=D % BD == 0, ONE=BD >= D, GATED=gated,
        ZERO_CENTERED=norm is not None and norm.zero_centered, OVERLAP=overlap, num_warps=tuning.num_warps,
        launch_pdl=overlap,
    )  # fmt: skip


@triton.jit
def product_kernel(
    x, norm_weight, weight, residual, out, x_stride, out_stride, N, D, eps,
    M: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr, WHOLE: tl.constexpr, ONE: tl.constexpr,
    GATED: tl.constexpr, ZERO_CENTERED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per BN outputs of all M tokens.

    x: [M, D]; norm_weight: [D] or None; weight: [N, D], GATED [2 N, D]; out: [M, N], as is residual, or None.
    WHOLE: D is made of blocks of BD inputs; ONE: of one.
    """
    o_n, o_d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_n = o_n < N
    p_weight = weight + o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    p_partner = weight + (o_n.to(tl.int64) + N)[:, None] * D + o_d[None, :]
    b_next, b_next_factor = load_weights(p_weight, m_n, o_d, D, WHOLE), load_vector(norm_weight, o_d, D, WHOLE)
    if GATED:
        b_next_partner = load_weights(p_partner, m_n, o_d, D, WHOLE)
    wait_for_launch_before(OVERLAP)
    b_next_x, b_residual = (), ()
    for m in tl.static_range(M):
        if residual is None:
            b_residual += (0.0,)
        else:
            b_residual += (tl.load(residual + m * out_stride + o_n, mask=m_n, other=0.0),)
        b_next_x += (load_vector(x + m * x_stride, o_d, D, WHOLE),)
    b_scale, b_sum, b_partner_sum = (), (), ()
    for m in tl.static_range(M):
        b_sum += (tl.zeros([BN, BD // RUN], tl.float32),)
        b_partner_sum += (tl.zeros([BN, BD // RUN], tl.float32),)
        if norm_weight is None:
            b_scale += (1.0,)
        elif ONE:
            b_scale += (inverse_rms(b_next_x[m], D, eps),)
        else:
            b_scale += (inverse_rms(load_vector(x + m * x_stride, tl.arange(0, BX), D, False), D, eps),)
    for first in range(0, D, BD):
        b_weight, b_factor, b_inputs = b_next, b_next_factor, b_next_x
        if GATED:
            b_partner = b_next_partner
        if not ONE:
            o_next = first + BD + o_d
            b_next, b_next_x = load_weights(p_weight + first + BD, m_n, o_next, D, False), ()
            b_next_factor = load_vector(norm_weight, o_next, D, False)
            if GATED:
                b_next_partner = load_weights(p_partner + first + BD, m_n, o_next, D, False)
            for m in tl.static_range(M):
                b_next_x += (load_vector(x + m * x_stride, o_next, D, False),)
        b_more, b_more_partner = (), ()
        for m in tl.static_range(M):
            b_x = normed_input(b_inputs[m], norm_weight, b_scale[m], b_factor, ZERO_CENTERED)
            b_more += (b_sum[m] + sums_of_runs(b_weight, b_x),)
            if GATED:
                b_more_partner += (b_partner_sum[m] + sums_of_runs(b_partner, b_x),)
            else:
                b_more_partner += (b_partner_sum[m],)
        b_sum, b_partner_sum = b_more, b_more_partner
    for m in tl.static_range(M):
        b_out = tl.sum(b_sum[m], 1).to(out.dtype.element_ty)
        if GATED:
            b_out = swiglu(b_out, tl.sum(b_partner_sum[m], 1).to(out.dtype.element_ty))
        if residual is not None:
            b_out = b_residual[m].to(tl.float32) + b_out.to(tl.float32)
        tl.store(out + m * out_stride + o_n, b_out.to(out.dtype.element_ty), mask=m_n)


@triton.jit
def inverse_rms(b_x, D, eps):
    """1 / sqrt(mean of squares + eps) of D numbers, beyond which there are zeros."""
    b_x = b_x.to(tl.float32)
    return tl.rsqrt(tl.sum(b_x * b_x, 0) / D + eps)


@triton.jit
def sums_of_runs(b_weight, b_x):
    """Products of a tile of weights with inputs, summed up over runs of RUN inputs, which one thread has."""
    BN: tl.constexpr = b_weight.shape[0]
    BD: tl.constexpr = b_weight.shape[1]
    return tl.sum(tl.reshape(b_weight.to(tl.float32) * b_x[None, :], [BN, BD // RUN, RUN]), 2)


@triton.jit
def load_weights(p_weight, m_n, o_d, D, WHOLE: tl.constexpr):
    """A tile of weights, [BN, BD], zero beyond them; each is read once."""
    mask = m_n[:, None]
    if not WHOLE:
        mask = mask & (o_d < D)[None, :]
    return tl.load(p_weight, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def normed_input(b_x, norm_weight, scale, b_factor, ZERO_CENTERED: tl.constexpr):
    """Inputs of a token, normalised if there is a norm, float32."""
    if norm_weight is not None:
        b_x = normalise(b_x, scale, b_factor.to(tl.float32), ZERO_CENTERED)
    return b_x.to(tl.float32)


@triton.jit
def load_vector(x, o_d, D, WHOLE: tl.constexpr):
    """Numbers o_d of D, zero beyond; o_d where there is no x."""
    b_x = o_d
    if x is not None:
        b_x = tl.load(x + o_d, mask=None if WHOLE else o_d < D, other=None if WHOLE else 0.0)
    return b_x


@triton.jit
def normalise(b_x, scale, b_weight, ZERO_CENTERED: tl.constexpr):
    """x * scale * weight in the dtype of x."""
    if ZERO_CENTERED:
        b_weight += 1.0
    return (b_x.to(tl.float32) * scale * b_weight).to(b_x.dtype)


@triton.jit
def swiglu(b_gate, b_partner):
    """SiLU(gate) * partner in float32."""
    b_gate = b_gate.to(tl.float32)
    return b_gate * sigmoid(b_gate) * b_partner.to(tl.float32)


def _normalised(x: Tensor, norm: Norm) -> Tensor:
    M, D = x.shape
    out, overlap = x.new_empty(M, D), overlaps(x.device)
    norm_kernel[(M,)](
        x, norm.weight, out, x.stride(0), D, norm.eps,
        BX=triton.next_power_of_2(D), ZERO_CENTERED=norm.zero_centered, OVERLAP=overlap, launch_pdl=overlap,
    )  # fmt: skip
    return out


@triton.jit
def norm_kernel(x, weight, out, x_stride, D, eps, BX: tl.constexpr, ZERO_CENTERED: tl.constexpr, OVERLAP: tl.constexpr):
    """One program per token; x, out: [M, D]; weight: [D]."""
    i_m, o_x = tl.program_id(0).to(tl.int64), tl.arange(0, BX)
    b_weight = tl.load(weight + o_x, mask=o_x < D, other=0.0).to(tl.float32)
    wait_for_launch_before(OVERLAP)
    b_x = tl.load(x + i_m * x_stride + o_x, mask=o_x < D, other=0.0)
    scale = inverse_rms(b_x, D, eps)
    tl.store(out + i_m * D + o_x, normalise(b_x, scale, b_weight, ZERO_CENTERED), mask=o_x < D)


def _swiglu(x: Tensor) -> Tensor:
    M, N = x.shape[0], x.shape[1] // 2
    out, overlap = x.new_empty(M, N), overlaps(x.device)
    swiglu_kernel[(M, triton.cdiv(N, SWIGLU_BLOCK))](
        x, out, N, BN=SWIGLU_BLOCK, OVERLAP=overlap, launch_pdl=overlap
    )  # fmt: skip
    return out


@triton.jit
def swiglu_kernel(x, out, N, BN: tl.constexpr, OVERLAP: tl.constexpr):
    """One program per BN outputs of a token; x: [M, 2 N], out: [M, N]."""
    i_m, o_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    wait_for_launch_before(OVERLAP)
    p_x, m_n = x + i_m * 2 * N + o_n, o_n < N
    b_out = swiglu(tl.load(p_x, mask=m_n, other=0.0), tl.load(p_x + N, mask=m_n, other=0.0))
    tl.store(out + i_m * N + o_n, b_out.to(out.dtype.element_ty), mask=m_n)
