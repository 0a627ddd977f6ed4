"""What a run is trained and validated on: indexed datasets and how much each counts; checks and counts of them."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_carve.data.indexed import INDEX_MAGIC, dtype_of
from megatron_carve.data.text import MANIFEST, PreparedText, load_prepared

# The .idx header: magic, version, dtype code, number of sequences, number of document boundaries.
_HEADER_BYTES = 34
_COUNT_OFFSET = 18

_EDGE_BYTES = 1 << 16

# How much of an indexed file is searched for ids outside the vocabulary: all of small ones, samples of large ones.
_SAMPLES, _SAMPLE_TOKENS = 64, 1 << 20


class Part(NamedTuple):
    """A share of an indexed dataset.

    Attributes:
        prefix: path without .bin and .idx.
        weight: how much it counts among others, above 0.
        begin, end: the share of its sequences, in [0, 1].
    """

    prefix: str
    weight: float
    begin: float = 0.0
    end: float = 1.0

    def sequences(self) -> np.ndarray:
        """Tokens of each of its sequences, int32 [sequences]."""
        lengths = _sequence_lengths(self.prefix)
        return lengths[round(self.begin * lengths.size) : round(self.end * lengths.size)]


@dataclass(frozen=True)
class Blend:
    """The data of a run.

    Attributes:
        train, validation: the sets of each, drawn from in proportion to their weights.
        split: Megatron's split string where training and validation are parts of the same files.
        argument: the recipe key that names them.
        examples: they hold examples, see `packing.PackedExamples`; weights count for nothing.
    """

    train: tuple[Part, ...]
    validation: tuple[Part, ...]
    split: str | None = None
    argument: str = "data.indexed"
    examples: bool = False

    @property
    def prefixes(self) -> list[str]:
        """Of all files, each once."""
        return list(dict.fromkeys(part.prefix for part in (*self.train, *self.validation)))

    def require_tokens(self, seq_length: int) -> None:
        """Check that each set holds the seq_length + 1 tokens of one sample.

        Only the index is read. Of a set without sequences Megatron counts epochs without end, and one with fewer
        tokens is repeated inside one sample.

        Raises:
            ValueError: a set is too small; names the argument and the counts.
        """
        for kind, parts in (("train", self.train), ("validation", self.validation)):
            for part in parts if not self.examples else ():
                sequences = part.sequences()
                tokens = int(sequences.sum(dtype=np.int64))
                if tokens < seq_length + 1:
                    given = f"with data.split {self.split!r}, " if self.split is not None else ""
                    raise ValueError(
                        f"{self.argument}: {given}{part.prefix} gives {tokens} {kind} tokens ({sequences.size} "
                        f"sequences), but seq_length {seq_length} needs at least {seq_length + 1}"
                    )

    def counts(self, tokens: int, seq_length: int) -> list[str]:
        """Lines that say what the sets hold, and how often a run of so many tokens goes through each."""
        lines = []
        for kind, parts in (("train", self.train), ("validation", self.validation)):
            total = sum(part.weight for part in parts)
            for part in parts:
                found = part.sequences()
                held, share = int(found.sum(dtype=np.int64)), part.weight / total
                line = f"{kind}: {_short(part.prefix)}: {found.size:,} documents, {held:,} tokens"
                if self.examples:  # packing fills what is left of a sequence
                    kept = np.minimum(found, seq_length + 1)
                    cut, held = int((found > kept).sum()), int(kept.sum(dtype=np.int64))
                    line += f", {cut:,} of them longer than a sequence" if cut else ""
                elif len(parts) > 1:
                    line += f", {share:.1%} of the batches"
                if kind == "train":
                    most = "up to " if self.examples else ""
                    line += f"; the run sees {most}{share * tokens / held:.3g} epochs of it"
                lines.append(line)
        return lines


def text_blend(prepared: PreparedText, validation: PreparedText | None = None) -> Blend:
    """The blend of prepared text, and of a validation text of its own if `prepared` keeps none."""
    held_out = prepared.validation_prefix if validation is None else validation.train_prefix
    assert held_out is not None
    train = (Part(prepared.train_prefix, 1.0),)
    return Blend(train, (Part(held_out, 1.0),), argument="data.text", examples=prepared.examples)


def indexed_blend(
    entries: Sequence[str], *, split: str, validation: Sequence[str] | None = None, examples: bool = False
) -> Blend:
    """The blend of a list in the form of Megatron's --data-path.

    Args:
        entries: prefixes of indexed datasets or folders of `prepare_folder` ["a", "b", ...], or weights and those
            ["0.3", "a", "0.7", "b", ...]. Without weights each counts by its tokens.
        split: of prefixes, such as "95,5,0" for 95 % training and 5 % validation; folders have their validation set.
        validation: entries for validation; then all of `entries` is trained on.
        examples: they are folders of examples, without weights.

    Raises:
        ValueError: the list is malformed; a file is missing, empty or not Megatron's format; a folder has no
            validation set; what is named holds examples or does not, against `examples`; names data.indexed, or
            data.validation, and the file.
    """
    blend = _blend(entries, split, validation)
    if examples and any(weight for _, weight in _weights(entries, "data.indexed")):
        raise ValueError("data.indexed: examples (data.loss_on=completion) count alike, expected no weights")
    if examples and blend.split is not None:
        raise ValueError("data.indexed: examples are given as prepared folders, or with data.validation beside them")
    for prefix in blend.prefixes:
        if Path(f"{prefix}.mask").exists() != examples:
            expected = "no examples, but data.loss_on is" if examples else "examples, of which data.loss_on must be"
            raise ValueError(f"data.indexed: {prefix} holds {expected} completion")
    return replace(blend, examples=examples)


def _blend(entries: Sequence[str], split: str, validation: Sequence[str] | None) -> Blend:
    sets = _sets(entries, "data.indexed")
    if validation is not None:
        held_out = _sets(validation, "data.validation")
        return Blend(
            _weighed([Part(train, weight) for train, _, weight in sets], sets),
            _weighed([Part(train, weight) for train, _, weight in held_out], held_out),
        )
    folders = [held_out for _, held_out, _ in sets]
    if all(name is None for name in folders):
        shares = _split_weights(split)
        ends = np.cumsum(np.array(shares) / sum(shares))
        train = _weighed([Part(name, weight, 0.0, float(ends[0])) for name, _, weight in sets], sets)
        held = [part._replace(begin=float(ends[0]), end=float(ends[1])) for part in train] if shares[1] > 0 else []
        return Blend(train, tuple(held), split=split)
    parts = []
    for name, kept, weight in sets:
        if kept is None:
            raise ValueError(
                f"data.indexed: {name} is a prefix beside prepared folders, which have validation sets: give "
                "data.validation, or prefixes alone"
            )
        if not kept:
            raise ValueError(
                f"data.indexed: {Path(name).parent} was prepared without a validation set; give data.validation"
            )
        parts.append(Part(kept, weight))
    train = _weighed([Part(name, weight) for name, _, weight in sets], sets)
    return Blend(train, tuple(part._replace(weight=of.weight) for part, of in zip(parts, train, strict=True)))


def _sets(entries: Sequence[str], argument: str) -> list[tuple[str, str | None, float]]:
    """(training prefix, validation prefix, weight) of each entry; the validation prefix is None for a prefix, and
    empty for a folder without one; the weight is 0 where none is given."""
    found: list[tuple[str, str | None, float]] = []
    for name, weight in _weights(entries, argument):
        if Path(name).is_dir():
            if not (Path(name) / MANIFEST).is_file():
                raise ValueError(f"{argument}: {name} is a folder that `python -m megatron_carve.prepare` did not make")
            try:
                prepared = load_prepared(name)
            except ValueError as error:
                raise ValueError(f"{argument}: {error}") from error
            found.append((prepared.train_prefix, prepared.validation_prefix or "", weight))
        else:
            _check_prefix(name, argument)
            found.append((name, None, weight))
    return found


def _check_prefix(prefix: str, argument: str) -> None:
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            raise ValueError(f"{argument}: {prefix} must be given without {suffix}")
        file = Path(prefix + suffix)
        if not file.is_file():
            raise ValueError(f"{argument}: {file} does not exist")
        if file.stat().st_size == 0:
            raise ValueError(f"{argument}: {file} is empty")
    try:
        _sequence_lengths(prefix)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def _weighed(parts: list[Part], sets: list[tuple[str, str | None, float]]) -> tuple[Part, ...]:
    """Parts with weights: Megatron, given none, ends after one epoch."""
    if all(weight for _, _, weight in sets):
        return tuple(parts)
    return tuple(part._replace(weight=max(1.0, float(part.sequences().sum(dtype=np.int64)))) for part in parts)


def require_known_ids(prefixes: Sequence[str], *, vocab_size: int) -> None:
    """Check token ids of indexed datasets against the vocabulary, in samples spread over each file.

    Raises:
        ValueError: an id outside the vocabulary; names data.indexed, the file and the remedy.
    """
    for prefix in prefixes:
        with open(f"{prefix}.idx", "rb") as index:
            code = index.read(_HEADER_BYTES)[_COUNT_OFFSET - 1]
        tokens = np.memmap(f"{prefix}.bin", dtype=dtype_of(code), mode="r")
        starts = np.unique(np.linspace(0, max(0, tokens.size - _SAMPLE_TOKENS), _SAMPLES, dtype=np.int64))
        largest = max(int(tokens[start : start + _SAMPLE_TOKENS].max()) for start in starts)
        if largest >= vocab_size:
            raise ValueError(
                f"data.indexed: {prefix}.bin holds the token id {largest}, outside the vocabulary of {vocab_size}; "
                "name the tokenizer that made it (data.tokenizer) or give model.vocab_size"
            )


def contents(prefixes: Sequence[str]) -> str:
    """Of the contents of indexed files, for telling whether they have changed: lengths of all documents, and the first
    and last 64 KiB of tokens; about a second per GB of .idx."""
    together = hashlib.blake2b(index_fingerprint(prefixes).encode(), digest_size=16)
    for prefix in prefixes:
        with open(prefix + ".bin", "rb") as file:
            together.update(file.read(_EDGE_BYTES))
            file.seek(max(0, file.seek(0, 2) - _EDGE_BYTES))
            together.update(file.read(_EDGE_BYTES))
    return together.hexdigest()


def index_fingerprint(prefixes: Sequence[str]) -> str:
    """Of the contents of all .idx files, on which Megatron's sample indices depend; about a second per GB of them."""
    together = hashlib.blake2b(digest_size=16)
    for prefix in prefixes:
        with open(prefix + ".idx", "rb") as file:
            together.update(hashlib.file_digest(file, "blake2b").digest())
    return together.hexdigest()


def _weights(entries: Sequence[str], argument: str) -> list[tuple[str, float]]:
    """Names and weights of a --data-path list, told apart by Megatron's rule; 0 where no weights are given."""
    if not entries:
        raise ValueError(f"{argument} must name at least one dataset, got an empty list")
    weights = [_number(entry) for entry in entries[::2]]
    if len(entries) % 2 or all(weight is None for weight in weights):
        return [(entry.strip(), 0.0) for entry in entries]
    for entry, weight in zip(entries[::2], weights, strict=True):
        if weight is None:
            raise ValueError(f"{argument} must be all prefixes or weight-prefix pairs; {entry!r} is not a weight")
        if not 0 < weight < math.inf:
            raise ValueError(f"{argument}: the weight {entry!r} must be positive and finite")
    return [(entry.strip(), weight or 0.0) for entry, weight in zip(entries[1::2], weights, strict=True)]


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
        header = stream.read(_HEADER_BYTES)
        count = int.from_bytes(header[_COUNT_OFFSET : _COUNT_OFFSET + 8], "little")
        known = len(header) == _HEADER_BYTES and header.startswith(INDEX_MAGIC)
        if not known or path.stat().st_size < _HEADER_BYTES + 4 * count:
            raise ValueError(f"{path} is not an index file of Megatron's indexed datasets, or is cut short")
        return np.fromfile(stream, dtype=np.int32, count=count)


def _short(prefix: str) -> str:
    path = Path(prefix)
    return f"{path.parent.name}/{path.name}" if path.name in ("train", "validation") else path.name
