"""Scores of steep rows, those whose decay from the chunk's start is beyond the range of a factor, and their gradient.

Late rows (see decay.py) have factors of their own. For halved rows the chunk is halved again and again instead. At a
step, rows of a lower half meet the columns of the upper half before it, and the decay splits at the upper half's last
row: both factors are exponentials of sums of the steps in between alone, at most 1 for any decay.

Kernels of their own do this, so that the others, for which steep rows are rare, need no registers for it. Only CARVE's
loops, whose erase gate nobody knows before, form the erased scores T themselves.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS
from .chunks import BT, chunk_rows
from .decay import erase_left, halved_rows, has_halved_rows, load_late_factors, load_log2_decay, sum_rows
from .gates import load_erase_gate
from .launching import launch
from .products import matmul, pairs_of_halves
from .special import fast_exp2
from .stages import HOPPER, Call, Factors, Inputs, Tuning
from .tiles import load_key_and_query, load_rows, store_rows, store_tile

TUNING = {HOPPER: Tuning(64, 0, 4)}

HALVINGS = tl.constexpr(6)
# Chunks per program: most have no steep row, and finding that out for one costs less than starting a program.
GROUP = tl.constexpr(4)


@triton.jit
def halving_factor(b_g, o_r, step, CT: tl.constexpr, BEFORE: tl.constexpr = False):
    """The factor that each row needs at a step, [BT, BK]: left in a lower half, right in an upper one.

    BEFORE: left counts the decays before the row's own.
    """
    half = o_r >> step
    in_lower = (half & 1) == 1
    after = tl.where(in_lower, half << step, o_r + 1)
    until = tl.where(in_lower, o_r + (0 if BEFORE else 1), (half + 1) << step)
    return fast_exp2(sum_rows((o_r[None, :] >= after[:, None]) & (o_r[None, :] < until[:, None]), b_g, CT))


@triton.jit
def load_score_rows(
    rows, b, content, k, start, o_r, m_r, i_h, H, i_content, K: tl.constexpr, o_k, factor, erase_scale,
    ERASED: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """What scores are of, and keys, [BT, BK] float32 each: rows of `rows` times `factor`, or the ERASED keys b k."""
    b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    if ERASED:
        b_row = b_k * load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_content, K, o_k, erase_scale, GATE)
    else:
        b_row = load_rows(rows, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * factor
    return b_row, b_k


@triton.jit
def halved_scores(
    rows, b, content, k, g, A_log, dt_bias, start, o_r, m_r, i_h, H, i_content, factor, erase_scale,
    K: tl.constexpr, BK: tl.constexpr, ERASED: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr,
    RAW_DECAY: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores with earlier keys by halving, for any decay, [BT, BT] float32; of ERASED keys BEFORE their own decay."""
    b_scores = tl.zeros([BT, BT], tl.float32)
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
        b_row, b_k = load_score_rows(
            rows, b, content, k, start, o_r, m_r, i_h, H, i_content, K, o_k, factor, erase_scale, ERASED, GATE
        )
        for step in range(HALVINGS):
            # of upper halves, whose rows are the columns here, the factor is the same
            b_e = halving_factor(b_g, o_r, step, CT, ERASED & BEFORE)
            b_product = matmul(b_row * b_e, tl.trans((b_k * b_e).to(CT)), CT, PRECISION)
            b_scores += tl.where(pairs_of_halves(o_r, step), b_product, 0.0)
    return b_scores


@triton.jit
def steep_scores(
    rows, b, k, g, late, A_log, dt_bias, start, o_r, m_r, i_h, H, i_ch, factor, erase_scale, first_steep, first_halved,
    K: tl.constexpr, BK: tl.constexpr, ERASED: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr,
    RAW_DECAY: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores with earlier keys, [BT, BT] float32, of which those of steep rows count."""
    b_scores = tl.zeros([BT, BT], tl.float32)
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_row, b_k = load_score_rows(
            rows, b, b, k, start, o_r, m_r, i_h, H, 0, K, o_k, factor, erase_scale, ERASED, GATE
        )
        b_left, b_right = load_late_factors(late, i_ch, o_r, K, o_k)
        b_left = erase_left(b_left, late, i_ch, o_r, K, o_k, ERASED & BEFORE, 32)
        b_scores += matmul(b_row * b_left, tl.trans((b_k * b_right).to(CT)), CT, PRECISION)
    if has_halved_rows(first_steep, first_halved):
        b_halved = halved_scores(
            rows, b, b, k, g, A_log, dt_bias, start, o_r, m_r, i_h, H, 0, factor, erase_scale,
            K, BK, ERASED, GATE, BEFORE, RAW_DECAY, CT, PRECISION,
        )  # fmt: skip
        b_scores = tl.where(halved_rows(o_r, first_steep, first_halved)[:, None], b_halved, b_scores)
    return b_scores


@triton.jit
def merge_scores(b_mild, p_steep, first_steep, o_r):
    """Scores of a chunk, strictly lower [BT, BT] float32: rows from first_steep on are those at p_steep."""
    m_steep = (o_r >= first_steep)[:, None]
    # a mask of whole rows: one that differs between columns loads number by number
    b_steep = tl.load(p_steep, mask=m_steep, other=0.0).to(tl.float32)
    return tl.where(o_r[None, :] < o_r[:, None], tl.where(m_steep, b_steep, b_mild), 0.0)


@triton.jit
def group_is_mild(steep_from, i_h, H, chunks):
    """Whether this program's chunks have no steep row."""
    o_c = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    return tl.min(tl.load(steep_from + o_c * H + i_h, mask=o_c < chunks, other=BT), 0) == BT


@triton.jit
def group_of_chunks(chunks):
    """(first chunk of this program, the one after its last)."""
    begin = tl.program_id(0).to(tl.int64) * GROUP
    return begin, tl.minimum(begin + GROUP, chunks)


@triton.jit
def steep_chunk(steep_from, halved_from, table, i_c, i_ch):
    """(first steep row of a chunk and head, first halved one, token of row 0, rows, which of them hold a token)."""
    start, o_r, m_r = chunk_rows(table, i_c)
    return tl.load(steep_from + i_ch), tl.load(halved_from + i_ch), start, o_r, m_r


@triton.jit
def steep_scores_kernel(
    q, k, g, b, A_log, dt_bias, late, steep_from, halved_from, T, P, table, scale, erase_scale, chunks, H,
    K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, RAW_DECAY: tl.constexpr,
    WITH_T: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per group of chunks and key head: writes T and P [NC, H, C, C], of which the steep rows count."""
    i_h = tl.program_id(1)
    if group_is_mild(steep_from, i_h, H, chunks):
        return
    begin, end = group_of_chunks(chunks)
    for i_c in range(begin, end):
        i_ch = i_c * H + i_h
        first_steep, first_halved, start, o_r, m_r = steep_chunk(steep_from, halved_from, table, i_c, i_ch)
        if first_steep < BT:
            b_P = steep_scores(
                q, b, k, g, late, A_log, dt_bias, start, o_r, m_r, i_h, H, i_ch, scale, erase_scale,
                first_steep, first_halved, K, BK, False, GATE, BEFORE, RAW_DECAY, CT, PRECISION,
            )  # fmt: skip
            store_tile(P, i_ch, o_r, BT, o_r, b_P)
            if WITH_T:
                b_T = steep_scores(
                    k, b, k, g, late, A_log, dt_bias, start, o_r, m_r, i_h, H, i_ch, 1.0, erase_scale,
                    first_steep, first_halved, K, BK, True, GATE, BEFORE, RAW_DECAY, CT, PRECISION,
                )  # fmt: skip
                store_tile(T, i_ch, o_r, BT, o_r, b_T)


@triton.jit
def steep_gradient_kernel(
    q, k, g, b, A_log, dt_bias, content, late, steep_from, halved_from, dT, dP, dq, dk, dbk, dg,
    table, scale, erase_scale, chunks, H, HV, HE,
    K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, PRECISE: tl.constexpr,
    RAW_DECAY: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per group of chunks and value head; HE heads have an erase gate of their own.

    Writes [B*T, HV, K] each, through the scores of steep rows: the gradients dq of scale * q, and dk, dbk of k and b k;
    if PRECISE in dg that of the sum of log-decays from the chunk's start through each row (before it, in erased keys).
    Takes steep rows out of dT and dP.
    """
    i_hv = tl.program_id(1)
    i_h = i_hv // (HV // H)
    if group_is_mild(steep_from, i_h, H, chunks):
        return
    begin, end = group_of_chunks(chunks)
    for i_c in range(begin, end):
        i_ch = i_c * H + i_h
        first_steep, first_halved, start, o_r, m_r = steep_chunk(steep_from, halved_from, table, i_c, i_ch)
        if first_steep < BT:
            m_halved = halved_rows(o_r, first_steep, first_halved)[:, None]
            i_chv, i_e = i_c * HV + i_hv, i_c * HE + i_hv // (HV // HE)
            o_square = i_chv * BT * BT + (o_r[:, None] * BT + o_r[None, :])
            b_dT, b_dP = tl.load(dT + o_square), tl.load(dP + o_square)
            m_late = (o_r >= first_steep)[:, None] & ~m_halved
            b_dT_late, b_dP_late = tl.where(m_late, b_dT, 0.0), tl.where(m_late, b_dP, 0.0)
            for i_k in range(K // BK):
                o_k = i_k * BK + tl.arange(0, BK)
                b_k, b_q = load_key_and_query(k, q, start, o_r, m_r, i_h, H, K, o_k, scale)
                b_bk = b_k * load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_e, K, o_k, erase_scale, GATE)
                b_left, b_right = load_late_factors(late, i_ch, o_r, K, o_k)
                b_erase_left = erase_left(b_left, late, i_ch, o_r, K, o_k, BEFORE, 32)
                b_columns = (b_k * b_right).to(CT)
                b_q_left, b_bk_left = (b_q * b_left).to(CT), (b_bk * b_erase_left).to(CT)
                b_dbk = matmul(b_dT_late, b_columns, CT, PRECISION)
                b_dq = matmul(b_dP_late, b_columns, CT, PRECISION)
                b_dk = matmul(tl.trans(b_dT_late), b_bk_left, CT, PRECISION)
                b_dk += matmul(tl.trans(b_dP_late), b_q_left, CT, PRECISION)
                if PRECISE:  # with factors as the products took them: see erasing_gradient_kernel
                    b_dg = b_q_left.to(tl.float32) * b_dq + b_bk_left.to(tl.float32) * b_dbk
                    b_dg -= b_columns.to(tl.float32) * b_dk
                b_dbk *= b_erase_left
                b_dq *= b_left
                b_dk *= b_right
                if has_halved_rows(first_steep, first_halved):
                    b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
                    for step in range(HALVINGS):
                        b_e = halving_factor(b_g, o_r, step, CT)
                        b_erase_e = halving_factor(b_g, o_r, step, CT, True) if BEFORE else b_e
                        b_ke, b_qe, b_bke = (b_k * b_e).to(CT), (b_q * b_e).to(CT), (b_bk * b_erase_e).to(CT)
                        m_pairs = pairs_of_halves(o_r, step) & m_halved
                        b_dbks = matmul(tl.where(m_pairs, b_dT, 0.0), b_ke, CT, PRECISION)
                        b_dqs = matmul(tl.where(m_pairs, b_dP, 0.0), b_ke, CT, PRECISION)
                        m_pairs = pairs_of_halves(o_r, step, True) & tl.trans(m_halved)
                        b_dks = matmul(tl.where(m_pairs, tl.trans(b_dT), 0.0), b_bke, CT, PRECISION)
                        b_dks += matmul(tl.where(m_pairs, tl.trans(b_dP), 0.0), b_qe, CT, PRECISION)
                        if PRECISE:
                            b_dg += b_qe.to(tl.float32) * b_dqs + b_bke.to(tl.float32) * b_dbks
                            b_dg -= b_ke.to(tl.float32) * b_dks
                        b_dbk += b_erase_e * b_dbks
                        b_dq += b_e * b_dqs
                        b_dk += b_e * b_dks
                if PRECISE:
                    tl.debug_barrier()  # all threads have read g, which lies there
                    store_rows(dg, start, o_r, m_r, i_hv, HV, K, o_k, b_dg)
                store_rows(dq, start, o_r, m_r, i_hv, HV, K, o_k, b_dq)
                store_rows(dk, start, o_r, m_r, i_hv, HV, K, o_k, b_dk)
                store_rows(dbk, start, o_r, m_r, i_hv, HV, K, o_k, b_dbk)
            tl.debug_barrier()  # all threads have read them
            m_mild = (o_r < first_steep)[:, None]
            store_tile(dT, i_chv, o_r, BT, o_r, tl.where(m_mild, b_dT, 0.0))
            store_tile(dP, i_chv, o_r, BT, o_r, tl.where(m_mild, b_dP, 0.0))


def scores_of_steep_rows(call: Call, x: Inputs, factors: Factors, T: Tensor | None) -> Tensor:
    """P [NC, H, C, C], and T, with the scores of steep rows alone."""
    BK = call.key_block(TUNING)
    P = call.tiles(x.q, call.H, CHUNK_TOKENS, CHUNK_TOKENS)
    launch(
        steep_scores_kernel, (-(-call.chunks.count // GROUP.value), call.H),
        x.q, x.k, x.g, x.b, x.A_log, x.dt_bias, *factors.of_steep_rows, T, P,
        call.chunks.table, call.scale, call.erase_scale, call.chunks.count, call.H,
        K=call.K, BK=BK, GATE=call.gate, BEFORE=call.before, RAW_DECAY=call.raw_decay, WITH_T=T is not None,
        **call.launch(TUNING, BK),
    )  # fmt: skip
    return P


def steep_gradient(
    call: Call, x: Inputs, factors: Factors, dT: Tensor, dP: Tensor, dq: Tensor, dk: Tensor, d_erased: Tensor,
    dg: Tensor | None,
) -> None:  # fmt: skip
    """Write the parts of steep rows in the gradients of q, k, b k (d_erased) and, if dg is given, g, by value head. It
    may be the memory of g."""
    BK = call.key_block(TUNING)
    launch(
        steep_gradient_kernel, (-(-call.chunks.count // GROUP.value), call.HV),
        x.q, x.k, x.g, x.b, x.A_log, x.dt_bias, x.content, *factors.of_steep_rows, dT, dP, dq, dk, d_erased, dg,
        call.chunks.table, call.scale, call.erase_scale, call.chunks.count, call.H, call.HV, call.erase_heads,
        K=call.K, BK=BK, GATE=call.gate, BEFORE=call.before, PRECISE=dg is not None, RAW_DECAY=call.raw_decay,
        **call.launch(TUNING, BK),
    )  # fmt: skip
