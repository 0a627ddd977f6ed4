"""A text or JSON-lines file, tokenised once into Megatron's indexed format."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_carve.data.tokenizer import Tokenizer

# Megatron and torch are imported where they are used: a recipe is checked, and a cached text found, without them.

logger = logging.getLogger(__name__)

_SPLITS = ("train", "validation")
_JSON_LINES = (".json", ".jsonl")
_MANIFEST = "manifest.json"
_PARTIAL, _LOCK = ".partial-", ".lock"
_FORMAT = 2  # part of the cache key: raise it when the conversion changes
_BLOCK_BYTES = 1 << 20
_EDGE_BYTES = 1 << 16
_MAX_SEQUENCE_TOKENS = 1 << 30  # the index holds lengths as int32


@dataclass(frozen=True)
class PreparedText:
    """A text file converted by `prepare_text`.

    Attributes:
        source: the text file.
        tokenizer: spec of the tokenizer.
        train_prefix, validation_prefix: paths of the indexed files without .bin and .idx.
        train_tokens, validation_tokens: tokens, end-of-document ids included.
        train_bytes, validation_bytes: UTF-8 bytes of the text behind those tokens.
        train_documents, validation_documents: documents that gave at least one token.
        empty_documents: documents left out because they gave none.
    """

    source: str
    tokenizer: str
    train_prefix: str
    validation_prefix: str
    train_tokens: int
    validation_tokens: int
    train_bytes: int
    validation_bytes: int
    train_documents: int
    validation_documents: int
    empty_documents: int

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per UTF-8 byte of text, over both splits; turns a loss per token into one per byte."""
        return (self.train_tokens + self.validation_tokens) / (self.train_bytes + self.validation_bytes)


def prepare_text(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str],
    *,
    text_key: str = "text",
    validation_fraction: float = 0.05,
    progress: bool = True,
) -> PreparedText:
    """Tokenise a text file once into a train and a validation set in Megatron's indexed format.

    A .jsonl or .json file holds one JSON object per line with a document under `text_key`; blank lines are skipped
    and the last documents are validation. Any other file is one document, the end of which is validation, cut at a
    line where that keeps validation between half and twice its share. Each document, and each part of a document
    that is cut, ends with the tokenizer's end-of-document id. A byte-order mark that begins the file is left out.

    The text is read in blocks of about 1 MiB that end at a line where possible (a JSON line is read whole), so a
    tokenizer that is not lossless line by line, such as a SentencePiece model that normalises white space, does not
    reproduce the file.

    The result is kept in a directory under `cache_dir`. It is found again by the file's path, size, modification time
    in ns and the SHA-256 of its first and last 64 KiB, the tokenizer's spec and vocabulary, `text_key` and
    `validation_fraction`. Size and time change with every ordinary write, the two ends tell apart files that a copying
    tool gave the same time, and hashing the whole of a large file would cost about as much as converting it. A
    conversion is written beside that directory and renamed, so an interrupted one is never taken for a finished one;
    what a killed one left, the next one removes. Processes that convert the same text at
    once all use the result of the first to finish, but it saves work to let one go ahead.

    Args:
        path: the text file, UTF-8.
        tokenizer: see `load_tokenizer`.
        cache_dir: created if missing.
        text_key: key of the document in a JSON line.
        validation_fraction: in (0, 1); share of bytes (plain text) or documents (JSON lines, at least one).
        progress: show a progress bar in bytes on stderr.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be used, or the cached conversion is damaged; names data.text and the place.
    """
    source = _checked_source(path)
    if not 0 < validation_fraction < 1:
        raise ValueError(f"data.validation_fraction must be between 0 and 1, got {validation_fraction}")
    identity = _identity(source, tokenizer, text_key, validation_fraction)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    directory = Path(cache_dir).expanduser().absolute() / f"{source.stem}-{key}"
    if directory.exists():
        return _load(directory, identity)

    _remove_abandoned(directory.parent)
    partial, lock = _begin(directory)
    try:
        if source.suffix.lower() in _JSON_LINES:
            pieces = _json_pieces(source, text_key, validation_fraction)
        else:
            pieces = _text_pieces(source, validation_fraction)
        splits = _convert(pieces, source, tokenizer, partial, progress)
        if _identity(source, tokenizer, text_key, validation_fraction) != identity:
            raise _changed(source)
        (partial / _LOCK).unlink()
        files = {file.name: file.stat().st_size for file in partial.iterdir()}
        manifest = {"identity": identity, "splits": splits, "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _publish(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.close()
    return _load(directory, identity)


def require_tokens(prepared: PreparedText, seq_length: int) -> None:
    """Check that both splits hold the seq_length + 1 tokens that one training sample takes.

    With fewer, Megatron would repeat the text inside one sample without a word.

    Raises:
        ValueError: a split is too short; names data.text, seq_length and the counts.
    """
    for split, tokens in (("train", prepared.train_tokens), ("validation", prepared.validation_tokens)):
        if tokens < seq_length + 1:
            remedy = " or a larger data.validation_fraction" if split == "validation" else ""
            raise ValueError(
                f"data.text: {prepared.source} gives {tokens} {split} tokens, but seq_length {seq_length} needs at "
                f"least {seq_length + 1}; use a longer text, a smaller seq_length{remedy}"
            )


class _Piece(NamedTuple):
    """A stretch of text on its way into one split."""

    split: str
    text: str
    text_bytes: int
    ends_document: bool
    position: int  # bytes of the source read so far


def _checked_source(path: str | os.PathLike[str]) -> Path:
    source = Path(path).expanduser().resolve()
    if source.is_dir():
        raise ValueError(f"data.text: {source} is a directory, not a text file")
    if not source.is_file():
        raise FileNotFoundError(f"data.text: {source} does not exist or is not a regular file")
    if source.stat().st_size == 0:
        raise ValueError(f"data.text: {source} is empty")
    return source


def _identity(source: Path, tokenizer: Tokenizer, text_key: str, fraction: float) -> dict[str, Any]:
    """What a cached conversion must agree on to be used again."""
    with open(source, "rb") as stream:
        stat = os.fstat(stream.fileno())
        edges = hashlib.sha256(stream.read(_EDGE_BYTES))
        stream.seek(max(0, stat.st_size - _EDGE_BYTES))
        edges.update(stream.read(_EDGE_BYTES))
    return {
        "format": _FORMAT,
        "source": str(source),
        "source_bytes": stat.st_size,
        "source_mtime_ns": stat.st_mtime_ns,
        "source_edges_sha256": edges.hexdigest(),
        "tokenizer": tokenizer.spec,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "text_key": text_key,
        "validation_fraction": fraction,
    }


def read_text(path: str | os.PathLike[str]) -> str:
    """A text as prepare_text reads it: UTF-8, lines ending as they do, without the byte-order mark that may begin it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    raw = Path(path).expanduser().read_bytes()
    mark = _mark(raw)
    try:
        return raw[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        place = mark + error.start
        raise ValueError(f"{path} is not UTF-8: byte 0x{raw[place]:02x} at byte offset {place}") from None


def _mark(raw: bytes) -> int:
    """Length of the byte-order mark that a file's first bytes begin with."""
    return len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0


def _changed(source: Path) -> ValueError:
    return ValueError(f"data.text: {source} changed while it was being read; run again")


def _decode(raw: bytes, source: Path, offset: int, where: str = "") -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.text: {source} is not UTF-8: byte 0x{raw[error.start]:02x} at byte offset "
            f"{offset + error.start}{where}"
        ) from error


def _text_pieces(source: Path, fraction: float) -> Iterator[_Piece]:
    """A plain text file as two documents, in blocks."""
    with open(source, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        cut = _validation_cut(stream, size, fraction)
        if not 0 < cut < size:
            raise ValueError(f"data.text: {source} is too short ({size} bytes) to split into train and validation")
        stream.seek(0)
        first = min(_mark(stream.read(len(codecs.BOM_UTF8))), cut)
        for split, begin, end in (("train", first, cut), ("validation", cut, size)):
            stream.seek(begin)
            for offset, raw in _blocks(stream, begin, end, source):
                position = offset + len(raw)
                yield _Piece(split, _decode(raw, source, offset), len(raw), position == end, position)


def _validation_cut(stream: BinaryIO, size: int, fraction: float) -> int:
    """Byte offset at which validation begins: the line nearest its share, else the nearest character."""
    share = max(1, round(size * fraction))
    wanted = size - share
    # Four bytes at least, so that a character that straddles the cut is seen.
    low = max(0, wanted - min(max(share, 4), _BLOCK_BYTES))
    stream.seek(low)
    window = stream.read(wanted - low + min(share // 2, _BLOCK_BYTES))
    middle = wanted - low
    lines = [low + at + 1 for at in (window.rfind(b"\n", 0, middle), window.find(b"\n", middle)) if at >= 0]
    lines = [at for at in lines if 0 < at < size]
    if lines:
        return min(lines, key=lambda at: abs(at - wanted))
    return low + _whole_characters(window[:middle])


def _blocks(stream: BinaryIO, begin: int, end: int, source: Path) -> Iterator[tuple[int, bytes]]:
    """Offsets and bytes of blocks over [begin, end), each ending at a line or at least at a character."""
    raw = b""
    while begin < end:
        chunk = stream.read(min(_BLOCK_BYTES, end - begin - len(raw)))
        if not chunk:
            raise _changed(source)
        raw += chunk
        at_end = begin + len(raw) == end
        cut = len(raw) if at_end else raw.rfind(b"\n") + 1 or _whole_characters(raw)
        if cut:
            yield begin, raw[:cut]
        begin, raw = begin + cut, raw[cut:]


def _whole_characters(raw: bytes) -> int:
    """Length of `raw` without an incomplete UTF-8 character at its end."""
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        if byte & 0xC0 != 0x80:
            width = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(raw) - back if width > back else len(raw)
    return len(raw)  # not UTF-8: left for the decoder, which names the offset


def _json_pieces(source: Path, text_key: str, fraction: float) -> Iterator[_Piece]:
    """A JSON-lines file as one piece per document."""
    with open(source, "rb") as stream:
        documents = sum(1 for line in stream if line.strip())
        if documents < 2:
            raise ValueError(
                f"data.text: {source} holds too few documents ({documents}); it needs at least 2, one for validation"
            )
        first_validation = documents - min(max(1, round(documents * fraction)), documents - 1)
        stream.seek(0)
        offset = document = 0
        for number, whole_line in enumerate(stream, start=1):
            mark = _mark(whole_line) if number == 1 else 0
            line, offset = whole_line[mark:], offset + mark
            if line.strip():
                text = _json_text(line, text_key, source, number, offset)
                try:
                    text_bytes = len(text.encode("utf-8"))
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"data.text: {source} line {number} escapes half of a surrogate pair, which is not a character"
                    ) from error
                split = "train" if document < first_validation else "validation"
                yield _Piece(split, text, text_bytes, True, offset + len(line))
                document += 1
            offset += len(line)


def _json_text(line: bytes, text_key: str, source: Path, number: int, offset: int) -> str:
    decoded = _decode(line, source, offset, f" (line {number})")
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise ValueError(
            f"data.text: {source} line {number} is not JSON ({error}); one JSON object per line is expected"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(
            f"data.text: {source} line {number} is a JSON {type(record).__name__}; one JSON object per line is expected"
        )
    if text_key not in record:
        found = ", ".join(repr(key) for key in record) or "none"
        raise ValueError(f"data.text: {source} line {number} has no key {text_key!r} (data.text_key); found: {found}")
    if not isinstance(record[text_key], str):
        kind = type(record[text_key]).__name__
        raise ValueError(f"data.text: {source} line {number}: {text_key!r} must be a string, got {kind}")
    return record[text_key]


class _SplitWriter:
    """Appends the tokens of one split to an indexed dataset."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._prefix = prefix
        self._tokenizer = tokenizer
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
        self._in_document = False
        self.tokens = self.bytes = self.documents = self.empty_documents = 0

    def add(self, piece: _Piece) -> None:
        import torch

        tokens = self._tokenizer.encode(piece.text)
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self._tokenizer.vocab_size):
            raise ValueError(
                f"data.tokenizer: {self._tokenizer.spec!r} gave an id outside its vocabulary of "
                f"{self._tokenizer.vocab_size}"
            )
        self.bytes += piece.text_bytes
        if piece.ends_document:
            if not tokens.size and not self._in_document:
                self.empty_documents += 1
                return
            tokens = np.append(tokens, np.int32(self._tokenizer.eod))
        if tokens.size:
            self._builder.add_item(torch.from_numpy(tokens))
            self.tokens += tokens.size
            self._join()
            self._in_document = True
        if piece.ends_document:
            self._builder.end_document()
            self.documents += 1
            self._in_document = False

    def _join(self) -> None:
        # GPTDataset shuffles sequences, not documents: left apart, the blocks of a text would meet in the wrong order.
        lengths = self._builder.sequence_lengths
        if self._in_document and lengths[-2] + lengths[-1] <= _MAX_SEQUENCE_TOKENS:
            lengths[-2:] = [lengths[-2] + lengths[-1]]

    def finish(self) -> dict[str, int]:
        self._builder.finalize(f"{self._prefix}.idx")
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "empty_documents": self.empty_documents,
        }

    def close(self) -> None:
        self._builder.data_file.close()


def _convert(
    pieces: Iterator[_Piece], source: Path, tokenizer: Tokenizer, directory: Path, progress: bool
) -> dict[str, dict[str, int]]:
    """Write the pieces as directory/{train,validation}.{bin,idx} and return the counts of each split."""
    writers = {split: _SplitWriter(directory / split, tokenizer) for split in _SPLITS}
    try:
        with tqdm(
            total=source.stat().st_size,
            desc=f"tokenising {source.name}",
            unit="B",
            unit_scale=True,
            disable=not progress,
        ) as bar:
            for piece in pieces:
                writers[piece.split].add(piece)
                bar.update(piece.position - bar.n)
        for split, writer in writers.items():
            if writer.tokens == 0:
                raise ValueError(f"data.text: {source} gives no {split} tokens with the tokenizer {tokenizer.spec!r}")
        empty = sum(writer.empty_documents for writer in writers.values())
        if empty:
            logger.warning("data.text: %s: left out %d documents that have no tokens", source, empty)
        return {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()


def _begin(directory: Path) -> tuple[Path, IO[str]]:
    """A new folder for what becomes `directory`, and the lock that tells it from abandoned ones."""
    new = directory.parent / f".new-{uuid.uuid4().hex}"
    new.mkdir(parents=True)
    lock = (new / _LOCK).open("w")
    lock.write(socket.gethostname())
    lock.flush()
    with contextlib.suppress(OSError):  # storage without locks: then nothing is ever taken for abandoned
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return new.rename(directory.parent / f"{_PARTIAL}{directory.name}-{new.name.removeprefix('.new-')}"), lock


def _remove_abandoned(cache: Path) -> None:
    """Remove conversions of this machine whose process has ended: nobody holds their locks.

    Of other machines none: there is storage that shows their locks as free.
    """
    for left in cache.glob(f"{_PARTIAL}*"):
        try:
            with (left / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock.read() == socket.gethostname():
                    shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue  # it goes on, or has just been finished, or locks do not work there


def _publish(partial: Path, directory: Path) -> None:
    try:
        partial.rename(directory)
    except OSError:
        # A directory that holds files is not replaced: another process finished the same conversion first.
        if not (directory / _MANIFEST).is_file():
            raise
        logger.info("data.text: another process converted %s first; using its files", directory)


def _load(directory: Path, identity: dict[str, Any]) -> PreparedText:
    damaged = f"data.text: the cached conversion in {directory} is damaged"
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        for name, size in manifest["files"].items():
            found = (directory / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes, not {size}")
        if manifest["identity"] != identity:
            raise ValueError(f"{_MANIFEST} describes another text")
        train, validation = (manifest["splits"][split] for split in _SPLITS)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{damaged} ({error}); delete it and run again") from error
    return PreparedText(
        source=identity["source"],
        tokenizer=identity["tokenizer"],
        train_prefix=str(directory / "train"),
        validation_prefix=str(directory / "validation"),
        empty_documents=train["empty_documents"] + validation["empty_documents"],
        **{f"train_{name}": train[name] for name in ("tokens", "bytes", "documents")},
        **{f"validation_{name}": validation[name] for name in ("tokens", "bytes", "documents")},
    )
