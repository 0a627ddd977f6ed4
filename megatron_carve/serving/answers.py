"""Answers in the form of OpenAI's completions and chat completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from megatron_carve.serving.choice import Piece, Token, TokenTexts

# JSON has no infinity.
LEAST_LOGPROB = -9999.0


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class CompletionAnswer:
    """Of POST /v1/completions.

    Args:
        texts: of tokens; None for no log-probabilities.
    """

    name, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, texts: TokenTexts | None) -> None:
        self.head = {"id": f"{self.name}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.texts = texts

    def whole(self, choices: Sequence[Piece], used: dict[str, int]) -> dict[str, Any]:
        """The answer that comes at once."""
        written = [self._choice(number, piece) for number, piece in enumerate(choices)]
        return {**self.head, "object": self.whole_kind, "choices": written, "usage": used}

    def chunk(self, number: int, piece: Piece) -> dict[str, Any]:
        """A part of a stream."""
        return {**self.head, "object": self.chunk_kind, "choices": [self._part(number, piece)]}

    def opening(self, number: int, echo: str) -> dict[str, Any] | None:
        """What a choice begins with in a stream, if anything."""
        return self.chunk(number, Piece(echo, [], None)) if echo else None

    def last(self, used: dict[str, int]) -> dict[str, Any]:
        """The end of a stream that reports usage."""
        return {**self.head, "object": self.chunk_kind, "choices": [], "usage": used}

    def _choice(self, number: int, piece: Piece) -> dict[str, Any]:
        logprobs = None if self.texts is None else self._logprobs(piece.tokens, self.texts)
        return {"index": number, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def _part(self, number: int, piece: Piece) -> dict[str, Any]:
        return self._choice(number, piece)

    def _logprobs(self, tokens: Sequence[Token], texts: TokenTexts) -> dict[str, Any]:
        return {
            "tokens": [texts.text(token.id)[0] for token in tokens],
            "token_logprobs": [max(LEAST_LOGPROB, token.logprob) for token in tokens],
            "top_logprobs": [
                {texts.text(i)[0]: max(LEAST_LOGPROB, value) for i, value in token.likeliest.items()}
                for token in tokens
            ],
            "text_offset": [token.offset for token in tokens],
        }


class ChatAnswer(CompletionAnswer):
    """Of POST /v1/chat/completions."""

    name, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, number: int, echo: str) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self.head, "object": self.chunk_kind, "choices": [choice]}

    def _choice(self, number: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text}
        return {"index": number, "message": message, **self._rest(piece)}

    def _part(self, number: int, piece: Piece) -> dict[str, Any]:
        return {"index": number, "delta": {"content": piece.text} if piece.text else {}, **self._rest(piece)}

    def _rest(self, piece: Piece) -> dict[str, Any]:
        logprobs = None if self.texts is None else {"content": self._content(piece.tokens, self.texts)}
        return {"logprobs": logprobs, "finish_reason": piece.finish}

    def _content(self, tokens: Sequence[Token], texts: TokenTexts) -> list[dict[str, Any]]:
        return [
            {
                **self._named(token.id, token.logprob, texts),
                "top_logprobs": [self._named(i, value, texts) for i, value in token.likeliest.items()],
            }
            for token in tokens
        ]

    def _named(self, token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
        text, is_text = texts.text(token)
        return {
            "token": text,
            "logprob": max(LEAST_LOGPROB, logprob),
            "bytes": list(text.encode()) if is_text else None,
        }
