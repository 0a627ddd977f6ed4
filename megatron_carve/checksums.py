"""Checksums of files: CRC-32 of every block, by several threads; and texts that carry their own.

They tell damage by accident. One who changes a file on purpose can change its checksum too.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

# Of all files in a folder, but this one; while a checkpoint is written, each process has a list of its own.
LIST = "checksums.txt"
OF_A_PROCESS = ".checksums_{}.txt"
BLOCK_BYTES = 4 * 1024**2
MOST_THREADS = 8
SEAL = "; crc32 of this and what follows: "


class Damaged(ValueError):
    """A file is not as it was written; the message names it."""


def seal(title: str, text: str) -> str:
    """The text below a line of comment that has the checksum of both."""
    return f"# {title}{SEAL}{zlib.crc32(f'# {title}{text}'.encode()):08x}\n{text}"


def unseal(sealed: str, name: str) -> str:
    """The text of `seal`.

    Raises:
        Damaged: a byte of text or seal is another one, or missing.
    """
    head, _, text = sealed.partition("\n")
    title, _, crc = head.rpartition(SEAL)
    if crc != f"{zlib.crc32((title + text).encode()):08x}":
        raise Damaged(f"{name} is damaged")
    return text


def write_list(folder: Path, names: Iterable[str], place: str = LIST, others: Mapping[str, Any] | None = None) -> None:
    """Write checksums of files of a folder, whole or not at all.

    Args:
        names: of the files, which are read.
        place: name of the list.
        others: more files, as read_list returns them.
    """
    files = {**(others or {}), **{name: {"bytes": (folder / name).stat().st_size} for name in names}}
    todo = {name: about for name, about in files.items() if "crc32" not in about}
    parts = [(name, block) for name, about in todo.items() for block in range(_blocks(about["bytes"]))]
    for about in todo.values():
        about["crc32"] = []
    for (name, _), found in zip(parts, _in_threads(lambda part: _crc(folder / part[0], part[1]), parts), strict=True):
        todo[name]["crc32"].append(found)
    partial = folder / f"{place}.partial"
    text = json.dumps({"block_bytes": BLOCK_BYTES, "files": dict(sorted(files.items()))}, indent=0)
    partial.write_text(seal("Files of this folder", text + "\n"))
    partial.replace(folder / place)


def read_list(folder: Path, place: str = LIST) -> dict[str, Any] | None:
    """For every file in a folder's list its length and checksums; None where there is no list.

    Raises:
        Damaged: the list itself.
    """
    try:
        text = (folder / place).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    return json.loads(unseal(text, place))["files"]


def check(
    folder: Path, files: Mapping[str, Any], wanted: Mapping[str, Sequence[tuple[int, int]] | None],
    share: tuple[int, int] = (0, 1), stop: Event | None = None,
) -> None:  # fmt: skip
    """Compare files with their checksums.

    Args:
        files: as read_list returns them.
        wanted: files by name, and the ranges of bytes that count; None for all of them. Whole blocks are compared.
        share: (i, n) compares the i-th of n parts, so that n processes do all of it together.
        stop: leave off, once it is set.

    Raises:
        Damaged: see there. The first that is found, in the order of `wanted`.
    """
    parts = []
    for name, ranges in wanted.items():
        if name not in files:
            raise Damaged(f"{name} is not in {LIST}")
        path, length = folder / name, files[name]["bytes"]
        actual = path.stat().st_size if path.is_file() else None
        if actual != length:
            state = "missing" if actual is None else f"of {actual} bytes instead of {length}"
            raise Damaged(f"{name} is {state}")
        blocks = range(_blocks(length)) if ranges is None else sorted(set(_touched(ranges)))
        parts += [(name, block) for block in blocks]
    mine = parts[share[0] :: share[1]]
    for (name, block), found in zip(mine, _in_threads(lambda part: _crc(folder / part[0], part[1]), mine), strict=True):
        if stop is not None and stop.is_set():
            return
        if files[name]["crc32"][block] != found:
            raise Damaged(f"{name} is damaged: its checksum is another after byte {block * BLOCK_BYTES}")


def _blocks(length: int) -> int:
    return -(-length // BLOCK_BYTES)


def _touched(ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
    for start, end in ranges:
        yield from range(start // BLOCK_BYTES, _blocks(end))


def _crc(path: Path, block: int) -> str:
    with path.open("rb", buffering=0) as file:
        file.seek(block * BLOCK_BYTES)
        return f"{zlib.crc32(_read(file, BLOCK_BYTES)):08x}"


def _read(file: Any, count: int) -> bytes:
    """A single read of an unbuffered file may bring less, as on network storage."""
    data = file.read(count)
    while data and len(data) < count and (more := file.read(count - len(data))):
        data += more
    return data


def _in_threads[T, R](work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """As map, by as many threads as this process has cores to itself; reading and CRC-32 let go of the interpreter."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // processes, len(items)))
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, items)
