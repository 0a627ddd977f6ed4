"""Inputs cut into blocks of about 256 KiB, which a process can tokenise by itself.

Where a block begins and ends depends on the text alone, so that tokens do not depend on who tokenises which block, nor
on where an interrupted conversion went on.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_carve.data.inputs import Input, InputError, TextStream, require_arrow
from megatron_carve.data.records import json_text, utf8

BLOCK_BYTES = 1 << 18
"""Text that is tokenised in one piece; longer documents are cut, at a line where possible."""
MAX_DOCUMENT_BYTES = 1 << 28
"""Of one line of JSON or one value of Parquet, which are held whole in memory."""
_CUT_FILE_BYTES = 1 << 20  # plain text files of this size give their end to validation, smaller ones are not cut
_ROWS = 256  # of Parquet, at most, that are decoded at once


class Place(NamedTuple):
    """Where to go on reading.

    Attributes:
        input: number of the input.
        offset: bytes of its text before this place; of Parquet, rows.
        number: lines of it before this place.
        documents: documents of all inputs before this place.
    """

    input: int = 0
    offset: int = 0
    number: int = 0
    documents: int = 0


class Block(NamedTuple):
    """A stretch of text on its way to the tokenizer.

    Attributes:
        form: "lines" of JSON, whole ones; "rows", the texts of whole documents one after the other; "piece" of a single
            document.
        data: UTF-8.
        begins: where it begins; `documents` counts from there.
        bounds: of "rows", where each begins in `data` and the last ends, int64 [rows + 1].
        validation: of a "piece", whether it is for validation.
        ends: of a "piece", whether its document ends with it.
        after: where to go on behind it; None in the midst of a document that is read again from its beginning.
        on_disk: bytes of all files read so far, for showing progress.
    """

    form: Literal["lines", "rows", "piece"]
    data: bytes
    begins: Place
    bounds: np.ndarray | None = None
    validation: bool = False
    ends: bool = False
    after: Place | None = None
    on_disk: int = 0


def is_validation(document: int, fraction: float) -> bool:
    """Whether the document of this number (from 0) is for validation: they lie evenly among the others."""
    return math.floor((document + 1) * fraction) > math.floor(document * fraction)


def read_blocks(
    inputs: Sequence[Input], begin: Place, *, text_key: str, validation_fraction: float, examples: bool = False
) -> Iterator[Block]:
    """The blocks of all inputs in order, from `begin` on.

    Args:
        examples: lines are not documents, and never cut.

    Raises:
        InputError: a file that cannot be read; what is wrong inside a block is found by who tokenises it.
    """
    for source in inputs:
        if examples and source.form != "lines":
            raise InputError(f"{source.path} is not JSON lines, in which examples are given")
    before = sum(source.size for source in inputs[: begin.input])
    for index in range(begin.input, len(inputs)):
        source, place = inputs[index], begin if index == begin.input else Place(index, documents=begin.documents)
        if source.form == "text":
            alone_or_large = len(inputs) == 1 or source.size >= _CUT_FILE_BYTES
            blocks = _text_blocks(
                source, place, validation_fraction, cut_end=alone_or_large and validation_fraction > 0
            )
        elif source.form == "lines":
            blocks = _line_blocks(source, place, None if examples else text_key, validation_fraction)
        else:
            blocks = _row_blocks(source, place, text_key, validation_fraction)
        for block in blocks:
            begin = block.after or begin
            yield block._replace(on_disk=before + block.on_disk)
        before += source.size


def window(data: bytes | bytearray | memoryview, limit: int) -> int:
    """Where to cut text of more than `limit` bytes: behind a line, or before a space, or else between characters."""
    head = bytes(data[:limit])
    return head.rfind(b"\n") + 1 or max(head.rfind(b" "), 0) or whole_characters(head) or limit


def whole_characters(raw: bytes) -> int:
    """Length of `raw` without an incomplete UTF-8 character at its end."""
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        if byte & 0xC0 != 0x80:
            width = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(raw) - back if width > back else len(raw)
    return len(raw)  # not UTF-8: left for the decoder, which names the offset


def mark_bytes(raw: bytes) -> int:
    """Length of the byte-order mark that a file's first bytes begin with."""
    return len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0


def changed(source: Input) -> InputError:
    return InputError(f"{source.path} changed while it was being read; run again")


def _text_blocks(source: Input, place: Place, fraction: float, *, cut_end: bool) -> Iterator[Block]:
    """A plain text file as one document, or as two: its end is for validation."""
    size: int | None = None
    cut = 0
    if cut_end:
        size = _length(source)
        cut = _validation_cut(source, size, fraction)
    with TextStream(source) as stream:
        stream.skip_to(place.offset)
        raw, offset = b"", place.offset
        over = False
        while not over:
            validation = offset >= cut if cut_end else is_validation(place.documents, fraction)
            end = None if size is None else size if validation else cut  # of this document
            # One byte more than a block tells whether a text of unknown length goes on.
            wanted = BLOCK_BYTES + 1 if end is None else min(BLOCK_BYTES + 1, end - offset)
            raw += stream.read(wanted - len(raw))
            if end is not None and len(raw) < wanted:
                raise changed(source)
            ends = len(raw) <= BLOCK_BYTES
            mark = mark_bytes(raw) if offset == 0 else 0
            length = len(raw) if ends else window(raw, BLOCK_BYTES)
            over = ends and end == size
            behind = place._replace(offset=offset + length)
            yield Block(
                "piece",
                raw[mark:length],
                place._replace(offset=offset + mark),
                validation=validation,
                ends=ends,
                after=Place(place.input + 1, documents=place.documents + 1) if over else behind,
                on_disk=stream.on_disk,
            )
            raw, offset = raw[length:], offset + length


def _length(source: Input) -> int:
    """Bytes of text; of a compressed file, by reading it."""
    if source.compression is None:
        return source.path.stat().st_size
    with TextStream(source) as stream:
        while stream.read(1 << 20):
            pass
        return stream.offset


def _validation_cut(source: Input, size: int, fraction: float) -> int:
    """Byte offset at which validation begins: the line nearest its share, else the nearest character."""
    share = max(1, round(size * fraction))
    wanted = size - share
    # Four bytes at least, so that a character that straddles the cut is seen.
    low = max(0, wanted - min(max(share, 4), BLOCK_BYTES))
    with TextStream(source) as stream:
        stream.skip_to(low)
        around = stream.read(wanted - low + min(share // 2, BLOCK_BYTES))
    middle = wanted - low
    lines = [low + at + 1 for at in (around.rfind(b"\n", 0, middle), around.find(b"\n", middle)) if at >= 0]
    lines = [at for at in lines if 0 < at < size]
    cut = min(lines, key=lambda at: abs(at - wanted)) if lines else low + whole_characters(around[:middle])
    if not 0 < cut < size:
        raise InputError(f"{source.path} is too short ({size} bytes) to split into train and validation")
    return cut


def _line_blocks(source: Input, place: Place, text_key: str | None, fraction: float) -> Iterator[Block]:
    """Whole lines; where they hold documents, a line that is longer than a block as the pieces of its document."""
    with TextStream(source) as stream:
        stream.skip_to(place.offset)
        for raw in _whole_lines(stream, source, place):
            if place.offset == 0 and (mark := mark_bytes(raw)):
                raw, place = raw[mark:], place._replace(offset=mark)
            for data in [raw] if len(raw) <= 2 * BLOCK_BYTES else _long_lines_apart(raw):
                lines = data.count(b"\n") + (not data.endswith(b"\n"))
                after = Place(place.input, place.offset + len(data), place.number + lines, place.documents + lines)
                if text_key is not None and lines == 1 and len(data) > BLOCK_BYTES and data.strip():
                    text = json_text(data, text_key, str(source.path), place.number + 1, place.offset).encode("utf-8")
                    yield from _pieces(text, place, after, stream.on_disk, fraction)
                else:
                    yield Block("lines", data, place, after=after, on_disk=stream.on_disk)
                place = after
        yield Block("lines", b"", place, after=Place(place.input + 1, documents=place.documents), on_disk=source.size)


def _whole_lines(stream: TextStream, source: Input, place: Place) -> Iterator[bytes]:
    """Stretches of whole lines, each as short as it can be above BLOCK_BYTES."""
    held, lines = bytearray(), place.number
    while part := stream.read(BLOCK_BYTES):
        end = part.rfind(b"\n") + 1
        held += part[:end] if end else part
        if end:
            lines += held.count(b"\n")
            yield bytes(held)
            held = bytearray(part[end:])
        elif len(held) > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{source.path} line {lines + 1} is longer than {MAX_DOCUMENT_BYTES} bytes; "
                "one JSON object per line is expected"
            )
    if held:
        yield bytes(held)


def _long_lines_apart(raw: bytes) -> Iterator[bytes]:
    """The lines of more than BLOCK_BYTES by themselves, and the stretches between them."""
    begin = at = 0
    while at < len(raw):
        end = raw.find(b"\n", at) + 1 or len(raw)
        if end - at > BLOCK_BYTES:
            if at > begin:
                yield raw[begin:at]
            yield raw[at:end]
            begin = end
        at = end
    if begin < len(raw):
        yield raw[begin:]


def _pieces(text: bytes, begins: Place, after: Place, on_disk: int, fraction: float) -> Iterator[Block]:
    """A long document, all pieces but the last of which are read again if a conversion is interrupted there."""
    validation, at = is_validation(begins.documents, fraction), 0
    rest = memoryview(text)
    while len(rest) - at > BLOCK_BYTES:
        length = window(rest[at : at + BLOCK_BYTES], BLOCK_BYTES)
        yield Block("piece", bytes(rest[at : at + length]), begins, validation=validation, on_disk=on_disk)
        at += length
    yield Block("piece", bytes(rest[at:]), begins, validation=validation, ends=True, after=after, on_disk=on_disk)


def _row_blocks(source: Input, place: Place, text_key: str, fraction: float) -> Iterator[Block]:
    """The rows of a Parquet file, row group by row group, page by page."""
    arrow = require_arrow(source.path)
    file = _parquet(source, text_key)
    first = 0
    with file:
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > place.offset:
                try:
                    at = first
                    for batch in _batches(file, group, text_key):
                        skip = max(0, min(place.offset - at, len(batch)))
                        at += len(batch)
                        if skip == len(batch):
                            continue
                        column = batch.column(0).cast(arrow.large_string())[skip:]
                        on_disk = int(source.size * at / file.metadata.num_rows)
                        for block in _column_blocks(column, place, source, text_key, fraction, on_disk):
                            yield block
                            place = block.after or place
                except (arrow.ArrowException, OSError) as error:
                    reason = " ".join(str(error).split())
                    raise InputError(f"{source.path} row group {group + 1} cannot be read: {reason}") from error
            first += rows
    yield Block("lines", b"", place, after=Place(place.input + 1, documents=place.documents), on_disk=source.size)


def _parquet(source: Input, text_key: str) -> Any:
    arrow = require_arrow(source.path)
    from pyarrow import parquet

    try:
        # Without pre_buffer and with a buffer, a row group is read page by page.
        file = parquet.ParquetFile(source.path, pre_buffer=False, buffer_size=1 << 20)
        schema = file.schema_arrow
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{source.path} is not a whole Parquet file: {' '.join(str(error).split())}") from error
    if text_key not in schema.names:
        found = ", ".join(map(repr, schema.names)) or "none"
        raise InputError(f"{source.path} has no column {text_key!r} (text_key); found: {found}")
    kind = schema.field(text_key).type
    texts = (arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_string_view)
    value = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if not any(is_text(value) for is_text in texts):
        raise InputError(f"{source.path}: the column {text_key!r} must hold strings, got {kind}")
    return file


def _batches(file: Any, group: int, text_key: str) -> Iterator[Any]:
    """Batches of rows, a few blocks each if the row group's texts are alike."""
    metadata = file.metadata.row_group(group)
    rows = max(1, min(_ROWS, metadata.num_rows * 4 * BLOCK_BYTES // max(1, metadata.total_byte_size)))
    return file.iter_batches(batch_size=rows, row_groups=[group], columns=[text_key], use_threads=False)


def _column_blocks(
    column: Any, place: Place, source: Input, text_key: str, fraction: float, on_disk: int
) -> Iterator[Block]:
    """Blocks of a large_string array, which begins at `place`."""
    rows = len(column)
    if column.null_count:
        null = column.is_null().to_numpy(zero_copy_only=False).argmax()
        raise InputError(f"{source.path} row {place.offset + int(null) + 1}: {text_key!r} must be a string, got null")
    _, bounds_buffer, data_buffer = column.buffers()
    bounds = np.frombuffer(bounds_buffer, dtype=np.int64)[column.offset : column.offset + rows + 1]
    data = memoryview(data_buffer) if data_buffer is not None else memoryview(b"")
    row = 0
    while row < rows:
        begin = int(bounds[row])
        # As many rows as a block holds, and one that is longer by itself.
        last = max(row + 1, int(np.searchsorted(bounds, begin + BLOCK_BYTES, side="right")) - 1)
        count, text = last - row, data[begin : int(bounds[last])]
        after = Place(place.input, place.offset + count, place.number + count, place.documents + count)
        if len(text) > MAX_DOCUMENT_BYTES:
            raise InputError(f"{source.path} row {place.offset + 1} is longer than {MAX_DOCUMENT_BYTES} bytes")
        if len(text) > BLOCK_BYTES:
            utf8(bytes(text), str(source.path), 0, f" of row {place.offset + 1}")
            yield from _pieces(bytes(text), place, after, on_disk, fraction)
        else:
            yield Block("rows", bytes(text), place, bounds=bounds[row : last + 1] - begin, after=after, on_disk=on_disk)
        row, place = last, after
