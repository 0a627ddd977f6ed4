"""The last stages of the backward: gradients of everything that belongs to tokens, for all chunks at once. CARVE's
diagonal form has the first of them, and erasing_gradient.py."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, chunk_rows
from .decay import (
    STEEPEST_LOG2_DECAY,
    UNSHIFT,
    load_decay_to_end,
    load_left,
    load_log2_decay,
    load_rate,
    load_total_decay,
    right_factor,
    sum_rows,
)
from .gates import GATE_SCALAR, GATE_SCALAR_LOGITS, GATE_VALUES, load_erase_gate, load_write_gate
from .launching import launch
from .products import matmul
from .special import LOG2_E, fast_sigmoid
from .stages import HOPPER, Call, Factors, Inputs, Tuning
from .steep import steep_gradient
from .tiles import load_columns, load_matrix, load_rows, load_tile, store_rows, store_tile

VALUE_TUNING = {HOPPER: Tuning(0, 0, 4)}
# Where what the chunks write has its gradient: four programs on a multiprocessor.
GIVEN_TUNING = {HOPPER: Tuning(0, 0, 4, maxnreg=128)}
KEY_TUNING = {HOPPER: Tuning(64, 0, 4)}


@triton.jit
def chunk_value_gradient_kernel(
    v, w, A, do, d_output_rows, written_rows, residuals, d_residuals,
    dv, dw, d_written, dT, dP, dP_own,
    table, HV, HE,
    V: tl.constexpr, SPLIT: tl.constexpr, SCALAR_W: tl.constexpr, LOGITS_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and value head: gradients of values, write gates and both score matrices. Without
    d_residuals d_written is given.

    HE heads have an erase gate, and so A, of their own. TRANSPOSED: residuals and their gradients are [V, C]. A row of
    d_output_rows [NC, HV, V], if there are any, is added to do, and to d_written, if that is given, times written_rows
    [NC, HV, C].

    Writes dv like v; dw like w, of a scalar gate [B, T, HV]; and per chunk
        d_written [NC, HV, C, V]: A^T dR, gradient of w v,
        dT, dP [NC, HV, C, C]: gradients of the erased scores and of the query scores with earlier keys,
        dP_own [NC, HV, C] float32: gradient of the query scores with the keys of the same row.
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_chv = i_c * HV + i_hv
    start, o_r, m_r = chunk_rows(table, i_c)
    o_v = tl.arange(0, V)
    if d_residuals is None:
        b_dz = load_tile(d_written, i_chv, o_r, V, o_v).to(tl.float32)
        b_weights = load_columns(written_rows, i_chv, BT, o_r)[:, None]
        b_dz += b_weights * load_columns(d_output_rows, i_chv, V, o_v)[None, :]
        store_tile(d_written, i_chv, o_r, V, o_v, b_dz)
        # loaded again it has a layout that suits the product, and its parts take no registers meanwhile
        tl.debug_barrier()
        b_dz = load_tile(d_written, i_chv, o_r, V, o_v).to(tl.float32)
    else:
        b_At = load_matrix(A, i_c * HE + i_hv // (HV // HE), o_r, o_r, BT, BT, True)
        b_dz = matmul(b_At, load_matrix(d_residuals, i_chv, o_r, o_v, BT, V, TRANSPOSED), CT, PRECISION)
        store_tile(d_written, i_chv, o_r, V, o_v, b_dz)
    b_v = load_rows(v, start, o_r, m_r, i_hv, HV, V, o_v).to(tl.float32)
    b_w = load_write_gate(w, start, o_r, m_r, i_hv, HV, V, o_v, SPLIT, SCALAR_W, LOGITS_W)
    store_rows(dv, start, o_r, m_r, i_hv, HV, V, o_v, b_w * b_dz)
    b_dw = b_v * b_dz
    if LOGITS_W:
        b_dw *= b_w * (1.0 - b_w)
    if SCALAR_W:
        tl.store(dw + (start + o_r) * HV + i_hv, tl.sum(b_dw, 1).to(dw.dtype.element_ty), mask=m_r)
    else:
        store_rows(dw, start, o_r, m_r, i_hv, HV, V, o_v, b_dw)
    b_R = load_matrix(residuals, i_chv, o_r, o_v, BT, V, TRANSPOSED)
    b_dT = -matmul(b_dz, tl.trans(b_R), CT, PRECISION)
    store_tile(dT, i_chv, o_r, BT, o_r, tl.where(o_r[None, :] < o_r[:, None], b_dT, 0.0))
    b_do = load_rows(do, start, o_r, m_r, i_hv, HV, V, o_v)
    if d_output_rows is not None:
        b_do = b_do.to(tl.float32) + load_columns(d_output_rows, i_chv, V, o_v)[None, :]
        b_do = tl.where(m_r[:, None], b_do, 0.0)
    b_dP = matmul(b_do, tl.trans(b_R), CT, PRECISION)
    tl.store(dP_own + i_chv * BT + o_r, tl.sum(tl.where(o_r[:, None] == o_r[None, :], b_dP, 0.0), 1))
    store_tile(dP, i_chv, o_r, BT, o_r, tl.where(o_r[None, :] < o_r[:, None], b_dP, 0.0))


@triton.jit
def chunk_key_gradient_kernel(
    q, k, g, b, A_log, dt_bias, content, left, last, rest, steep_from,
    states, d_states, do, d_output_rows, residuals, d_written, dT, dP, dP_own, steep_dk, steep_dbk,
    dq, dk, dg, db, d_content, dA_log, d_dt_bias,
    table, scale, erase_scale, H, HV, HE,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
    GATE: tl.constexpr, RAW_DECAY: tl.constexpr,
    CONTENT: tl.constexpr, STATES_T: tl.constexpr, TRANSPOSED: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of key columns, chunk and value head: gradients of everything on the key axis.

    They come through the states before and after the chunk, and through the scores. STATES_T: the states are [V, K].
    TRANSPOSED: so are their gradients, and the residuals are [V, C]. A row of d_output_rows, if there are any, is added
    to do.

    Writes a value head's share of dq, dk, dg, db [B, T, HV, K], of a scalar gate's db a share by block of key columns,
    [B, T, HV, K // BK]; and sums over the chunk's tokens [NC, HV, K] float32: d_content for CONTENT, dA_log and
    d_dt_bias for RAW_DECAY. On entry dq, steep_dk and steep_dbk of a chunk with steep rows hold what
    steep_gradient_kernel wrote there.
    """
    i_c, i_hv = tl.program_id(0).to(tl.int64) // (K // BK), tl.program_id(1)
    i_k = tl.program_id(0) % (K // BK)
    i_h = i_hv // (HV // H)
    i_ch, i_chv, i_e = i_c * H + i_h, i_c * HV + i_hv, i_c * HE + i_hv // (HV // HE)
    start, o_r, m_r = chunk_rows(table, i_c)
    o_v = tl.arange(0, V)
    o_k = i_k * BK + tl.arange(0, BK)
    first_steep = tl.load(steep_from + i_ch)
    # The products. What they need is loaded for them alone: loaded again below it takes no registers meanwhile.
    b_S = load_matrix(states, i_chv, o_k, o_v, K, V, STATES_T)
    b_dS = load_matrix(d_states, i_chv, o_k, o_v, K, V, TRANSPOSED)
    b_dtotal = tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1) * load_total_decay(last, i_ch, K, o_k)
    if d_output_rows is not None:
        b_S_row = tl.sum(b_S.to(tl.float32) * load_columns(d_output_rows, i_chv, V, o_v)[None, :], 1) * UNSHIFT
    b_R = load_matrix(residuals, i_chv, o_r, o_v, BT, V, TRANSPOSED)
    b_dk = matmul(b_R, tl.trans(b_dS), CT, PRECISION)
    b_do = load_rows(do, start, o_r, m_r, i_hv, HV, V, o_v)
    b_dq = matmul(b_do, tl.trans(b_S), CT, PRECISION) * UNSHIFT
    if d_output_rows is not None:
        b_dq += b_S_row[None, :]
    b_dbk = matmul(load_tile(d_written, i_chv, o_r, V, o_v), tl.trans(b_S), CT, PRECISION) * -UNSHIFT
    b_left = load_left(left, i_ch, o_r, K, o_k)
    b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_dT, b_dP = load_tile(dT, i_chv, o_r, BT, o_r), load_tile(dP, i_chv, o_r, BT, o_r)
    b_columns = (b_k * right_factor(b_left)).to(CT)
    b_dq += matmul(b_dP, b_columns, CT, PRECISION)
    b_dbk += matmul(b_dT, b_columns, CT, PRECISION)
    b_k *= load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_e, K, o_k, erase_scale, GATE)
    b_k *= b_left
    b_dcolumn = matmul(tl.trans(b_dT), b_k, CT, PRECISION)
    b_q = load_rows(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale * b_left
    b_dcolumn += matmul(tl.trans(b_dP), b_q, CT, PRECISION)

    tl.debug_barrier()  # also keeps the compiler from holding on to what was loaded above
    b_left = load_left(left, i_ch, o_r, K, o_k)
    b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    b_dk *= load_decay_to_end(b_left, last, rest, first_steep, i_ch, o_r, K, o_k)
    # The log-decays: what a row gains with its decay from the start, a key loses. The decay of the whole chunk is in
    # that of every step, and a key's decay to the chunk's end in that of the steps after it: all keys' minus those of
    # later ones.
    b_dtotal += tl.sum(b_dk * b_k, 0)
    b_dbk *= b_left
    b_dk += b_dcolumn * right_factor(b_left)
    b_dq *= b_left
    if first_steep < BT:
        b_dk += load_rows(steep_dk, start, o_r, m_r, i_hv, HV, K, o_k).to(tl.float32)
        b_dq += load_rows(dq, start, o_r, m_r, i_hv, HV, K, o_k).to(tl.float32)
        b_dbk += load_rows(steep_dbk, start, o_r, m_r, i_hv, HV, K, o_k).to(tl.float32)
    b_q = load_rows(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale
    b_dg = b_q * b_dq - b_k * b_dk
    # a query meets the key of its own row without decay
    b_own = tl.load(dP_own + i_chv * BT + o_r)[:, None]
    store_rows(dq, start, o_r, m_r, i_hv, HV, K, o_k, scale * (b_dq + b_own * b_k))
    b_dk += b_own * b_q
    b_b = load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_e, K, o_k, erase_scale, GATE)
    store_rows(dk, start, o_r, m_r, i_hv, HV, K, o_k, b_dk + b_b * b_dbk)
    b_db = b_k * b_dbk
    b_dg += b_b * b_db
    if (GATE != GATE_VALUES) & (GATE != GATE_SCALAR):
        b_db *= b_b * (1.0 - b_b / erase_scale)
    if CONTENT:
        tl.store(d_content + i_chv * K + o_k, tl.sum(tl.where(m_r[:, None], b_db, 0.0), 0))
    if (GATE == GATE_SCALAR) | (GATE == GATE_SCALAR_LOGITS):
        tl.store(db + ((start + o_r) * HV + i_hv) * (K // BK) + i_k, tl.sum(b_db, 1), mask=m_r)
    else:
        store_rows(db, start, o_r, m_r, i_hv, HV, K, o_k, b_db)
    b_dg = sum_rows(o_r[None, :] >= o_r[:, None], b_dg, CT) + b_dtotal[None, :]
    if RAW_DECAY:
        b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
        # A decay of exactly 0 has no gradient; what came is the rounding of a sum that cancels.
        b_dg = tl.where(m_r[:, None] & (b_g > STEEPEST_LOG2_DECAY), b_dg, 0.0)
        tl.store(dA_log + i_chv * K + o_k, tl.sum(b_dg * b_g, 0) / LOG2_E)
        b_x = load_rows(g, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        b_x += tl.load(dt_bias + i_h * K + o_k)[None, :]
        b_dg *= -load_rate(A_log, i_h, K, o_k)[None, :] * fast_sigmoid(b_x)
        tl.store(d_dt_bias + i_chv * K + o_k, tl.sum(b_dg, 0))
    store_rows(dg, start, o_r, m_r, i_hv, HV, K, o_k, b_dg)


class WrittenParts(NamedTuple):
    """What the gradient of what the chunks write is the sum of: all but what d_output_rows gives it, [NC, HV, C, V],
    and d_output_rows times rows [NC, HV, C]."""

    without_rows: Tensor
    rows: Tensor | None


class ValueGradients(NamedTuple):
    """What chunk_value_gradient_kernel writes."""

    v: Tensor
    w: Tensor
    d_written: Tensor
    dT: Tensor
    dP: Tensor
    dP_own: Tensor

    @property
    def of_scores(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.dT, self.dP, self.dP_own


def value_gradients(
    call: Call, x: Inputs, A: Tensor, residuals: Tensor, do: Tensor, d_output_rows: Tensor | None,
    d_residuals: Tensor | None, given: WrittenParts | None, dw: Tensor, transposed: bool,
) -> ValueGradients:  # fmt: skip
    """
    Args:
        given: in the place of d_residuals; becomes their sum.
        dw: memory for the gradient of the write gate.
        transposed: residuals and their gradients.
    """

    def scores() -> Tensor:
        return call.tiles(do, call.HV, CHUNK_TOKENS, CHUNK_TOKENS)

    d_written, rows = given or WrittenParts(call.tiles(do, call.HV, CHUNK_TOKENS, call.V), None)
    d = ValueGradients(call.of_tokens(x.v), dw, d_written, scores(), scores(), call.floats(do, call.HV, CHUNK_TOKENS))
    tuning = GIVEN_TUNING if given and call.tile_dtype == torch.bfloat16 else VALUE_TUNING
    launch(
        chunk_value_gradient_kernel, (call.chunks.count, call.HV),
        x.v, x.w, A, do, d_output_rows, rows, residuals, d_residuals, *d,
        call.chunks.table, call.HV, call.erase_heads,
        V=call.V, SPLIT=call.split, SCALAR_W=call.scalar_w, LOGITS_W=call.logits_w,
        TRANSPOSED=transposed, **call.launch(tuning, call.V),
    )  # fmt: skip
    return d


def _sum_by_head(d: Tensor, heads: int) -> Tensor:
    """[..., HV, K] -> [..., heads, K]."""
    return d if d.shape[-2] == heads else d.unflatten(-2, (heads, -1)).sum(-2)


def chunk_gradient(
    call: Call, x: Inputs, factors: Factors, residuals: Tensor, A: Tensor, states: Tensor, do: Tensor,
    d_output_rows: Tensor | None, d_residuals: Tensor, d_states: Tensor, d_content: Tensor | None,
) -> Inputs:  # fmt: skip
    """Gradients of the inputs; None for what the call has not."""
    tokens = x.q.shape[:2]
    BK = call.key_block(KEY_TUNING)
    blocks = call.K // BK
    transposed = call.sees_content and d_output_rows is not None  # from the delta form's loop

    # What value heads share, and of a scalar erase gate the blocks of key columns, is summed up afterwards.
    def share(given: Tensor, *width: int) -> Tensor:
        dtype = given.dtype if given.shape[2] == call.HV else torch.float32
        return call.of_tokens(given, *tokens, call.HV, *width, dtype=dtype)

    def vector(wanted: bool) -> Tensor | None:
        return call.floats(x.q, call.HV, call.K) if wanted else None

    dw = share(x.w) if call.scalar_w else call.of_tokens(x.w)
    of_values = value_gradients(call, x, A, residuals, do, d_output_rows, d_residuals, None, dw, transposed)
    dq, dk, dg = (share(given, call.K) for given in (x.q, x.k, x.g))
    if call.scalar_b:
        db = call.of_tokens(x.b, *tokens, call.HV, blocks, dtype=torch.float32)
        steep_dbk = torch.empty_like(dk)
    else:
        db = steep_dbk = share(x.b, call.K)
    dA_log, d_dt_bias = vector(call.raw_decay), vector(call.raw_decay)
    d_content_share = vector(call.sees_content and d_content is None)
    steep_dk = torch.empty_like(dk)
    steep_gradient(call, x, factors, of_values.dT, of_values.dP, dq, steep_dk, steep_dbk, None)
    launch(
        chunk_key_gradient_kernel, (call.chunks.count * blocks, call.HV),
        x.q, x.k, x.g, x.b, x.A_log, x.dt_bias, x.content, *factors.of_rows,
        states, d_states, do, d_output_rows, residuals, of_values.d_written, *of_values.of_scores, steep_dk, steep_dbk,
        dq, dk, dg, db, d_content_share, dA_log, d_dt_bias,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV, call.erase_heads,
        K=call.K, BK=BK, V=call.V, GATE=call.gate, RAW_DECAY=call.raw_decay, CONTENT=d_content_share is not None,
        STATES_T=call.sees_content, TRANSPOSED=transposed, **call.launch(KEY_TUNING, BK, call.V),
    )  # fmt: skip

    def gather(dx: Tensor, given: Tensor) -> Tensor:
        if dx.shape == given.shape:
            return dx
        return dx.view(*given.shape[:3], -1, *given.shape[3:]).sum(3).to(given.dtype)

    if call.scalar_b:
        db = db.view(*db.shape[:2], call.H, -1, blocks).sum((3, 4)).to(x.b.dtype)
    if dA_log is not None and d_dt_bias is not None:
        dA_log, d_dt_bias = (_sum_by_head(d.sum(0), call.H) for d in (dA_log, d_dt_bias))
    if d_content_share is not None:
        d_content = _sum_by_head(d_content_share, call.erase_heads)
    return Inputs(
        gather(dq, x.q), gather(dk, x.k), of_values.v, gather(dg, x.g), gather(db, x.b), gather(dw, x.w),
        dA_log, d_dt_bias, d_content,
    )  # fmt: skip
