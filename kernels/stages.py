"""Launches of the chunk kernels: for each stage its tuning, its outputs and its grid."""

from collections.abc import Sequence
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
from .chunks import Chunks
from .decay_factors import decay_factors_kernel
from .steep import GROUP, steep_gradient_kernel, steep_scores_kernel
from .tiles import GATE_CONTENT

SEES_CONTENT = GATE_CONTENT.value


class Tuning(NamedTuple):
    """Widest blocks of key and value columns, warps per program, stages of pipelined loads."""

    BK: int
    BV: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None

    def launch(self, dtype: torch.dtype, *columns: int) -> dict[str, Any]:
        """Launch options for tiles of this dtype with these blocks of columns.

        Loads of float32 tiles and of 256 columns are not pipelined: several stages of them exceed a Hopper SM's shared
        memory.

        Triton 3.6 reads outside shared memory in a wgmma product of 64 rows with 32 columns or fewer that lie
        contiguous (seen on an H200 with compute-sanitizer); two warps multiply without wgmma.
        """
        num_warps = min(self.num_warps, 2) if min(columns) < 64 else self.num_warps
        num_stages = self.num_stages if dtype == torch.bfloat16 and max(columns) <= 128 else 1
        return {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": self.maxnreg}


TUNING = {
    "decay_factors": Tuning(64, 0, 4),
    "steep": Tuning(64, 0, 4),
    "carve_tiles": Tuning(128, 0, 4),
    "carve_state": Tuning(0, 0, 8, 2),
    "carve_state_gradient": Tuning(0, 0, 8, 2),
    "chunk_operands": Tuning(64, 64, 4, 3),
    "chunk_state": Tuning(0, 64, 4, 3),
    "chunk_output": Tuning(64, 128, 4, 1, 168),
    "chunk_recompute": Tuning(64, 128, 4),
    "chunk_state_gradient": Tuning(0, 64, 8, 2),
    "chunk_value_gradient": Tuning(0, 128, 4),
    "chunk_row_gradient": Tuning(64, 128, 4),
    "chunk_key_gradient": Tuning(64, 128, 4),
}


class Inputs(NamedTuple):
    """The tensors of a call that belong to tokens, and the parameters that act on each of them.

    b and w are gates, or their logits; content, [NC, HV, K] float32, is added to the logits of an erase gate that sees
    it. A_log and dt_bias are given where g is the raw decay.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    b: Tensor
    w: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    content: Tensor | None = None


class Factors(NamedTuple):
    """What decay_factors_kernel writes."""

    left: Tensor
    right: Tensor
    last: Tensor
    rest: Tensor
    steep_from: Tensor


class CarveTiles(NamedTuple):
    """What carve_tiles_kernel writes besides P."""

    q_sum: Tensor
    P_sum: Tensor
    k_left: Tensor
    k_right: Tensor
    k_to_end: Tensor


class Recomputed(NamedTuple):
    """What chunk_recompute_kernel writes; the last three only for CARVE's loop, the one before only without it."""

    erasure: Tensor
    q_from_start: Tensor
    k_to_end: Tensor
    residuals: Tensor
    d_residuals_here: Tensor | None
    q_sum: Tensor | None
    k_right: Tensor | None
    gate_slope: Tensor | None


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

    @property
    def gates(self) -> dict[str, Any]:
        return {"GATE": self.gate, "SCALAR_W": self.scalar_w, "LOGITS_W": self.logits_w}

    @property
    def sees_content(self) -> bool:
        return self.gate == SEES_CONTENT

    def tiles(self, like: Tensor, heads: int, *shape: int) -> Tensor:
        """Scratch with one tile per chunk and head."""
        return torch.empty(self.chunks.count, heads, *shape, dtype=self.tile_dtype, device=like.device)

    def floats(self, like: Tensor, heads: int, *shape: int) -> Tensor:
        return torch.empty(self.chunks.count, heads, *shape, dtype=torch.float32, device=like.device)

    def blocks(self, stage: str) -> dict[str, int]:
        """The stage's blocks of key and value columns."""
        return {"BK": column_block(self.K, TUNING[stage].BK), "BV": column_block(self.V, TUNING[stage].BV)}


def column_block(width: int, largest: int) -> int:
    """The widest block of columns, a power of two, that divides a head width."""
    return min(largest, width & -width)


def decay_factors(call: Call, x: Inputs) -> Factors:
    tuning = TUNING["decay_factors"]
    BK = column_block(call.K, tuning.BK)
    steep_from = torch.empty(call.chunks.count, call.H, dtype=torch.int32, device=x.g.device)
    left, right, rest = (call.tiles(x.g, call.H, 64, call.K) for _ in range(3))
    factors = Factors(left, right, call.floats(x.g, call.H, call.K), rest, steep_from)
    arithmetic = {"CT": call.arithmetic["CT"]}
    decay_factors_kernel[(call.chunks.count, call.H)](
        x.g, x.A_log, x.dt_bias, *factors, call.chunks.table, call.H,
        K=call.K, BK=BK, RAW_DECAY=call.raw_decay, **arithmetic, **tuning.launch(call.tile_dtype, BK),
    )  # fmt: skip
    return factors


def steep_scores(call: Call, x: Inputs, factors: Factors, T: Tensor | None, P: Tensor) -> None:
    tuning = TUNING["steep"]
    BK = column_block(call.K, tuning.BK)
    steep_scores_kernel[(triton.cdiv(call.chunks.count, GROUP.value), call.H)](
        x.q, x.k, x.g, x.b, x.A_log, x.dt_bias, factors.steep_from, T, P,
        call.chunks.table, call.scale, call.erase_scale, call.chunks.count, call.H,
        K=call.K, BK=BK, GATE=call.gate, RAW_DECAY=call.raw_decay, WITH_T=T is not None,
        **call.arithmetic, **tuning.launch(call.tile_dtype, BK),
    )  # fmt: skip


def chunk_operands(call: Call, x: Inputs, factors: Factors) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A, P, erasure, update, k_to_end."""
    A, P = call.tiles(x.k, call.H, 64, 64), call.tiles(x.k, call.H, 64, 64)
    erasure, k_to_end = call.tiles(x.k, call.H, 64, call.K), call.tiles(x.k, call.H, 64, call.K)
    update = call.tiles(x.k, call.HV, 64, call.V)
    steep_scores(call, x, factors, A, P)
    blocks = call.blocks("chunk_operands")
    chunk_operands_kernel[(call.chunks.count, call.H)](
        x.q, x.k, x.v, x.b, x.w, *factors,
        A, P, erasure, update, k_to_end,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV,
        K=call.K, V=call.V, **blocks, **call.gates,
        **call.arithmetic, **TUNING["chunk_operands"].launch(call.tile_dtype, *blocks.values()),
    )  # fmt: skip
    return A, P, erasure, update, k_to_end


def chunk_state(
    call: Call, erasure: Tensor, update: Tensor, k_to_end: Tensor, factors: Factors, initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """States, residuals, final state."""
    tuning = TUNING["chunk_state"]
    states, residuals = call.tiles(erasure, call.HV, call.K, call.V), torch.empty_like(update)
    sequences = call.chunks.sequences
    final_state = factors.last.new_empty(sequences, call.HV, call.K, call.V) if want_final else None
    BV = column_block(call.V, tuning.BV // (call.K // 128 or 1))
    chunk_state_kernel[(sequences * call.HV, call.V // BV)](
        erasure, update, k_to_end, factors.last, initial_state,
        states, residuals, final_state,
        call.chunks.first, call.H, call.HV,
        K=call.K, KP=triton.next_power_of_2(call.K), V=call.V, BV=BV,
        HAS_INITIAL=initial_state is not None, STORE_FINAL=want_final,
        **call.arithmetic, **tuning.launch(call.tile_dtype, BV),
    )  # fmt: skip
    return states, residuals, final_state


def chunk_output(call: Call, x: Inputs, factors: Factors, P: Tensor, states: Tensor, residuals: Tensor) -> Tensor:
    blocks = call.blocks("chunk_output")
    o = torch.empty_like(x.v)
    chunk_output_kernel[(call.chunks.count, call.HV)](
        x.q, factors.left, P, states, residuals, o,
        call.chunks.table, call.scale, call.H, call.HV,
        K=call.K, V=call.V, **blocks, TRANSPOSED=call.sees_content,
        **call.arithmetic, **TUNING["chunk_output"].launch(call.tile_dtype, *blocks.values()),
    )  # fmt: skip
    return o


def carve_tiles(call: Call, x: Inputs, factors: Factors) -> tuple[Tensor, CarveTiles]:
    """P and the rest."""
    tuning = TUNING["carve_tiles"]
    BK = column_block(call.K, tuning.BK)
    P = call.tiles(x.q, call.H, 64, 64)
    steep_scores(call, x, factors, None, P)
    tiles = CarveTiles(
        call.floats(x.q, call.H, call.K), call.floats(x.q, call.H, 64),
        *(call.tiles(x.q, call.H, 64, call.K) for _ in range(3)),
    )  # fmt: skip
    carve_tiles_kernel[(call.chunks.count, call.H)](
        x.q, x.k, *factors, P, *tiles,
        call.chunks.table, call.scale, call.H,
        K=call.K, BK=BK, **call.arithmetic, **tuning.launch(call.tile_dtype, BK),
    )  # fmt: skip
    return P, tiles


def carve_sizes(call: Call, content_down: Tensor) -> dict[str, int]:
    sizes = {"K": call.K, "V": call.V, "R": content_down.shape[1]}
    padded = {name + "P": triton.next_power_of_2(size) for name, size in sizes.items()}
    return sizes | padded | {"BK": column_block(call.K, 64)}


def carve_state(
    call: Call, x: Inputs, down: Tensor, up: Tensor, factors: Factors, tiles: CarveTiles,
    initial: Sequence[Tensor | None], content_chunk: int, want_final: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A, states, residuals (both transposed), codes, content, means, and the three tensors of the final state."""
    A, residuals = call.tiles(x.v, call.HV, 64, 64), call.tiles(x.v, call.HV, call.V, 64)
    states = call.tiles(x.v, call.HV, call.V, call.K)
    # zeros: chunks beyond the last one enter the sums of the backward with weight zero
    codes, content, means = (call.floats(x.v, call.HV, size).zero_() for size in (down.shape[1], call.K, call.V))
    shape = (call.chunks.sequences, call.HV)
    final = [
        means.new_empty(*shape, *tail) if want_final else None for tail in ((call.K, call.V), (call.V,), (call.V,))
    ]
    carve_state_kernel[(call.chunks.sequences * call.HV,)](
        x.k, x.v, x.g, x.b, x.w, x.A_log, x.dt_bias, down, up, *tiles, factors.last, factors.steep_from,
        *initial, A, states, residuals, codes, content, means, *final,
        call.chunks.table, call.chunks.first, content_chunk, call.erase_scale, call.H, call.HV,
        **carve_sizes(call, down), HAS_INITIAL=initial[0] is not None, STORE_FINAL=want_final,
        RAW_DECAY=call.raw_decay, LOGITS_W=call.logits_w,
        **call.arithmetic, **TUNING["carve_state"].launch(call.tile_dtype, call.K, call.V),
    )  # fmt: skip
    return A, states, residuals, codes, content, means, *final


def carve_state_gradient(
    call: Call, x: Inputs, down: Tensor, up: Tensor, factors: Factors, P_sum: Tensor,
    recomputed: Recomputed, A: Tensor, P: Tensor, states: Tensor, do: Tensor,
    d_final: Sequence[Tensor | None], count: Tensor | None, has_initial: bool, content_chunk: int, detached: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
    """Gradients of states and residuals (both transposed), what is added to outputs', those of the initial state."""
    d_states, d_residuals = torch.empty_like(states), call.tiles(do, call.HV, call.V, 64)
    d_rows = call.floats(do, call.HV, call.V)
    shape = (call.chunks.sequences, call.HV)
    tails = ((call.K, call.V), (call.V,), (call.V,))
    has_final = any(d is not None for d in d_final)
    if has_final:
        d_final = [
            d_rows.new_zeros(*shape, *t) if d is None else d.contiguous() for d, t in zip(d_final, tails, strict=True)
        ]
    d_initial = [d_rows.new_empty(*shape, *tail) if has_initial else None for tail in tails]
    carve_state_gradient_kernel[(call.chunks.sequences * call.HV,)](
        x.k, x.g, x.b, x.A_log, x.dt_bias, down, up, x.content,
        recomputed.q_sum, P_sum, recomputed.k_right, recomputed.k_to_end, recomputed.q_from_start, recomputed.erasure,
        recomputed.gate_slope, factors.last, factors.steep_from,
        A, P, states, recomputed.residuals, do,
        *d_final, count,
        torch.empty(*shape, 64, 64, dtype=call.tile_dtype, device=do.device), d_rows.new_empty(*shape, call.K),
        d_states, d_residuals, d_rows, *d_initial,
        call.chunks.table, call.chunks.first, content_chunk, call.erase_scale, call.H, call.HV,
        **carve_sizes(call, down), HAS_FINAL=has_final, HAS_INITIAL=has_initial, DETACHED=detached,
        RAW_DECAY=call.raw_decay,
        **call.arithmetic, **TUNING["carve_state_gradient"].launch(call.tile_dtype, call.K, call.V),
    )  # fmt: skip
    return d_states, d_residuals, d_rows, d_initial


def chunk_recompute(
    call: Call, x: Inputs, factors: Factors, A: Tensor, P: Tensor, states: Tensor, do: Tensor, for_carve_loop: bool
) -> Recomputed:
    key_tile, value_tile = (64, call.K), (64, call.V)
    recomputed = Recomputed(
        call.tiles(x.q, call.HV if call.sees_content else call.H, *key_tile),
        call.tiles(x.q, call.H, *key_tile), call.tiles(x.q, call.H, *key_tile),
        call.tiles(x.q, call.HV, *value_tile),
        None if for_carve_loop else call.tiles(x.q, call.HV, *value_tile),
        call.floats(x.q, call.H, call.K) if for_carve_loop else None,
        call.tiles(x.q, call.H, *key_tile) if for_carve_loop else None,
        call.tiles(x.q, call.HV, *key_tile) if for_carve_loop else None,
    )  # fmt: skip
    blocks = call.blocks("chunk_recompute")
    chunk_recompute_kernel[(call.chunks.count, call.HV)](
        x.q, x.k, x.v, x.b, x.w, x.content, *factors, A, P, states, do,
        *recomputed,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV,
        K=call.K, V=call.V, **blocks, **call.gates,
        FOR_CARVE_LOOP=for_carve_loop, STATES_T=call.sees_content,
        **call.arithmetic, **TUNING["chunk_recompute"].launch(call.tile_dtype, *blocks.values()),
    )  # fmt: skip
    return recomputed


def chunk_state_gradient(
    call: Call, recomputed: Recomputed, factors: Factors, do: Tensor, d_final_state: Tensor | None, want_initial: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of states, residuals and the initial state."""
    tuning = TUNING["chunk_state_gradient"]
    d_states, d_residuals = call.tiles(do, call.HV, call.K, call.V), torch.empty_like(recomputed.residuals)
    sequences = call.chunks.sequences
    d_initial = factors.last.new_empty(sequences, call.HV, call.K, call.V) if want_initial else None
    BV = column_block(call.V, tuning.BV // (call.K // 128 or 1))
    chunk_state_gradient_kernel[(sequences * call.HV, call.V // BV)](
        recomputed.erasure, recomputed.k_to_end, recomputed.q_from_start, factors.last, recomputed.d_residuals_here,
        do, d_final_state,
        d_states, d_residuals, d_initial,
        call.chunks.table, call.chunks.first, call.H, call.HV,
        K=call.K, KP=triton.next_power_of_2(call.K), V=call.V, BV=BV,
        HAS_FINAL=d_final_state is not None, STORE_INITIAL=want_initial, PER_HEAD_ERASURE=call.sees_content,
        **call.arithmetic, **tuning.launch(call.tile_dtype, BV),
    )  # fmt: skip
    return d_states, d_residuals, d_initial


class ScoreGradients(NamedTuple):
    """What chunk_value_gradient_kernel leaves for the key axis; d_outputs only where rows are added to do."""

    d_outputs: Tensor | None
    d_written: Tensor
    dT: Tensor
    dP: Tensor
    dP_own: Tensor


def chunk_value_gradient(
    call: Call,
    x: Inputs,
    A: Tensor,
    do: Tensor,
    d_output_rows: Tensor | None,
    residuals: Tensor,
    d_residuals: Tensor,
) -> tuple[Tensor, Tensor, ScoreGradients]:
    """dv, dw, and what the key axis needs."""
    dv, dw = torch.empty_like(x.v), torch.empty_like(x.w)
    scores = ScoreGradients(
        None if d_output_rows is None else torch.empty_like(residuals), torch.empty_like(residuals),
        call.tiles(x.v, call.HV, 64, 64), call.tiles(x.v, call.HV, 64, 64), call.floats(x.v, call.HV, 64),
    )  # fmt: skip
    BV = column_block(call.V, TUNING["chunk_value_gradient"].BV)
    chunk_value_gradient_kernel[(call.chunks.count, call.HV)](
        x.v, x.w, A, do, d_output_rows, residuals, d_residuals,
        dv, dw, *scores,
        call.chunks.table, call.H, call.HV,
        V=call.V, BV=BV, PER_HEAD_A=call.sees_content,
        SCALAR_W=call.scalar_w, LOGITS_W=call.logits_w, OUTPUT_ROWS=d_output_rows is not None,
        D_STATES_T=d_output_rows is not None,
        **call.arithmetic, **TUNING["chunk_value_gradient"].launch(call.tile_dtype, BV),
    )  # fmt: skip
    return dv, dw, scores


class KeyGradients(NamedTuple):
    """Gradients of everything on the key axis; None for what the call has not."""

    q: Tensor
    k: Tensor
    g: Tensor
    b: Tensor
    content: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None


def chunk_key_gradient(
    call: Call, x: Inputs, factors: Factors, do: Tensor,
    states: Tensor, d_states: Tensor, residuals: Tensor, scores: ScoreGradients,
) -> KeyGradients:  # fmt: skip
    shared = call.HV != call.H
    tokens = x.q.shape[:2]

    def per_value_head(given: Tensor) -> Tensor:
        dtype = torch.float32 if shared else given.dtype
        return torch.empty(*tokens, call.HV, call.K, dtype=dtype, device=given.device)

    dq, dk, dg, db = (per_value_head(given) for given in (x.q, x.k, x.g, x.b))
    vector = (x.q, call.HV, call.K)
    d_content = call.floats(*vector) if call.sees_content else None
    dA_log, d_dt_bias = (call.floats(*vector), call.floats(*vector)) if call.raw_decay else (None, None)
    steep_dk = torch.empty_like(dk)
    steep = TUNING["steep"]
    BK = column_block(call.K, steep.BK)
    steep_gradient_kernel[(triton.cdiv(call.chunks.count, GROUP.value), call.HV)](
        x.q, x.k, x.g, x.b, x.A_log, x.dt_bias, x.content, factors.steep_from, scores.dT, scores.dP, dq, steep_dk, db,
        call.chunks.table, call.scale, call.erase_scale, call.chunks.count, call.H, call.HV,
        K=call.K, BK=BK, GATE=call.gate, RAW_DECAY=call.raw_decay,
        **call.arithmetic, **steep.launch(call.tile_dtype, BK),
    )  # fmt: skip
    d_sums = call.floats(x.q, call.HV, 64, call.K)
    blocks = call.blocks("chunk_row_gradient")
    chunk_row_gradient_kernel[(call.chunks.count * (call.K // blocks["BK"]), call.HV)](
        x.q, x.k, x.b, x.content, factors.left, factors.right, factors.steep_from,
        do, scores.d_outputs, states, scores.d_written, scores.dT, scores.dP, scores.dP_own,
        dq, dk, db, d_content, d_sums,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV,
        K=call.K, V=call.V, **blocks,
        GATE=call.gate, OUTPUT_ROWS=scores.d_outputs is not None, STATES_T=call.sees_content,
        **call.arithmetic, **TUNING["chunk_row_gradient"].launch(call.tile_dtype, *blocks.values()),
    )  # fmt: skip
    blocks = call.blocks("chunk_key_gradient")
    chunk_key_gradient_kernel[(call.chunks.count * (call.K // blocks["BK"]), call.HV)](
        x.q, x.k, x.g, x.b, x.A_log, x.dt_bias, x.content, *factors,
        states, d_states, residuals, scores.dT, scores.dP, d_sums, steep_dk,
        dk, dg, dA_log, d_dt_bias,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV,
        K=call.K, V=call.V, **blocks,
        GATE=call.gate, RAW_DECAY=call.raw_decay, STATES_T=call.sees_content, D_STATES_T=scores.d_outputs is not None,
        **call.arithmetic, **TUNING["chunk_key_gradient"].launch(call.tile_dtype, *blocks.values()),
    )  # fmt: skip
    if shared:
        dq, dk, dg, db = (
            dx.unflatten(2, (call.H, -1)).sum(3).to(given.dtype)
            for dx, given in ((dq, x.q), (dk, x.k), (dg, x.g), (db, x.b))
        )
    if dA_log is not None and d_dt_bias is not None:
        dA_log = dA_log.sum(0).view(call.H, -1).sum(1)
        d_dt_bias = d_dt_bias.sum(0).view(call.H, -1, call.K).sum(1)
    return KeyGradients(dq, dk, dg, db, d_content, dA_log, d_dt_bias)
