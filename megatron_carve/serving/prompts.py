"""From what a client asks to token ids."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from megatron_carve.serving.protocol import ApiError, Chat, Completion

if TYPE_CHECKING:
    from megatron_carve.data.tokenizer import Tokenizer


class Prompts:
    """Reads prompts with a copy of the tokenizer, for a thread of its own.

    Args:
        tokenizer: None for a model of tokens that are no text.
        vocab_size: ids that a prompt may have.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        # A copy, because some tokenizers change while they encode, and the original decodes meanwhile.
        self.tokenizer, self.vocab_size = copy.deepcopy(tokenizer), vocab_size

    def of(self, asked: Completion | Chat) -> list[list[int]]:
        """Token ids of every prompt, at least one each.

        Raises:
            ApiError: 400.
        """
        if isinstance(asked, Chat):
            return [self._chat(asked)]
        return [self._text(p) if isinstance(p, str) else self._ids(p) for p in asked.prompt]

    def texts(self, asked: Completion, ids: list[list[int]]) -> list[str]:
        """The prompts as they are echoed."""
        return [
            p if isinstance(p, str) else self.tokenizer.decode(i) if self.tokenizer else " ".join(map(str, i)) + " "
            for p, i in zip(asked.prompt, ids, strict=True)
        ]

    def turn_ends(self) -> tuple[int, ...]:
        """Control tokens that end an answer by the chat template, beside the end of document."""
        if self.tokenizer is None:
            return ()
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            asking = self.tokenizer.chat_text(messages[:1], asks=True)
            answered = self.tokenizer.chat_text(messages)
        except ValueError:
            return ()
        _, answer, after = answered.removeprefix(asking).partition("b")
        if not answered.startswith(asking) or not answer or not after:
            return ()
        first = self.tokenizer.encode_template(after)[0].tolist()[:1]
        # What can be written in a text is a token of it, such as a new line, which answers may have too.
        plain = self.tokenizer.encode(after).tolist()[:1]
        return () if first == plain else tuple(first)

    def _text(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ApiError(400, "prompt: the model has tokens that are no text; expected token ids", param="prompt")
        # documents are divided by eod, so one begins after it
        return self.tokenizer.encode(text).tolist() or [self.tokenizer.eod]

    def _ids(self, ids: list[int]) -> list[int]:
        if outside := next((i for i in ids if not 0 <= i < self.vocab_size), None):
            wanted = f"expected token ids from 0 to {self.vocab_size - 1}"
            raise ApiError(400, f"prompt: {wanted}, got {outside}", param="prompt")
        return ids

    def _chat(self, asked: Chat) -> list[int]:
        if self.tokenizer is None:
            raise ApiError(400, "messages: the model has tokens that are no text", param="messages")
        messages = [{"role": message.role, "content": message.content} for message in asked.messages]
        try:
            text = self.tokenizer.chat_text(messages, asks=True)
            return self.tokenizer.encode_template(text)[0].tolist() or [self.tokenizer.eod]
        except ValueError as error:
            reason = str(error)
            if reason.startswith("data.tokenizer"):
                reason = "the model's tokenizer has no chat template"
            raise ApiError(400, f"messages: {reason}", param="messages") from error
