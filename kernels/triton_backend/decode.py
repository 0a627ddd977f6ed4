"""The recurrence token by token in Triton, for decoding; forward only, one launch a call, no host synchronisation.

A decoding step reads and writes the whole state for a few operations on each number: its time is that of moving
2 * N * HV * K * V * 4 bytes. So every kernel holds a tile of S in registers, [K, BV], reads it once and writes it once.
Columns of S depend on each other only through CARVE's erase gate, whose content term needs the mean of all columns:

- gdn2_kernel: a program per sequence, value head and block of columns, any number of tokens.
- carve_token_kernel: the same programs, for one token per sequence.
- carve_sequences_kernel: a program per sequence and value head, any number of tokens; between two ends of a content
  chunk the mean stands still, so S passes through the registers once per content chunk, block after block.

When CARVE's state is updated in place, the programs of a sequence share what some of them write: `count`, and in
carve_token_kernel also `mean`. Every program announces in the upper half of `count`, by one atomic addition after its
last read, that it is done; the last one to do so writes what is shared and with it clears the announcements. Nobody
waits, and nothing has to be reset between launches, so a captured CUDA graph can be replayed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import OpCall
from ..state import CarveState
from ..torch_backend.gates import plain_decay, plain_erase_gate, plain_write_gate
from .products import tanh
from .special import softplus

# Numbers in a tile of S, and warps of its program: of 2048 to 16384 numbers and 2 to 8 warps these moved the most bytes
# on an H200 at 64 and 512 sequences (K = V = 128; carve_sequences was not timed). Four warps hold 32 to 64 registers of
# the tile a thread, which keeps enough loads in flight. Smaller tiles suit carve_token_kernel better, although each of
# its programs reads D and U again, from the L2 cache.
TILES = {"gdn2": 8192, "carve_token": 4096, "carve_sequences": 8192}
NUM_WARPS = 4
# Rows of D and columns of U in registers at a time.
RANK_BLOCK = 16
# Numbers of `mean` that the last program of a sequence renews at a time.
MEAN_BLOCK = tl.constexpr(1024)
# In place, the lower half of a count counts tokens, the upper half the programs that are done with this launch.
DONE = tl.constexpr(1 << 32)
TOKEN_BITS = tl.constexpr((1 << 32) - 1)


@torch.no_grad()
def recurrent_op(call: OpCall) -> tuple[Tensor, Any]:
    """The Triton backend of the public recurrent ops, after their checks.

    Neither boundaries of packed sequences nor counts are read on the host: boundaries that fall or leave [0, T] are
    brought into order; a count outside [0, content_chunk) ends its content chunk at the next token.
    """
    with torch.cuda.device_of(call.q):
        return _recurrent_gdn2(call) if call.op == "gdn2" else _recurrent_carve(call)


def _outputs(call: OpCall) -> Tensor:
    """Memory for o. Packed sequences may end before the tokens do; what no sequence holds is zero, as is padding."""
    whole = call.cu_seqlens is None and call.state_rows is None
    return call.v.new_empty(call.v.shape) if whole else call.v.new_zeros(call.v.shape)


def _recurrent_gdn2(call: OpCall) -> tuple[Tensor, Tensor | None]:
    q, v = call.q, call.v
    S: Any = call.initial_state
    S = S if S is None or call.state_rows is not None else S.contiguous()
    new_S = S
    if not call.inplace_state:
        new_S = _new_state(call) if call.output_final_state else None
    o = _outputs(call)
    b = plain_erase_gate(call)
    b = b if call.b.ndim == 4 else b.squeeze(-1)
    tensors, strides = _rows(q, call.k, v, plain_decay(call), b, plain_write_gate(call))
    blocks = _blocks(q, v, TILES["gdn2"])
    gdn2_kernel[(call.sequences * v.shape[2] * (v.shape[3] // blocks["BV"]),)](
        *tensors, S, new_S, o, call.cu_seqlens, call.state_rows, _row_stride(S, v, q.shape[3]),
        *strides, call.output_scale, q.shape[1], q.shape[2], v.shape[2],
        SCALAR_B=b.ndim == 3, SCALAR_W=call.w.ndim == 3, num_warps=NUM_WARPS, **blocks,
    )  # fmt: skip
    return o, new_S


def _recurrent_carve(call: OpCall) -> tuple[Tensor, CarveState | None]:
    q, v = call.q, call.v
    one_token = call.cu_seqlens is None and q.shape[1] == 1
    state = call.initial_state
    if state is not None and call.state_rows is None:
        state = CarveState(*(part.contiguous() for part in state))
    assert state is None or isinstance(state, CarveState)
    new_state = state
    if not call.inplace_state:
        # with several content chunks S waits in memory from one to the next, asked for or not
        new_state = _new_carve_state(call) if call.output_final_state or not one_token else None
    o = _outputs(call)
    tensors, strides = _rows(q, call.k, v, plain_decay(call), call.b, plain_write_gate(call))
    down, up = (None if x is None else x.contiguous() for x in (call.content_down, call.content_up))
    blocks = _blocks(q, v, TILES["carve_token" if one_token else "carve_sequences"])
    options: dict[str, Any] = {
        "DIAGONAL": call.erases_by_decay, "BEFORE": call.predicts_before_decay, "IN_PLACE": call.inplace_state,
        "num_warps": NUM_WARPS, **blocks, **_content_blocks(call),
    }  # fmt: skip
    programs = call.sequences * v.shape[2]
    if one_token:
        kernel = carve_token_kernel
        programs *= v.shape[3] // blocks["BV"]
        S, mean = (None, None) if state is None else state[:2]
        options |= {
            "rows": call.state_rows, "S_stride": _row_stride(S, v, q.shape[3]),
            "mean_stride": _row_stride(mean, v, 1),
        }  # fmt: skip
    else:
        kernel = carve_sequences_kernel
        options |= {"cu_seqlens": call.cu_seqlens, "T": q.shape[1]}
    kernel[(programs,)](
        *tensors, down, up, None if call.erase_bias is None else call.erase_bias.contiguous(),
        *(state or [None] * 4), *(new_state or [None] * 4), o,
        *strides, call.output_scale, call.erase_scale, call.content_chunk, q.shape[2], v.shape[2],
        int(down is not None and down.ndim == 3), **options,
    )  # fmt: skip
    if new_state is not None and not call.has_content and call.state_rows is None:
        for unused in (new_state.mean, new_state.partial):
            unused.zero_()
    return o, new_state if call.output_final_state or call.inplace_state else None


@triton.jit
def gdn2_kernel(
    q, k, v, g, b, w, S, new_S, o, cu_seqlens, rows, S_stride,
    q_stride, k_stride, v_stride, g_stride, b_stride, w_stride, scale, T, H, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SCALAR_B: tl.constexpr, SCALAR_W: tl.constexpr,
):  # fmt: skip
    """One program per sequence, value head and block of columns; S may be None (zeros), new_S too, or both the same.

    rows: of S, that are the sequences', or None for their own numbers.
    """
    i_nh, i_v = tl.program_id(0) // (V // BV), tl.program_id(0) % (V // BV)
    i_n, i_hv = (i_nh // HV).to(tl.int64), i_nh % HV
    i_h = i_hv // (HV // H)
    row = i_n
    if rows is not None:
        row = tl.load(rows + i_n)
        if row < 0:
            return
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    o_head = row * S_stride + i_hv * K * V
    b_S = tl.zeros([BK, BV], tl.float32)
    if S is not None:
        b_S = load_tile(S + o_head, o_k, o_v, K, V, BK)
    start, length = token_range(cu_seqlens, i_n, T)
    for i_t in range(length):
        i_row = start + i_t
        if SCALAR_B:
            b_b = tl.load(b + i_row * b_stride + i_h).to(tl.float32)
        else:
            b_b = load_keys(b + i_row * b_stride + i_h * K, o_k, K, BK)
        b_q, b_k, b_g, b_w, b_v = load_token(
            q, k, v, g, w, q_stride, k_stride, v_stride, g_stride, w_stride,
            i_row, i_h, i_hv, o_k, o_v, K, V, BK, SCALAR_W,
        )  # fmt: skip
        b_S, b_y = advance(b_S, b_q, b_k, tl.exp(b_g), b_b, b_w * b_v, False)
        tl.store(o + (i_row * HV + i_hv) * V + o_v, (scale * b_y).to(o.dtype.element_ty))
    if new_S is not None:
        store_tile(new_S + o_head, b_S, o_k, o_v, K, V, BK)


@triton.jit
def carve_token_kernel(
    q, k, v, g, erase_logits, w, content_down, content_up, bias,
    S, mean, partial, count, new_S, new_mean, new_partial, new_count, o,
    q_stride, k_stride, v_stride, g_stride, erase_stride, w_stride,
    scale, erase_scale, content_chunk, H, HV, content_heads, rows, S_stride, mean_stride,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, VP: tl.constexpr,
    DIAGONAL: tl.constexpr, BEFORE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """One token of every sequence, programs as in gdn2_kernel; the old state may be None, the new one too.

    IN_PLACE: the old and the new state are the same tensors. rows: of S, mean and partial, as in gdn2_kernel.
    """
    NV: tl.constexpr = V // BV
    i_nh, i_v = tl.program_id(0) // NV, tl.program_id(0) % NV
    i_n, i_hv = (i_nh // HV).to(tl.int64), i_nh % HV
    row = i_n
    if rows is not None:
        row = tl.load(rows + i_n)
        if row < 0:
            return
    i_h = i_hv // (HV // H)
    o_S, o_mean = row * S_stride + i_hv * K * V, row * mean_stride + i_hv * V
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    b_S = tl.zeros([BK, BV], tl.float32)
    b_content = tl.zeros([BK], tl.float32)
    b_mean = tl.zeros([BV], tl.float32)
    b_partial = tl.zeros([BV], tl.float32)
    tokens = tl.zeros([], tl.int64)
    if S is not None:
        # S first: what follows arrives while it is on its way
        b_S = load_tile(S + o_S, o_k, o_v, K, V, BK)
        tokens = tokens_before(count, i_n)
        b_partial = tl.load(partial + o_mean + o_v)
        if content_down is not None:
            b_content = content_term(
                mean + o_mean, content_down, content_up, i_hv * content_heads, o_k, K, V, R, BK, BR, VP
            )  # fmt: skip
    if bias is not None:
        b_content += load_keys(bias + i_h * K, o_k, K, BK)
    b_S, b_y = advance_carve(
        q, k, v, g, erase_logits, w, q_stride, k_stride, v_stride, g_stride, erase_stride, w_stride,
        b_S, b_content, i_n, i_h, i_hv, o_k, o_v, erase_scale, K, V, BK, DIAGONAL, BEFORE,
    )  # fmt: skip
    tl.store(o + (i_n * HV + i_hv) * V + o_v, (scale * b_y).to(o.dtype.element_ty))
    if new_S is not None:
        store_tile(new_S + o_S, b_S, o_k, o_v, K, V, BK)
        if content_down is not None:
            b_partial += b_y
        tokens += 1
        full = tokens >= content_chunk
        next_tokens = tl.where(full, 0, tokens)
        if IN_PLACE:
            tl.store(new_partial + o_mean + o_v, b_partial)
            if programs_done_before(new_count, i_n) == HV * NV - 1:
                if full:
                    end_content_chunk(new_mean, new_partial, row * mean_stride, HV * V, content_chunk)
                tl.store(new_count + i_n, next_tokens)
        else:
            if S is not None:
                b_mean = tl.load(mean + o_mean + o_v)
            tl.store(new_mean + o_mean + o_v, tl.where(full, b_partial / content_chunk, b_mean))
            tl.store(new_partial + o_mean + o_v, tl.where(full, 0.0, b_partial))
            if (i_hv == 0) & (i_v == 0):
                tl.store(new_count + i_n, next_tokens)


@triton.jit
def carve_sequences_kernel(
    q, k, v, g, erase_logits, w, content_down, content_up, bias,
    S, mean, partial, count, new_S, new_mean, new_partial, new_count, o,
    q_stride, k_stride, v_stride, g_stride, erase_stride, w_stride,
    scale, erase_scale, content_chunk, H, HV, content_heads, cu_seqlens, T,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, VP: tl.constexpr,
    DIAGONAL: tl.constexpr, BEFORE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Any tokens of every sequence, one program per sequence and value head; the old state may be None, not the new.

    A section is a run of tokens that see the same mean: up to the end of a content chunk or of the call. A sequence
    without tokens has one empty section, which carries its state over.
    """
    i_n, i_hv = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    i_h = i_hv // (HV // H)
    i_head = i_n * HV + i_hv
    o_k, o_w = tl.arange(0, BK), tl.arange(0, VP)
    m_w = o_w < V
    start, length = token_range(cu_seqlens, i_n, T)
    old_S, old_mean, old_partial = new_S, new_mean, new_partial
    tokens = tl.zeros([], tl.int64)
    if S is not None:
        old_S, old_mean, old_partial = S, mean, partial
        tokens = tokens_before(count, i_n)
    missing = tl.maximum(content_chunk - tokens, 1)
    sections = 1 + tl.cdiv(tl.maximum(length - missing, 0), content_chunk)
    for i_s in range(sections):
        # without an old state the first section reads what nobody has written, and drops it
        known = (i_s > 0) | (S is not None)
        section_start = tl.where(i_s > 0, missing + (i_s - 1) * content_chunk, 0)
        chunk_end = missing + i_s * content_chunk
        b_content = tl.zeros([BK], tl.float32)
        if content_down is not None:
            b_content = content_term(
                old_mean + i_head * V, content_down, content_up, i_hv * content_heads, o_k, K, V, R, BK, BR, VP
            )  # fmt: skip
            b_content = tl.where(known, b_content, 0.0)
        if bias is not None:
            b_content += load_keys(bias + i_h * K, o_k, K, BK)
        for i_v in range(V // BV):
            o_v = i_v * BV + tl.arange(0, BV)
            b_S = tl.where(known, load_tile(old_S + i_head * K * V, o_k, o_v, K, V, BK), 0.0)
            b_partial = tl.where(known, tl.load(old_partial + i_head * V + o_v), 0.0)
            for i_t in range(section_start, tl.minimum(chunk_end, length)):
                i_row = start + i_t
                b_S, b_y = advance_carve(
                    q, k, v, g, erase_logits, w, q_stride, k_stride, v_stride, g_stride, erase_stride, w_stride,
                    b_S, b_content, i_row, i_h, i_hv, o_k, o_v, erase_scale, K, V, BK, DIAGONAL, BEFORE,
                )  # fmt: skip
                if content_down is not None:
                    b_partial += b_y
                tl.store(o + (i_row * HV + i_hv) * V + o_v, (scale * b_y).to(o.dtype.element_ty))
            store_tile(new_S + i_head * K * V, b_S, o_k, o_v, K, V, BK)
            tl.store(new_partial + i_head * V + o_v, b_partial)
        b_mean = tl.where(known, tl.load(old_mean + i_head * V + o_w, mask=m_w, other=0.0), 0.0)
        tl.store(new_mean + i_head * V + o_w, b_mean, mask=m_w)
        # other threads read what this one wrote
        tl.debug_barrier()
        if chunk_end <= length:
            end_content_chunk(new_mean, new_partial, i_head * V, V, content_chunk)
            tl.debug_barrier()
        old_S, old_mean, old_partial = new_S, new_mean, new_partial
    filled = length - missing
    next_tokens = tl.where(filled >= 0, filled % content_chunk, tokens + length)
    if IN_PLACE:
        if programs_done_before(new_count, i_n) == HV - 1:
            tl.store(new_count + i_n, next_tokens)
    elif i_hv == 0:
        tl.store(new_count + i_n, next_tokens)


@triton.jit
def token_range(cu_seqlens, i_n, T):
    """(row of the first token, number of tokens) of a sequence, where all tokens of the call are rows [B * T]."""
    if cu_seqlens is None:
        return i_n * T, T
    else:  # noqa: RET505  # Triton compiles what follows a return, and here that would load from None
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n + 1).to(tl.int64), start), T)
        return start, end - start


@triton.jit
def load_token(
    q, k, v, g, w, q_stride, k_stride, v_stride, g_stride, w_stride,
    i_row, i_h, i_hv, o_k, o_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, SCALAR_W: tl.constexpr,
):  # fmt: skip
    """Of one token in float32: q, k, g, [BK], w, [BV] or a scalar, and v, [BV]; channels beyond K have k = q = 0."""
    b_q = load_keys(q + i_row * q_stride + i_h * K, o_k, K, BK)
    b_k = load_keys(k + i_row * k_stride + i_h * K, o_k, K, BK)
    b_g = load_keys(g + i_row * g_stride + i_h * K, o_k, K, BK)
    b_v = tl.load(v + i_row * v_stride + i_hv * V + o_v).to(tl.float32)
    if SCALAR_W:
        b_w = tl.load(w + i_row * w_stride + i_hv).to(tl.float32)
    else:
        b_w = tl.load(w + i_row * w_stride + i_hv * V + o_v).to(tl.float32)
    return b_q, b_k, b_g, b_w, b_v


@triton.jit
def advance(b_S, b_q, b_k, b_decay, b_b, b_z, BEFORE: tl.constexpr):
    """One token: (S, y) after r = z - S^T (b k); S = decay S + k r^T; y = S^T q. What r is the difference to is taken
    from S decayed or, if BEFORE, as it was."""
    if BEFORE:
        b_r = b_z - tl.sum(b_S * (b_b * b_k)[:, None], 0)
        b_S *= b_decay[:, None]
    else:
        b_S *= b_decay[:, None]
        b_r = b_z - tl.sum(b_S * (b_b * b_k)[:, None], 0)
    b_S += b_k[:, None] * b_r[None, :]
    return b_S, tl.sum(b_S * b_q[:, None], 0)


@triton.jit
def advance_carve(
    q, k, v, g, erase_logits, w, q_stride, k_stride, v_stride, g_stride, erase_stride, w_stride,
    b_S, b_content, i_row, i_h, i_hv, o_k, o_v, erase_scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, DIAGONAL: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """One token of CARVE: (S, S^T q)."""
    b_l = load_keys(erase_logits + i_row * erase_stride + i_h * K, o_k, K, BK) + b_content
    b_q, b_k, b_g, b_w, b_v = load_token(
        q, k, v, g, w, q_stride, k_stride, v_stride, g_stride, w_stride, i_row, i_h, i_hv, o_k, o_v, K, V, BK, True,
    )  # fmt: skip
    if DIAGONAL:  # log(1 - sigmoid(x)) is -softplus(x)
        b_S, b_y = advance(b_S, b_q, b_k, tl.exp(b_g - softplus(b_l)), b_w, b_w * b_v, BEFORE)
    else:
        b_S, b_y = advance(b_S, b_q, b_k, tl.exp(b_g), erase_scale * tl.sigmoid(b_l), b_w * b_v, False)
    return b_S, b_y


@triton.jit
def content_term(
    mean, content_down, content_up, i_map, o_k,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """U tanh(D mean) of one value head, [BK], `mean` at the head's own V numbers; D and U are maps number i_map."""
    o_v = tl.arange(0, VP)
    b_mean = load_keys(mean, o_v, V, VP)
    b_content = tl.zeros([BK], tl.float32)
    for i_r in range((R + BR - 1) // BR):
        b_down, b_up = load_content_maps(content_down, content_up, i_map, i_r, o_k, o_v, K, V, R, BR)
        b_content += through_content_maps(b_mean, b_down, b_up)
    return b_content


@triton.jit
def load_content_maps(
    content_down, content_up, i_map, i_r, o_k, o_v, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BR: tl.constexpr
):
    """Features i_r * BR to (i_r + 1) * BR of the maps D and U, [BR, VP] and [BR, BK], zero beyond."""
    o_r = i_r * BR + tl.arange(0, BR)
    p_down = content_down + i_map.to(tl.int64) * R * V + o_r[:, None] * V + o_v[None, :]
    b_down = tl.load(p_down, mask=(o_r[:, None] < R) & (o_v[None, :] < V), other=0.0)
    # as [BR, BK]: a sum over the last axis would have the compiler move all of S to the layout of U
    p_up = content_up + i_map.to(tl.int64) * K * R + o_k[None, :] * R + o_r[:, None]
    b_up = tl.load(p_up, mask=(o_k[None, :] < K) & (o_r[:, None] < R), other=0.0)
    return b_down, b_up


@triton.jit
def through_content_maps(b_mean, b_down, b_up):
    """What these features add to the content term, [BK]."""
    b_code = tanh(tl.sum(b_down.to(tl.float32) * b_mean[None, :], 1))
    return tl.sum(b_up.to(tl.float32) * b_code[:, None], 0)


@triton.jit
def end_content_chunk(mean, partial, start, size, content_chunk):
    """mean = partial / content_chunk and partial = 0, for `size` numbers from `start` on."""
    for i in range(0, size, MEAN_BLOCK):
        o_i = i + tl.arange(0, MEAN_BLOCK)
        m_i = o_i < size
        # from L2: other SMs may have written it during this launch
        b_partial = tl.load(partial + start + o_i, mask=m_i, other=0.0, cache_modifier=".cg")
        tl.store(mean + start + o_i, b_partial / content_chunk, mask=m_i)
        tl.store(partial + start + o_i, tl.zeros([MEAN_BLOCK], tl.float32), mask=m_i)


@triton.jit
def tokens_before(count, i_n):
    """Tokens in the running content chunk before this launch; volatile, as other programs may be announcing."""
    return tl.load(count + i_n, volatile=True) & TOKEN_BITS


@triton.jit
def programs_done_before(count, i_n):
    """Announce that this program is done with the sequence's shared state; how many announced it before.

    The barrier puts the reads and writes of all its threads before the one that announces; acquire and release put
    those of all programs before what the last one does next.
    """
    tl.debug_barrier()
    return tl.atomic_add(count + i_n, DONE, sem="acq_rel") >> 32


@triton.jit
def load_keys(x, o_d, D: tl.constexpr, BD: tl.constexpr):
    """D numbers from x on as float32, zero beyond, [BD]."""
    if D == BD:
        return tl.load(x + o_d).to(tl.float32)
    return tl.load(x + o_d, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit
def load_tile(S, o_k, o_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr):
    """Columns o_v of one head's S, zero in rows beyond K, [BK, BV]."""
    p_S = S + o_k[:, None] * V + o_v[None, :]
    if K == BK:
        return tl.load(p_S)
    return tl.load(p_S, mask=o_k[:, None] < K, other=0.0)


@triton.jit
def store_tile(S, b_S, o_k, o_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr):
    """The counterpart of load_tile."""
    p_S = S + o_k[:, None] * V + o_v[None, :]
    if K == BK:
        tl.store(p_S, b_S)
    else:
        tl.store(p_S, b_S, mask=o_k[:, None] < K)


def _new_state(call: OpCall) -> Tensor:
    q, v = call.q, call.v
    return q.new_empty((call.sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)


def _new_carve_state(call: OpCall) -> CarveState:
    S = _new_state(call)
    mean, partial = (S.new_empty(S.shape[0], S.shape[1], S.shape[3]) for _ in range(2))
    return CarveState(S, mean, partial, S.new_empty(S.shape[0], dtype=torch.int64))


def _row_stride(state: Tensor | None, v: Tensor, keys: int) -> int:
    """How far apart the rows of a part of the state lie, old or new, [N, HV, keys, V]."""
    return v.shape[2] * keys * v.shape[3] if state is None else state.stride(0)


def _rows(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """The tensors, [B, T, ...], and how far apart their tokens lie; copied only where that is not one number.

    A slice of a fused projection needs no copy: its tokens lie apart, but each is in one piece.
    """
    rows = [x if _in_rows(x) else x.contiguous() for x in tensors]
    return rows, [x.stride(1 if x.shape[1] > 1 else 0) for x in rows]


def _in_rows(x: Tensor) -> bool:
    batch, tokens = x.shape[:2]
    if batch > 1 and tokens > 1 and x.stride(0) != tokens * x.stride(1):
        return False
    size = 1
    for axis in range(x.ndim - 1, 1, -1):
        if x.shape[axis] > 1 and x.stride(axis) != size:
            return False
        size *= x.shape[axis]
    return True


def _blocks(q: Tensor, v: Tensor, numbers: int) -> dict[str, int]:
    """Sizes of a tile of S of that many numbers: K rounded up to a power of two, the widest such part of V."""
    K, V = q.shape[3], v.shape[3]
    BK = triton.next_power_of_2(K)
    return {"K": K, "V": V, "BK": BK, "BV": min(max(numbers // BK, 1), V & -V)}


def _content_blocks(call: OpCall) -> dict[str, int]:
    R = 1 if call.content_down is None else call.content_down.shape[-2]
    BR = min(triton.next_power_of_2(R), RANK_BLOCK)
    return {"R": R, "BR": BR, "VP": triton.next_power_of_2(call.v.shape[3])}
