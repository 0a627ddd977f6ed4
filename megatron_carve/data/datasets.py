"""Megatron's GPT datasets from prepared text or from indexed files, and checks of such files."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_carve.data.text import PreparedText

# The .idx header: magic, version, dtype code, number of sequences, number of document boundaries.
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER_BYTES = 34
_INDEX_COUNT_OFFSET = 18

_EDGE_BYTES = 1 << 16

# How much of an indexed file is searched for ids outside the vocabulary: all of small ones, samples of large ones.
_SAMPLES, _SAMPLE_TOKENS = 64, 1 << 20


def indexed_prefixes(entries: list[str]) -> list[str]:
    """Check a list in the form of Megatron's --data-path and return it.

    Args:
        entries: prefixes ["a", "b", ...], or weights and prefixes ["0.3", "a", "0.7", "b", ...].

    Raises:
        ValueError: the list mixes the two forms, a weight is not positive, or a prefix's .bin or .idx is missing,
            empty or not Megatron's format; names data.indexed and the file.
    """
    for prefix in _blend_prefixes(entries):
        for suffix in (".bin", ".idx"):
            if prefix.endswith(suffix):
                raise ValueError(f"data.indexed: {prefix} must be given without {suffix}")
            file = Path(prefix + suffix)
            if not file.is_file():
                raise ValueError(f"data.indexed: {file} does not exist")
            if file.stat().st_size == 0:
                raise ValueError(f"data.indexed: {file} is empty")
        _sequence_lengths(prefix)
    return entries


def require_indexed_tokens(entries: list[str], *, split: str, seq_length: int) -> None:
    """Check that each indexed dataset gives each used part of `split` the tokens of one sample.

    Only the index is read. Megatron divides a dataset by whole sequences: a part that gets none makes it count epochs
    without end, and one with fewer than seq_length + 1 tokens is repeated inside one sample.

    Args:
        entries: as for `indexed_prefixes`.
        split: Megatron's split string, such as "95,5" or "969,30,1".
        seq_length: tokens per sample.

    Raises:
        ValueError: the split string is malformed (names data.split), or a part is too small (names data.indexed).
    """
    weights = _split_weights(split)
    ends = np.cumsum(np.array(weights) / sum(weights))
    for prefix in _blend_prefixes(entries):
        lengths = _sequence_lengths(prefix)
        begin = 0.0
        for name, weight, end in zip(("train", "validation", "test"), weights, ends, strict=False):
            part = lengths[round(begin * lengths.size) : round(end * lengths.size)]
            begin = end
            tokens = int(part.sum(dtype=np.int64))
            if weight > 0 and tokens < seq_length + 1:
                raise ValueError(
                    f"data.indexed: with data.split {split!r}, {prefix} gives {tokens} {name} tokens "
                    f"({part.size} of its {lengths.size} sequences), but seq_length {seq_length} needs at least "
                    f"{seq_length + 1}"
                )


def require_known_ids(entries: list[str], *, vocab_size: int) -> None:
    """Check token ids of indexed datasets against the vocabulary, in samples spread over each file.

    Raises:
        ValueError: an id outside the vocabulary; names data.indexed, the file and the remedy.
    """
    from megatron.core.datasets.indexed_dataset import DType

    for prefix in _blend_prefixes(entries):
        with open(f"{prefix}.idx", "rb") as index:
            code = index.read(_INDEX_HEADER_BYTES)[_INDEX_COUNT_OFFSET - 1]
        tokens = np.memmap(f"{prefix}.bin", dtype=DType.dtype_from_code(code), mode="r")
        starts = np.unique(np.linspace(0, max(0, tokens.size - _SAMPLE_TOKENS), _SAMPLES, dtype=np.int64))
        largest = max(int(tokens[start : start + _SAMPLE_TOKENS].max()) for start in starts)
        if largest >= vocab_size:
            raise ValueError(
                f"data.indexed: {prefix}.bin holds the token id {largest}, outside the vocabulary of {vocab_size}; "
                "name the tokenizer that made it (data.tokenizer) or give model.vocab_size"
            )


@dataclass(frozen=True)
class GPTDatasetTokenizer:
    """The part of a tokenizer that Megatron's GPTDataset reads; its data are token ids already.

    Attributes:
        eod: end-of-document id.
        vocab_size: number of ids.
        data: a fingerprint of the data where files of the same name may come to hold others.
        pad: -1, an id no data holds. Megatron fills an incomplete last sample with it and masks those labels; any real
            id would mask that id wherever it occurs.
    """

    eod: int
    vocab_size: int
    data: str = ""
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, int | str]:
        """What Megatron hashes into the names of its cached sample indices."""
        return {"class": type(self).__name__, "eod": self.eod, "vocab_size": self.vocab_size, "data": self.data}


class SameSamples:
    """A validation dataset, map-style, whose samples are the first ones of another, again and again.

    Args:
        source: the other one.
        count: of its samples, at least one.
        length: samples of this one.
    """

    def __init__(self, source: Any, count: int, length: int) -> None:
        from megatron.core.datasets.utils import Split

        self.split = Split.valid  # by which Megatron knows its batch sizes
        self.source, self.count, self.length = source, count, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.source[index % self.count]


def build_gpt_datasets(
    source: PreparedText | list[str],
    *,
    split: str | None,
    num_samples: tuple[int, int, int],
    seq_length: int,
    seed: int,
    eod: int,
    vocab_size: int,
    cache_path: str | None,
    is_built_on_rank: Callable[[], bool],
    documents_apart: bool = False,
) -> tuple[Any, Any, Any]:
    """Megatron's (train, validation, test) GPT datasets; every rank calls this together.

    Args:
        source: prepared text, or entries as for `indexed_prefixes`.
        split: Megatron's split string for indexed entries; None for prepared text, which is split already.
        num_samples: samples wanted per split; the data are repeated as often as that takes.
        seq_length: tokens per sample.
        seed: order of documents and samples.
        eod, vocab_size: of the tokenizer that made the data.
        cache_path: directory for Megatron's sample indices, or None for one beside the data.
        is_built_on_rank: whether this rank reads data.
        documents_apart: give each sample, beside its tokens, cu_seqlens: [seq_length + 1] int32, the first tokens of
            its documents, filled up with seq_length; no loss for the token after a document, where the data end
            documents with eod.

    Returns:
        Per split a dataset, or None where the split is empty (test, with prepared text) or not built on this rank.

    Raises:
        ValueError: `split` is missing for indexed entries or given for prepared text.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    blend: dict[str, Any]
    fingerprint = ""
    if isinstance(source, PreparedText):
        if split is not None:
            raise ValueError(f"data.split applies to data.indexed only, got {split!r} with data.text")
        blend = {"blend_per_split": [([source.train_prefix], None), ([source.validation_prefix], None), None]}
    else:
        if split is None:
            raise ValueError("data.split is needed with data.indexed")
        blend = {"blend": get_blend_from_list(source), "split": split}
        fingerprint = _index_fingerprint(source)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        path_to_cache=cache_path,
        tokenizer=GPTDatasetTokenizer(eod, vocab_size, data=fingerprint),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=documents_apart,
        inter_document_masking=documents_apart,
        create_attention_mask=False,
        **blend,
    )
    train, validation, test = BlendedMegatronDatasetBuilder(
        GPTDataset, list(num_samples), is_built_on_rank, config
    ).build()
    return train, validation, test


def contents(prefixes: Sequence[str]) -> str:
    """Of the contents of indexed files, for telling whether they have changed: lengths of all documents, and the first
    and last 64 KiB of tokens; about a second per GB of .idx."""
    together = hashlib.blake2b(_index_fingerprint(prefixes).encode(), digest_size=16)
    for prefix in _blend_prefixes(prefixes):
        with open(prefix + ".bin", "rb") as file:
            together.update(file.read(_EDGE_BYTES))
            file.seek(max(0, file.seek(0, 2) - _EDGE_BYTES))
            together.update(file.read(_EDGE_BYTES))
    return together.hexdigest()


def _index_fingerprint(entries: Sequence[str]) -> str:
    """Of the contents of all .idx files, on which Megatron's sample indices depend; about a second per GB of them."""
    together = hashlib.blake2b(digest_size=16)
    for prefix in _blend_prefixes(entries):
        with open(prefix + ".idx", "rb") as file:
            together.update(hashlib.file_digest(file, "blake2b").digest())
    return together.hexdigest()


def _blend_prefixes(entries: Sequence[str]) -> list[str]:
    """The prefixes of a --data-path list, told apart from weights by Megatron's rule."""
    if not entries:
        raise ValueError("data.indexed must name at least one dataset, got an empty list")
    weights = [_number(entry) for entry in entries[::2]]
    if len(entries) % 2 or all(weight is None for weight in weights):
        return [entry.strip() for entry in entries]
    for entry, weight in zip(entries[::2], weights, strict=True):
        if weight is None:
            raise ValueError(f"data.indexed must be all prefixes or weight-prefix pairs; {entry!r} is not a weight")
        if not 0 < weight < math.inf:
            raise ValueError(f"data.indexed: the weight {entry!r} must be positive and finite")
    return [entry.strip() for entry in entries[1::2]]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _split_weights(split: str) -> list[float]:
    weights = [_number(part) for part in split.split(",")]
    if (
        not re.fullmatch(r"[0-9., ]+", split)
        or None in weights
        or not 2 <= len(weights) <= 3
        or not sum(weight or 0.0 for weight in weights) > 0
    ):
        raise ValueError(f'data.split must be two or three weights such as "95,5" or "969,30,1", got {split!r}')
    return [weight or 0.0 for weight in weights]


def _sequence_lengths(prefix: str) -> np.ndarray:
    """Tokens of each sequence, int32 [num_sequences], read from the .idx file."""
    path = Path(prefix + ".idx")
    with open(path, "rb") as stream:
        header = stream.read(_INDEX_HEADER_BYTES)
        count = int.from_bytes(header[_INDEX_COUNT_OFFSET : _INDEX_COUNT_OFFSET + 8], "little")
        known = len(header) == _INDEX_HEADER_BYTES and header.startswith(_INDEX_MAGIC)
        if not known or path.stat().st_size < _INDEX_HEADER_BYTES + 4 * count:
            raise ValueError(
                f"data.indexed: {path} is not an index file of Megatron's indexed datasets, or is cut short"
            )
        return np.fromfile(stream, dtype=np.int32, count=count)
