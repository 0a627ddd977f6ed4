"""The text of one choice as a client may have it: in whole characters, up to a stop, with log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from megatron_carve.use.continuation import Continuation

if TYPE_CHECKING:
    from megatron_carve.data.tokenizer import Tokenizer
    from megatron_carve.use.engine import Step


class Token(NamedTuple):
    """A token with its log-probability.

    Attributes:
        offset: of the text of its choice, in characters, where it begins.
        likeliest: log-probabilities by token id, the likeliest first.
    """

    id: int
    logprob: float
    offset: int
    likeliest: dict[int, float]


class Piece(NamedTuple):
    """What has been added to a choice.

    Attributes:
        tokens: that begin in `text`; empty unless log-probabilities were asked for.
        finish: "stop" or "length" with the last piece.
    """

    text: str
    tokens: list[Token]
    finish: str | None


class Choice:
    """Grows by steps of the engine.

    Args:
        tokenizer: None for token ids with spaces between.
        stop: texts to stop before.
        stop_tokens: ids that end it, and are no part of it.

    Attributes:
        finish: "stop" or "length" when there comes nothing more.
        count: tokens that were made for it.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], stop_tokens: Sequence[int]) -> None:
        self.finish: str | None = None
        self.count = 0
        self._text = Continuation(tokenizer, stop)
        self._stop_tokens = frozenset(stop_tokens)
        self._tokens: list[Token] = []  # not taken yet
        self._taken = 0  # characters

    def add(self, step: Step) -> None:
        """Take a step; after the end it does not count."""
        for place, token in enumerate(step.tokens):
            if self.finish:
                return
            self.count += 1
            if token in self._stop_tokens:
                self._end("stop")
                return
            if step.logprobs:
                likeliest = step.top_logprobs[place] if step.top_logprobs else {}
                self._tokens.append(Token(token, step.logprobs[place], len(self._text.text), likeliest))
            self._text.add(token)
            if self._text.ended:
                self._end("stop")
        if step.finish and not self.finish:
            self._end(step.finish)

    def take(self) -> Piece | None:
        """What is new and certain; None if that is nothing."""
        sure = self._text.sure
        text = self._text.text[self._taken : sure]
        # With the last piece come those that made no character, unless they belong to what a stop took away.
        every = self.finish is not None and not self._text.stopped
        count = len(self._tokens) if every else sum(token.offset < sure for token in self._tokens)
        if not text and not count and self.finish is None:
            return None
        tokens, self._tokens = self._tokens[:count], self._tokens[count:]
        self._taken = max(self._taken, sure)
        return Piece(text, tokens, self.finish)

    def _end(self, reason: str) -> None:
        self._text.finish()
        self.finish = "stop" if self._text.stopped else reason


class TokenTexts:
    """The texts of single tokens, which name them in log-probabilities."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers drop a space at the beginning of a text.
        self._before = [] if tokenizer is None else tokenizer.encode("a").tolist()
        self._skipped = 0 if tokenizer is None else len(tokenizer.decode(self._before))
        self.text = lru_cache(maxsize=65536)(self._text)

    def _text(self, token: int) -> tuple[str, bool]:
        """The text, and whether it is one: parts of characters and the end of a document have a name instead."""
        if self._tokenizer is None:
            return str(token), True
        text = self._tokenizer.decode([*self._before, token])[self._skipped :]
        return (text, True) if text and "\ufffd" not in text else (f"token:{token}", False)
