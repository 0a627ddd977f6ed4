"""CARVE's diagonal erase as part of the decay, for all tokens: log-decays g + log(1 - b), and their gradient."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import chunk_rows
from .decay import LOG2_E, STEEPEST_LOG2_DECAY, load_log2_decay, load_rate, softplus
from .launching import launch
from .stages import Call
from .tiles import load_columns, load_rows, store_rows

# Key columns of a program.
BLOCK = 64


class DecayInputs(NamedTuple):
    """What the decay is made of: g, raw where A_log and dt_bias [H, K] are given, and erase logits, [B, T, H, K];
    content [NC, H, K] float32, which is added to the logits of a chunk, or None."""

    g: Tensor
    erase_logits: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    content: Tensor | None


class DecayGradients(NamedTuple):
    """Of g and the erase logits as they were given, and sums over each chunk's tokens, [NC, H, K] float32."""

    g: Tensor
    erase_logits: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    content: Tensor


@triton.jit
def load_erase_logits(erase_logits, content, i_ch, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k):
    """Erase logits with what content adds, [BT, BK] float32."""
    b_l = load_rows(erase_logits, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    if content is not None:
        b_l += load_columns(content, i_ch, K, o_k)[None, :]
    return b_l


@triton.jit
def erasing_log2_decay(b_g, b_logits, m_r):
    """log2 of the decay with the erase, [rows, BK], from that without; 0 in empty rows.

    log(1 - sigmoid(x)) is -softplus(x).
    """
    b_a = tl.maximum(b_g - softplus(b_logits) * LOG2_E, STEEPEST_LOG2_DECAY)
    return tl.where(m_r[:, None], b_a, 0.0)


@triton.jit
def erasing_decay_kernel(
    g, erase_logits, A_log, dt_bias, content, log_decay, table, H,
    K: tl.constexpr, BK: tl.constexpr, RAW_DECAY: tl.constexpr,
):  # fmt: skip
    """One program per block of key columns, chunk and key head: writes log_decay [B, T, H, K] float32, natural."""
    i_c, i_h = tl.program_id(0).to(tl.int64) // (K // BK), tl.program_id(1)
    start, o_r, m_r = chunk_rows(table, i_c)
    o_k = (tl.program_id(0) % (K // BK)) * BK + tl.arange(0, BK)
    b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
    b_l = load_erase_logits(erase_logits, content, i_c * H + i_h, start, o_r, m_r, i_h, H, K, o_k)
    store_rows(log_decay, start, o_r, m_r, i_h, H, K, o_k, erasing_log2_decay(b_g, b_l, m_r) / LOG2_E)


@triton.jit
def erasing_decay_gradient_kernel(
    g, erase_logits, A_log, dt_bias, content, d_log_decay, dg, d_logits, dA_log, d_dt_bias, d_content, table, H,
    K: tl.constexpr, BK: tl.constexpr, RAW_DECAY: tl.constexpr,
):  # fmt: skip
    """The gradient of erasing_decay_kernel, with the same programs; outputs as in DecayGradients."""
    i_c, i_h = tl.program_id(0).to(tl.int64) // (K // BK), tl.program_id(1)
    i_ch = i_c * H + i_h
    start, o_r, m_r = chunk_rows(table, i_c)
    o_k = (tl.program_id(0) % (K // BK)) * BK + tl.arange(0, BK)
    b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
    b_l = load_erase_logits(erase_logits, content, i_ch, start, o_r, m_r, i_h, H, K, o_k)
    b_da = load_rows(d_log_decay, start, o_r, m_r, i_h, H, K, o_k)
    # A decay of exactly 0 has no gradient; what came is the rounding of a sum that cancels.
    b_da = tl.where(erasing_log2_decay(b_g, b_l, m_r) > STEEPEST_LOG2_DECAY, b_da, 0.0)
    b_dl = -tl.sigmoid(b_l) * b_da
    store_rows(d_logits, start, o_r, m_r, i_h, H, K, o_k, b_dl)
    tl.store(d_content + i_ch * K + o_k, tl.sum(tl.where(m_r[:, None], b_dl, 0.0), 0))
    if RAW_DECAY:
        b_da = tl.where(m_r[:, None], b_da, 0.0)
        tl.store(dA_log + i_ch * K + o_k, tl.sum(b_da * b_g, 0) / LOG2_E)
        b_x = load_rows(g, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) + load_columns(dt_bias, i_h, K, o_k)[None, :]
        b_da *= -load_rate(A_log, i_h, K, o_k)[None, :] * tl.sigmoid(b_x)
        tl.store(d_dt_bias + i_ch * K + o_k, tl.sum(b_da, 0))
    store_rows(dg, start, o_r, m_r, i_h, H, K, o_k, b_da)


def erasing_decay(call: Call, x: DecayInputs) -> Tensor:
    """log-decays with the erase in them, [B, T, H, K] float32, natural logarithm."""
    log_decay = torch.empty(x.g.shape, dtype=torch.float32, device=x.g.device)
    BK = min(BLOCK, call.K)
    launch(
        erasing_decay_kernel, (call.chunks.count * (call.K // BK), call.H),
        x.g, x.erase_logits, x.A_log, x.dt_bias, x.content, log_decay, call.chunks.table, call.H,
        K=call.K, BK=BK, RAW_DECAY=x.A_log is not None,
    )  # fmt: skip
    return log_decay


def erasing_decay_gradient(call: Call, x: DecayInputs, d_log_decay: Tensor) -> DecayGradients:
    dA_log, d_dt_bias = (call.floats(x.g, call.H, call.K) if x.A_log is not None else None for _ in range(2))
    d = DecayGradients(
        call.of_tokens(x.g), call.of_tokens(x.erase_logits), dA_log, d_dt_bias, call.floats(x.g, call.H, call.K)
    )  # fmt: skip
    BK = min(BLOCK, call.K)
    launch(
        erasing_decay_gradient_kernel, (call.chunks.count * (call.K // BK), call.H),
        x.g, x.erase_logits, x.A_log, x.dt_bias, x.content, d_log_decay, *d, call.chunks.table, call.H,
        K=call.K, BK=BK, RAW_DECAY=x.A_log is not None,
    )  # fmt: skip
    return d
