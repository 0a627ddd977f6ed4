"""Continue texts with a trained model: `python -m megatron_carve.generate RUN --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_carve.program import exit_status

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_carve.generation import Sampling
    from megatron_carve.tokenizer import Tokenizer
    from megatron_carve.trained import Trained


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status. A user's mistake ends in one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_carve.generate",
        description="Continues texts with the model of a run. The continuation of one prompt is printed as it comes, "
        "those of several at the end, one after another. An empty prompt begins a document. Speed is reported on "
        "standard error.",
    )
    parser.add_argument("run", help="folder of the run, with recipe.yaml and checkpoints/ in it")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="can be given several times")
    parser.add_argument("--prompt-file", action="append", default=[], type=Path, metavar="FILE", help="likewise")
    parser.add_argument("--prompt-ids", action="append", default=[], metavar="'N N ...'", help="likewise")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of each prompt (default: 128)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token (default: 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that make up P")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; likewise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the newest)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    chosen = parser.parse_args(arguments)
    return exit_status(lambda: _generate(chosen))


def _generate(chosen: argparse.Namespace) -> None:
    texts = [*chosen.prompt, *(path.read_text(encoding="utf-8") for path in chosen.prompt_file)]
    lists = [_numbers(words) for words in chosen.prompt_ids]
    if not texts and not lists:
        raise ValueError("expected a --prompt, --prompt-file or --prompt-ids, got none")
    if chosen.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, got {chosen.max_new_tokens}")
    # Here because torch and Megatron take seconds to import; a typing mistake need not wait.
    import torch

    from megatron_carve.generation import Sampling
    from megatron_carve.trained import trained_model

    sampling = Sampling(
        temperature=chosen.temperature, top_k=chosen.top_k, top_p=chosen.top_p, seed=chosen.seed
    )  # fmt: skip
    with trained_model(chosen.run, device=chosen.device, step=chosen.step) as trained:
        if texts and trained.tokenizer is None:
            raise ValueError("--prompt: the run was trained on generated tokens, which are no text; use --prompt-ids")
        if trained.tokenizer is not None:
            # documents are divided by eod, so one begins after it
            lists = [trained.tokenizer.encode(text).tolist() or [trained.tokenizer.eod] for text in texts] + lists
        for ids in lists:
            if not ids or min(ids) < 0 or max(ids) >= trained.vocab_size:
                wanted = f"expected at least one token id, each from 0 to {trained.vocab_size - 1}"
                raise ValueError(f"a prompt: {wanted}, got {ids[:20] or 'none'}")
        writers = [Writer(trained.tokenizer, live=len(lists) == 1, stop=chosen.stop) for _ in lists]
        _run(trained, [torch.tensor(ids) for ids in lists], sampling, chosen.max_new_tokens, writers)


def _run(
    trained: Trained, prompts: list[Tensor], sampling: Sampling, max_new_tokens: int, writers: list[Writer]
) -> None:
    from megatron_carve.generation import generate

    start = time.monotonic()
    first = start
    count = 0
    for tokens in generate(
        trained.model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, vocab_size=trained.vocab_size
    ):
        count += 1
        first = time.monotonic() if count == 1 else first
        for writer, token in zip(writers, tokens.tolist(), strict=True):
            writer.add(token)
        if all(writer.ended for writer in writers):
            break
    end = time.monotonic()
    for number, writer in enumerate(writers, 1):
        if len(writers) > 1:
            print(f"--- {number}")
        writer.finish()
    read = sum(prompt.numel() for prompt in prompts)
    line = f"step {trained.step}: {read} tokens read in {first - start:.2f} s"
    if count > 1:
        speed = (count - 1) * len(prompts) / (end - first)
        line += f"; {count} generated for each of {len(prompts)}, {speed:.0f} a second"
    print(line, file=sys.stderr)


class Writer:
    """Prints one sequence's generated tokens as text, up to what ends it: a document's end, or a text to stop before.

    Args:
        tokenizer: None to print token ids.
        live: print as they come, all but what may still turn out to be the beginning of a `stop`.
        stop: texts.
    """

    def __init__(self, tokenizer: Tokenizer | None, live: bool, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.live, self.stop = tokenizer, live, tuple(filter(None, stop))
        self.ids: list[int] = []
        self.text = ""
        self.ended = False
        self._printed = 0

    def add(self, token: int) -> None:
        """Take the next token, which counts no more once the text has ended."""
        if self.ended:
            return
        if self.tokenizer is not None and token == self.tokenizer.eod:
            self.ended = True
            return
        self.ids.append(token)
        text = " ".join(map(str, self.ids)) if self.tokenizer is None else self.tokenizer.decode(self.ids)
        found = [text.find(stop) for stop in self.stop if stop in text]
        self.ended = bool(found)
        self.text = text[: min(found, default=len(text))]
        if self.live:
            # the last character may lack bytes that are still to come
            self._print(self.text if self.ended else self.text[: len(self.text) - self._open()].rstrip("\ufffd"))

    def finish(self) -> None:
        """Print what is left, and end the line."""
        self._print(self.text)
        print(flush=True)

    def _open(self) -> int:
        """Characters at the end of the text with which a `stop` begins."""
        ends = (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(ends, default=0)

    def _print(self, text: str) -> None:
        print(text[self._printed :], end="", flush=True)
        self._printed = max(self._printed, len(text))


def _numbers(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split()]
    except ValueError:
        raise ValueError(f"--prompt-ids: expected numbers with spaces between, got {words!r}") from None


if __name__ == "__main__":
    sys.exit(main())
