"""The Triton backend of the chunk ops: the stages in data order, forward and backward."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .carve_state import carve_state_gradient_kernel, carve_state_kernel
from .carve_tiles import carve_tiles_kernel
from .chunk_gradients import (
    chunk_key_gradient_kernel,
    chunk_recompute_kernel,
    chunk_row_gradient_kernel,
    chunk_value_gradient_kernel,
)
from .chunk_operands import chunk_operands_kernel
from .chunk_output import chunk_output_kernel
from .chunk_state import chunk_state_gradient_kernel, chunk_state_kernel
from .chunks import Chunks, make_chunks
from .decay_factors import decay_factors_kernel
from .state import CarveState
from .steep import steep_gradient_kernel, steep_scores_kernel


class Tuning(NamedTuple):
    """Widest blocks of key and value columns, warps per program, stages of pipelined loads."""

    BK: int
    BV: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None

    def launch(self, dtype: torch.dtype, *columns: int) -> dict[str, Any]:
        """Launch options for tiles of this dtype with these blocks of columns.

        Loads of float32 tiles are not pipelined: several stages of them exceed a Hopper SM's shared memory.

        Triton 3.6 reads outside shared memory in a wgmma product of 64 rows with 32 columns or fewer that lie
        contiguous (seen on an H200 with compute-sanitizer); two warps multiply without wgmma.
        """
        num_warps = min(self.num_warps, 2) if min(columns) < 64 else self.num_warps
        num_stages = self.num_stages if dtype == torch.bfloat16 else 1
        return {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": self.maxnreg}


TUNING = {
    "decay_factors": Tuning(128, 0, 1),
    "carve_tiles": Tuning(64, 0, 4),
    "carve_state": Tuning(0, 0, 8),
    "carve_state_gradient": Tuning(0, 0, 8),
    "chunk_operands": Tuning(64, 64, 4, 2),
    "chunk_state": Tuning(0, 64, 4, 3),
    "chunk_output": Tuning(64, 128, 4, 1, 168),
    "chunk_recompute": Tuning(64, 128, 4),
    "chunk_state_gradient": Tuning(0, 64, 8, 2),
    "chunk_value_gradient": Tuning(0, 128, 4),
    "chunk_row_gradient": Tuning(64, 128, 4),
    "chunk_key_gradient": Tuning(64, 128, 4),
}


@dataclass(frozen=True)
class Call:
    """What all stages of one call need besides its tensors."""

    chunks: Chunks
    H: int
    HV: int
    K: int
    V: int
    scale: float
    erase_scale: float
    gate: int
    scalar_w: bool
    logits_w: bool
    raw_decay: bool
    dtype: torch.dtype

    @property
    def arithmetic(self) -> dict[str, Any]:
        """Dtype of the products' operands, and how float32 ones are multiplied."""
        if self.dtype == torch.bfloat16:
            return {"CT": triton.language.bfloat16, "PRECISION": "tf32"}
        # tf32 keeps as many bits as float16, and float32's range
        return {"CT": triton.language.float32, "PRECISION": "tf32" if self.dtype == torch.float16 else "tf32x3"}

    @property
    def tile_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    def tiles(self, like: Tensor, heads: int, *shape: int) -> Tensor:
        """Scratch with one tile per chunk and head."""
        return torch.empty(self.chunks.count, heads, *shape, dtype=self.tile_dtype, device=like.device)

    def floats(self, like: Tensor, heads: int, *shape: int) -> Tensor:
        return torch.empty(self.chunks.count, heads, *shape, dtype=torch.float32, device=like.device)


HEAD_WIDTHS = (32, 64, 96, 128, 256)


def check_supported(q: Tensor, v: Tensor, widest: int) -> None:
    """Refuse what these kernels lack."""
    if q.dtype == torch.float64:
        raise NotImplementedError("backend 'triton': no float64, use backend='torch'")
    for name, width in (("K", q.shape[3]), ("V", v.shape[3])):
        if width not in HEAD_WIDTHS or width > widest:
            legal = ", ".join(str(w) for w in HEAD_WIDTHS if w <= widest)
            raise NotImplementedError(f"backend 'triton': expected {name} of {legal}, got {width}; use backend='torch'")


def check_float32_size(q: Tensor, v: Tensor, largest_K: int, largest_state: int) -> None:
    """Refuse float32 heads whose tiles, each split in two for tf32x3, exceed a Hopper SM's shared memory."""
    K, V = q.shape[3], v.shape[3]
    if q.dtype == torch.float32 and (largest_K < K or largest_state < K * V):
        raise NotImplementedError(
            f"backend 'triton': for float32 expected K <= {largest_K} and K * V <= {largest_state}, got K = {K}, "
            f"V = {V}; use bfloat16, float16 or backend='torch'"
        )


def column_block(width: int, largest: int) -> int:
    """The widest block of columns, a power of two, that divides a head width."""
    return min(largest, width & -width)


class Factors(NamedTuple):
    """What decay_factors_kernel writes."""

    down: Tensor
    up: Tensor
    rest: Tensor
    blocks: Tensor
    steep: Tensor


class ChunkGDN2(torch.autograd.Function):
    """GDN-2: q, k, v, g, b, w, A_log, dt_bias, initial_state -> o, final_state."""

    @staticmethod
    def forward(ctx, call, want_final, q, k, v, g, b, w, A_log, dt_bias, initial_state):
        factors = decay_factors(call, g, A_log, dt_bias)
        A, P, erasure, update, k_to_end = chunk_operands(call, q, k, v, g, b, w, A_log, dt_bias, factors)
        states, residuals, final_state = chunk_state(
            call, erasure, update, k_to_end, factors, initial_state, want_final
        )
        o = chunk_output(call, q, v, factors, P, states, residuals)
        ctx.call = call
        ctx.has_initial = initial_state is not None
        ctx.save_for_backward(q, k, v, g, b, w, A_log, dt_bias, A, P, states)
        return o, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, d_final_state):
        call = ctx.call
        q, k, v, g, b, w, A_log, dt_bias, A, P, states = ctx.saved_tensors
        do = do.contiguous()
        factors = decay_factors(call, g, A_log, dt_bias)
        recomputed = chunk_recompute(call, q, k, v, b, w, None, factors, A, P, states, do, with_A=True)
        erasure, q_from_start, k_to_end, residuals, d_here = recomputed
        d_states, d_residuals, d_initial = chunk_state_gradient(
            call, erasure, k_to_end, q_from_start, factors, d_here, do, d_final_state, ctx.has_initial
        )
        dv, dw, d_written, dT, dP = chunk_value_gradient(call, v, w, A, do, None, residuals, d_residuals)
        dq, dk, dg, db, _, dA_log, d_dt_bias = chunk_key_gradient(
            call, q, k, g, b, A_log, dt_bias, None, factors, do, None, states, d_states, residuals, d_written, dT, dP
        )
        return None, None, dq, dk, dv, dg, db, dw, dA_log, d_dt_bias, d_initial


class ChunkCarve(torch.autograd.Function):
    """CARVE: the op's tensors, then the parts of the initial state -> o, S, mean, partial."""

    @staticmethod
    def forward(ctx, call, content_chunk, detached, want_final, *tensors):
        q, k, v, g, logits, w, down, up, A_log, dt_bias, *initial = tensors
        factors = decay_factors(call, g, A_log, dt_bias)
        P = call.tiles(q, call.H, 64, 64)
        steep_scores(call, q, k, g, logits, A_log, dt_bias, factors, None, P)
        tiles = carve_tiles(call, q, k, g, A_log, dt_bias, factors, P, with_P=True)
        loop = carve_state(call, v, logits, w, down, up, factors, tiles, initial, content_chunk, want_final)
        A, states, residuals, codes, means, *final = loop
        o = chunk_output(call, q, v, factors, P, states, residuals)
        ctx.call, ctx.content_chunk, ctx.detached = call, content_chunk, detached
        ctx.save_for_backward(q, k, v, g, logits, w, down, up, A_log, dt_bias, initial[3], A, P, states, codes, means)
        ctx.has_initial = initial[0] is not None
        ctx.set_materialize_grads(False)
        return o, *final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, *d_final):
        call = ctx.call
        q, k, v, g, logits, w, down, up, A_log, dt_bias, count, A, P, states, codes, means = ctx.saved_tensors
        # rounded as the loop's products rounded it
        content = torch.einsum("chr,hkr->chk", *(x.to(call.tile_dtype).float() for x in (codes, up))).contiguous()
        do = torch.zeros_like(v) if do is None else do.contiguous()
        factors = decay_factors(call, g, A_log, dt_bias)
        # without a gradient through the means nothing of the content path runs from chunk to chunk
        alone = ctx.detached and d_final[1] is None and d_final[2] is None and not ctx.has_initial
        recomputed = chunk_recompute(call, q, k, v, logits, w, content, factors, A, P, states, do, with_A=alone)
        erasure, q_from_start, k_to_end, residuals, d_here = recomputed
        if alone:
            d_states, d_residuals, _ = chunk_state_gradient(
                call, erasure, k_to_end, q_from_start, factors, d_here, do, d_final[0], False
            )
            d_rows, d_initial = None, (None, None, None)
        else:
            tiles = carve_tiles(call, q, k, g, A_log, dt_bias, factors, P, with_P=False)
            d_states, d_residuals, d_rows, d_initial = carve_state_gradient(
                call, logits, down, up, content, factors, tiles, A, states, residuals, erasure, q_from_start, d_here,
                do, d_final, count, ctx.has_initial, ctx.content_chunk, ctx.detached,
            )  # fmt: skip
        dv, dw, d_written, dT, dP = chunk_value_gradient(call, v, w, A, do, d_rows, residuals, d_residuals)
        dq, dk, dg, d_logits, d_content, dA_log, d_dt_bias = chunk_key_gradient(
            call, q, k, g, logits, A_log, dt_bias, content, factors, do, d_rows,
            states, d_states, residuals, d_written, dT, dP,
        )  # fmt: skip
        d_up = torch.einsum("chk,chr->hkr", d_content, codes)
        d_down = torch.einsum("chr,chv->hrv", torch.einsum("hkr,chk->chr", up.float(), d_content), means)
        gradients = dq, dk, dv, dg, d_logits, dw, d_down.to(down.dtype), d_up.to(up.dtype), dA_log, d_dt_bias
        return None, None, None, None, *gradients, *d_initial, None


def steep_scores(call, q, k, g, b, A_log, dt_bias, factors, T, P):
    steep_scores_kernel[(call.chunks.count * 4, call.H)](
        q, k, g, b, A_log, dt_bias, factors.steep, T, P, call.chunks.table, call.scale, call.erase_scale, call.H,
        K=call.K, BK=column_block(call.K, 32), GATE=call.gate, RAW_DECAY=call.raw_decay, WITH_T=T is not None,
        **call.arithmetic, num_warps=1,
    )  # fmt: skip


class CarveTiles(NamedTuple):
    """What carve_tiles_kernel writes besides P."""

    q_sum: Tensor
    P_sum: Tensor
    k_down: Tensor
    k_up: Tensor
    k_16: Tensor
    k_32: Tensor
    k_start: Tensor
    k_to_end: Tensor
    k_halved: Tensor


def carve_tiles(call, q, k, g, A_log, dt_bias, factors, P, with_P):
    tuning = TUNING["carve_tiles"]
    tiles = CarveTiles(
        call.floats(q, call.H, call.K), call.floats(q, call.H, 64),
        *(call.tiles(q, call.H, 64, call.K) for _ in range(6)), call.tiles(q, call.H, 4, 64, call.K),
    )  # fmt: skip
    carve_tiles_kernel[(call.chunks.count, call.H)](
        q, k, g, A_log, dt_bias, *factors, P, *tiles,
        call.chunks.table, call.scale, call.H,
        K=call.K, BK=column_block(call.K, tuning.BK), RAW_DECAY=call.raw_decay, WITH_P=with_P,
        **call.arithmetic, **tuning.launch(call.tile_dtype, column_block(call.K, tuning.BK)),
    )  # fmt: skip
    return tiles


def carve_sizes(call, down):
    R = down.shape[1]
    return {
        "K": call.K, "KP": triton.next_power_of_2(call.K), "V": call.V, "VP": triton.next_power_of_2(call.V),
        "R": R, "RP": max(16, triton.next_power_of_2(R)),
    }  # fmt: skip


def carve_state(call, v, logits, w, down, up, factors, tiles, initial, content_chunk, want_final):
    tuning = TUNING["carve_state"]
    A, residuals = call.tiles(v, call.HV, 64, 64), call.tiles(v, call.HV, 64, call.V)
    states = call.tiles(v, call.HV, call.K, call.V)
    # zeros: chunks beyond the last one enter the sums of the backward with weight zero
    codes, means = call.floats(v, call.HV, down.shape[1]).zero_(), call.floats(v, call.HV, call.V).zero_()
    shape = (call.chunks.sequences, call.HV)
    final = [
        means.new_zeros(*shape, *tail) if want_final else None for tail in ((call.K, call.V), (call.V,), (call.V,))
    ]
    carve_state_kernel[(call.chunks.sequences * call.HV,)](
        v, logits, w, down, up, tiles.q_sum, tiles.P_sum, factors.blocks, factors.steep, *tiles[2:],
        *initial, A, states, residuals, codes, means, *final,
        call.chunks.table, call.chunks.first, content_chunk, call.erase_scale, call.H, call.HV,
        **carve_sizes(call, down), HAS_INITIAL=initial[0] is not None, STORE_FINAL=want_final, LOGITS_W=call.logits_w,
        **call.arithmetic, **tuning.launch(call.tile_dtype, call.K, call.V),
    )  # fmt: skip
    return A, states, residuals, codes, means, *final


def carve_state_gradient(
    call, logits, down, up, content, factors, tiles, A, states, residuals, erasure, q_from_start, d_here, do,
    d_final, count, has_initial, content_chunk, detached,
):  # fmt: skip
    tuning = TUNING["carve_state_gradient"]
    d_states, d_residuals = torch.empty_like(states), torch.empty_like(residuals)
    d_rows = call.floats(do, call.HV, call.V)
    shape = (call.chunks.sequences, call.HV)
    tails = ((call.K, call.V), (call.V,), (call.V,))
    has_final = any(x is not None for x in d_final)
    if has_final:
        d_final = [
            content.new_zeros(*shape, *t) if x is None else x.contiguous() for x, t in zip(d_final, tails, strict=True)
        ]
    d_initial = [content.new_empty(*shape, *tail) if has_initial else None for tail in tails]
    carve_state_gradient_kernel[(call.chunks.sequences * call.HV,)](
        logits, down, up, content, tiles.q_sum, tiles.P_sum, factors.blocks, factors.steep, *tiles[2:],
        A, states, residuals, erasure, q_from_start, d_here, do,
        *d_final, count,
        d_states, d_residuals, d_rows, *d_initial,
        call.chunks.table, call.chunks.first, content_chunk, call.erase_scale, call.H, call.HV,
        **carve_sizes(call, down), HAS_FINAL=has_final, HAS_INITIAL=has_initial, DETACHED=detached,
        **call.arithmetic, **tuning.launch(call.tile_dtype, call.K, call.V),
    )  # fmt: skip
    return d_states, d_residuals, d_rows, d_initial


def decay_factors(call, g, A_log, dt_bias):
    tuning = TUNING["decay_factors"]
    down, up, rest = (call.tiles(g, call.H, 64, call.K) for _ in range(3))
    blocks = call.floats(g, call.H, 4, call.K)
    steep = torch.empty(call.chunks.count, call.H, 4, dtype=torch.int32, device=g.device)
    decay_factors_kernel[(call.chunks.count * 4, call.H)](
        g, A_log, dt_bias, down, up, rest, blocks, steep, call.chunks.table, call.H,
        K=call.K, BK=column_block(call.K, tuning.BK), RAW_DECAY=call.raw_decay, **tuning.launch(call.tile_dtype, 64),
    )  # fmt: skip
    return Factors(down, up, rest, blocks, steep)


def chunk_operands(call, q, k, v, g, b, w, A_log, dt_bias, factors):
    tuning = TUNING["chunk_operands"]
    A, P = call.tiles(k, call.H, 64, 64), call.tiles(k, call.H, 64, 64)
    erasure, k_to_end = call.tiles(k, call.H, 64, call.K), call.tiles(k, call.H, 64, call.K)
    update = call.tiles(k, call.HV, 64, call.V)
    steep_scores(call, q, k, g, b, A_log, dt_bias, factors, A, P)
    chunk_operands_kernel[(call.chunks.count, call.H)](
        q, k, v, b, w, *factors,
        A, P, erasure, update, k_to_end,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV,
        K=call.K, V=call.V, BK=column_block(call.K, tuning.BK), BV=column_block(call.V, tuning.BV),
        GATE=call.gate, SCALAR_W=call.scalar_w, LOGITS_W=call.logits_w,
        **call.arithmetic,
        **tuning.launch(call.tile_dtype, column_block(call.K, tuning.BK), column_block(call.V, tuning.BV)),
    )  # fmt: skip
    return A, P, erasure, update, k_to_end


def chunk_state(call, erasure, update, k_to_end, factors, initial_state, want_final):
    tuning = TUNING["chunk_state"]
    states = call.tiles(erasure, call.HV, call.K, call.V)
    residuals = torch.empty_like(update)
    sequences = call.chunks.sequences
    final_state = factors.blocks.new_empty(sequences, call.HV, call.K, call.V) if want_final else None
    BV = column_block(call.V, tuning.BV // (call.K // 128 or 1))
    chunk_state_kernel[(sequences * call.HV, call.V // BV)](
        erasure, update, k_to_end, factors.blocks, initial_state,
        states, residuals, final_state,
        call.chunks.first, call.H, call.HV,
        K=call.K, KP=triton.next_power_of_2(call.K), V=call.V, BV=BV,
        HAS_INITIAL=initial_state is not None, STORE_FINAL=want_final,
        **call.arithmetic, **tuning.launch(call.tile_dtype, BV),
    )  # fmt: skip
    return states, residuals, final_state


def chunk_output(call, q, v, factors, P, states, residuals):
    tuning = TUNING["chunk_output"]
    o = torch.empty_like(v)
    chunk_output_kernel[(call.chunks.count, call.HV)](
        q, factors.down, factors.blocks, P, states, residuals, o,
        call.chunks.table, call.scale, call.H, call.HV,
        K=call.K, V=call.V, BK=column_block(call.K, tuning.BK), BV=column_block(call.V, tuning.BV),
        **call.arithmetic,
        **tuning.launch(call.tile_dtype, column_block(call.K, tuning.BK), column_block(call.V, tuning.BV)),
    )  # fmt: skip
    return o


def chunk_recompute(call, q, k, v, b, w, content, factors, A, P, states, do, with_A):
    tuning = TUNING["chunk_recompute"]
    erasure = call.tiles(q, call.HV if call.gate == 2 else call.H, 64, call.K)
    q_from_start, k_to_end = call.tiles(q, call.H, 64, call.K), call.tiles(q, call.H, 64, call.K)
    residuals, d_here = call.tiles(q, call.HV, 64, call.V), call.tiles(q, call.HV, 64, call.V)
    chunk_recompute_kernel[(call.chunks.count, call.HV)](
        q, k, v, b, w, content, factors.down, factors.rest, factors.blocks, A, P, states, do,
        erasure, q_from_start, k_to_end, residuals, d_here,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV,
        K=call.K, V=call.V, BK=column_block(call.K, tuning.BK), BV=column_block(call.V, tuning.BV),
        GATE=call.gate, SCALAR_W=call.scalar_w, LOGITS_W=call.logits_w, WITH_A=with_A,
        **call.arithmetic,
        **tuning.launch(call.tile_dtype, column_block(call.K, tuning.BK), column_block(call.V, tuning.BV)),
    )  # fmt: skip
    return erasure, q_from_start, k_to_end, residuals, d_here


def chunk_state_gradient(call, erasure, k_to_end, q_from_start, factors, d_here, do, d_final_state, want_initial):
    tuning = TUNING["chunk_state_gradient"]
    d_states = call.tiles(erasure, call.HV, call.K, call.V)
    d_residuals = torch.empty_like(d_here)
    sequences = call.chunks.sequences
    d_initial = factors.blocks.new_empty(sequences, call.HV, call.K, call.V) if want_initial else None
    BV = column_block(call.V, tuning.BV // (call.K // 128 or 1))
    chunk_state_gradient_kernel[(sequences * call.HV, call.V // BV)](
        erasure, k_to_end, q_from_start, factors.blocks, d_here, do, d_final_state,
        d_states, d_residuals, d_initial,
        call.chunks.table, call.chunks.first, call.H, call.HV,
        K=call.K, KP=triton.next_power_of_2(call.K), V=call.V, BV=BV,
        HAS_FINAL=d_final_state is not None, STORE_INITIAL=want_initial, PER_HEAD_ERASURE=call.gate == 2,
        **call.arithmetic, **tuning.launch(call.tile_dtype, BV),
    )  # fmt: skip
    return d_states, d_residuals, d_initial


def chunk_value_gradient(call, v, w, A, do, d_output_rows, residuals, d_residuals):
    tuning = TUNING["chunk_value_gradient"]
    dv, dw = torch.empty_like(v), torch.empty_like(w)
    d_written = torch.empty_like(residuals)
    dT, dP = call.tiles(v, call.HV, 64, 64), call.tiles(v, call.HV, 64, 64)
    chunk_value_gradient_kernel[(call.chunks.count, call.HV)](
        v, w, A, do, d_output_rows, residuals, d_residuals,
        dv, dw, d_written, dT, dP,
        call.chunks.table, call.H, call.HV,
        V=call.V, BV=column_block(call.V, tuning.BV), PER_HEAD_A=call.gate == 2,
        SCALAR_W=call.scalar_w, LOGITS_W=call.logits_w, OUTPUT_ROWS=d_output_rows is not None,
        **call.arithmetic, **tuning.launch(call.tile_dtype, column_block(call.V, tuning.BV)),
    )  # fmt: skip
    return dv, dw, d_written, dT, dP


def chunk_key_gradient(
    call,
    q,
    k,
    g,
    b,
    A_log,
    dt_bias,
    content,
    factors,
    do,
    d_output_rows,
    states,
    d_states,
    residuals,
    d_written,
    dT,
    dP,
):
    shared = call.HV != call.H

    def gradient(x):
        shape = (*x.shape[:2], call.HV, call.K)
        return torch.empty(shape, dtype=torch.float32 if shared else x.dtype, device=x.device)

    dq, dk, dg, db = gradient(q), gradient(k), gradient(g), gradient(b)
    steep_dk = torch.empty_like(dk)
    d_content = call.floats(q, call.HV, call.K) if call.gate == 2 else None
    dA_log = call.floats(q, call.HV, call.K) if call.raw_decay else None
    d_dt_bias = call.floats(q, call.HV, call.K) if call.raw_decay else None
    BK = column_block(call.K, 32)
    steep_gradient_kernel[(call.chunks.count * 4, call.K // BK, call.HV)](
        q, k, g, b, A_log, dt_bias, content, factors.steep, dT, dP, dq, steep_dk, db,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV,
        K=call.K, BK=BK, GATE=call.gate, RAW_DECAY=call.raw_decay, **call.arithmetic, num_warps=1,
    )  # fmt: skip
    d_sums = call.floats(q, call.HV, 64, call.K)
    tuning = TUNING["chunk_row_gradient"]
    BK = column_block(call.K, tuning.BK)
    chunk_row_gradient_kernel[(call.chunks.count * (call.K // BK), call.HV)](
        q, k, b, content, *factors, do, d_output_rows, states, d_written, dT, dP,
        dq, db, dq, dk, db, d_content, d_sums,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV,
        K=call.K, V=call.V, BK=BK, BV=column_block(call.V, tuning.BV),
        GATE=call.gate, OUTPUT_ROWS=d_output_rows is not None,
        **call.arithmetic, **tuning.launch(call.tile_dtype, BK, column_block(call.V, tuning.BV)),
    )  # fmt: skip
    tuning = TUNING["chunk_key_gradient"]
    BK = column_block(call.K, tuning.BK)
    chunk_key_gradient_kernel[(call.chunks.count * (call.K // BK), call.HV)](
        q, k, g, b, A_log, dt_bias, content, *factors,
        states, d_states, residuals, dT, dP, d_sums, steep_dk,
        dk, dg, dA_log, d_dt_bias,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV,
        K=call.K, V=call.V, BK=BK, BV=column_block(call.V, tuning.BV),
        GATE=call.gate, RAW_DECAY=call.raw_decay,
        **call.arithmetic, **tuning.launch(call.tile_dtype, BK, column_block(call.V, tuning.BV)),
    )  # fmt: skip
    if shared:
        dq, dk, dg, db = (
            dx.unflatten(2, (call.H, -1)).sum(3).to(x.dtype) for dx, x in ((dq, q), (dk, k), (dg, g), (db, b))
        )
    if call.raw_decay:
        dA_log = dA_log.sum(0).view(call.H, -1).sum(1)
        d_dt_bias = d_dt_bias.sum(0).view(call.H, -1, call.K).sum(1)
    return dq, dk, dg, db, d_content, dA_log, d_dt_bias


def chunk_gdn2(
    q, k, v, g, b, w, *, scale, initial_state, output_final_state, cu_seqlens,
    A_log=None, dt_bias=None, gate_logits=False, erase_scale=1.0,
):  # fmt: skip
    """The Triton backend of the public chunk_gdn2, after its checks."""
    check_supported(q, v, 256)
    check_float32_size(q, v, 128, 128 * 256)
    call = Call(
        make_chunks(q, cu_seqlens, None), q.shape[2], v.shape[2], q.shape[3], v.shape[3], scale, erase_scale,
        gate=int(gate_logits), scalar_w=w.ndim == 3, logits_w=gate_logits, raw_decay=A_log is not None, dtype=q.dtype,
    )  # fmt: skip
    inputs = [x.contiguous() for x in (q, k, v, g, b, w)]
    return ChunkGDN2.apply(call, output_final_state, *inputs, A_log, dt_bias, initial_state)


def chunk_carve(
    q, k, v, g, erase_logits, w, content_down, content_up, *,
    content_chunk, content_grad, erase_scale, scale, initial_state, output_final_state, cu_seqlens,
    A_log=None, dt_bias=None, gate_logits=False,
):  # fmt: skip
    """The Triton backend of the public chunk_carve, after its checks."""
    # the whole state of a head stays in one program's registers
    check_supported(q, v, 128)
    check_float32_size(q, v, 128, 128 * 64)
    count = None if initial_state is None else initial_state.count
    chunks = make_chunks(q, cu_seqlens, count)
    call = Call(
        chunks, q.shape[2], v.shape[2], q.shape[3], v.shape[3], scale, erase_scale,
        gate=2, scalar_w=True, logits_w=gate_logits, raw_decay=A_log is not None, dtype=q.dtype,
    )  # fmt: skip
    inputs = [x.contiguous() for x in (q, k, v, g, erase_logits, w, content_down, content_up)]
    initial = (None,) * 4 if initial_state is None else [x.contiguous() for x in initial_state]
    o, *final = ChunkCarve.apply(
        call, content_chunk, content_grad == "detached", output_final_state, *inputs, A_log, dt_bias, *initial
    )
    if not output_final_state:
        return o, None
    lengths = chunks.lengths if count is None else chunks.lengths + count
    return o, CarveState(*final, lengths % content_chunk)
