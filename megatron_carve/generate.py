"""Continue texts with a trained model: `python -m megatron_carve.generate RUN --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_carve.data.text import read_text
from megatron_carve.run.program import exit_status, run_parser
from megatron_carve.use.continuation import Continuation

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_carve.data.tokenizer import Tokenizer
    from megatron_carve.use.generation import Sampling
    from megatron_carve.use.trained import Trained

DESCRIPTION = """
Continues texts with the model of a run. The continuation of one prompt is printed as it comes, those of several at
the end, one after another. An empty prompt begins a document. Speed is reported on standard error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status. A user's mistake ends in one line on stderr and status 2."""
    parser = run_parser("generate", DESCRIPTION)
    for name, metavar, what in (
        ("--prompt", "TEXT", "can be given several times, as can the next two"),
        ("--prompt-file", "FILE", "a text"),
        ("--prompt-ids", "'N N ...'", "token ids"),
    ):
        kind = partial(_prompt, name)
        parser.add_argument(name, action="append", dest="prompts", type=kind, metavar=metavar, help=what)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of each prompt (default: 128)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token (default: 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that make up P")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; can be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    chosen = parser.parse_args(arguments)
    return exit_status(lambda: _generate(chosen))


def _generate(chosen: argparse.Namespace) -> None:
    if not chosen.prompts:
        raise ValueError("expected a --prompt, --prompt-file or --prompt-ids, got none")
    if chosen.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, got {chosen.max_new_tokens}")
    prompts = [_read(kind, value) for kind, value in chosen.prompts]
    # Here because torch and Megatron take seconds to import; a typing mistake need not wait.
    import torch

    from megatron_carve.use.generation import Sampling
    from megatron_carve.use.trained import trained_model

    sampling = Sampling(
        temperature=chosen.temperature, top_k=chosen.top_k, top_p=chosen.top_p, seed=chosen.seed
    )  # fmt: skip
    with trained_model(chosen.run, device=chosen.device, step=chosen.step) as trained:
        lists = [_ids(trained, prompt) for prompt in prompts]
        writers = [Writer(trained.tokenizer, live=len(lists) == 1, stop=chosen.stop) for _ in lists]
        _run(trained, [torch.tensor(ids) for ids in lists], sampling, chosen.max_new_tokens, writers)


def _run(
    trained: Trained, prompts: list[Tensor], sampling: Sampling, max_new_tokens: int, writers: list[Writer]
) -> None:
    from megatron_carve.use.generation import generate

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
    """Prints one sequence's continuation.

    Args:
        tokenizer: None to print token ids.
        live: print as it comes, all but what may still turn out to be the beginning of a `stop`.
        stop: texts to stop before.
    """

    def __init__(self, tokenizer: Tokenizer | None, live: bool, stop: Sequence[str] = ()) -> None:
        self.continuation, self.live = Continuation(tokenizer, stop), live
        self._printed = 0

    @property
    def ended(self) -> bool:
        return self.continuation.ended

    def add(self, token: int) -> None:
        """Take the next token."""
        self.continuation.add(token)
        if self.live:
            self._print(self.continuation.sure)

    def finish(self) -> None:
        """Print what is left, and end the line."""
        self._print(len(self.continuation.finish()))
        print(flush=True)

    def _print(self, end: int) -> None:
        if end > self._printed:
            print(self.continuation.text[self._printed : end], end="", flush=True)
            self._printed = end


def _prompt(kind: str, value: str) -> tuple[str, str]:
    """A prompt as given; prompts of all kinds stay in their order."""
    return kind, value


def _read(kind: str, value: str) -> str | list[int]:
    """A text, or token ids."""
    if kind == "--prompt-file":
        return read_text(value)
    if kind == "--prompt":
        return value
    try:
        return [int(word) for word in value.split()]
    except ValueError:
        raise ValueError(f"--prompt-ids: expected numbers with spaces between, got {value!r}") from None


def _ids(trained: Trained, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        if trained.tokenizer is None:
            raise ValueError("--prompt: the run was trained on generated tokens, which are no text; use --prompt-ids")
        # documents are divided by eod, so one begins after it
        return trained.tokenizer.encode(prompt).tolist() or [trained.tokenizer.eod]
    if not prompt or min(prompt) < 0 or max(prompt) >= trained.vocab_size:
        wanted = f"expected at least one token id, each from 0 to {trained.vocab_size - 1}"
        raise ValueError(f"--prompt-ids: {wanted}, got {prompt[:20] or 'none'}")
    return prompt


if __name__ == "__main__":
    sys.exit(main())
