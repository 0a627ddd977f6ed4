"""An engine without a model, for tests of what is around one: it says every prompt again, and again."""

import math
import time
from collections.abc import Sequence

from megatron_carve.use.engine import Sampling, Step


class Parrot:
    """As megatron_carve.use.engine.Engine. A request of a seed begins with that token of its prompt.

    The log-probability of a token is -1 - token / 1000, beside it is named the token that follows it, at -2.

    Args:
        seconds: that a step takes.
        fails_on: a token that no step survives.

    Attributes:
        steps: so far.
        cancelled: requests that were ended from outside.
    """

    def __init__(self, *, max_requests=4, max_sequence=4000, seconds=0.0, fails_on=None):
        self.max_requests, self.max_sequence, self.seconds, self.fails_on = (
            max_requests,
            max_sequence,
            seconds,
            fails_on,
        )
        self.steps, self.closed, self.cancelled = 0, False, []
        self._live: dict[int, tuple[list[int], Sampling, int]] = {}
        self._cancels: list[int] = []
        self._next = 0

    def add(self, prompt: Sequence[int], sampling: Sampling) -> int:
        if len(prompt) + sampling.max_tokens > self.max_sequence:
            raise ValueError(f"prompt: {len(prompt)} + {sampling.max_tokens} tokens are too many")
        if list(prompt) == [7, 7, 7]:
            raise ValueError("prompt: nobody wants these tokens")
        self._next += 1
        self._live[self._next] = list(prompt), sampling, 0
        return self._next

    def cancel(self, request: int) -> None:
        if request in self._live:
            self._cancels.append(request)

    def step(self) -> list[Step]:
        self.steps += 1
        if self.seconds:
            time.sleep(self.seconds)
        found = [Step(request, finish="cancelled") for request in self._cancels]
        for request in self._cancels:
            del self._live[request]
        self.cancelled += self._cancels
        self._cancels = []
        for request in list(self._live)[: self.max_requests]:
            found.append(self._say(request))
        return found

    def idle(self) -> bool:
        return not self._live

    def close(self) -> None:
        self.closed = True

    def _say(self, request: int) -> Step:
        prompt, sampling, count = self._live[request]
        token = prompt[((sampling.seed or 0) + count) % len(prompt)]
        if token == self.fails_on:
            raise ArithmeticError("this token is not for me")
        count += 1
        finish = "stop" if token in sampling.stop_tokens else "length" if count == sampling.max_tokens else None
        self._live[request] = prompt, sampling, count
        if finish:
            del self._live[request]
        if sampling.logprobs is None:
            return Step(request, (token,), finish=finish)
        values = [(token, logprob(token)), (token + 1, -2.0), (token + 2, -math.inf)]
        return Step(request, (token,), (logprob(token),), (dict(values[: sampling.logprobs]),), finish)


def logprob(token: int) -> float:
    return -1 - token / 1000
