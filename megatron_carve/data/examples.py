"""Examples to fine-tune with: what is given, and what is to be learned of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from megatron_carve.data.inputs import InputError
from megatron_carve.data.records import characters
from megatron_carve.data.tokenizer import Tokenizer

_ROLE = "assistant"


class Example(NamedTuple):
    """Tokens of an example.

    Attributes:
        ids: int32 [num_tokens], the end of document included.
        learned: 1 for those that the loss is of, uint8 [num_tokens].
        text_bytes: UTF-8 bytes of prompt and completion, or of the messages as the template has them.
    """

    ids: np.ndarray
    learned: np.ndarray
    text_bytes: int


def example(record: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> Example:
    """The tokens of {"prompt": TEXT, "completion": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}.

    Prompt and completion are tokenised each by itself, as in generation; the completion and the end of document are
    learned. Messages are written by the tokenizer's chat template, whose control tokens count as such; what it writes
    for messages of the assistant is learned, and the end of document, if the assistant has the last word.

    Args:
        where: the place of the record, for messages.

    Raises:
        InputError: the record is neither; names the place.
        ValueError: the tokenizer has no chat template.
    """
    if "messages" in record:
        text, spans = _chat(record["messages"], tokenizer, where)
        ids, begins = tokenizer.encode_template(text)
        learned = np.zeros(ids.size, dtype=np.uint8)
        for begin, end in spans:
            learned[(begins >= begin) & (begins < end)] = 1
        if ids.size and ids[-1] == tokenizer.eod:
            return Example(ids, learned, len(text.encode("utf-8")))
        return _ended(ids, learned, tokenizer, len(text.encode("utf-8")), spans[-1][1] == len(text))
    missing = [key for key in ("prompt", "completion") if key not in record]
    if missing:
        found = ", ".join(map(repr, record)) or "none"
        raise InputError(f"{where} has no key {missing[0]!r}, nor 'messages'; found: {found}")
    prompt, completion = (characters(record[key], where, key) for key in ("prompt", "completion"))
    parts = [tokenizer.encode(prompt), tokenizer.encode(completion)]
    learned = np.repeat(np.array([0, 1], dtype=np.uint8), [part.size for part in parts])
    return _ended(np.concatenate(parts), learned, tokenizer, len((prompt + completion).encode("utf-8")), True)


def _ended(ids: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer, text_bytes: int, learns_end: bool) -> Example:
    ids = np.append(ids, np.int32(tokenizer.eod))
    return Example(ids, np.append(learned, np.uint8(learns_end)), text_bytes)


def _chat(messages: Any, tokenizer: Tokenizer, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where in it the assistant speaks."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: 'messages' must be a list of messages, got {messages!r:.60}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: message {number} must have a role and a content, got {message!r:.60}")
        characters(message.get("content"), f"{where}: message {number}", "content")
    spans = []
    whole = _written(messages, tokenizer, where)
    for number, message in enumerate(messages):
        if message["role"] == _ROLE:
            before = _written(messages[:number], tokenizer, where, asks=True) if number else ""
            after = whole if number + 1 == len(messages) else _written(messages[: number + 1], tokenizer, where)
            if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
                raise InputError(
                    f"{where}: the chat template writes message {number + 1} differently by what follows it, so that "
                    "its tokens cannot be told apart"
                )
            spans.append((len(before), len(after)))
    if not spans:
        raise InputError(f"{where}: none of the messages has the role {_ROLE!r}, of which the loss is")
    return whole, spans


def _written(messages: list[Any], tokenizer: Tokenizer, where: str, *, asks: bool = False) -> str:
    try:
        return tokenizer.chat_text(messages, asks=asks)
    except ValueError as error:
        if str(error).startswith("data.tokenizer"):
            raise
        raise InputError(f"{where}: the chat template refuses the messages: {error}") from error
