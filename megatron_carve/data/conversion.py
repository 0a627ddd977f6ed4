"""Inputs to indexed datasets: blocks are read, tokenised by several processes, and written in order.

Memory is bounded by four blocks of 256 KiB (a few lines more) and their tokens for each process, what the tokenizer
takes for one of them, and the longest line or row. Every few seconds what is written is brought to the disk and a
journal says where the next block begins: a conversion that was killed goes on from there.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_carve.data.blocks import Block, Place, read_blocks
from megatron_carve.data.encoding import Encoder, Tokens, encoding
from megatron_carve.data.indexed import IndexedWriter, Written
from megatron_carve.data.inputs import Input, InputError, title
from megatron_carve.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")
_JOURNAL = "journal.json"
_JOURNAL_SECONDS = 5.0


def convert(
    inputs: Sequence[Input],
    tokenizer: Tokenizer,
    folder: Path,
    aside: Path,
    *,
    text_key: str,
    validation_fraction: float,
    examples: bool,
    workers: int,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """Write folder/train.{bin,idx} and, unless validation_fraction is 0, folder/validation.{bin,idx}.

    Args:
        inputs: see `find_inputs`.
        folder, aside: for the result, and for what is needed to go on; both exist. What they hold is of an earlier call
            with the same arguments that was interrupted, `workers` apart.
        workers: processes that tokenise; no byte of the result depends on it.

    Returns:
        By split what it holds, as indexed.Written.

    Raises:
        ValueError: an input cannot be used; names it and the place.
        ChildProcessError: one of the processes was killed.
    """
    splits = SPLITS if validation_fraction else SPLITS[:1]
    place, written, on_disk = _journal(aside)
    encoder = Encoder(tokenizer, [str(source.path) for source in inputs], text_key, validation_fraction, examples)
    writers = [
        IndexedWriter(
            folder / split, aside, dtype=encoder.dtype, eod=tokenizer.eod, written=written[split], masked=examples
        )
        for split in splits
    ]
    try:
        with (
            _bar(inputs, on_disk, progress) as bar,
            encoding(encoder, workers) as encode,
        ):
            said = time.monotonic()
            begun = said, sum(writer.written.tokens for writer in writers)
            blocks = read_blocks(
                inputs, place, text_key=text_key, validation_fraction=validation_fraction, examples=examples
            )
            for block, tokens in encode(blocks):
                _write(block, tokens, writers)
                now = time.monotonic()
                speed = (sum(w.written.tokens for w in writers) - begun[1]) / max(now - begun[0], 1e-9)
                bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
                bar.update(block.on_disk - bar.n)
                if block.after is not None and now - said >= _JOURNAL_SECONDS:
                    _write_journal(aside, block.after, writers, block.on_disk)
                    said = time.monotonic()
        _hold_out_one(aside, writers, Place(len(inputs)), sum(source.size for source in inputs))
        for split, writer in zip(splits, writers, strict=True):
            if not writer.written.tokens:
                remedy = "; it needs at least 2 documents, one for validation" if split == "validation" else ""
                raise InputError(
                    f"{title(inputs)} gives no {split} tokens with the tokenizer {tokenizer.spec!r}{remedy}"
                )
        empty = sum(writer.written.empty_documents for writer in writers)
        if empty:
            logger.warning("%s: left out %d documents that have no tokens", title(inputs), empty)
        for writer in writers:
            writer.finish()
        return {split: asdict(writer.written) for split, writer in zip(splits, writers, strict=True)}
    finally:
        for writer in writers:
            writer.close()


def _write(block: Block, tokens: tuple[Tokens, Tokens], writers: Sequence[IndexedWriter]) -> None:
    for writer, found, validation in zip(writers, tokens, (False, True), strict=False):
        if block.form != "piece":
            writer.add(
                found.ids, found.lengths, text_bytes=found.text_bytes, empty=found.empty, last_bytes=found.last_bytes,
                learned=found.learned,
            )  # fmt: skip
        elif validation == block.validation:
            writer.add_piece(found.ids, found.text_bytes, ends=block.ends)


def _hold_out_one(aside: Path, writers: Sequence[IndexedWriter], end: Place, on_disk: int) -> None:
    """Of few documents, too few for one to fall to validation, the last is for validation.

    Killed at any moment this can be done again: the last document is first copied, then told of, then removed.
    """
    if len(writers) == 1 or writers[1].written.documents:
        return
    train, validation = writers
    if train.written.documents < 2 or train.written.documents != train.written.sequences:
        return
    rest, ids, learned = train.without_last_document()
    moved = train.written.last_bytes
    validation.add(ids, np.array([ids.size]), text_bytes=moved, last_bytes=moved, learned=learned)
    train.written = rest
    _write_journal(aside, end, writers, on_disk)
    train.restore(rest)


def _bar(inputs: Sequence[Input], on_disk: int, progress: bool) -> tqdm:
    name = inputs[0].path.name if len(inputs) == 1 else f"{len(inputs)} files"
    return tqdm(
        total=sum(source.size for source in inputs),
        initial=on_disk,
        desc=f"tokenising {name}",
        unit="B",
        unit_scale=True,
        disable=not progress,
    )


def _journal(aside: Path) -> tuple[Place, dict[str, Written], int]:
    """Where to go on, what is written up to there, and bytes on disk read for it."""
    try:
        found = json.loads((aside / _JOURNAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Place(), {split: Written() for split in SPLITS}, 0
    written = {split: Written(**found["written"].get(split, {})) for split in SPLITS}
    return Place(*found["place"]), written, found["on_disk"]


def _write_journal(aside: Path, place: Place, writers: Sequence[IndexedWriter], on_disk: int) -> None:
    written = {split: writer.flush() for split, writer in zip(SPLITS, writers, strict=False)}
    partial = aside / f"{_JOURNAL}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"place": place, "written": written, "on_disk": on_disk}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(aside / _JOURNAL)
