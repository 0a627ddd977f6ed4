"""Examples packed whole into sequences, with a loss of what is to be learned alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

# Sequences that wait for an example that fits into what is left of them.
_OPEN = 64


class PackedExamples(torch.utils.data.Dataset):
    """Map-style dataset of examples, several to a sequence, in the form of Megatron's GPTDataset.

    Every epoch goes through all examples in an order of its own and gives each to the first sequence with room for it.
    What is left of a sequence is filled with end-of-document ids that are not learned. Of an example that is longer
    than a sequence, the end is left out. Sequences depend on the arguments alone.

    Args:
        prefixes: of datasets that `prepare_text` made of examples.
        seq_length: tokens per sample.
        num_samples: length of the dataset; the examples are repeated as often as that takes.
        seed: order of the examples.
        eod: end-of-document id.
        split: "train" or "validation".
        documents_apart: give each sample, beside its tokens, what `build_gpt_datasets` says, so that no example sees
            another; the loss is not of an example's first token then.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        *,
        seq_length: int,
        num_samples: int,
        seed: int,
        eod: int,
        split: str,
        documents_apart: bool = False,
    ) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

        self.split = {"train": Split.train, "validation": Split.valid}[split]  # Megatron knows its batch sizes by it
        self._sources: list[Any] = [IndexedDataset(prefix) for prefix in prefixes]
        self._masks = [np.memmap(f"{prefix}.mask", dtype=np.uint8, mode="r") for prefix in prefixes]
        self._firsts = np.cumsum([0, *[len(source) for source in self._sources]])
        self._room, self._eod, self._apart = seq_length + 1, eod, documents_apart
        lengths = np.minimum(np.concatenate([source.sequence_lengths for source in self._sources]), self._room)
        sequences = list(islice(packed(lengths, self._room, seed), num_samples))
        self._examples = np.fromiter(chain.from_iterable(sequences), dtype=np.int32)
        self._ends = np.cumsum([0, *[len(sequence) for sequence in sequences]])
        self._position_ids = torch.arange(seq_length)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`: tokens, labels, position_ids int64 [seq_length]; loss_mask float32 [seq_length]; of documents
        apart also cu_seqlens int32 [seq_length + 1] and max_seqlen."""
        ids = np.full(self._room, self._eod, dtype=np.int64)
        learned = np.zeros(self._room, dtype=np.float32)
        at, starts = 0, [0]
        for number in self._examples[self._ends[index] : self._ends[index + 1]]:
            source = int(np.searchsorted(self._firsts, number, side="right")) - 1
            row = int(number - self._firsts[source])
            found = self._sources[source][row][: self._room]
            pointer, _, _ = self._sources[source].index[row]
            begin = pointer // found.itemsize
            ids[at : at + found.size] = found
            learned[at : at + found.size] = self._masks[source][begin : begin + found.size]
            at += found.size
            starts.append(at)
        if self._apart:
            learned[starts[:-1]] = 0
        sample = {
            "tokens": torch.from_numpy(ids[:-1].copy()),
            "labels": torch.from_numpy(ids[1:].copy()),
            "loss_mask": torch.from_numpy(learned[1:].copy()),
            "position_ids": self._position_ids.clone(),
        }
        return sample | self._boundaries(starts) if self._apart else sample

    def _boundaries(self, starts: list[int]) -> dict[str, torch.Tensor]:
        """Where examples begin, the filling being one more, and the position of every token in its own."""
        length = self._room - 1
        boundaries = torch.full((length + 1,), length, dtype=torch.int32)
        within = torch.tensor([start for start in starts if start < length], dtype=torch.int32)
        boundaries[: within.numel()] = within
        lengths = boundaries.diff()[: within.numel()].long()
        positions = self._position_ids - torch.repeat_interleave(within.long(), lengths)
        return {"cu_seqlens": boundaries, "max_seqlen": lengths.max().int(), "position_ids": positions}


def packed(lengths: np.ndarray, room: int, seed: int) -> Iterator[list[int]]:
    """Numbers of the examples in each sequence of `room` tokens, epoch after epoch, without end.

    Args:
        lengths: tokens of each example, at most `room`.
    """
    order = np.random.default_rng(seed)
    while True:
        waiting: deque[list[int]] = deque()
        left: deque[int] = deque()
        for number in order.permutation(lengths.size).tolist():
            length = int(lengths[number])
            place = next((i for i, room_left in enumerate(left) if room_left >= length), None)
            if place is None:
                if len(waiting) == _OPEN:
                    left.popleft()
                    yield waiting.popleft()
                waiting.append([number])
                left.append(room - length)
            else:
                waiting[place].append(number)
                left[place] -= length
        yield from waiting
