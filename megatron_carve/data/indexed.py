"""Megatron's indexed datasets, written with little memory and from a place where writing was interrupted."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

INDEX_MAGIC = b"MMIDIDX\x00\x00"
DTYPE_CODES: dict[type[np.generic], int] = {np.uint16: 8, np.int32: 4}
MAX_SEQUENCE_TOKENS = 1 << 30  # the index holds lengths as int32
_CHUNK = 1 << 20


def dtype_of(code: int) -> np.dtype:
    """The dtype of a dataset's tokens by the code in its index."""
    kinds = (np.uint8, np.int8, np.int16, np.int32, np.int64, np.float64, np.float32, np.uint16)
    return np.dtype(kinds[code - 1])


@dataclass
class Written:
    """What a dataset holds.

    Attributes:
        tokens: end-of-document ids included.
        bytes: UTF-8 bytes of text behind them.
        documents: that have at least one token.
        empty_documents: left out because they have none.
        sequences: documents, but for those longer than MAX_SEQUENCE_TOKENS, which are several.
        open: tokens of the last sequence, to which its document goes on; 0 between documents.
        in_document: a document goes on.
        last_bytes: of text, in the last document.
    """

    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    empty_documents: int = 0
    sequences: int = 0
    open: int = 0
    in_document: bool = False
    last_bytes: int = 0


class IndexedWriter:
    """Appends documents to `prefix`.bin; lengths and ends of documents wait in two files of `aside` for the index.

    Args:
        prefix: of the dataset.
        aside: folder for what is needed until `finish`.
        dtype: of the ids.
        eod: id that ends a document.
        written: what there is of it already, as of an earlier writer's `flush`; what was written after that is cut off.
        masked: `prefix`.mask has a byte for each token, which is 1 where it is learned.

    Raises:
        ValueError: less is there than `written` says.
    """

    def __init__(
        self, prefix: Path, aside: Path, *, dtype: type[np.generic], eod: int, written: Written, masked: bool = False
    ) -> None:
        self._prefix, self._eod, self._dtype, self._code = prefix, eod, np.dtype(dtype), DTYPE_CODES[dtype]
        names: list[str | Path] = [
            f"{prefix}.bin",
            aside / f"{prefix.name}.lengths",
            aside / f"{prefix.name}.documents",
        ]
        names += [f"{prefix}.mask"] if masked else []
        self._files: list[IO[bytes]] = [open(name, "ab") for name in names]  # noqa: SIM115
        self._tokens, self._lengths, self._documents = self._files[:3]
        self._mask = self._files[3] if masked else None
        self.restore(written)

    def add(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        *,
        text_bytes: int,
        empty: int = 0,
        last_bytes: int,
        learned: np.ndarray | None = None,
    ) -> None:
        """Append whole documents; arguments as the attributes of encoding.Tokens."""
        w = self.written
        assert not w.in_document
        if lengths.size:
            w.last_bytes = last_bytes
        w.bytes += text_bytes
        w.empty_documents += empty
        self._tokens.write(ids.data)
        if self._mask is not None:
            assert learned is not None and learned.size == ids.size
            self._mask.write(learned.data)
        self._lengths.write(lengths.astype("<i4").data)
        self._documents.write(np.arange(w.sequences + 1, w.sequences + 1 + lengths.size, dtype="<i8").data)
        w.tokens += ids.size
        w.sequences += lengths.size
        w.documents += lengths.size

    def add_piece(self, ids: np.ndarray, text_bytes: int, *, ends: bool) -> None:
        """Append the next piece of one document, without end-of-document id; `ends` says that it is the last."""
        w = self.written
        w.bytes += text_bytes
        if ends:
            if not ids.size and not w.in_document:
                w.empty_documents += 1
                return
            ids = np.append(ids, np.array([self._eod], dtype=self._dtype))
        w.last_bytes = text_bytes + (w.last_bytes if w.in_document else 0)
        if not ids.size:
            return
        self._tokens.write(ids.data)
        w.tokens += ids.size
        # GPTDataset shuffles sequences, not documents: left apart, the pieces of a text would meet in the wrong order.
        if w.open and w.open + ids.size > MAX_SEQUENCE_TOKENS:
            self._end_sequence()
        w.open += ids.size
        w.in_document = not ends
        if ends:
            self._end_sequence()
            w.documents += 1
            self._documents.write(struct.pack("<q", w.sequences))

    def _end_sequence(self) -> None:
        self._lengths.write(struct.pack("<i", self.written.open))
        self.written.sequences += 1
        self.written.open = 0

    def flush(self) -> dict[str, Any]:
        """Bring everything to the disk; returns what an IndexedWriter can go on from."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return asdict(self.written)

    def without_last_document(self) -> tuple[Written, np.ndarray, np.ndarray | None]:
        """What there is but for the last document; the tokens of that and which are learned. `restore` removes it."""
        w = self.written
        assert w.documents == w.sequences and not w.in_document
        for file in self._files:
            file.flush()
        length = int(np.fromfile(self._lengths.name, dtype="<i4", offset=(w.sequences - 1) * 4)[0])
        begin = w.tokens - length
        ids = np.fromfile(self._tokens.name, dtype=self._dtype, offset=begin * self._dtype.itemsize)
        learned = None if self._mask is None else np.fromfile(self._mask.name, dtype=np.uint8, offset=begin)
        rest = replace(
            w, tokens=begin, bytes=w.bytes - w.last_bytes, documents=w.documents - 1, sequences=w.sequences - 1
        )
        return rest, ids, learned

    def restore(self, written: Written) -> None:
        """Cut off what was written after `written`."""
        self.written = written
        sizes = (written.tokens * self._dtype.itemsize, written.sequences * 4, written.documents * 8, written.tokens)
        for file, size in zip(self._files, sizes, strict=False):
            file.flush()
            there = file.seek(0, os.SEEK_END)
            if there < size:
                raise ValueError(f"{file.name} has {there} bytes, not {size}; delete the folder and run again")
            file.truncate(size)

    def finish(self) -> None:
        """Write the index, in Megatron's order: lengths, where sequences begin in bytes, ends of documents."""
        w = self.written
        self.flush()
        with open(f"{self._prefix}.idx", "wb") as index:
            index.write(INDEX_MAGIC + struct.pack("<QBQQ", 1, self._code, w.sequences, w.documents + 1))
            for lengths in _chunks(self._lengths.name, "<i4"):
                index.write(lengths.data)
            begin = 0
            for lengths in _chunks(self._lengths.name, "<i4"):
                ends = begin + np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
                index.write(np.concatenate([[begin], ends[:-1]]).astype("<i8").data)
                begin = int(ends[-1])
            index.write(struct.pack("<q", 0))
            for documents in _chunks(self._documents.name, "<i8"):
                index.write(documents.data)
            index.flush()
            os.fsync(index.fileno())

    def close(self) -> None:
        for file in self._files:
            file.close()


def _chunks(path: str, dtype: str) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while (chunk := np.fromfile(file, dtype=dtype, count=_CHUNK)).size:
            yield chunk
