"""The text in a line of JSON."""

from __future__ import annotations

import json
from typing import Any

from megatron_carve.data.inputs import InputError


def utf8(raw: bytes, name: str, offset: int, where: str = "") -> str:
    """Decode bytes of the file `name`, of which they begin at `offset`.

    Raises:
        InputError: they are not UTF-8; names the byte and its place.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8: byte 0x{raw[error.start]:02x} at byte offset {offset + error.start}{where}"
        ) from error


def json_record(line: bytes, name: str, number: int, offset: int) -> dict[str, Any]:
    """The JSON object in a line.

    Args:
        name: of the file, for messages.
        number: of the line, from 1.
        offset: byte offset of the line in its file.

    Raises:
        InputError: it is not one.
    """
    decoded = utf8(line, name, offset, f" (line {number})")
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise InputError(f"{name} line {number} is not JSON ({error}); one JSON object per line is expected") from error
    if not isinstance(record, dict):
        raise InputError(
            f"{name} line {number} is a JSON {type(record).__name__}; one JSON object per line is expected"
        )
    return record


def json_text(line: bytes, text_key: str, name: str, number: int, offset: int) -> str:
    """The text under `text_key` of the JSON object in a line; arguments and errors as for `json_record`."""
    record = json_record(line, name, number, offset)
    if text_key not in record:
        found = ", ".join(repr(key) for key in record) or "none"
        raise InputError(f"{name} line {number} has no key {text_key!r} (text_key); found: {found}")
    return characters(record[text_key], f"{name} line {number}", text_key)


def characters(value: Any, where: str, key: str) -> str:
    """`value` if it is a text that can be encoded.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} must be a string, got {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{where} escapes half of a surrogate pair, which is not a character") from error
    return value
