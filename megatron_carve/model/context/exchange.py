"""Context parallelism of a mixer: how the tokens of a sequence, spread over ranks, meet the recurrence in order.

Megatron hands every context-parallel rank two pieces of the sequence: of 2 * size equal pieces one from the front and
its counterpart from the back, so that attention has as much to do on each. There are two ways to the op and back:

- HeadExchange: all tokens of a share of the heads. The op runs as on one rank; the size divides the key heads.
- ShardExchange: a contiguous shard of the tokens of all heads. The op starts from the state in which the rank before
  ends (state_passing), and the short convolution from its last tokens.

Both take one all-to-all of the projected tokens there and one of the op's outputs back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

from megatron_carve.kernels.wide_copy import moved, rows, widest_unit
from megatron_carve.model.context.documents import Documents

PackedOrder = Literal["document", "sequence"]
ContextMethod = Literal["auto", "heads", "sequence"]


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """Where tokens lie when the ranks' pieces are put one after another.

    Attributes:
        natural: [T] int64, for each position in the sequence its place in the pieces.
        pieces: [T] int64, the inverse.
        rank, size: of the context-parallel group.
    """

    natural: Tensor
    pieces: Tensor
    rank: int
    size: int

    @functools.cached_property
    def route(self) -> Route:
        """From the ranks' pieces to contiguous shards; sizes of messages are read on the host, once for an order."""
        tokens = self.pieces.shape[0] // self.size
        mine = slice(self.rank * tokens, (self.rank + 1) * tokens)
        positions, holders = self.pieces[mine], self.natural[mine] // tokens
        send = positions.argsort()
        by_holder = holders.argsort(stable=True)
        sent, received = (
            torch.bincount(ranks, minlength=self.size).tolist() for ranks in (positions // tokens, holders)
        )
        return Route(send, send.argsort(), sent, received, by_holder.argsort(), by_holder)


class Route(NamedTuple):
    """How a rank's two pieces become its contiguous shard.

    Attributes:
        send: [T / size] int64, the tokens of the pieces by receiving rank; send_back is the inverse.
        sent, received: tokens to and from every rank.
        arrange: [T / size] int64, the received tokens in order; arrange_back is the inverse.
    """

    send: Tensor
    send_back: Tensor
    sent: list[int]
    received: list[int]
    arrange: Tensor
    arrange_back: Tensor


class Span(NamedTuple):
    """What one call of the op sees of the sequences of a batch, or of the documents packed into one; N in number.

    Attributes:
        cu_seqlens: [N + 1] boundaries of packed documents in the call's tokens; None if not packed.
        group: None if the call sees them whole; else the ranks that see a shard each, in order. Then also:
        whole_cu_seqlens: [N + 1] the boundaries in the tokens of all ranks; None if not packed.
        enters: [N] bool, those that began on an earlier rank.
        leaves: [N] bool, those that go on on the next rank.
        before: [N] int64, their tokens on earlier ranks.
    """

    cu_seqlens: Tensor | None
    group: Any = None
    whole_cu_seqlens: Tensor | None = None
    enters: Tensor | None = None
    leaves: Tensor | None = None
    before: Tensor | None = None


class _Exchange:
    """What both ways have in common."""

    shares: int
    """Ranks that the heads are divided over."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def share(self, x: Tensor) -> Tensor:
        """This rank's heads of a parameter that lists heads, or channels of heads, on axis 0."""
        return x if self.shares == 1 else x.chunk(self.shares)[self.rank]

    def order(self, tokens: int, packed_seq_params: Any, packed_order: PackedOrder, device: Any) -> TokenOrder | None:
        """The order of the T tokens of a batch whose ranks hold `tokens` each; None for a group of one.

        Args:
            packed_seq_params: Megatron's packed sequences, or None. The order is computed and checked, which waits for
                the device, once for an object and kept on it, so that the layers of a step share it.
            packed_order: whether every document was divided into 2 * size pieces, or the whole packed sequence.

        Raises:
            ValueError: documents, or a sequence, that cannot have been divided so.
        """
        if self.size == 1:
            return None
        if isinstance(packed_seq_params, Documents):
            return _rows_order(packed_seq_params.rows, packed_seq_params.tokens, self.rank, self.size, device)
        if packed_seq_params is None or packed_order == "sequence":
            return _rows_order(1, tokens * self.size, self.rank, self.size, device)
        kept = getattr(packed_seq_params, "_document_order", None)
        if kept is None:
            ends = packed_boundaries(packed_seq_params)
            assert ends is not None
            kept = _document_order(ends, tokens * self.size, self.rank, self.size)
            packed_seq_params._document_order = kept
        return kept


class HeadExchange(_Exchange):
    """The exchange of tokens for heads between the ranks of a context-parallel group; the identity for one rank.

    Heads do not depend on each other, so their parameters are used by shares too.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        super().__init__(group)
        self.shares = self.size

    def enter(self, pieces: Sequence[tuple[Tensor, Sequence[int]]], order: TokenOrder | None) -> list[Tensor]:
        """From [T / size, B, D] of all heads to [T, B, D / size] of this rank's, tokens in order, in one all-to-all.

        Args:
            pieces: projections, and the sizes of the sections that each consists of. The channels of a section go by
                heads, head after head.
            order: of the tokens; None for a group of one.
        """
        if order is None:
            return [x for x, _ in pieces]
        by_rank = _ByRank.apply(self.size, [list(sizes) for _, sizes in pieces], *(x for x, _ in pieces))
        exchanged = _Permutation.apply(all_to_all(self.group, by_rank), order.natural, order.pieces)
        return list(exchanged.split([x.shape[-1] // self.size for x, _ in pieces], -1))

    def leave(self, x: Tensor, order: TokenOrder | None) -> Tensor:
        """The way back: from [T, B, D / size] to [T / size, B, D]."""
        if order is None:
            return x
        by_rank = all_to_all(self.group, _Permutation.apply(x.contiguous(), order.pieces, order.natural))
        return moved(by_rank.unflatten(0, (self.size, -1)), 0, 2).flatten(2)

    def span(self, x: Tensor, cu_seqlens: Tensor | None) -> Span:
        """The boundaries as they are: the op sees all tokens."""
        return Span(cu_seqlens)


class ShardExchange(_Exchange):
    """The exchange between the ranks' two pieces of a sequence and contiguous shards of it, in the order of ranks.

    Same methods as HeadExchange; every rank uses all heads.
    """

    shares = 1

    def enter(self, pieces: Sequence[tuple[Tensor, Sequence[int]]], order: TokenOrder | None) -> list[Tensor]:
        """From [T / size, B, D] of this rank's pieces to those of its shard, in one all-to-all."""
        assert order is not None
        route = order.route
        x = torch.cat([x for x, _ in pieces], -1)
        sent = _Permutation.apply(x, route.send, route.send_back)
        received = all_to_all(self.group, sent, route.received, route.sent)
        shard = _Permutation.apply(received, route.arrange, route.arrange_back)
        return list(shard.split([x.shape[-1] for x, _ in pieces], -1))

    def leave(self, x: Tensor, order: TokenOrder | None) -> Tensor:
        """The way back."""
        assert order is not None
        route = order.route
        sent = _Permutation.apply(x, route.arrange_back, route.arrange)
        received = all_to_all(self.group, sent, route.sent, route.received)
        return _Permutation.apply(received, route.send_back, route.send)

    def span(self, x: Tensor, cu_seqlens: Tensor | None) -> Span:
        """What this rank's shard x, [T / size, B, D], holds of the sequences."""
        tokens, batch = x.shape[:2]
        start, end = self.rank * tokens, (self.rank + 1) * tokens
        if cu_seqlens is None:
            everywhere = torch.ones(batch, dtype=torch.bool, device=x.device)
            first, last = self.rank == 0, self.rank == self.size - 1
            return Span(None, self.group, None, everywhere & (not first), everywhere & (not last), everywhere * start)
        first_token, last_token = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        enters = (first_token < start) & (last_token > start)
        leaves = (first_token < end) & (last_token > end)
        before = torch.where(enters, start - first_token, 0)
        return Span((cu_seqlens - start).clamp(0, tokens), self.group, cu_seqlens, enters, leaves, before)


Exchange = HeadExchange | ShardExchange


def context_exchange(group: Any, method: ContextMethod, key_heads: int) -> Exchange:
    """The way of a group with this many key heads on every rank; "auto": heads where the size divides them.

    Heads go first because the op then runs as on one rank; shards make it pass on a state, which costs GDN-2 more
    columns and makes CARVE's ranks wait for each other.
    """
    if method == "sequence" or (method == "auto" and key_heads % group.size()):
        return ShardExchange(group) if group.size() > 1 else HeadExchange(group)
    return HeadExchange(group)


def packed_boundaries(packed_seq_params: Any) -> Tensor | None:
    """The cu_seqlens of Megatron's packed sequences, padding between documents counted with the document."""
    if packed_seq_params is None:
        return None
    if isinstance(packed_seq_params, Documents):
        return packed_seq_params.cu_seqlens_q
    if packed_seq_params.qkv_format != "thd":
        raise ValueError(f"packed_seq_params.qkv_format: expected 'thd', got {packed_seq_params.qkv_format!r}")
    padded = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded


@functools.lru_cache(maxsize=16)
def _rows_order(rows: int, tokens: int, rank: int, size: int, device: Any) -> TokenOrder:
    """The order of rows of `tokens` each, one after another, each divided into 2 * size pieces."""
    if tokens % (2 * size):
        raise ValueError(
            f"sequence: expected a length that 2 * context_parallel_size = {2 * size} divides, got {tokens}"
        )
    return _divided_order(torch.arange(rows + 1, device=device) * tokens, rows * tokens, rank, size)


def _document_order(ends: Tensor, tokens: int, rank: int, size: int) -> TokenOrder:
    boundaries = ends.tolist()
    if boundaries[-1] != tokens:
        raise ValueError(f"cu_seqlens: expected to end at the {tokens} tokens of all ranks, got {boundaries[-1]}")
    odd = [end - start for start, end in pairwise(boundaries) if (end - start) % (2 * size)]
    if odd:
        raise ValueError(
            f"packed documents: expected lengths that 2 * context_parallel_size = {2 * size} divides, padding "
            f"included, got {', '.join(map(str, odd[:8]))}"
        )
    return _divided_order(ends.long(), tokens, rank, size)


def _divided_order(ends: Tensor, tokens: int, rank: int, size: int) -> TokenOrder:
    """The order of documents, [N + 1] boundaries, each divided into 2 * size pieces."""
    position = torch.arange(tokens, device=ends.device)
    document = torch.searchsorted(ends, position, right=True) - 1
    start, length = ends[document], ends[document + 1] - ends[document]
    piece_tokens = length // (2 * size)
    piece, offset = (position - start) // piece_tokens, (position - start) % piece_tokens
    front = piece < size
    holder = torch.where(front, piece, 2 * size - 1 - piece)
    within = start // size + torch.where(front, 0, piece_tokens) + offset
    natural = holder * (tokens // size) + within
    return TokenOrder(natural, torch.empty_like(natural).scatter_(0, natural, position), rank, size)


class _Permutation(torch.autograd.Function):
    """x[index], whose gradient is taken by the inverse index instead of being added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows(x.contiguous(), index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return rows(d_out.contiguous(), inverse), None, None


class _ByRank(torch.autograd.Function):
    """From projections, [T, B, D] each, whose sections go by heads, to what each rank gets of them: [size * T, B,
    sum of D / size], its share of every section; in one copy, and one a section back."""

    @staticmethod
    def forward(ctx: Any, size: int, sizes: list[list[int]], *pieces: Tensor) -> Tensor:
        ctx.size, ctx.sizes = size, sizes
        sections = [s for x, widths in zip(pieces, sizes, strict=True) for s in x.split(widths, -1)]
        shares = [section.unflatten(-1, (size, -1)).movedim(-2, 0) for section in sections]
        unit = widest_unit(*shares)
        return torch.cat([share.view(unit) for share in shares], -1).view(pieces[0].dtype).flatten(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_by_rank: Tensor) -> tuple[Tensor | None, ...]:
        d_shares = d_by_rank.unflatten(0, (ctx.size, -1)).movedim(0, -2)
        d_pieces, start = [], 0
        for widths in ctx.sizes:
            d_piece = d_by_rank.new_empty(*d_shares.shape[:-2], sum(widths))
            for d_section in d_piece.split(widths, -1):
                into = d_section.unflatten(-1, (ctx.size, -1))
                d_share = d_shares[..., start : start + into.shape[-1]]
                unit = widest_unit(into, d_share)
                into.view(unit).copy_(d_share.view(unit))
                start += into.shape[-1]
            d_pieces.append(d_piece)
        return None, None, *d_pieces
