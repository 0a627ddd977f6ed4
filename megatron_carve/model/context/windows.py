"""Attention with a window under context parallelism: ranks send their neighbours what the window reaches of theirs.

Of 2 * size equal pieces of a sequence rank r has those of numbers r and 2 * size - 1 - r. The pieces before these are
its neighbours', and of the last rank's second piece the one before is its own. Whatever the number of heads, a piece
needs no more than the last tokens of the one before, if those are as many as the window.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor


def attend_by_window(
    group: torch.distributed.ProcessGroup, attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor,
    key: Tensor, value: Tensor, window: int,
) -> Tensor:  # fmt: skip
    """Causal attention with a window, for this rank's two pieces.

    Both are attended in one call, as sequences of their own that begin with the end of the piece before. Queries there
    are zeros, and what comes of them is left out; the first piece of all has as many tokens after it instead, which
    none of its own sees.

    Args:
        group: the ranks that have the pieces.
        attend: [T, B, heads, D] and [T, B, groups, D] twice -> [T, B, heads * D], causal, of `window` tokens at most.
        query: [T / size, B, heads, D]; key and value: [T / size, B, groups, D].
        window: tokens that a token sees, itself included; at most those of a piece, T / (2 * size).

    Returns:
        [T / size, B, heads * D].
    """
    first = group.rank() == 0
    sections = [key.flatten(2), value.flatten(2)]
    widths = [x.shape[-1] for x in sections]
    pieces = torch.cat(sections, -1).unflatten(0, (2, -1))
    before = _ends_before(group, pieces, window)
    unused = query.new_zeros(window, *query.shape[1:])

    def side_by_side(ends: Tensor | list[Tensor], own: Tensor) -> Tensor:
        """[window + T / (2 * size), 2 * B, any]."""
        front = (own[0], ends[0]) if first else (ends[0], own[0])
        return torch.stack([torch.cat(front), torch.cat((ends[1], own[1]))], 1).flatten(1, 2)

    k, v = side_by_side(before, pieces).split(widths, -1)
    q = side_by_side([unused, unused], query.unflatten(0, (2, -1)))
    by_head = (-1, query.shape[-1])
    out = attend(q, k.unflatten(-1, by_head), v.unflatten(-1, by_head)).unflatten(1, (2, -1))
    tokens = pieces.shape[1]
    return torch.cat([out[:tokens, 0] if first else out[window:, 0], out[window:, 1]])


def _ends_before(group: torch.distributed.ProcessGroup, pieces: Tensor, tokens: int) -> Tensor:
    """From this rank's pieces, [2, T / (2 * size), B, D], to the last tokens of those before them, [2, tokens, B, D];
    zeros before the first of all."""
    rank, last = group.rank(), group.size() - 1
    front, back = pieces[:, -tokens:]
    counts = [tokens if abs(other - rank) == 1 else 0 for other in range(last + 1)]
    sent = torch.cat(([back] if rank > 0 else []) + ([front] if rank < last else []))
    received = all_to_all(group, sent, counts, counts)
    return torch.stack(
        [received[:tokens] if rank > 0 else torch.zeros_like(front), received[-tokens:] if rank < last else front]
    )
