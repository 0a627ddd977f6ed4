"""The files that a text is made of: found, in order, told apart by their names, and opened."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, cast

_COMPRESSIONS: dict[str, Literal["gzip", "zstd"]] = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_FORMS: dict[str, Literal["lines", "rows"]] = {
    ".json": "lines",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".parquet": "rows",
}
_EDGE_BYTES = 1 << 16

type Given = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A file, a folder, a glob, or a list of them."""


class InputError(ValueError):
    """A file that cannot be used; the message begins with its path and names the place in it."""


@dataclass(frozen=True)
class Input:
    """A file of texts.

    Attributes:
        path: absolute.
        form: "text", one document; "lines", one JSON object a line; "rows" of a Parquet file.
        compression: "gzip", "zstd" or None.
        size: bytes on disk.
    """

    path: Path
    form: Literal["text", "lines", "rows"]
    compression: Literal["gzip", "zstd"] | None
    size: int

    def identity(self) -> list[Any]:
        """What tells whether the file has changed: path, size, time in ns, SHA-256 of its first and last 64 KiB.

        Size and time change with every ordinary write, the two ends tell apart files that a copying tool gave the same
        time; hashing the whole of a large file would cost about as much as converting it.
        """
        with open(self.path, "rb") as stream:
            stat = os.fstat(stream.fileno())
            edges = hashlib.sha256(stream.read(_EDGE_BYTES))
            stream.seek(max(0, stat.st_size - _EDGE_BYTES))
            edges.update(stream.read(_EDGE_BYTES))
        return [str(self.path), stat.st_size, stat.st_mtime_ns, edges.hexdigest()]


def find_inputs(given: Given) -> list[Input]:
    """The files that `given` names, in its order; those of a folder or a glob by name.

    A folder gives all files in it and its subfolders but those whose names begin with "." or "_", which tools leave
    beside data. A glob knows `**`.

    Raises:
        FileNotFoundError, InputError: nothing is there, or what is there is no file of texts.
    """
    entries = [given] if isinstance(given, str | os.PathLike) else list(given)
    if not entries:
        raise InputError("expected at least one file, got an empty list")
    paths = [path for entry in entries for path in _files(os.path.expanduser(entry))]
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise InputError(f"{path} is given twice")
        seen.add(path)
    return [_input(path) for path in paths]


def title(inputs: Sequence[Input]) -> str:
    """The inputs in a few words: the only one's path, or the first's and how many more there are."""
    more = len(inputs) - 1
    return f"{inputs[0].path}" + (f" and {more} more" if more else "")


def plain_stem(name: str) -> str:
    """A file's name without the endings of its compression and form."""
    path = Path(name)
    return Path(path.stem).stem if path.suffix.lower() in _COMPRESSIONS else path.stem


class TextStream:
    """A file's bytes, decompressed, read once from its beginning.

    Errors of damaged files are InputErrors that name them.
    """

    def __init__(self, source: Input) -> None:
        self._source = source
        self._raw = open(source.path, "rb")  # noqa: SIM115 closed by __exit__
        self._stream: BinaryIO = self._raw
        self.offset = 0
        """Bytes of text read so far."""
        if source.compression == "gzip":
            self._stream = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw))
        elif source.compression == "zstd":
            arrow = require_arrow(source.path)
            self._stream = cast(BinaryIO, arrow.CompressedInputStream(arrow.PythonFile(self._raw, mode="r"), "zstd"))

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()
        self._raw.close()

    @property
    def on_disk(self) -> int:
        """Bytes of the file read so far, for showing progress."""
        return self._raw.tell() if not self._raw.closed else self._source.size

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end."""
        parts = []
        while count > 0:
            try:
                part = self._stream.read(count)
            except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
                if self._source.compression is None:
                    raise
                raise InputError(
                    f"{self._source.path} cannot be decompressed after {self.offset} bytes of text: {error}"
                ) from error
            if not part:
                break
            parts.append(part)
            self.offset += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip_to(self, offset: int) -> None:
        """Go on at a byte of the text that is not before the present one."""
        if self._source.compression is None:
            self.offset = self._raw.seek(offset)
            return
        while self.offset < offset and self.read(min(1 << 20, offset - self.offset)):
            pass


def require_arrow(path: Path) -> ModuleType:
    """pyarrow, which reads Parquet and zstd.

    Raises:
        ImportError: it is not installed; names the file that needs it and the remedy.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(f'{path} needs pyarrow ({error}); run: pip install "megatron-carve[prepare]"') from error
    return pyarrow


def _files(entry: str) -> list[Path]:
    path = Path(os.path.abspath(entry))  # links keep their names, which say what they lead to
    if path.is_dir():
        found = [
            file
            for file in path.rglob("*")
            if not any(part[0] in "._" for part in file.relative_to(path).parts) and file.is_file()
        ]
        if not found:
            raise InputError(f"{path} is a folder without files")
        return sorted(found, key=str)
    if path.exists() or not glob.has_magic(entry):
        return [path]
    matches = sorted(Path(os.path.abspath(name)) for name in glob.glob(entry, recursive=True) if os.path.isfile(name))
    if not matches:
        raise FileNotFoundError(f"{entry} matches no file")
    return matches


def _input(path: Path) -> Input:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a regular file")
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path} is empty")
    compression = _COMPRESSIONS.get(path.suffix.lower())
    name = path.stem if compression else path.name
    form: Literal["text", "lines", "rows"] = _FORMS.get(Path(name).suffix.lower(), "text")
    if form == "rows" and compression is not None:
        raise InputError(f"{path} is a Parquet file in {compression}, which is not read; decompress it")
    return Input(path, form, compression, size)
