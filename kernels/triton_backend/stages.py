"""What the stages of the chunk ops share: the call, their tuning, and what one stage hands to the next."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .chunks import Chunks
from .gates import GATE_CONTENT, GATE_SCALAR, GATE_SCALAR_LOGITS
from .products import arithmetic_of

SEES_CONTENT, SCALAR_GATES = GATE_CONTENT.value, (GATE_SCALAR.value, GATE_SCALAR_LOGITS.value)
# Values wider than this count as several heads of this width wherever columns of values do not depend on each other.
WIDEST_VALUES = 128

next_power_of_2 = functools.cache(triton.next_power_of_2)  # which takes the CPU a microsecond


# Major number of the compute capability. A stage has a table of tunings by it; what was not measured takes Hopper's.
HOPPER = 9
# Of a thread.
MOST_REGISTERS = 255


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
        contiguous (seen on an H200 with compute-sanitizer); two warps multiply without wgmma. Told nothing, ptxas has
        given their threads 32 registers and spilled 9 KB.
        """
        narrow = min(columns) < 64
        num_warps = min(self.num_warps, 2) if narrow else self.num_warps
        maxnreg = MOST_REGISTERS if narrow and self.maxnreg is None else self.maxnreg
        num_stages = self.num_stages if dtype == torch.bfloat16 and max(columns) <= 128 else 1
        return {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}


class Inputs(NamedTuple):
    """The tensors of a call that belong to tokens, and the parameters that act on each of them.

    b and w are gates, or their logits; content, [NC, HV, K] float32, is added to the logits of an erase gate that sees
    it. A_log and dt_bias, [H, K] both, are given where g is the raw decay. Gradients come in the same form, that of
    the content by value head.

    Of CARVE's diagonal form g is memory for the log-decay with the erase in it, float32, which decay_kernel fills for
    chunks with steep rows alone; what it is made of are DecayInputs.
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

    @property
    def of_tokens(self) -> tuple[Tensor | None, ...]:
        """All but the content, which belongs to chunks."""
        return self[:-1]


class DecayInputs(NamedTuple):
    """What the decay of CARVE's diagonal form is made of: g, raw where A_log and dt_bias [H, K] are given, and erase
    logits, [B, T, H, K]; content [NC, H, K] float32, which is added to the logits of a chunk, or None."""

    g: Tensor
    erase_logits: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    content: Tensor | None


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
    """What gradient_operands_kernel writes; gate_slope only for the delta form's loop, P_sum and rows_here only
    for the diagonal form's content, P and k_right only for these two, d_residuals_here only without them."""

    erasure: Tensor
    k_to_end: Tensor
    q_from_start: Tensor
    residuals: Tensor
    d_residuals_here: Tensor | None
    P: Tensor | None
    k_right: Tensor | None
    gate_slope: Tensor | None
    P_sum: Tensor | None
    rows_here: Tensor | None


class Call(NamedTuple):
    """What all stages of one call need besides its tensors.

    HV heads of V value columns each, at most WIDEST_VALUES: `split` of them make a head of the caller. K and V are
    powers of two. architecture: see HOPPER. before: the erased keys are those before a token's own decay.
    packed: see of_tokens.
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
    architecture: int
    before: bool = False
    packed: bool = False

    @property
    def arithmetic(self) -> dict[str, Any]:
        """Dtype of the products' operands, and how float32 ones are multiplied."""
        return arithmetic_of(self.dtype)

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
        return self.gate in SCALAR_GATES

    @property
    def erase_heads(self) -> int:
        """Heads that have an erase gate of their own."""
        return self.HV // self.split if self.sees_content else self.H

    def of_tokens(self, given: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for what is written for every token, like `given` where nothing else is said. Packed sequences may
        end before the tokens do; what no sequence holds is zero."""
        if not shape:
            return (torch.zeros_like if self.packed else torch.empty_like)(given, dtype=dtype)
        make = torch.zeros if self.packed else torch.empty
        return make(shape, dtype=dtype or given.dtype, device=given.device)

    def tiles(self, like: Tensor, heads: int, *shape: int) -> Tensor:
        """Scratch with one tile per chunk and head."""
        return torch.empty(self.chunks.count, heads, *shape, dtype=self.tile_dtype, device=like.device)

    def floats(self, like: Tensor, heads: int, *shape: int) -> Tensor:
        return torch.empty(self.chunks.count, heads, *shape, dtype=torch.float32, device=like.device)

    def floats_of_chunks(self, like: Tensor, heads: int, *shape: int) -> Tensor:
        """For what enters the sums of the backward; of chunks beyond the last one it is zero."""
        floats = self.floats(like, heads, *shape)
        return floats.zero_() if self.chunks.spare else floats

    def tuning(self, of_stage: Mapping[int, Tuning]) -> Tuning:
        return of_stage.get(self.architecture, of_stage[HOPPER])

    def key_block(self, of_stage: Mapping[int, Tuning]) -> int:
        return column_block(self.K, self.tuning(of_stage).BK)

    def value_block(self, of_stage: Mapping[int, Tuning]) -> int:
        return column_block(self.V, self.tuning(of_stage).BV)

    def launch(self, of_stage: Mapping[int, Tuning], *columns: int) -> dict[str, Any]:
        return _launch_options(self.tuning(of_stage), self.dtype, self.tile_dtype, columns)


@functools.cache
def _launch_options(
    tuning: Tuning, dtype: torch.dtype, tile_dtype: torch.dtype, columns: tuple[int, ...]
) -> dict[str, Any]:
    return arithmetic_of(dtype) | tuning.launch(tile_dtype, *columns)


@functools.cache
def architecture(device: torch.device) -> int:
    """Of a GPU; that which kernels are interpreted or compiled for without one is Hopper."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else HOPPER


def column_block(width: int, largest: int) -> int:
    """The widest block of columns, a power of two, that divides a head width."""
    return min(largest, width & -width)
