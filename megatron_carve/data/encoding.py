"""Blocks of text to tokens, in this process or in others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from megatron_carve.data.blocks import Block, is_validation
from megatron_carve.data.examples import Example, example
from megatron_carve.data.inputs import InputError
from megatron_carve.data.records import json_record, json_text, utf8
from megatron_carve.data.tokenizer import Tokenizer
from megatron_carve.processes import end_with_parent

# Blocks that are read ahead of the one that is written, for each process.
_AHEAD = 4


class Tokens(NamedTuple):
    """Tokens of one split.

    Attributes:
        ids: of all documents, one after the other, [num_tokens], in the dtype of the files.
        lengths: tokens of each document that has any, its end included, int64 [documents].
        text_bytes: UTF-8 bytes behind them.
        empty: documents that have none.
        last_bytes: of text, in the last document that has tokens.
        learned: of examples, which ids the loss is of, uint8 [num_tokens]; None for texts.
    """

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    empty: int
    last_bytes: int
    learned: np.ndarray | None = None


@dataclass(frozen=True)
class Encoder:
    """What makes tokens of a block.

    Attributes:
        tokenizer: see `load_tokenizer`.
        names: of the inputs, for messages.
        text_key: key of the document in a JSON line.
        validation_fraction: share of documents for validation, in [0, 1).
        examples: lines are examples with a prompt and a completion, or messages, instead of documents.
    """

    tokenizer: Tokenizer
    names: Sequence[str]
    text_key: str
    validation_fraction: float
    examples: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process, an encoder takes no more of its tokenizer along than it needs there."""
        tokenizer = self.tokenizer if self.examples else self.tokenizer.of_texts
        return Encoder, (tokenizer, self.names, self.text_key, self.validation_fraction, self.examples)

    def encode(self, block: Block) -> tuple[Tokens, Tokens]:
        """(train, validation) tokens of a block; those of a "piece" without an end-of-document id.

        Raises:
            InputError: the first line or row that is not what it should be.
            ValueError: the tokenizer gave an id outside its vocabulary.
        """
        name, at = self.names[block.begins.input], block.begins
        if block.form == "piece":
            ids = self._ids(utf8(block.data, name, at.offset))
            found = Tokens(ids.astype(self.dtype), np.array([ids.size]), len(block.data), 0, len(block.data))
            return (self._none(), found) if block.validation else (found, self._none())
        if self.examples:
            return self._split(at.documents, self._example_lines(block, name), self._examples)
        texts = self._lines(block, name) if block.form == "lines" else self._rows(block, name)
        return self._split(at.documents, texts, self._documents)

    def _split[T](
        self, before: int, found: Iterator[tuple[int, T]], tokens: Callable[[Sequence[T]], Tokens]
    ) -> tuple[Tokens, Tokens]:
        """Tokens of what is found, with its number in the block, for train and for validation."""
        parts: tuple[list[T], list[T]] = ([], [])
        for number, document in found:
            parts[is_validation(before + number, self.validation_fraction)].append(document)
        return tokens(parts[0]), tokens(parts[1])

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        return token_dtype(self.tokenizer.vocab_size)

    def _lines(self, block: Block, name: str) -> Iterator[tuple[int, str]]:
        offset = block.begins.offset
        for number, line in enumerate(block.data.split(b"\n")):
            if line.strip():
                yield number, json_text(line, self.text_key, name, block.begins.number + number + 1, offset)
            offset += len(line) + 1

    def _example_lines(self, block: Block, name: str) -> Iterator[tuple[int, Example]]:
        offset = block.begins.offset
        for number, line in enumerate(block.data.split(b"\n")):
            if line.strip():
                place = block.begins.number + number + 1
                record = json_record(line, name, place, offset)
                yield number, example(record, self.tokenizer, f"{name} line {place}")
            offset += len(line) + 1

    def _examples(self, examples: Sequence[Example]) -> Tokens:
        none = self._none()
        return Tokens(
            np.concatenate([none.ids, *[self._known(found.ids) for found in examples]]).astype(self.dtype),
            np.array([found.ids.size for found in examples], dtype=np.int64),
            sum(found.text_bytes for found in examples),
            0,
            examples[-1].text_bytes if examples else 0,
            np.concatenate([np.empty(0, np.uint8), *[found.learned for found in examples]]),
        )

    def _rows(self, block: Block, name: str) -> Iterator[tuple[int, str]]:
        assert block.bounds is not None
        bounds = block.bounds.tolist()
        for row, (begin, end) in enumerate(pairwise(bounds)):
            yield row, utf8(block.data[begin:end], name, 0, f" of row {block.begins.offset + row + 1}")

    def _documents(self, texts: Sequence[str]) -> Tokens:
        if not texts:
            return self._none()
        end = np.array([self.tokenizer.eod])
        parts, lengths, text_bytes, last_bytes = [], [], 0, 0
        for text in texts:
            ids = self._ids(text)
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
            text_bytes += size
            if ids.size:
                parts += [ids, end]
                lengths.append(ids.size + 1)
                last_bytes = size
        ids = np.concatenate(parts).astype(self.dtype) if parts else self._none().ids
        return Tokens(ids, np.array(lengths, dtype=np.int64), text_bytes, len(texts) - len(lengths), last_bytes)

    def _ids(self, text: str) -> np.ndarray:
        return self._known(self.tokenizer.encode(text))

    def _known(self, ids: np.ndarray) -> np.ndarray:
        tokenizer = self.tokenizer
        if ids.size and not (ids.min() >= 0 and ids.max() < tokenizer.vocab_size):
            raise ValueError(
                f"data.tokenizer: {tokenizer.spec!r} gave an id outside its vocabulary of {tokenizer.vocab_size}"
            )
        return ids

    def _none(self) -> Tokens:
        return Tokens(np.empty(0, self.dtype), np.empty(0, np.int64), 0, 0, 0)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The dtype in which Megatron keeps ids of such a vocabulary."""
    return np.uint16 if vocab_size < 65500 else np.int32


type Encode = Callable[[Iterator[Block]], Iterator[tuple[Block, tuple[Tokens, Tokens]]]]


@contextlib.contextmanager
def encoding(encoder: Encoder, workers: int) -> Iterator[Encode]:
    """A function that gives blocks, without their data, with their tokens, in order.

    Args:
        workers: processes that tokenise. One is this process, which alone takes tokenizers that `load_tokenizer` does
            not make. Others are started afresh (this one may have threads), and end with this one, however it ends.

    Raises:
        ChildProcessError: one of them ended by itself.
    """
    if workers == 1:
        yield lambda blocks: ((block._replace(data=b"", bounds=None), encoder.encode(block)) for block in blocks)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
        initargs=(encoder,),
    )
    try:
        yield partial(_in_order, pool, workers * _AHEAD)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"one of {workers} processes that tokenise ended by itself, as for want of memory; run again with fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, ahead: int, blocks: Iterator[Block]
) -> Iterator[tuple[Block, tuple[Tokens, Tokens]]]:
    waiting: deque[tuple[Block, Future[tuple[Tokens, Tokens]]]] = deque()

    def next_one() -> tuple[Block, tuple[Tokens, Tokens]]:
        block, future = waiting.popleft()
        return block, future.result()

    try:
        for block in blocks:
            waiting.append((block._replace(data=b"", bounds=None), pool.submit(_encode, block)))
            if len(waiting) >= ahead:
                yield next_one()
    except InputError:  # of reading: what is wrong in a block before comes first
        while waiting:
            yield next_one()
        raise
    while waiting:
        yield next_one()


_encoder: Encoder | None = None  # of a process that tokenises


def _begin_worker(encoder: Encoder) -> None:
    global _encoder
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a key on the terminal interrupts this process through its parent
    _encoder = encoder


def _encode(block: Block) -> tuple[Tokens, Tokens]:
    assert _encoder is not None
    return _encoder.encode(block)
