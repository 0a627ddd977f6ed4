"""Where the chunks of a call lie in its tokens, as device tensors: no size or boundary is read on the host."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import CHUNK_TOKENS

BT = tl.constexpr(CHUNK_TOKENS)


class Chunks(NamedTuple):
    """The chunks of all sequences of a call, sequence after sequence.

    A sequence that enters with n tokens in its running content chunk starts n % 64 rows into its first chunk, so that
    chunk boundaries divide content chunks. The rows before and after a sequence's tokens are empty.

    Attributes:
        table: [count, 4] int64 per chunk: the flat token index of row 0 (it may be negative), the first row that
            holds a token, the row after the last one, the sequence. Chunks beyond the last one are empty.
        first: [N + 1] int64, index of each sequence's first chunk.
        lengths: [N] int64, tokens of each sequence.
        count: upper bound of the number of chunks, known without reading the device.
        sequences: N.
        spare: whether there may be chunks beyond the last one.
    """

    table: Tensor
    first: Tensor
    lengths: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count
    sequences: int
    spare: bool


def make_chunks(x: Tensor, cu_seqlens: Tensor | None, counts: Tensor | None) -> Chunks:
    """Lay out a call whose tensors look like x, [B, T, ...].

    Args:
        x: gives B, T and the device.
        cu_seqlens: [N + 1] int, boundaries of packed sequences (B = 1), or None for one sequence per batch entry.
            Values outside [0, T] or falling ones are brought into order on the device, so that no kernel reads
            outside its tensors.
        counts: [N] int64, tokens that each sequence already has in its running content chunk, or None for zeros.
    """
    batch, tokens = x.shape[:2]
    if cu_seqlens is None and counts is None:
        return _regular_chunks(batch, tokens, x.device)
    if cu_seqlens is None:
        starts = torch.arange(batch + 1, device=x.device) * tokens
    else:
        starts = cu_seqlens.long().clamp(0, tokens).cummax(0).values
    sequences = starts.shape[0] - 1
    shift = torch.zeros_like(starts[:-1]) if counts is None else counts % CHUNK_TOKENS
    spare = 1 if counts is None else 2
    return _make(starts, shift, batch * tokens // CHUNK_TOKENS + spare * sequences, spare=True)


@functools.lru_cache(maxsize=64)
def _regular_chunks(batch: int, tokens: int, device: torch.device) -> Chunks:
    """The layout of B sequences of T tokens; a function of its arguments alone, so it may be kept."""
    starts = torch.arange(batch + 1, device=device) * tokens
    return _make(starts, torch.zeros_like(starts[:-1]), batch * -(-tokens // CHUNK_TOKENS), spare=False)


def _make(starts: Tensor, shift: Tensor, count: int, *, spare: bool) -> Chunks:
    lengths = starts[1:] - starts[:-1]
    ends = shift + lengths  # row after the last token, counted from row 0 of the sequence's first chunk
    numbers = torch.where(lengths > 0, (ends + CHUNK_TOKENS - 1) // CHUNK_TOKENS, 0)
    last = numbers.cumsum(0)
    index = torch.arange(count, device=starts.device)
    sequence = torch.searchsorted(last, index, right=True)
    real = sequence < lengths.shape[0]
    sequence = sequence.clamp(max=lengths.shape[0] - 1)
    row = (index - (last - numbers)[sequence]) * CHUNK_TOKENS
    low = (shift[sequence] - row).clamp(min=0)
    high = torch.where(real, (ends[sequence] - row).clamp(max=CHUNK_TOKENS), 0)
    table = torch.stack([starts[sequence] - shift[sequence] + row, low, high, sequence], 1)
    return Chunks(table, torch.cat([torch.zeros_like(last[:1]), last]), lengths, count, lengths.shape[0], spare)


@triton.jit
def chunk_span(table, i_c):
    """(token of row 0, first row that holds a token, row after the last one) of a chunk."""
    return tl.load(table + i_c * 4), tl.load(table + i_c * 4 + 1), tl.load(table + i_c * 4 + 2)


@triton.jit
def chunk_rows(table, i_c):
    """(token of row 0, rows 0 to BT, which of them hold a token) of a chunk."""
    start, low, high = chunk_span(table, i_c)
    o_r = tl.arange(0, BT)
    return start, o_r, (o_r >= low) & (o_r < high)


@triton.jit
def chunk_sequence(table, i_c):
    return tl.load(table + i_c * 4 + 3)


@triton.jit
def sequence_chunks(table, first, i_n):
    """(first chunk of a sequence, the one after its last, token of the first one's row 0, the sequence's first token,
    the one after its last).

    For loops over a sequence's chunks, whose addresses then wait for no load.
    """
    begin, end = tl.load(first + i_n), tl.load(first + i_n + 1)
    row_0, low, _ = chunk_span(table, tl.maximum(tl.minimum(begin, end - 1), 0))
    last_row_0, _, high = chunk_span(table, tl.maximum(end - 1, 0))
    return begin, end, row_0, row_0 + low, last_row_0 + high


@triton.jit
def sequence_and_head(H, HV):
    """(sequence, value head, its key head, sequence and value head as one) of a program of N * HV."""
    i_n, i_hv = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    return i_n, i_hv, i_hv // (HV // H), i_n * HV + i_hv
