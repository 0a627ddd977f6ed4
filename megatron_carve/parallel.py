"""Context parallelism of a mixer: from some of the tokens and all heads to all tokens and some of the heads, and back.

A recurrence needs its tokens in order, and Megatron hands every context-parallel rank two pieces of the sequence: of
2 * size equal pieces one from the front and its counterpart from the back, so that attention has as much to do on each.
One all-to-all brings all tokens of a share of the heads to each rank, a permutation puts them into order, and after
the recurrence the same way leads back. Heads do not depend on each other, so their parameters are used by shares too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

PackedOrder = Literal["document", "sequence"]


class TokenOrder(NamedTuple):
    """Where tokens lie when the ranks' pieces are put one after another.

    Attributes:
        natural: [T] int64, for each position in the sequence its place in the pieces.
        pieces: [T] int64, the inverse.
    """

    natural: Tensor
    pieces: Tensor


class HeadExchange:
    """The exchange between the ranks of a context-parallel group; the identity for a group of one."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def share(self, x: Tensor) -> Tensor:
        """This rank's heads of a parameter that lists heads, or channels of heads, on axis 0."""
        return x if self.size == 1 else x.chunk(self.size)[self.rank]

    def to_heads(self, pieces: Sequence[tuple[Tensor, Sequence[int]]], order: TokenOrder | None) -> list[Tensor]:
        """From [T / size, B, D] of all heads to [T, B, D / size] of this rank's, tokens in order, in one all-to-all.

        Args:
            pieces: projections, and the sizes of the sections that each consists of. The channels of a section go by
                heads, head after head.
            order: of the tokens; None for a group of one.
        """
        if order is None:
            return [x for x, _ in pieces]
        shares = [
            torch.cat([section.unflatten(-1, (self.size, -1)) for section in x.split(list(sizes), -1)], -1)
            for x, sizes in pieces
        ]
        by_rank = torch.cat(shares, -1).movedim(2, 0).flatten(0, 1).contiguous()
        exchanged = _Permutation.apply(all_to_all(self.group, by_rank), order.natural, order.pieces)
        return list(exchanged.split([x.shape[-1] for x in shares], -1))

    def to_tokens(self, x: Tensor, order: TokenOrder | None) -> Tensor:
        """The way back: from [T, B, D / size] to [T / size, B, D]."""
        if order is None:
            return x
        by_rank = all_to_all(self.group, _Permutation.apply(x.contiguous(), order.pieces, order.natural))
        return by_rank.unflatten(0, (self.size, -1)).movedim(0, 2).flatten(2)

    def order(self, tokens: int, packed_seq_params: Any, packed_order: PackedOrder, device: Any) -> TokenOrder | None:
        """The order of the T tokens of a batch whose ranks hold `tokens` each.

        Args:
            packed_seq_params: Megatron's packed sequences, or None. The order is computed and checked, which waits for
                the device, once for an object and kept on it, so that the layers of a step share it.
            packed_order: whether every document was divided into 2 * size pieces, or the whole packed sequence.

        Raises:
            ValueError: documents, or a sequence, that cannot have been divided so.
        """
        if self.size == 1:
            return None
        if packed_seq_params is None or packed_order == "sequence":
            return _sequence_order(tokens * self.size, self.size, device)
        kept = getattr(packed_seq_params, "_document_order", None)
        if kept is None:
            ends = packed_boundaries(packed_seq_params)
            assert ends is not None
            kept = _document_order(ends, tokens * self.size, self.size)
            packed_seq_params._document_order = kept
        return kept


def packed_boundaries(packed_seq_params: Any) -> Tensor | None:
    """The cu_seqlens of Megatron's packed sequences, padding between documents counted with the document."""
    if packed_seq_params is None:
        return None
    if packed_seq_params.qkv_format != "thd":
        raise ValueError(f"packed_seq_params.qkv_format: expected 'thd', got {packed_seq_params.qkv_format!r}")
    padded = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded


@functools.lru_cache(maxsize=16)
def _sequence_order(tokens: int, size: int, device: Any) -> TokenOrder:
    if tokens % (2 * size):
        raise ValueError(
            f"sequence: expected a length that 2 * context_parallel_size = {2 * size} divides, got {tokens}"
        )
    return _divided_order(torch.tensor([0, tokens], device=device), tokens, size)


def _document_order(ends: Tensor, tokens: int, size: int) -> TokenOrder:
    boundaries = ends.tolist()
    if boundaries[-1] != tokens:
        raise ValueError(f"cu_seqlens: expected to end at the {tokens} tokens of all ranks, got {boundaries[-1]}")
    odd = [end - start for start, end in pairwise(boundaries) if (end - start) % (2 * size)]
    if odd:
        raise ValueError(
            f"packed documents: expected lengths that 2 * context_parallel_size = {2 * size} divides, padding "
            f"included, got {', '.join(map(str, odd[:8]))}"
        )
    return _divided_order(ends.long(), tokens, size)


def _divided_order(ends: Tensor, tokens: int, size: int) -> TokenOrder:
    """The order of documents, [N + 1] boundaries, each divided into 2 * size pieces."""
    position = torch.arange(tokens, device=ends.device)
    document = torch.searchsorted(ends, position, right=True) - 1
    start, length = ends[document], ends[document + 1] - ends[document]
    piece_tokens = length // (2 * size)
    piece, offset = (position - start) // piece_tokens, (position - start) % piece_tokens
    front = piece < size
    rank = torch.where(front, piece, 2 * size - 1 - piece)
    within = start // size + torch.where(front, 0, piece_tokens) + offset
    natural = rank * (tokens // size) + within
    return TokenOrder(natural, torch.empty_like(natural).scatter_(0, natural, position))


class _Permutation(torch.autograd.Function):
    """x[index], whose gradient is taken by the inverse index instead of being added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return d_out.index_select(0, inverse), None, None
