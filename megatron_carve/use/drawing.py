"""Drawing the next tokens of requests that each want it their own way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Draw(NamedTuple):
    """How one token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the largest.
        top_k: among so many of the largest; 0 among all.
        top_p: among the fewest of the largest whose probabilities add up to this; 0 among all.
        number: at random, from 0 to below 1: which token it is to be, of those in question, by their probability.
    """

    temperature: float
    top_k: int
    top_p: float
    number: float


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Token ids [N] int64 from logits [N, V] float32; a row's depends on no other row."""
    tokens = logits.argmax(-1)
    rows = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if not rows:
        return tokens
    chosen = [draws[row] for row in rows]
    numbers = torch.tensor(chosen, dtype=torch.float64).to(logits.device)
    temperature, top_k, top_p, number = numbers[:, :, None].unbind(1)  # [N, 1] each
    place = torch.tensor(rows).to(logits.device)
    logits = logits[place]
    # From the largest, in float64: however low the temperature, that one stays 0 and nothing becomes no number.
    logits = (logits - logits.amax(-1, keepdim=True)).double() / temperature
    order = None
    if any(draw.top_k or draw.top_p for draw in chosen):
        logits, order = logits.sort(-1, descending=True, stable=True)
        rank = torch.arange(logits.shape[1], device=logits.device)
        logits = logits.masked_fill((top_k > 0) & (rank >= top_k), -torch.inf)
        probability = logits.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # the first is never beyond
        logits = logits.masked_fill((top_p > 0) & beyond, -torch.inf)
    reached = logits.softmax(-1).cumsum(-1)
    index = torch.searchsorted(reached, number * reached[:, -1:], right=True)
    drawn = index if order is None else order.gather(1, index)
    return tokens.index_copy(0, place, drawn[:, 0])
