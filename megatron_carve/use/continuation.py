"""A text that grows by a token at a time, up to what ends it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_carve.data.tokenizer import Tokenizer

# Tokens that may be missing the rest of a character; after more, what they begin with is no UTF-8.
OPEN_TOKENS = 8
# Tokens at most of which the rest of a character can be missing, and those of a character.
REST, CHARACTER = 3, 4


class Continuation:
    """What a model adds to a prompt, as text: up to the end of a document, or to a text to stop before.

    Args:
        tokenizer: None for token ids with spaces between.
        stop: texts.

    Attributes:
        text: so far, in whole characters.
        ended: nothing comes any more.
        stopped: one of `stop` ended it.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(filter(None, stop))
        self.text = ""
        self.ended = self.stopped = False
        self._ids: list[int] = []
        # Text is made of the last tokens alone, together with some before them, which may decide about a space.
        self._context = self._settled = 0

    def add(self, token: int) -> None:
        """Take the next token; after the end it does not count."""
        if self.ended:
            return
        if self.tokenizer is not None and token == self.tokenizer.eod:
            self.finish()
            return
        self._ids.append(token)
        count = len(self._ids)
        new = self._new_text(count)
        if not new.endswith("\ufffd"):
            self._settle(count, new)
        elif count - self._settled > OPEN_TOKENS:
            # All but the last few are what they are, if what they give does not end within a character.
            ends = range(count - REST, count - REST - CHARACTER, -1)
            end = next((end for end in ends if new.startswith(self._new_text(end))), count)
            self._settle(end, self._new_text(end))

    def finish(self) -> str:
        """End the text, with what is left of a character; returns it."""
        if not self.ended:
            self._settle(len(self._ids), self._new_text(len(self._ids)))
            self.ended = True
        return self.text

    @property
    def sure(self) -> int:
        """Characters of the text that no `stop` can take back."""
        if self.ended:
            return len(self.text)
        begun = (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return len(self.text) - max(begun, default=0)

    def _new_text(self, end: int) -> str:
        """Of the tokens before `end` that are not settled."""
        if self.tokenizer is None:
            return "".join(f" {i}" for i in self._ids[self._settled : end])[0 if self.text else 1 :]
        before = self.tokenizer.decode(self._ids[self._context : self._settled])
        return self.tokenizer.decode(self._ids[self._context : end])[len(before) :]

    def _settle(self, end: int, new: str) -> None:
        first = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text += new
        self._context, self._settled = self._settled, end
        found = [place for place in (self.text.find(stop, first) for stop in self.stop) if place >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.ended = self.stopped = True
