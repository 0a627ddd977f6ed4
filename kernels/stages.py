"""Launches of the chunk kernels: for each stage its tuning, its outputs and its grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .chunk_gradient import chunk_key_gradient_kernel, chunk_value_gradient_kernel
from .chunk_operands import chunk_operands_kernel
from .chunk_output import chunk_output_kernel
from .chunk_state import chunk_state_gradient_kernel, chunk_state_kernel
from .chunks import Chunks
from .decay import decay_kernel
from .delta_operands import SUM_ROWS, delta_operands_kernel
from .delta_state import delta_state_gradient_kernel, delta_state_kernel
from .gradient_operands import gradient_operands_kernel
from .steep import GROUP, steep_gradient_kernel, steep_scores_kernel
from .tiles import GATE_CONTENT, GATE_SCALAR, GATE_SCALAR_LOGITS

SEES_CONTENT = GATE_CONTENT.value
# Values wider than this count as several heads of this width wherever columns of values do not depend on each other.
WIDEST_VALUES = 128


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
    "decay": Tuning(64, 0, 4),
    "steep": Tuning(64, 0, 4),
    "delta_operands": Tuning(64, 0, 4),
    "delta_state": Tuning(0, 0, 8, 2),
    "delta_state_gradient": Tuning(0, 0, 8, 2),
    "chunk_operands": Tuning(64, 64, 4, 2),
    "chunk_state": Tuning(0, 64, 4, 3),
    "chunk_output": Tuning(64, 128, 4, 1, 168),
    "gradient_operands": Tuning(64, 0, 4),
    "chunk_state_gradient": Tuning(0, 64, 8, 2),
    "chunk_value_gradient": Tuning(0, 0, 4),
    "chunk_key_gradient": Tuning(64, 0, 4),
    "precise_key_gradient": Tuning(64, 0, 8),
}


class Inputs(NamedTuple):
    """The tensors of a call that belong to tokens, and the parameters that act on each of them.

    b and w are gates, or their logits; content, [NC, HV, K] float32, is added to the logits of an erase gate that sees
    it. A_log and dt_bias, [H, K] both, are given where g is the raw decay.
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


class Content(NamedTuple):
    """D [HV or 1, R, V], U [HV or 1, K, R], and the bias [H, K] float32 or None."""

    down: Tensor
    up: Tensor
    bias: Tensor | None

    @property
    def by_head(self) -> int:
        """1 where every value head has D and U of its own, else 0."""
        return int(self.down.shape[0] > 1)


class Factors(NamedTuple):
    """What decay_kernel writes, first_chunks for CARVE's delta form alone."""

    left: Tensor
    last: Tensor
    rest: Tensor
    late: Tensor
    steep_from: Tensor
    halved_from: Tensor
    first_chunks: Tensor | None

    @property
    def of_rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the kernels take that form operands of all rows; steep ones among them are those of steep.py."""
        return self.left, self.last, self.rest, self.steep_from

    @property
    def of_steep_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """What forms the scores of steep rows."""
        return self.late, self.steep_from, self.halved_from


class DeltaOperands(NamedTuple):
    """What delta_operands_kernel writes."""

    P: Tensor
    q_sum: Tensor
    P_sum: Tensor
    k_left: Tensor
    k_right: Tensor
    k_to_end: Tensor
    q_from_start: Tensor


class GradientOperands(NamedTuple):
    """What gradient_operands_kernel writes; d_residuals_here only without the delta form's loop, P, k_right and
    gate_slope only for it, P_sum only for the diagonal form's."""

    erasure: Tensor
    k_to_end: Tensor
    q_from_start: Tensor
    residuals: Tensor
    d_residuals_here: Tensor | None
    P: Tensor | None
    k_right: Tensor | None
    gate_slope: Tensor | None
    P_sum: Tensor | None


@dataclass(frozen=True)
class Call:
    """What all stages of one call need besides its tensors.

    HV heads of V value columns each, at most WIDEST_VALUES: `split` of them make a head of the caller. K and V are
    powers of two. before: the erased keys are those before a token's own decay. precise_decay: the gradients of
    log-decays will be summed up over many tokens.
    """

    chunks: Chunks
    H: int
    HV: int
    K: int
    V: int
    split: int
    scale: float
    erase_scale: float
    gate: int
    scalar_w: bool
    logits_w: bool
    raw_decay: bool
    dtype: torch.dtype
    before: bool = False
    precise_decay: bool = False

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
        writes = {"SPLIT": self.split, "SCALAR_W": self.scalar_w, "LOGITS_W": self.logits_w}
        return {"GATE": self.gate, "BEFORE": self.before, **writes}

    @property
    def sees_content(self) -> bool:
        """The erase gate does: CARVE's delta form, whose loops keep what goes from chunk to chunk transposed."""
        return self.gate == SEES_CONTENT

    @property
    def scalar_b(self) -> bool:
        return self.gate in (GATE_SCALAR.value, GATE_SCALAR_LOGITS.value)

    @property
    def erase_heads(self) -> int:
        """Heads that have an erase gate of their own."""
        return self.HV // self.split if self.sees_content else self.H

    def tiles(self, like: Tensor, heads: int, *shape: int) -> Tensor:
        """Scratch with one tile per chunk and head."""
        return torch.empty(self.chunks.count, heads, *shape, dtype=self.tile_dtype, device=like.device)

    def floats(self, like: Tensor, heads: int, *shape: int) -> Tensor:
        return torch.empty(self.chunks.count, heads, *shape, dtype=torch.float32, device=like.device)

    def key_block(self, stage: str) -> int:
        return column_block(self.K, TUNING[stage].BK)

    def value_block(self, stage: str) -> int:
        return column_block(self.V, TUNING[stage].BV)

    def launch(self, stage: str, *columns: int) -> dict[str, Any]:
        return self.arithmetic | TUNING[stage].launch(self.tile_dtype, *columns)


def column_block(width: int, largest: int) -> int:
    """The widest block of columns, a power of two, that divides a head width."""
    return min(largest, width & -width)


def decay_factors(call: Call, x: Inputs) -> Factors:
    BK = call.key_block("decay")
    left, rest, late = (call.tiles(x.g, call.H, 64, call.K) for _ in range(3))
    steep_from, halved_from = torch.empty(2, call.chunks.count, call.H, dtype=torch.int32, device=x.g.device)
    first_chunks = None
    if call.sees_content:
        shape = call.chunks.sequences, call.H, 2
        first_chunks = torch.full(shape, call.chunks.count, dtype=torch.int32, device=x.g.device)
    factors = Factors(left, call.floats(x.g, call.H, call.K), rest, late, steep_from, halved_from, first_chunks)
    decay_kernel[(call.chunks.count, call.H)](
        x.g, x.A_log, x.dt_bias, *factors, call.chunks.table, call.H,
        K=call.K, BK=BK, RAW_DECAY=call.raw_decay, CT=call.arithmetic["CT"],
        **TUNING["decay"].launch(call.tile_dtype, BK),
    )  # fmt: skip
    return factors


def steep_scores(call: Call, x: Inputs, factors: Factors, T: Tensor | None) -> Tensor:
    """P [NC, H, C, C], and T, with the scores of steep rows alone."""
    BK = call.key_block("steep")
    P = call.tiles(x.q, call.H, 64, 64)
    steep_scores_kernel[(triton.cdiv(call.chunks.count, GROUP.value), call.H)](
        x.q, x.k, x.g, x.b, x.A_log, x.dt_bias, *factors.of_steep_rows, T, P,
        call.chunks.table, call.scale, call.erase_scale, call.chunks.count, call.H,
        K=call.K, BK=BK, GATE=call.gate, BEFORE=call.before, RAW_DECAY=call.raw_decay, WITH_T=T is not None,
        **call.launch("steep", BK),
    )  # fmt: skip
    return P


def chunk_operands(call: Call, x: Inputs, factors: Factors) -> tuple[Tensor, ...]:
    """A, P, erasure, update, k_to_end, q_from_start."""
    A = call.tiles(x.k, call.H, 64, 64)
    P = steep_scores(call, x, factors, A)
    erasure, k_to_end, q_from_start = (call.tiles(x.k, call.H, 64, call.K) for _ in range(3))
    operands = A, P, erasure, call.tiles(x.k, call.HV, 64, call.V), k_to_end, q_from_start
    BK, BV = call.key_block("chunk_operands"), call.value_block("chunk_operands")
    chunk_operands_kernel[(call.chunks.count, call.H)](
        x.q, x.k, x.v, x.b, x.w, *factors.of_rows, *operands,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV,
        K=call.K, BK=BK, V=call.V, BV=BV, **call.gates, **call.launch("chunk_operands", BK, BV),
    )  # fmt: skip
    return operands


def chunk_state(
    call: Call, factors: Factors, erasure: Tensor, update: Tensor, k_to_end: Tensor, initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """States, residuals, final state."""
    states, residuals = call.tiles(erasure, call.HV, call.K, call.V), torch.empty_like(update)
    sequences = call.chunks.sequences
    final_state = factors.last.new_empty(sequences, call.HV, call.K, call.V) if want_final else None
    BV = state_columns(call, "chunk_state")
    chunk_state_kernel[(sequences * call.HV, call.V // BV)](
        erasure, update, k_to_end, factors.last, initial_state,
        states, residuals, final_state,
        call.chunks.first, call.H, call.HV,
        K=call.K, V=call.V, BV=BV,
        HAS_INITIAL=initial_state is not None, STORE_FINAL=want_final, **call.launch("chunk_state", call.K, BV),
    )  # fmt: skip
    return states, residuals, final_state


def state_columns(call: Call, stage: str) -> int:
    """Value columns of a program that holds a block of the state, all K rows of it."""
    return column_block(call.V, TUNING[stage].BV)


def chunk_output(call: Call, x: Inputs, q_from_start: Tensor, P: Tensor, states: Tensor, residuals: Tensor) -> Tensor:
    BK, BV = call.key_block("chunk_output"), call.value_block("chunk_output")
    o = torch.empty_like(x.v)
    chunk_output_kernel[(call.chunks.count, call.HV)](
        q_from_start, P, states, residuals, o, call.chunks.table, call.H, call.HV,
        K=call.K, BK=BK, V=call.V, BV=BV, TRANSPOSED=call.sees_content, **call.launch("chunk_output", BK, BV),
    )  # fmt: skip
    return o


def delta_operands(call: Call, x: Inputs, factors: Factors) -> DeltaOperands:
    operands = DeltaOperands(
        steep_scores(call, x, factors, None),
        call.tiles(x.q, call.H, SUM_ROWS.value, call.K), call.tiles(x.q, call.H, SUM_ROWS.value, 64),
        *(call.tiles(x.q, call.H, 64, call.K) for _ in range(4)),
    )  # fmt: skip
    BK = call.key_block("delta_operands")
    delta_operands_kernel[(call.chunks.count, call.H)](
        x.q, x.k, *factors.of_rows, factors.first_chunks, *operands, call.chunks.table, call.scale, call.H,
        K=call.K, BK=BK, **call.launch("delta_operands", BK),
    )  # fmt: skip
    return operands


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Blocks of [rows, columns] of a contiguous tensor seen as rows of its last dimensions."""
    x = x.flatten(0, -2) if x.ndim != 2 else x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def delta_sizes(call: Call, content_down: Tensor) -> dict[str, int]:
    _, R, V = content_down.shape
    return {"K": call.K, "BK": column_block(call.K, 64), "V": V, "R": R, "RP": triton.next_power_of_2(R)}


def delta_state(
    call: Call, x: Inputs, content: Content, factors: Factors, operands: DeltaOperands,
    initial: Sequence[Tensor | None], count: Tensor | None, content_chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A, states, residuals (both transposed), codes, content, means, and the three tensors of the final state, which
    carry the state from the first launch to the second."""
    heads, sizes = call.erase_heads, delta_sizes(call, content.down)
    V = sizes["V"]
    A, residuals = call.tiles(x.v, heads, 64, 64), call.tiles(x.v, heads, V, 64)
    states = call.tiles(x.v, heads, V, call.K)
    # zeros: chunks beyond the last one enter the sums of the backward with weight zero
    codes, terms, means = (call.floats(x.v, heads, size).zero_() for size in (sizes["R"], call.K, V))
    shape = (call.chunks.sequences, heads)
    final = [means.new_empty(*shape, *tail) for tail in ((call.K, V), (V,), (V,))]
    K = call.K
    read = (
        x.k, x.g, x.b, x.w, x.A_log, x.dt_bias, *content,
        descriptor(x.b.flatten(2), 64, K), descriptor(x.v.flatten(2), 64, V),
        descriptor(operands.q_sum, SUM_ROWS.value, K), descriptor(operands.P_sum, SUM_ROWS.value, 64),
        descriptor(operands.k_left, 64, K), descriptor(operands.k_right, 64, K),
        descriptor(operands.k_to_end, 64, K), factors.last, *factors.of_steep_rows, factors.first_chunks,
    )  # fmt: skip
    written = A, descriptor(states, V, K), descriptor(residuals, V, 64), codes, terms, means, *final
    for steep, start in ((False, initial), (True, final)):
        delta_state_kernel[(call.chunks.sequences * heads,)](
            *read, *start, count, *written,
            call.chunks.table, call.chunks.first, content_chunk, call.scale, call.erase_scale, call.H, heads,
            content.by_head,
            **sizes, STEEP=steep, HAS_INITIAL=start[0] is not None,
            RAW_DECAY=call.raw_decay, LOGITS_W=call.logits_w, **call.launch("delta_state", call.K, V),
        )  # fmt: skip
    return A, states, residuals, codes, terms, means, *final


def delta_state_gradient(
    call: Call, x: Inputs, content: Content, codes: Tensor, factors: Factors, operands: GradientOperands,
    A: Tensor, states: Tensor, do: Tensor,
    d_final: Sequence[Tensor | None], count: Tensor | None, has_initial: bool, content_chunk: int, detached: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Gradients of states and residuals (both transposed), what is added to outputs', that of the content terms unless
    detached, those of the initial state."""
    heads, sizes = call.erase_heads, delta_sizes(call, content.down)
    V = sizes["V"]
    # one more tile a head, for the state before the first chunk
    d_states = states.new_empty(call.chunks.count + 1, *states.shape[1:])
    d_residuals = call.tiles(do, heads, V, 64)
    d_rows = call.floats(do, heads, V)
    shape = (call.chunks.sequences, heads)
    tails = ((call.K, V), (V,), (V,))
    has_final = any(d is not None for d in d_final)
    if has_final:
        d_final = [
            d_rows.new_zeros(*shape, *t) if d is None else d.contiguous() for d, t in zip(d_final, tails, strict=True)
        ]
    d_initial = [d_rows.new_empty(*shape, *tail) if has_initial else None for tail in tails]
    K = call.K
    assert operands.P is not None and operands.k_right is not None  # gradient_operands(for_delta_loop=True)
    d_content = None if detached else call.floats(do, heads, K).zero_()
    delta_state_gradient_kernel[(call.chunks.sequences * heads,)](
        x.k, x.g, x.b, x.A_log, x.dt_bias, content.down, content.up, codes, x.content,
        descriptor(operands.P, 64, 64), descriptor(operands.k_right, 64, K), descriptor(operands.k_to_end, 64, K),
        descriptor(operands.q_from_start, 64, K), descriptor(operands.erasure, 64, K),
        operands.gate_slope, factors.last, *factors.of_steep_rows, factors.first_chunks,
        descriptor(A, 64, 64), descriptor(states, V, K), operands.residuals,
        descriptor(do.flatten(2), 64, V),
        *d_final, count,
        descriptor(d_states, V, K), d_residuals, d_rows, d_content, *d_initial,
        call.chunks.table, call.chunks.first, content_chunk, call.scale, call.erase_scale, call.chunks.count,
        call.H, heads, content.by_head,
        **sizes, HAS_FINAL=has_final, HAS_INITIAL=has_initial, DETACHED=detached, RAW_DECAY=call.raw_decay,
        **call.launch("delta_state_gradient", call.K, V),
    )  # fmt: skip
    return d_states[:-1], d_residuals, d_rows, d_content, d_initial


def gradient_operands(
    call: Call, x: Inputs, factors: Factors, A: Tensor, states: Tensor, do: Tensor, *,
    for_delta_loop: bool = False, with_P_sum: bool = False,
) -> GradientOperands:  # fmt: skip
    key_tile, gate_heads = (64, call.K), call.erase_heads
    value_tile = (call.V, 64) if for_delta_loop else (64, call.V)
    P = steep_scores(call, x, factors, None)
    operands = GradientOperands(
        call.tiles(x.q, gate_heads, *key_tile), call.tiles(x.q, call.H, *key_tile), call.tiles(x.q, call.H, *key_tile),
        call.tiles(x.q, call.HV, *value_tile),
        None if for_delta_loop else call.tiles(x.q, call.HV, *value_tile),
        P if for_delta_loop else None,
        call.tiles(x.q, call.H, *key_tile) if for_delta_loop else None,
        call.tiles(x.q, gate_heads, call.K, 64) if for_delta_loop else None,
        call.floats(x.q, call.HV, 64) if with_P_sum else None,
    )  # fmt: skip
    BK = call.key_block("gradient_operands")
    gradient_operands_kernel[(call.chunks.count, call.HV)](
        x.q, x.k, x.v, x.b, x.w, x.content, *factors.of_rows, factors.first_chunks, A, P, states, do,
        operands.erasure, operands.k_to_end, operands.q_from_start, operands.residuals, operands.d_residuals_here,
        operands.k_right, operands.gate_slope, operands.P_sum,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV, gate_heads,
        K=call.K, BK=BK, V=call.V, **call.gates,
        STATES_T=call.sees_content, FOR_DELTA_LOOP=for_delta_loop, **call.launch("gradient_operands", BK, call.V),
    )  # fmt: skip
    return operands


def chunk_state_gradient(
    call: Call,
    factors: Factors,
    operands: GradientOperands,
    do: Tensor,
    d_final_state: Tensor | None,
    want_initial: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of states, residuals and the initial state."""
    d_states, d_residuals = call.tiles(do, call.HV, call.K, call.V), call.tiles(do, call.HV, 64, call.V)
    sequences = call.chunks.sequences
    d_initial = factors.last.new_empty(sequences, call.HV, call.K, call.V) if want_initial else None
    BV = state_columns(call, "chunk_state_gradient")
    chunk_state_gradient_kernel[(sequences * call.HV, call.V // BV)](
        operands.erasure, operands.k_to_end, operands.q_from_start, factors.last, operands.d_residuals_here,
        do, d_final_state,
        d_states, d_residuals, d_initial,
        call.chunks.table, call.chunks.first, call.H, call.HV, call.erase_heads,
        K=call.K, V=call.V, BV=BV,
        HAS_FINAL=d_final_state is not None, STORE_INITIAL=want_initial,
        **call.launch("chunk_state_gradient", call.K, BV),
    )  # fmt: skip
    return d_states, d_residuals, d_initial


class Gradients(NamedTuple):
    """Of the inputs, in their order; and of CARVE's content terms, [NC, HV, K]. None for what the call has not."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    b: Tensor
    w: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    content: Tensor | None


def _by_value_head(call: Call, x: Inputs, blocks: int, with_content: bool) -> Gradients:
    """Memory for the gradients that every value head gives; where value heads share what is given, and of a scalar
    erase gate by blocks of key columns, they are summed up afterwards."""
    tokens = x.q.shape[:2]

    def share(given: Tensor, heads: int, *width: int) -> Tensor:
        # The write gate that also erases has two gradients, which are added up before they are rounded.
        rounded = given.shape[2] == heads and not (call.precise_decay and given is x.w)
        dtype = given.dtype if rounded else torch.float32
        return torch.empty(*tokens, heads, *width, dtype=dtype, device=given.device)

    def vector() -> Tensor:
        return call.floats(x.q, call.HV, call.K)

    return Gradients(
        share(x.q, call.HV, call.K), share(x.k, call.HV, call.K), torch.empty_like(x.v),
        share(x.g, call.HV, call.K),
        torch.empty(*tokens, call.HV, blocks, dtype=torch.float32, device=x.b.device)
        if call.scalar_b else share(x.b, call.HV, call.K),
        share(x.w, call.HV) if call.scalar_w else torch.empty_like(x.w),
        vector() if call.raw_decay else None, vector() if call.raw_decay else None,
        vector() if call.sees_content and with_content else None,
    )  # fmt: skip


def chunk_gradient(
    call: Call, x: Inputs, factors: Factors, operands: GradientOperands, A: Tensor, states: Tensor, do: Tensor,
    d_output_rows: Tensor | None, d_residuals: Tensor, d_states: Tensor, d_content: Tensor | None,
) -> Gradients:  # fmt: skip
    stage = "precise_key_gradient" if call.precise_decay else "chunk_key_gradient"
    BK = call.key_block(stage)
    blocks = call.K // BK
    dq, dk, dv, dg, db, dw, dA_log, d_dt_bias, d_content_share = _by_value_head(call, x, blocks, d_content is None)
    transposed = call.sees_content and d_output_rows is not None  # from the delta form's loop
    d_written, dT, dP = call.tiles(do, call.HV, 64, call.V), *(call.tiles(do, call.HV, 64, 64) for _ in range(2))
    dP_own = call.floats(do, call.HV, 64)
    chunk_value_gradient_kernel[(call.chunks.count, call.HV)](
        x.v, x.w, A, do, d_output_rows, operands.residuals, d_residuals,
        dv, dw, d_written, dT, dP, dP_own,
        call.chunks.table, call.H, call.HV, call.erase_heads,
        V=call.V, SPLIT=call.split, SCALAR_W=call.scalar_w, LOGITS_W=call.logits_w,
        TRANSPOSED=transposed, **call.launch("chunk_value_gradient", call.V),
    )  # fmt: skip
    steep_dk = torch.empty_like(dk)
    steep_dbk = torch.empty_like(dk) if call.scalar_b else db
    steep_BK = call.key_block("steep")
    steep_gradient_kernel[(triton.cdiv(call.chunks.count, GROUP.value), call.HV)](
        x.q, x.k, x.g, x.b, x.A_log, x.dt_bias, x.content, *factors.of_steep_rows, dT, dP, dq, steep_dk, steep_dbk,
        dg,
        call.chunks.table, call.scale, call.erase_scale, call.chunks.count, call.H, call.HV, call.erase_heads,
        K=call.K, BK=steep_BK, GATE=call.gate, BEFORE=call.before, PRECISE=call.precise_decay, RAW_DECAY=call.raw_decay,
        **call.launch("steep", steep_BK),
    )  # fmt: skip
    chunk_key_gradient_kernel[(call.chunks.count * blocks, call.HV)](
        x.q, x.k, x.g, x.b, x.A_log, x.dt_bias, x.content, *factors.of_rows,
        states, d_states, do, d_output_rows, operands.residuals, d_written, dT, dP, dP_own, steep_dk, steep_dbk,
        dq, dk, dg, db, d_content_share, dA_log, d_dt_bias,
        call.chunks.table, call.scale, call.erase_scale, call.H, call.HV, call.erase_heads,
        K=call.K, BK=BK, V=call.V, GATE=call.gate, BEFORE=call.before, PRECISE=call.precise_decay,
        RAW_DECAY=call.raw_decay, CONTENT=d_content_share is not None, STATES_T=call.sees_content,
        TRANSPOSED=transposed, **call.launch(stage, BK, call.V),
    )  # fmt: skip

    def gather(dx: Tensor, given: Tensor) -> Tensor:
        if dx.shape == given.shape:
            return dx
        return dx.unflatten(2, (given.shape[2], -1)).sum(3).to(given.dtype)

    if call.scalar_b:
        db = db.unflatten(2, (call.H, -1)).sum((3, 4))
        db = db if call.precise_decay else db.to(x.b.dtype)
    if dA_log is not None and d_dt_bias is not None:
        dA_log, d_dt_bias = (d.sum(0).view(call.H, -1, call.K).sum(1) for d in (dA_log, d_dt_bias))
    if d_content_share is not None:
        d_content = d_content_share.unflatten(1, (call.erase_heads, -1)).sum(2)
    return Gradients(
        gather(dq, x.q), gather(dk, x.k), dv, gather(dg, x.g), gather(db, x.b), gather(dw, x.w),
        dA_log, d_dt_bias, d_content,
    )  # fmt: skip
