"""How well a model predicts a text: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Perplexity:
    """Of a text.

    Attributes:
        tokens: predicted; all but the first of the text.
        nats: of all of them together.
        bytes: of the text in UTF-8.
    """

    tokens: int
    nats: float
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token, so that it compares models of one tokenizer only; bits_per_byte compares all."""
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def windows(tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first predicted) of the pieces of a text that a model reads, each on its own.

    Every token but the first of the text is predicted once, from at least length - stride tokens before it where there
    are as many. A window reads tokens start to end - 1 and predicts those from `first` to end - 1.
    """
    first = 1
    while first < tokens:
        end = min(first + stride, tokens) if first > 1 else min(length + 1, tokens)
        yield max(0, end - 1 - length), end, first
        first = end


def check_windows(tokens: int, length: int, stride: int) -> None:
    """Raise ValueError unless a text of so many tokens can be read in such windows."""
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")
    if not 1 <= stride <= length:
        raise ValueError(f"stride: expected 1 to length={length}, got {stride}")
    if tokens < 2:
        raise ValueError(f"text: expected at least 2 tokens, got {tokens}")


@torch.no_grad()
def text_perplexity(
    model: nn.Module, ids: Sequence[int] | Tensor, *, length: int, stride: int | None = None, text_bytes: int,
    batch: int = 1,
) -> Perplexity:  # fmt: skip
    """Perplexity of a text under a model in evaluation mode.

    The logits of batch * length tokens are in memory at once, in the model's dtype and in float32.

    Args:
        model: a HybridModel on the device where it is to run.
        ids: token ids of the whole text.
        length: tokens that the model reads at once.
        stride: tokens after which the next window begins; `length` if None, so that no token is read twice and the
            first of a window are predicted from little. Smaller is better and dearer.
        text_bytes: of the text in UTF-8.
        batch: windows at a time.

    Raises:
        ValueError: fewer than two tokens, or a length, stride or batch out of range.
    """
    stride = length if stride is None else stride
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    text = torch.as_tensor(ids, dtype=torch.int64)
    check_windows(text.numel(), length, stride)
    device = next(model.parameters()).device
    nats = 0.0
    pending: list[tuple[int, int, int]] = []
    for window in [*windows(text.numel(), length, stride), None]:
        full = pending and (window is None or len(pending) == batch or _size(window) != _size(pending[0]))
        if full:
            nats += _nats(model, text, pending, device)
            pending = []
        if window is not None:
            pending.append(window)
    return Perplexity(text.numel() - 1, nats, text_bytes)


def _size(window: tuple[int, int, int]) -> int:
    return window[1] - window[0]


def _nats(model: Any, text: Tensor, pieces: list[tuple[int, int, int]], device: torch.device) -> float:
    """Of the tokens that windows of one size predict."""
    rows = torch.stack([text[start:end] for start, end, _ in pieces]).to(device)
    positions = torch.arange(rows.shape[1] - 1, device=device).expand(rows.shape[0], -1)
    losses = model(rows[:, :-1].contiguous(), positions, None, labels=rows[:, 1:].contiguous()).double()
    return sum(losses[i, first - start - 1 :].sum().item() for i, (start, _, first) in enumerate(pieces))
