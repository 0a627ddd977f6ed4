"""What a mixer layer keeps of the tokens so far while a model generates, in Megatron's static inference context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MixerCache(NamedTuple):
    """One layer's memory of the sequences of a call; views of what the context holds, written in place.

    Attributes:
        tokens: [B, taps - 1, channels], the last projected tokens before the short convolution; zeros before the
            first.
        state: the recurrence's, [B, ...] each, as the ops take them: S, and CARVE's mean, partial and count.
    """

    tokens: Tensor
    state: tuple[Tensor, ...]


def sequences_of_call(context: Any, batch: int) -> slice:
    """Where a call's sequences are among those of a static inference context.

    Raises:
        ValueError: more sequences than the context has room for.
    """
    first, last = context.batch_size_offset, context.batch_size_offset + batch
    if last > context.max_batch_size:
        raise ValueError(
            f"inference_context: expected at most max_batch_size={context.max_batch_size} sequences, got {last}"
        )
    return slice(first, last)


def keep_newest(kept: Tensor, new: Tensor) -> None:
    """Bring the last tokens of a sequence up to date with those that follow: [B, n, channels], [B, T, channels]."""
    newest = new[:, max(0, new.shape[1] - kept.shape[1]) :]
    kept.copy_(torch.cat([kept, newest], 1)[:, newest.shape[1] :])


def mixer_cache(
    context: Any, layer_number: int, batch: int, tokens: tuple[tuple[int, ...], torch.dtype],
    state: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device,
) -> MixerCache:  # fmt: skip
    """The cache of a layer in a context, empty where the context is at the beginning of its sequences.

    Args:
        context: Megatron's StaticInferenceContext; the call's sequences are those from its batch_size_offset on.
        layer_number: under which the context keeps it.
        batch: sequences of the call.
        tokens, state: shape per sequence and dtype of every tensor.

    Raises:
        ValueError: more sequences than the context has room for.
    """
    sequences = sequences_of_call(context, batch)
    kept = context.key_value_memory_dict.get(layer_number)
    if kept is None:
        # A plain tuple: Megatron compares the addresses of all tensors in it.
        kept = tuple(
            torch.zeros(context.max_batch_size, *shape, dtype=dtype, device=device) for shape, dtype in (tokens, *state)
        )
        context.key_value_memory_dict[layer_number] = kept
    mine = [x[sequences] for x in kept]
    if context.sequence_len_offset == 0:
        for x in mine:
            x.zero_()
    return MixerCache(mine[0], tuple(mine[1:]))
