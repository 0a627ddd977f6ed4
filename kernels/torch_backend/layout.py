"""The padded time grid: every sequence on a row of its own, chunk boundaries in the same columns for all rows."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Where each token of a call stands on a [rows, steps] grid; zeros fill the rest.

    A sequence that enters with n tokens in its running content chunk starts n columns in, so that content chunks
    end in the same column for every row. The recurrence treats zero columns as no-ops (k = q = w * v = g = 0).

    Attributes:
        batch, tokens: sizes of the call's [B, T, ...] tensors.
        steps: columns of the grid.
        ends: per row, the column after its last token.
        front: empty columns before the first token of every row, when all rows agree (positions is None).
        positions: flat grid index of every token, when rows differ.
    """

    batch: int
    tokens: int
    steps: int
    ends: list[int]
    front: int = 0
    positions: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.ends)

    def place(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [rows, steps, ...]."""
        if self.positions is None:
            back = self.steps - self.front - self.tokens
            if self.front == 0 and back == 0:
                return x
            return F.pad(x, (0, 0) * (x.ndim - 2) + (self.front, back))
        grid = x.new_zeros(self.rows * self.steps, *x.shape[2:])
        return grid.index_copy(0, self.positions, x.flatten(0, 1)).unflatten(0, (self.rows, self.steps))

    def take(self, y: Tensor) -> Tensor:
        """[rows, steps, ...] -> [B, T, ...], the inverse of place."""
        if self.positions is None:
            return y[:, self.front : self.front + self.tokens]
        return y.flatten(0, 1).index_select(0, self.positions).unflatten(0, (self.batch, self.tokens))


def make_grid(x: Tensor, *, boundaries: list[int] | None, offsets: list[int] | None, multiple: int) -> Grid:
    """Lay out a call whose tensors look like x, [B, T, ...].

    Args:
        x: any of the call's tensors; gives B, T and the device.
        boundaries: N + 1 boundaries of packed sequences (B = 1), or None for one sequence per batch entry.
        offsets: first column of each sequence, or None for zeros.
        multiple: the number of columns is rounded up to a multiple of this.
    """
    batch, tokens = x.shape[:2]
    packed = boundaries is not None
    if boundaries is None:
        boundaries = [row * tokens for row in range(batch + 1)]
    starts = boundaries[:-1]
    lengths = [end - start for start, end in pairwise(boundaries)]
    offsets = offsets if offsets is not None else [0] * len(starts)
    ends = [offset + length for offset, length in zip(offsets, lengths, strict=True)]
    steps = -(-max(ends) // multiple) * multiple
    if not packed and len(set(offsets)) == 1:
        return Grid(batch, tokens, steps, ends, front=offsets[0])
    # token start_n + j of the flattened call stands at n * steps + offset_n + j
    shifts = [row * steps + offset - start for row, (offset, start) in enumerate(zip(offsets, starts, strict=True))]
    counts = torch.tensor(lengths, device=x.device)
    shift = torch.tensor(shifts, device=x.device).repeat_interleave(counts, output_size=batch * tokens)
    positions = torch.arange(batch * tokens, device=x.device) + shift
    return Grid(batch, tokens, steps, ends, positions=positions)
