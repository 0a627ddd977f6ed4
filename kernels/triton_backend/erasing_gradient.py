"""CARVE with diagonal erase, the last stage of the backward: gradients of everything on the key axis.

The erase is part of the decay, whose gradient is summed up over many tokens, as that of A_log and of the content. So it
is formed without differences that cancel: what the rows from a step's own on gain with their decay from the chunk's
start, less what their keys lose as columns of scores, formed of the same rounded numbers; and what the keys before it
give to the chunk's end, and the state through it. The gradients of g and of the erase logits follow at once.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunk_gradient import WrittenParts, value_gradients
from .chunks import BT, chunk_rows
from .decay import (
    STEEPEST_LOG2_DECAY,
    UNSHIFT,
    erase_left,
    load_erase_logits,
    load_left,
    load_rate,
    load_step,
    load_total_decay,
)
from .gates import load_scalar_gate
from .launching import launch
from .products import matmul
from .special import LOG2_E, fast_sigmoid, log2_softplus, reciprocal, rounded
from .stages import HOPPER, Call, DecayInputs, Factors, Inputs, Tuning
from .steep import steep_gradient
from .tiles import load_columns, load_key_and_query, load_matrix, load_rows, load_tile, store_rows

TUNING = {HOPPER: Tuning(64, 0, 4)}
# Keeps 0 times it finite.
LARGEST_STEP = tl.constexpr(2.0**120)


@triton.jit
def load_right(left, i_ch, o_r, K: tl.constexpr, o_k):
    """right_factor of left, [BT, BK] float32, to 23 bits."""
    return reciprocal(tl.maximum(load_left(left, i_ch, o_r, K, o_k), UNSHIFT))


@triton.jit
def add_sums(b_sum, b_ones, b_x, CT: tl.constexpr):
    """b_sum + b_ones b_x as sum_rows of decay.py, [BT, BK] float32."""
    if tl.bfloat16 == CT:
        b_high = rounded(b_x, CT)
        b_sum = tl.dot(b_ones, b_high.to(CT), b_sum)
        b_sum = tl.dot(b_ones, (b_x - b_high).to(CT), b_sum)
    else:
        b_sum = tl.dot(b_ones, b_x, b_sum, input_precision="tf32x3")
    return b_sum


@triton.jit
def erasing_gradient_kernel(
    q, k, w, g, A_log, dt_bias, erase_logits, content, left, last, rest, steep_from,
    states, d_states, do, d_output_rows, state_rows, residuals, d_written, dT, dP, dP_own, steep_dk, steep_dg,
    dq, dk, dw, dg, d_logits, dA_log, d_dt_bias, d_content,
    triangles, table, scale, H,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
    BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of key columns, chunk and head: gradients of everything on the key axis.

    They come through the states before and after the chunk, and through the scores. A row of d_output_rows, if there
    are any, is added to do, and to d_states times state_rows [NC, H, K].

    Writes dq, dk, dg, d_logits [B, T, H, K]; of the write gate as it erases a share by block of key columns, dw
    [B, T, H, K // BK] float32; and sums over the chunk's tokens [NC, H, K] float32: d_content, and dA_log and d_dt_bias
    for RAW_DECAY. On entry dq, steep_dk, d_logits and steep_dg of a chunk with steep rows hold the gradients of q, k,
    erased keys and decays that steep_gradient_kernel wrote there.
    """
    i_c, i_h = tl.program_id(0).to(tl.int64) // (K // BK), tl.program_id(1)
    i_k = tl.program_id(0) % (K // BK)
    i_ch = i_c * H + i_h
    o_r, o_v = tl.arange(0, BT), tl.arange(0, V)
    o_k = i_k * BK + tl.arange(0, BK)
    # Rows and columns of scores are rounded once for the products and for what rows gain and keys lose. One gradient
    # follows the other, and loads anew what it needs: together they would take more registers than there are.
    b_S = load_matrix(states, i_ch, o_k, o_v, K, V, False)
    b_dT, b_dP = load_tile(dT, i_ch, o_r, BT, o_r), load_tile(dP, i_ch, o_r, BT, o_r)
    b_left = load_left(left, i_ch, o_r, K, o_k)
    first_steep = tl.load(steep_from + i_ch)
    start, o_r, m_r = chunk_rows(table, i_c)
    b_w = load_scalar_gate(w, start, o_r, m_r, i_h, H, LOGITS_W)[:, None]
    b_k, b_q = load_key_and_query(k, q, start, o_r, m_r, i_h, H, K, o_k, scale)
    b_do = load_rows(do, start, o_r, m_r, i_h, H, V, o_v)
    b_dcolumn = matmul(tl.trans(b_dP), b_q * b_left, CT, PRECISION)
    b_columns = (b_k * reciprocal(tl.maximum(b_left, UNSHIFT))).to(CT)
    b_erased = b_w * b_k * erase_left(b_left, left, i_ch, o_r, K, o_k, BEFORE)
    b_dcolumn += matmul(tl.trans(b_dT), b_erased, CT, PRECISION)
    tl.debug_barrier()
    b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_right = load_right(left, i_ch, o_r, K, o_k)
    b_da = -rounded(b_k * b_right, CT) * b_dcolumn
    b_dk = b_right * b_dcolumn
    if first_steep < BT:
        b_dk += load_rows(steep_dk, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        b_da += load_rows(steep_dg, start, o_r, m_r, i_h, H, K, o_k)
    # of queries
    tl.debug_barrier()
    b_dq = matmul(b_do, tl.trans(b_S), CT, PRECISION)
    if d_output_rows is not None:
        b_d_rows = tl.broadcast_to(load_columns(d_output_rows, i_ch, V, o_v).to(CT)[None, :], [BT, V])
        b_dq = tl.dot(b_d_rows, tl.trans(b_S.to(CT)), b_dq, input_precision=PRECISION)
    b_dq *= UNSHIFT
    b_dq += matmul(b_dP, b_columns, CT, PRECISION)
    tl.debug_barrier()
    b_k, b_q = load_key_and_query(k, q, start, o_r, m_r, i_h, H, K, o_k, scale)
    b_left = load_left(left, i_ch, o_r, K, o_k)
    b_da += rounded(b_q * b_left, CT) * b_dq
    b_dq *= b_left
    b_own = tl.load(dP_own + i_ch * BT + o_r)[:, None]  # a query meets the key of its own row without decay
    b_dk += b_own * b_q
    if first_steep < BT:
        b_dq += load_rows(dq, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    store_rows(dq, start, o_r, m_r, i_h, H, K, o_k, scale * (b_dq + b_own * b_k))
    # of erased keys, whose own decay is, or if BEFORE is not, in theirs
    b_dz = load_tile(d_written, i_ch, o_r, V, o_v)
    b_derased = matmul(b_dz, tl.trans(b_S), CT, PRECISION) * -UNSHIFT
    b_derased += matmul(b_dT, b_columns, CT, PRECISION)
    tl.debug_barrier()
    b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_left = erase_left(load_left(left, i_ch, o_r, K, o_k), left, i_ch, o_r, K, o_k, BEFORE)
    b_da_later = b_da + rounded(b_w * b_k * b_left, CT) * b_derased
    b_derased *= b_left
    if not BEFORE:
        b_da = b_da_later
    if first_steep < BT:
        b_steep = load_rows(d_logits, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        b_derased += b_steep
        if BEFORE:
            b_da -= b_w * b_k * b_steep
    b_dk += b_w * b_derased
    b_dw = tl.sum(b_k * b_derased, 1)
    if LOGITS_W:
        b_dw *= tl.sum(b_w * (1.0 - b_w), 1)
    tl.store(dw + ((start + o_r) * H + i_h) * (K // BK) + i_k, b_dw, mask=m_r)
    b_da = add_sums(b_da, load_tile(triangles, 0, o_r, BT, o_r), b_da_later, CT)
    # of keys on their way to the chunk's end, and of the state on its way through it
    tl.debug_barrier()
    b_dS = load_matrix(d_states, i_ch, o_k, o_v, K, V, False)
    if d_output_rows is not None:
        b_d_rows = load_columns(d_output_rows, i_ch, V, o_v)[None, :]
        b_dS = (b_dS.to(tl.float32) + load_columns(state_rows, i_ch, K, o_k)[:, None] * b_d_rows).to(CT)
    b_dtotal = matmul(b_S, tl.trans(b_dS), CT, PRECISION)
    b_dtotal = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_dtotal, 0.0), 1) * load_total_decay(last, i_ch, K, o_k)
    b_da += b_dtotal[None, :]
    b_dk_to_end = matmul(load_tile(residuals, i_ch, o_r, V, o_v), tl.trans(b_dS), CT, PRECISION)
    tl.debug_barrier()
    b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_l = load_erase_logits(erase_logits, content, i_ch, start, o_r, m_r, i_h, H, K, o_k)
    b_to_end = load_right(left, i_ch, o_r, K, o_k) * load_columns(last, i_ch, K, o_k)[None, :]
    if first_steep < BT:
        b_to_end = load_tile(rest, i_ch, o_r, K, o_k).to(tl.float32)
    b_dk_to_end *= b_to_end
    store_rows(dk, start, o_r, m_r, i_h, H, K, o_k, b_dk + b_dk_to_end)
    b_da = add_sums(b_da, load_tile(triangles, 1, o_r, BT, o_r), b_dk_to_end * b_k, CT)

    # of log-decays, then of what they are made of
    if first_steep < BT:
        # A decay of exactly 0 has no gradient; what came is the rounding of a sum that cancels.
        b_a = load_step(g, A_log, dt_bias, erase_logits, content, i_ch, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
        b_da = tl.where(b_a > STEEPEST_LOG2_DECAY, b_da, 0.0)
    b_dl = -fast_sigmoid(b_l) * b_da
    store_rows(d_logits, start, o_r, m_r, i_h, H, K, o_k, b_dl)
    tl.store(d_content + i_ch * K + o_k, tl.sum(tl.where(m_r[:, None], b_dl, 0.0), 0))
    if RAW_DECAY:
        b_da = tl.where(m_r[:, None], b_da, 0.0) * -load_rate(A_log, i_h, K, o_k)[None, :]
        b_x = load_rows(g, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) + load_columns(dt_bias, i_h, K, o_k)[None, :]
        tl.store(dA_log + i_ch * K + o_k, tl.sum(b_da * tl.minimum(log2_softplus(b_x), LARGEST_STEP), 0) / LOG2_E)
        b_da *= fast_sigmoid(b_x)
        tl.store(d_dt_bias + i_ch * K + o_k, tl.sum(b_da, 0))
    store_rows(dg, start, o_r, m_r, i_h, H, K, o_k, b_da)


@functools.cache
def triangles(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[2, C, C], row r, column s: one where s is after r; where it is before."""
    ones = torch.ones(CHUNK_TOKENS, CHUNK_TOKENS, device=device, dtype=dtype)
    return torch.stack([ones.triu(1), ones.tril(-1)])


def erasing_gradient(
    call: Call, x: Inputs, decay: DecayInputs, factors: Factors, residuals: Tensor, A: Tensor, states: Tensor,
    do: Tensor, d_output_rows: Tensor | None, state_rows: Tensor | None, d_residuals: Tensor | None, d_states: Tensor,
    d_written: WrittenParts | None,
) -> Inputs:  # fmt: skip
    """Gradients of what the op was given: q, k, v, g, the erase logits in the place of b, w, A_log, dt_bias, and, not
    of the op but by chunk, the content term.

    Args:
        x: with the log-decay that the erase is part of, which is lost: steep rows leave their part of its gradient.
        decay: with the content terms of the forward.
        state_rows: what d_output_rows are multiplied with in d_states.
        d_residuals, d_written: one of them; see chunk_value_gradient_kernel.
    """
    BK = call.key_block(TUNING)
    blocks = call.K // BK
    # The write gate that also erases has gradients that are added up before they are rounded.
    dw = call.of_tokens(x.w, dtype=torch.float32)
    dw_erasing = call.of_tokens(x.w, *x.w.shape, blocks, dtype=torch.float32)
    of_values = value_gradients(call, x, A, residuals, do, d_output_rows, d_residuals, d_written, dw, False)
    dq, dk, dg, d_logits = (call.of_tokens(given) for given in (x.q, x.k, decay.g, decay.erase_logits))
    steep_dk, steep_dg = torch.empty_like(dk), x.g
    steep_gradient(call, x, factors, of_values.dT, of_values.dP, dq, steep_dk, d_logits, steep_dg)
    d_content, dA_log, d_dt_bias = (
        None if of is None else call.floats(x.q, call.H, call.K) for of in (x.q, decay.A_log, decay.dt_bias)
    )
    launch(
        erasing_gradient_kernel, (call.chunks.count * blocks, call.H),
        x.q, x.k, x.w, decay.g, decay.A_log, decay.dt_bias, decay.erase_logits, decay.content, *factors.of_rows,
        states, d_states, do, d_output_rows, state_rows, residuals, of_values.d_written, *of_values.of_scores,
        steep_dk, steep_dg,
        dq, dk, dw_erasing, dg, d_logits, dA_log, d_dt_bias, d_content,
        triangles(x.q.device, call.tile_dtype), call.chunks.table, call.scale, call.H,
        K=call.K, BK=BK, V=call.V, BEFORE=call.before, RAW_DECAY=decay.A_log is not None,
        LOGITS_W=call.logits_w, **call.launch(TUNING, BK, call.V),
    )  # fmt: skip
    dw = torch.add(dw_erasing.sum(-1), dw, out=torch.empty_like(x.w))
    if dA_log is not None and d_dt_bias is not None:
        dA_log, d_dt_bias = dA_log.sum(0), d_dt_bias.sum(0)
    return Inputs(dq, dk, of_values.v, dg, d_logits, dw, dA_log, d_dt_bias, d_content)
