"""A text that grows by a token at a time, up to what ends it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_carve.data.tokenizer import Tokenizer

# Tokens that may be missing the rest of a character; after more, what they are is no UTF-8.
OPEN_TOKENS = 8


class Continuation:
    """What a model adds to a prompt, as text: up to the end of a document, or to a text to stop before.

    Args:
        tokenizer: None for token ids with spaces between.
        stop: texts.

    Attributes:
        text: so far, in whole characters.
        ended: nothing comes any more.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(filter(None, stop))
        self.text = ""
        self.ended = False
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
        new = self._new_text()
        if not new.endswith("\ufffd") or len(self._ids) - self._settled > OPEN_TOKENS:
            self._settle(new)

    def finish(self) -> str:
        """End the text, with what is left of a character; returns it."""
        if not self.ended:
            self._settle(self._new_text())
            self.ended = True
        return self.text

    @property
    def sure(self) -> int:
        """Characters of the text that no `stop` can take back."""
        if self.ended:
            return len(self.text)
        begun = (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return len(self.text) - max(begun, default=0)

    def _new_text(self) -> str:
        if self.tokenizer is None:
            return "".join(f" {i}" for i in self._ids[self._settled :])[0 if self.text else 1 :]
        before = self.tokenizer.decode(self._ids[self._context : self._settled])
        return self.tokenizer.decode(self._ids[self._context :])[len(before) :]

    def _settle(self, new: str) -> None:
        first = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text += new
        self._context, self._settled = self._settled, len(self._ids)
        found = [place for place in (self.text.find(stop, first) for stop in self.stop) if place >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.ended = True
