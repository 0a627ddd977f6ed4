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
        top_p: among the fewest of the largest whose probabilities add up to this; 0 and 1 among all.
        number: at random, from 0 to below 1: which token it is to be, of those in question, by their probability.
    """

    temperature: float
    top_k: int
    top_p: float
    number: float

    @property
    def filters(self) -> bool:
        """Whether some tokens are out of the question."""
        return self.top_k > 0 or 0 < self.top_p < 1


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Token ids [N] int64 from logits [N, V] float32; a row's depends on no other row."""
    tokens = logits.argmax(-1)
    for filters in (False, True):  # apart: in what order probabilities are added up decides which token a number means
        rows = [row for row, draw in enumerate(draws) if draw.temperature > 0 and draw.filters == filters]
        if rows:
            place = torch.tensor(rows).to(logits.device)
            drawn = (_draw_among_some if filters else _draw)(logits[place], [draws[row] for row in rows])
            tokens.index_copy_(0, place, drawn)
    return tokens


def _draw(logits: Tensor, draws: list[Draw]) -> Tensor:
    """Among all tokens."""
    temperature, _, _, number = _columns(draws, logits)
    return _by_number(_scaled(logits, temperature).softmax(-1), number)[:, 0]


def _draw_among_some(logits: Tensor, draws: list[Draw]) -> Tensor:
    temperature, top_k, top_p, number = _columns(draws, logits)
    logits, order = _scaled(logits, temperature).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    logits = logits.masked_fill((top_k > 0) & (rank >= top_k), -torch.inf)
    probability = logits.softmax(-1)
    beyond = probability.cumsum(-1) - probability >= top_p  # the first is never beyond
    probability = probability.masked_fill((top_p > 0) & beyond, 0.0)
    return order.gather(1, _by_number(probability, number))[:, 0]


def _columns(draws: list[Draw], logits: Tensor) -> tuple[Tensor, ...]:
    """What the draws say, [N, 1] float64 each."""
    return torch.tensor(draws, dtype=torch.float64).to(logits.device)[:, :, None].unbind(1)


def _scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    # From the largest, in float64: however low the temperature, that one stays 0 and nothing becomes no number.
    return (logits - logits.amax(-1, keepdim=True)).double() / temperature


def _by_number(probability: Tensor, number: Tensor) -> Tensor:
    """Where the sum of the probabilities so far, of their sum in all, first exceeds the number: [N, V] -> [N, 1].

    Sums that are no numbers never do: the last place, which is one at least.
    """
    reached = probability.cumsum(-1)
    return torch.searchsorted(reached, number * reached[:, -1:], right=True).clamp(max=probability.shape[1] - 1)
