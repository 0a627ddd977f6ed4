"""Generated associative recall: key-value pairs to remember, then queries to answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from megatron.core.datasets.utils import Split

# The second word of each sample's random stream: distinct numbers keep the two splits disjoint.
_SPLIT_STREAM = {"train": 0, "validation": 1}


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """Sizes of the recall task, checked, and the tokens that follow from them.

    A sequence is num_pairs pairs (key, value), one separator, then queries (key, value) to the end:

        k_a v_a  k_b v_b  ...  SEP  k_b v_b  k_a v_a  k_b v_b ...

    A query's key is drawn uniformly from the keys seen; its value, the answer, is what the key was last assigned.
    Keys are the tokens [0, num_keys), values [num_keys, num_keys + num_values), the separator comes after them.

    Attributes:
        seq_length: tokens per sample.
        num_keys, num_values: sizes of the two token ranges.
        num_pairs: pairs before the separator.
        num_overwrites: how many of the pairs assign a key seen before again, to a value drawn anew.

    Raises:
        ValueError: a combination that leaves nothing to ask or cannot be drawn; names data.recall.<field>.
    """

    seq_length: int
    num_keys: int = 32
    num_values: int = 32
    num_pairs: int = 16
    num_overwrites: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_keys", 1), ("num_values", 2), ("num_pairs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.recall.{name} must be at least {least}, got {getattr(self, name)}")
        # The last token of the prompt is the first query's key, so one answer needs 2 * num_pairs + 2 input tokens.
        if 2 * self.num_pairs + 2 > self.seq_length:
            raise ValueError(
                f"data.recall.num_pairs {self.num_pairs} needs a seq_length of at least {2 * self.num_pairs + 2} "
                f"(two tokens a pair, a separator, one query), got {self.seq_length}"
            )
        if not 0 <= self.num_overwrites < self.num_pairs:
            raise ValueError(
                f"data.recall.num_overwrites must be at least 0 and below num_pairs {self.num_pairs}, "
                f"got {self.num_overwrites}"
            )
        if self.num_distinct > self.num_keys:
            raise ValueError(
                f"data.recall.num_pairs {self.num_pairs} with num_overwrites {self.num_overwrites} needs "
                f"{self.num_distinct} different keys, but data.recall.num_keys is {self.num_keys}"
            )

    @property
    def num_distinct(self) -> int:
        """Different keys in one sequence."""
        return self.num_pairs - self.num_overwrites

    @property
    def num_answers(self) -> int:
        """Supervised positions in one sequence."""
        return (self.seq_length - 2 * self.num_pairs) // 2

    @property
    def separator(self) -> int:
        """Token between the pairs and the queries."""
        return self.num_keys + self.num_values

    @property
    def vocab_size(self) -> int:
        """Keys, values and the separator."""
        return self.num_keys + self.num_values + 1

    @property
    def chance_loss(self) -> float:
        """Loss in nats of a uniform guess among all values: log(num_values).

        A model that knows which values occurred, but not which key they belong to, already reaches about
        log(num_distinct): recall has begun only below that.
        """
        return math.log(self.num_values)

    def generate(self, generator: np.random.Generator) -> np.ndarray:
        """Draw one sequence, int64 [seq_length + 1]: inputs and labels are its first and last seq_length tokens."""
        assigned = self._assigned(generator)
        keys = generator.permutation(self.num_keys)[: self.num_distinct]
        values = self.num_keys + generator.integers(self.num_values, size=self.num_pairs)
        answers = np.empty(self.num_distinct, dtype=np.int64)
        answers[assigned] = values  # numpy keeps the last of several assignments to one place
        queries = generator.integers(self.num_distinct, size=self.num_answers + 1)

        prompt = 2 * self.num_pairs
        sequence = np.empty(prompt + 1 + 2 * queries.size, dtype=np.int64)
        sequence[0:prompt:2] = keys[assigned]
        sequence[1:prompt:2] = values
        sequence[prompt] = self.separator
        sequence[prompt + 1 :: 2] = keys[queries]
        sequence[prompt + 2 :: 2] = answers[queries]
        return sequence[: self.seq_length + 1]

    def _assigned(self, generator: np.random.Generator) -> np.ndarray:
        """The key each pair assigns, [num_pairs], as its place among the distinct keys in order of first use."""
        if not self.num_overwrites:
            return np.arange(self.num_pairs)
        again = np.zeros(self.num_pairs, dtype=bool)
        again[1 + generator.permutation(self.num_pairs - 1)[: self.num_overwrites]] = True
        seen = np.cumsum(~again)
        return np.where(again, generator.integers(seen), seen - 1)


class RecallDataset(torch.utils.data.Dataset):
    """Map-style dataset of generated recall sequences, in the form of Megatron's GPTDataset.

    Sample i depends on (seed, split, i) and the sizes alone: not on order, process or any global random state.

    Args:
        seq_length, num_keys, num_values, num_pairs, num_overwrites: see `RecallTask`.
        num_samples: length of the dataset.
        seed: non-negative; the two splits of one seed share no random stream.
        split: "train" or "validation".

    Attributes:
        task: the checked `RecallTask`.

    Raises:
        ValueError: a bad size (names data.recall.<field>), num_samples, seed or split.
    """

    def __init__(
        self,
        *,
        seq_length: int,
        num_samples: int,
        seed: int,
        split: str,
        num_keys: int = 32,
        num_values: int = 32,
        num_pairs: int = 16,
        num_overwrites: int = 0,
    ) -> None:
        self.task = RecallTask(
            seq_length=seq_length,
            num_keys=num_keys,
            num_values=num_values,
            num_pairs=num_pairs,
            num_overwrites=num_overwrites,
        )
        if num_samples < 0:
            raise ValueError(f"num_samples must not be negative, got {num_samples}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if split not in _SPLIT_STREAM:
            raise ValueError(f"split must be one of {', '.join(_SPLIT_STREAM)}, got {split!r}")
        self.seed = seed
        self._split_name = split
        self._num_samples = num_samples
        self._position_ids = torch.arange(seq_length)
        self._loss_mask = torch.zeros(seq_length)
        self._loss_mask[2 * num_pairs + 1 :: 2] = 1.0

    @property
    def split(self) -> Split:
        """Megatron's Split.train or Split.valid, which tells its data loader the batch size to use."""
        # Imported here so that checking a recipe does not wait for Megatron.
        from megatron.core.datasets.utils import Split

        return {"train": Split.train, "validation": Split.valid}[self._split_name]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.task.vocab_size

    @property
    def chance_loss(self) -> float:
        """Loss in nats of a uniform guess among all values."""
        return self.task.chance_loss

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`: tokens, labels, position_ids int64 [seq_length]; loss_mask float32 [seq_length].

        loss_mask is 1 where the label is an answer and 0 elsewhere.

        Raises:
            IndexError: the index is outside [0, len).
        """
        if not 0 <= index < self._num_samples:
            raise IndexError(f"index {index} is outside [0, {self._num_samples})")
        stream = np.random.SeedSequence(self.seed, spawn_key=(_SPLIT_STREAM[self._split_name], index))
        sequence = torch.from_numpy(self.task.generate(np.random.default_rng(stream)))
        return {
            "tokens": sequence[:-1].clone(),
            "labels": sequence[1:].clone(),
            "loss_mask": self._loss_mask.clone(),
            "position_ids": self._position_ids.clone(),
        }
