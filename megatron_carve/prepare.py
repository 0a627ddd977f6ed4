"""Tokenise texts for training: `python -m megatron_carve.prepare OUT INPUT ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

# Processes that tokenise import this module too: what takes long to import comes later.
if TYPE_CHECKING:
    from megatron_carve.data.text import PreparedText


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status. A user's mistake ends in one line on stderr and status 2."""
    from megatron_carve.run.program import exit_status

    parser = argparse.ArgumentParser(
        prog="python -m megatron_carve.prepare",
        description="Tokenise texts into the folder OUT, in Megatron's indexed format, for data.indexed=[OUT] of a "
        "recipe or Megatron-LM's --data-path. Interrupted, it goes on where it was when it is called again.",
    )
    parser.add_argument("out", metavar="OUT", help="a new folder: train and, with a fraction, validation; .bin, .idx")
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="files, folders or globs: plain text, JSON lines (.jsonl, .json, .ndjson), both also as .gz or .zst, and "
        ".parquet",
    )
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="SPEC",
        help="bytes (the default), sentencepiece:PATH, tiktoken:NAME_OR_PATH or huggingface:NAME_OR_PATH",
    )
    parser.add_argument(
        "--loss-on",
        default="text",
        choices=["text", "completion"],
        help="completion, to fine-tune: lines hold a prompt and a completion, or messages; see data.loss_on",
    )
    parser.add_argument("--text-key", default="text", metavar="NAME", help="JSON key or column of a document (text)")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.05, metavar="F", help="kept for validation (0.05); 0: none"
    )
    parser.add_argument("--workers", type=int, default=cores(), metavar="N", help="processes (default: all cores)")
    chosen = parser.parse_args(arguments)
    return exit_status(lambda: _prepare(chosen))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _prepare(chosen: argparse.Namespace) -> None:
    from megatron_carve.data.text import Texts, prepare_folder
    from megatron_carve.data.tokenizer import load_tokenizer

    if chosen.workers < 1:
        raise ValueError(f"--workers: expected at least 1, got {chosen.workers}")
    if not 0 <= chosen.validation_fraction < 1:
        raise ValueError(f"--validation-fraction: expected at least 0 and below 1, got {chosen.validation_fraction}")
    texts = Texts(
        chosen.inputs,
        load_tokenizer(chosen.tokenizer),
        text_key=chosen.text_key,
        validation_fraction=chosen.validation_fraction,
        examples=chosen.loss_on == "completion",
        argument="INPUT",
    )
    found = prepare_folder(chosen.out, texts, workers=chosen.workers)
    print("\n".join(report(found)))


def report(found: PreparedText) -> list[str]:
    """Lines that say what a prepared folder holds."""
    lines = [f"{found.folder}: {found.source}, {found.tokenizer}"]
    for split, documents, tokens, prefix in (
        ("train", found.train_documents, found.train_tokens, found.train_prefix),
        ("validation", found.validation_documents, found.validation_tokens, found.validation_prefix),
    ):
        if prefix is not None:
            lines.append(f"  {split:<12}{documents:>16,} documents{tokens:>20,} tokens")
    return lines


if __name__ == "__main__":
    sys.exit(main())
