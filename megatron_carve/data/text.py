"""Texts, tokenised once into Megatron's indexed format and found again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_carve.data.blocks import mark_bytes
from megatron_carve.data.conversion import SPLITS, convert
from megatron_carve.data.inputs import Given, Input, InputError, find_inputs, plain_stem, title
from megatron_carve.data.tokenizer import Tokenizer

# Megatron and torch are imported where they are used: a recipe is checked, and a cached text found, without them.

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PARTIAL, _LOCK, _DONE = ".partial-", "lock", "done"
_FORMAT = 3  # part of the cache key: raise it when the conversion changes
_BYTES_PER_WORKER = 4 << 20  # smaller inputs are tokenised before more processes have started


@dataclass(frozen=True)
class PreparedText:
    """Texts converted by `prepare_text` or `prepare_folder`.

    Attributes:
        source: the text file, or the first one and how many more there are.
        tokenizer: spec of the tokenizer.
        folder: where the result is.
        train_prefix, validation_prefix: paths of the indexed files without .bin and .idx; the second is None where
            nothing was kept for validation, and its counts are 0.
        train_tokens, validation_tokens: tokens, end-of-document ids included.
        train_bytes, validation_bytes: UTF-8 bytes of the text behind those tokens.
        train_documents, validation_documents: documents that gave at least one token.
        empty_documents: documents left out because they gave none.
        examples: documents are examples, of which the loss is of completions alone.
    """

    source: str
    tokenizer: str
    folder: str
    train_prefix: str
    validation_prefix: str | None
    train_tokens: int
    validation_tokens: int
    train_bytes: int
    validation_bytes: int
    train_documents: int
    validation_documents: int
    empty_documents: int
    examples: bool

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per UTF-8 byte of text, over both splits; turns a loss per token into one per byte."""
        return (self.train_tokens + self.validation_tokens) / (self.train_bytes + self.validation_bytes)


@dataclass(frozen=True)
class Texts:
    """Files to convert, and how.

    Attributes:
        given: a file, a folder, a glob, or a list of them; UTF-8. What files there may be: see `find_inputs`.
        tokenizer: see `load_tokenizer`.
        text_key: key of the document in a JSON line, or name of the column.
        validation_fraction: in [0, 1); share of documents, or of bytes of a plain text; 0 keeps nothing.
        examples: the lines are examples instead of documents, see `examples.example`; train.mask and validation.mask
            then tell which tokens are learned.
        argument: what messages call `given`.
    """

    given: Given
    tokenizer: Tokenizer
    text_key: str = "text"
    validation_fraction: float = 0.05
    examples: bool = False
    argument: str = "data.text"

    def identity(self, inputs: Sequence[Input]) -> dict[str, Any]:
        """What a cached conversion must agree on to be used again."""
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction must be at least 0 and below 1, got {self.validation_fraction}")
        together = hashlib.sha256()
        for source in inputs:
            together.update(json.dumps(source.identity()).encode())
        return {
            "format": _FORMAT,
            "files": len(inputs),
            "files_sha256": together.hexdigest(),
            "tokenizer": self.tokenizer.spec,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "text_key": self.text_key,
            "validation_fraction": self.validation_fraction,
            "examples": self.examples,
        }


def prepare_text(
    texts: Texts, cache_dir: str | os.PathLike[str], *, workers: int = 1, progress: bool = True
) -> PreparedText:
    """Tokenise texts once into a train and a validation set in Megatron's indexed format.

    One JSON object a line (.jsonl, .json, .ndjson) holds a document under `text_key`, blank lines are skipped; so does
    a row of a .parquet file. Any other file is one document of plain text; a byte-order mark that begins it is left
    out. Plain text and JSON lines may be compressed (.gz, .zst). The order of documents is that of the files, whatever
    the number of workers.

    Validation documents lie evenly among the others, every 20th at 0.05; of fewer, the last one is. A file of plain
    text that is alone, or of 1 MiB or more, is two documents: its end is for validation, cut at a line where that
    keeps it between half and twice its share. Each document ends with the tokenizer's end-of-document id.

    Text is tokenised in pieces of at most 256 KiB that end at a line where possible, so that a tokenizer that is not
    lossless piece by piece, such as a SentencePiece model that normalises white space, does not reproduce a longer
    document.

    The result is kept in a directory under `cache_dir`. It is found again by what `Input.identity` says of each file,
    the tokenizer's spec and vocabulary, `text_key` and `validation_fraction`. A conversion is written beside that
    directory and renamed, so an interrupted one is never taken for a finished one; the next one with the same
    arguments goes on from it on the same machine, and waits for it while it is under way.

    Args:
        cache_dir: created if missing.
        workers: processes that tokenise; see `Tokenizer.of_texts` for what more than one get of the tokenizer.
        progress: show a progress bar in bytes on stderr.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file cannot be used, or the cached conversion is damaged; names the argument, file and place.
        ImportError: a file needs pyarrow, which is not installed.
        ChildProcessError: a worker was killed.
    """
    with _named(texts.argument):
        inputs = find_inputs(texts.given)
        identity = texts.identity(inputs)
        return _prepared(texts, inputs, identity, _in_cache(inputs, identity, cache_dir), workers, progress)


def find_prepared(texts: Texts, cache_dir: str | os.PathLike[str]) -> PreparedText | None:
    """What `prepare_text` has left of the same arguments, or None; nothing is tokenised. Errors as there."""
    with _named(texts.argument):
        inputs = find_inputs(texts.given)
        directory = _in_cache(inputs, texts.identity(inputs), cache_dir)
        return load_prepared(directory) if directory.exists() else None


def prepare_folder(
    out: str | os.PathLike[str], texts: Texts, *, workers: int = 1, progress: bool = True
) -> PreparedText:
    """`prepare_text` with a result in the folder `out`: train.bin, train.idx, validation.bin, validation.idx.

    Raises:
        As `prepare_text`; FileExistsError: `out` is a file, or a folder that holds something else.
    """
    directory = Path(out).expanduser().absolute()
    if directory.exists() and not (directory / MANIFEST).is_file():
        if not directory.is_dir() or any(directory.iterdir()):
            raise FileExistsError(f"{directory}: expected a new or empty folder")
        directory.rmdir()
    with _named(texts.argument):
        for entry in [texts.given] if isinstance(texts.given, str | os.PathLike) else texts.given:
            if directory.is_relative_to(Path(entry).expanduser().absolute()):
                raise FileExistsError(f"{directory}: lies in {entry}, whose files are read; choose another folder")
        inputs = find_inputs(texts.given)
        identity = texts.identity(inputs)
        if directory.exists() and _manifest(directory)["identity"] != identity:
            raise FileExistsError(f"{directory}: holds other texts, or the same prepared in another way")
        return _prepared(texts, inputs, identity, directory, workers, progress)


def load_prepared(folder: str | os.PathLike[str]) -> PreparedText:
    """What `prepare_folder` left in a folder.

    Raises:
        ValueError: it is not there, or damaged.
    """
    directory = Path(folder).expanduser().absolute()
    manifest = _manifest(directory)
    splits = {split: manifest["splits"].get(split) for split in SPLITS}
    counts = {
        f"{split}_{name}": found[name] if found else 0
        for split, found in splits.items()
        for name in ("tokens", "bytes", "documents")
    }
    return PreparedText(
        source=manifest["source"],
        tokenizer=manifest["identity"]["tokenizer"],
        folder=str(directory),
        train_prefix=str(directory / "train"),
        validation_prefix=str(directory / "validation") if splits["validation"] else None,
        examples=manifest["identity"]["examples"],
        empty_documents=sum(found["empty_documents"] for found in splits.values() if found),
        **counts,
    )


def require_tokens(prepared: PreparedText, seq_length: int, argument: str = "data.text") -> None:
    """Check that each split holds the seq_length + 1 tokens that one training sample takes.

    With fewer, Megatron would repeat the text inside one sample without a word.

    Raises:
        ValueError: a split is too short; names the argument, seq_length and the counts.
    """
    for split, tokens in (("train", prepared.train_tokens), ("validation", prepared.validation_tokens)):
        if split == "validation" and prepared.validation_prefix is None:
            continue
        if tokens < seq_length + 1:
            remedy = " or a larger data.validation_fraction" if split == "validation" else ""
            raise ValueError(
                f"{argument}: {prepared.source} gives {tokens} {split} tokens, but seq_length {seq_length} needs at "
                f"least {seq_length + 1}; use a longer text, a smaller seq_length{remedy}"
            )


def read_text(path: str | os.PathLike[str]) -> str:
    """A text as prepare_text reads it: UTF-8, lines ending as they do, without the byte-order mark that may begin it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    raw = Path(path).expanduser().read_bytes()
    mark = mark_bytes(raw)
    try:
        return raw[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        place = mark + error.start
        raise ValueError(f"{path} is not UTF-8: byte 0x{raw[place]:02x} at byte offset {place}") from None


@contextlib.contextmanager
def _named(argument: str) -> Iterator[None]:
    """Say in what an argument's files are wrong that it is this argument's."""
    try:
        yield
    except InputError as error:
        raise ValueError(f"{argument}: {error}") from error
    except (FileNotFoundError, ImportError) as error:
        if error.args and str(error.args[0]).startswith("data."):  # of the tokenizer
            raise
        raise type(error)(f"{argument}: {error}") from error


def _in_cache(inputs: Sequence[Input], identity: dict[str, Any], cache_dir: str | os.PathLike[str]) -> Path:
    """The directory for what is made of the inputs."""
    stem = plain_stem(inputs[0].path.name) + (f"-and-{len(inputs) - 1}-more" if len(inputs) > 1 else "")
    return Path(cache_dir).expanduser().absolute() / f"{stem}-{_key(identity)}"


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _prepared(
    texts: Texts, inputs: Sequence[Input], identity: dict[str, Any], directory: Path, workers: int, progress: bool
) -> PreparedText:
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not directory.exists():
        _remove_abandoned(directory, _key(identity))
        partial, lock = _begin(directory, _key(identity))
        try:
            if not directory.exists():  # nobody else finished it meanwhile
                _fill(partial, texts, inputs, identity, workers, progress)
                _publish(partial / _DONE, directory)
            shutil.rmtree(partial, ignore_errors=True)
        except ValueError:  # of these texts nothing can be made, whereas an interrupted conversion can go on
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.close()
    if _manifest(directory)["identity"] != identity:
        raise ValueError(_damaged(directory, f"{MANIFEST} describes another text"))
    return load_prepared(directory)


def _fill(
    partial: Path, texts: Texts, inputs: Sequence[Input], identity: dict[str, Any], workers: int, progress: bool
) -> None:
    done = partial / _DONE
    done.mkdir(exist_ok=True)
    splits = convert(
        inputs,
        texts.tokenizer,
        done,
        partial,
        text_key=texts.text_key,
        validation_fraction=texts.validation_fraction,
        examples=texts.examples,
        workers=min(workers, 1 + sum(source.size for source in inputs) // _BYTES_PER_WORKER),
        progress=progress,
    )
    for source in inputs:
        if not source.path.is_file() or source.path.stat().st_size != source.size:
            raise InputError(f"{source.path} changed while it was being read; run again")
    if texts.identity(inputs) != identity:
        raise InputError(f"{title(inputs)} changed while it was being read; run again")
    files = {file.name: file.stat().st_size for file in done.iterdir() if file.name != MANIFEST}
    manifest = {"identity": identity, "source": title(inputs), "splits": splits, "files": files}
    (done / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _begin(directory: Path, key: str) -> tuple[Path, IO[str]]:
    """The folder for what becomes `directory`, which this process alone writes to until it closes the lock.

    Of this machine: there is storage that shows the locks of others as free.
    """
    host = re.sub(r"[^\w.-]", "_", socket.gethostname())
    partial = directory.parent / f"{_PARTIAL}{directory.name.removesuffix(f'-{key}')}-{key}-{host}"
    waited = False
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            lock = (partial / _LOCK).open("a+")
        except FileNotFoundError:
            continue  # who held it has just removed it
        try:
            if not waited:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                fcntl.flock(lock, fcntl.LOCK_EX)
        except BlockingIOError:
            logger.info("waiting for another process of this machine, which prepares %s", directory)
            waited = True
            lock.close()
            continue
        except OSError:  # storage without locks: a folder of one's own, which nobody goes on from
            lock.close()
            partial = partial.with_name(f"{partial.name}-{uuid.uuid4().hex}")
            partial.mkdir()
            return partial, (partial / _LOCK).open("w")
        if (partial / _LOCK).exists() and os.path.samestat(os.fstat(lock.fileno()), (partial / _LOCK).stat()):
            return partial, lock
        lock.close()  # removed while this process waited


def _remove_abandoned(directory: Path, key: str) -> None:
    """Remove interrupted conversions of this machine of earlier forms of these texts: nobody holds their locks."""
    host = re.sub(r"[^\w.-]", "_", socket.gethostname())
    name = re.escape(directory.name.removesuffix(f"-{key}"))
    for left in directory.parent.glob(f"{_PARTIAL}*"):
        found = re.fullmatch(rf"{re.escape(_PARTIAL)}{name}-([0-9a-f]{{16}})-{re.escape(host)}", left.name)
        if found is None or found[1] == key:
            continue
        try:
            with (left / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue  # it goes on, or has just been finished, or locks do not work there


def _publish(done: Path, directory: Path) -> None:
    try:
        done.rename(directory)
    except OSError:
        # A directory that holds files is not replaced: another process finished the same conversion first.
        if not (directory / MANIFEST).is_file():
            raise
        logger.info("another process prepared %s first; using its files", directory)


def _manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished conversion whose files are whole."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        for name, size in manifest["files"].items():
            found = (directory / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes, not {size}")
        if manifest["identity"]["format"] != _FORMAT:
            raise ValueError(f"format {manifest['identity']['format']}, not {_FORMAT}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(_damaged(directory, str(error))) from error


def _damaged(directory: Path, reason: str) -> str:
    return f"the prepared text in {directory} is damaged ({reason}); delete it and run again"
