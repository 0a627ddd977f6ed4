"""Many requests at a time from one trained model: they join and leave at any step."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.inference.sampling_params import SamplingParams
from torch import Tensor

from megatron_carve.notices import say_once
from megatron_carve.use.drawing import Draw, draw_tokens
from megatron_carve.use.dynamic_context import Layers, dynamic_context
from megatron_carve.use.steps import Part, Steps
from megatron_carve.use.trained import Trained

MAX_REQUESTS = 64
# Tokens of a step: prompts are read in pieces of what those that generate leave of it.
MAX_TOKENS = 4096
BLOCK_TOKENS = 256
# Of the memory that is left on a GPU, what keys, values and states may take; on a CPU, bytes.
GPU_SHARE = 0.8
CPU_BYTES = 8 * 1024**3
NO_DRAW = Draw(0.0, 0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request wants.

    Attributes:
        max_tokens: to generate at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among so many of the likeliest; 0 among all.
        top_p: draw among the fewest of the likeliest whose probabilities add up to this; 0 and 1 among all.
        seed: of its random numbers, which no other request touches; None for one by chance. One seed gives one text on
            one kind of device, but for what rounding makes of probabilities: a step of other size is computed in
            another order.
        logprobs: with every token its logarithmic probability by the model's logits as they are, without temperature,
            and those of so many of the likeliest; None for none.
        prompt_logprobs: also those of the prompt's tokens, but for the first.
        stop_tokens: ids that end the text.

    Raises:
        ValueError: a value out of range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a number of at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0, got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p: expected a number from 0 to 1, got {self.top_p}")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs: expected at least 0, got {self.logprobs}")


@dataclass(frozen=True)
class Step:
    """What one step brought one request.

    Attributes:
        request: its number.
        tokens: new ones; the one that stops it is among them.
        logprobs: of `tokens`, if asked for.
        top_logprobs: of the likeliest in their places, by token, if asked for.
        finish: None while it goes on; "stop", "length" or "cancelled".
        prompt_logprobs: of the prompt's tokens from the second on, in the step that has read it whole, if asked for.
    """

    request: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[dict[int, float], ...] = ()
    finish: str | None = None
    prompt_logprobs: tuple[float, ...] = ()


@dataclass(eq=False)
class _Request:
    """One that waits or runs. `megatron` keeps how far its prompt is read."""

    number: int
    prompt: Tensor
    sampling: Sampling
    blocks: int
    megatron: DynamicInferenceRequest
    random: random.Random
    generated: int = 0
    cancelled: bool = False
    prompt_logprobs: list[float] = field(default_factory=list)

    def draw(self) -> Draw:
        """How its next token is drawn."""
        s = self.sampling
        # 32 bits: their product with a sum of probabilities stays below the sum
        return Draw(s.temperature, s.top_k, s.top_p, self.random.getrandbits(32) / 2**32 if s.temperature else 0.0)


class Engine:
    """Generates for requests that come and go, in Megatron's dynamic inference context. For one thread.

    A request begins when there is room for all it can become, in the order of arrival; so none is ever put off again.
    Long prompts are read in pieces beside the others' tokens. On a GPU the steps in which all generate are CUDA graphs.

    Args:
        trained: the model.
        max_requests: that run at a time; more wait.
        max_tokens: of a step; more than max_requests.
        max_sequence: tokens of a request, prompt and generated; None for the length that the run was trained with.
        memory: bytes for keys and values; None for what max_requests of max_sequence tokens need, as far as there is.
        cuda_graphs: None for whether there is a GPU.
        block_tokens: in a block of keys and values; a request takes whole blocks.

    Attributes:
        max_sequence, max_requests, max_batch_tokens: the limits.

    Raises:
        ValueError: limits that do not fit each other, or the memory.
        NotImplementedError: layers that dynamic batching does not know.
    """

    def __init__(
        self, trained: Trained, *, max_requests: int = MAX_REQUESTS, max_tokens: int = MAX_TOKENS,
        max_sequence: int | None = None, memory: int | None = None, cuda_graphs: bool | None = None,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:  # fmt: skip
        if max_requests < 1:
            raise ValueError(f"max_requests: expected at least 1, got {max_requests}")
        if max_tokens <= max_requests:
            raise ValueError(f"max_tokens: expected more than max_requests={max_requests}, got {max_tokens}")
        self.max_sequence = trained.recipe.training.seq_length if max_sequence is None else max_sequence
        if self.max_sequence < 2:
            raise ValueError(f"max_sequence: expected at least 2, got {self.max_sequence}")
        self.max_requests, self.max_batch_tokens = max_requests, max_tokens
        self.vocab_size, self.device = trained.vocab_size, trained.device
        graphs = self.device.type == "cuda" if cuda_graphs is None else cuda_graphs
        self._block_tokens = block_tokens
        self._free_blocks = self._affordable_blocks(Layers(trained.model), memory)
        context = dynamic_context(
            trained.model, max_requests=max_requests, max_tokens=max_tokens, max_sequence=self.max_sequence,
            blocks=self._free_blocks, block_tokens=self._block_tokens, cuda_graphs=max_requests if graphs else None,
        )  # fmt: skip
        self._steps: Steps | None = Steps(trained.model, context, self.vocab_size)
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Request] = {}
        self._partly_read: _Request | None = None
        self._next = 0
        say_once(
            f"engine: Megatron-Core's dynamic inference context on {self.device.type}, at most {max_requests} requests "
            f"of {self.max_sequence} tokens, {self._free_blocks} blocks of {self._block_tokens} tokens, steps "
            f"{'as CUDA graphs where all generate' if graphs else 'without CUDA graphs'}"
        )

    def _affordable_blocks(self, layers: Layers, memory: int | None) -> int:
        each = layers.block_bytes(self._block_tokens)
        a_sequence = self._blocks(self.max_sequence)
        wanted = self.max_requests * a_sequence
        if memory is None:
            free = GPU_SHARE * torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else CPU_BYTES
            memory = int(free) - self.max_requests * layers.state_bytes
        blocks = min(wanted, memory // each)
        if blocks < a_sequence:
            raise ValueError(
                f"max_sequence: expected memory for the keys and values of {self.max_sequence} tokens, "
                f"{a_sequence * each} bytes, got {max(0, memory)} beside the states of {self.max_requests} requests"
            )
        return int(blocks)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def add(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """Let a request wait for its turn; returns its number.

        Raises:
            ValueError: a prompt that is empty, has ids beyond the vocabulary, or leaves no room for max_tokens.
        """
        self._require_open()
        if not prompt or min(prompt) < 0 or max(prompt) >= self.vocab_size:
            wanted = f"expected at least one token id, each from 0 to {self.vocab_size - 1}"
            raise ValueError(f"prompt: {wanted}, got {list(prompt[:20]) or 'none'}")
        length = len(prompt) + sampling.max_tokens
        if length > self.max_sequence:
            raise ValueError(
                f"prompt: expected at most {self.max_sequence} tokens together with those to generate, got "
                f"{len(prompt)} + {sampling.max_tokens}"
            )
        number, self._next = self._next, self._next + 1
        tokens = torch.tensor(prompt, dtype=torch.int64)
        known = SamplingParams(num_tokens_to_generate=sampling.max_tokens, termination_id=-1)
        request = DynamicInferenceRequest(request_id=number, prompt_tokens=tokens, sampling_params=known)
        self._waiting.append(
            _Request(number, tokens, sampling, self._blocks(length), request, random.Random(sampling.seed))
        )
        return number

    def cancel(self, request: int) -> None:
        """End a request; its memory is free again after the next step, which also reports it. Nothing if it ended."""
        for known in (*self._waiting, *self._running.values()):
            if known.number == request:
                known.cancelled = True

    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._waiting and not self._running

    def close(self) -> None:
        """Give the memory back; every request is forgotten."""
        self._waiting.clear()
        self._running.clear()
        self._partly_read = None
        self._steps = None

    def step(self) -> list[Step]:
        """Read and generate for all that run; what came of it, by request. Nothing where none waits or runs.

        After an error, Ctrl-C among them, nothing can be relied on but close.
        """
        batch = self._require_open()
        steps = [Step(r.number, finish="cancelled") for r in self._drop_cancelled()]
        self._admit()
        if not self._running:
            return steps
        parts = batch.begin()
        running = [self._running[part.request] for part in parts]
        scored = any(r.sampling.prompt_logprobs and not r.generated for r in running)
        logits = batch.logits(all_tokens=scored)
        if scored:
            for r, part in zip(running, parts, strict=True):
                self._score_prompt(r, part, logits)
            logits = logits[torch.tensor([part.tokens.stop - 1 for part in parts], device=logits.device)]
        # Only who gets a token draws: how a prompt was cut must not change what follows.
        speaks = [r is not self._partly_read and not r.cancelled for r in running]
        tokens = draw_tokens(logits, [r.draw() if s else NO_DRAW for r, s in zip(running, speaks, strict=True)])
        logprobs = self._logprobs(running, logits, tokens)
        tokens = tokens.cpu()
        outcomes = zip(running, speaks, tokens.tolist(), logprobs, strict=True)
        found = [
            self._found(r, token, *these) if s else Step(r.number, finish="cancelled" if r.cancelled else None)
            for r, s, token, these in outcomes
        ]
        batch.end(tokens, [step.finish is None for step in found])
        for r, step in zip(running, found, strict=True):
            if step.finish is not None:
                self._forget(r)
        return steps + [step for step, s in zip(found, speaks, strict=True) if s or step.finish]

    def _drop_cancelled(self) -> list[_Request]:
        """Those that the context has no part in; the others take part in one more step."""
        dropped = [r for r in self._waiting if r.cancelled]
        self._waiting = deque(r for r in self._waiting if not r.cancelled)
        if (r := self._partly_read) is not None and r.cancelled:
            self._require_open().drop_partly_read()
            self._partly_read = None
            self._forget(r)
            dropped.append(r)
        return dropped

    def _admit(self) -> None:
        """Read more of the prompt that is partly read, then begin those that wait, as far as there is room."""
        if self._partly_read is not None:
            self._read(self._partly_read)
        while self._waiting and self._partly_read is None and self._room() > 0:
            if len(self._running) == self.max_requests or self._waiting[0].blocks > self._free_blocks:
                return
            r = self._waiting.popleft()
            self._running[r.number] = r
            self._free_blocks -= r.blocks
            self._read(r)

    def _room(self) -> int:
        """Tokens that still fit the next step."""
        return self.max_batch_tokens - self._require_open().context.active_token_count

    def _read(self, r: _Request) -> None:
        whole = self._require_open().read(r.megatron, self._room())
        self._partly_read = None if whole else r

    def _score_prompt(self, r: _Request, part: Part, logits: Tensor) -> None:
        """Take the logarithmic probabilities of a prompt's tokens from the logits of those before them, [T, V]."""
        if not r.sampling.prompt_logprobs or r.generated:
            return
        following = r.prompt[part.start + 1 : part.start + 1 + part.tokens.stop - part.tokens.start].to(logits.device)
        mine = logits[part.tokens][: following.shape[0]].log_softmax(-1)
        r.prompt_logprobs += mine.gather(1, following[:, None])[:, 0].tolist()

    def _logprobs(
        self, running: list[_Request], logits: Tensor, tokens: Tensor
    ) -> list[tuple[tuple[float, ...], tuple[dict[int, float], ...]]]:
        """Of each request's token, and of the likeliest in its place, where they are asked for."""
        wanted = [r.sampling.logprobs for r in running]
        if all(n is None for n in wanted):
            return [((), ())] * len(running)
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        top = logprobs.topk(min(max(n or 0 for n in wanted), self.vocab_size), -1)
        values, ids = top.values.tolist(), top.indices.tolist()
        return [
            ((), ()) if n is None else ((chosen[row],), (dict(zip(ids[row][:n], values[row][:n], strict=True)),))
            for row, n in enumerate(wanted)
        ]

    def _found(
        self, r: _Request, token: int, logprobs: tuple[float, ...], top_logprobs: tuple[dict[int, float], ...]
    ) -> Step:
        """What a step's token makes of a request."""
        r.generated += 1
        finish = None
        if token in r.sampling.stop_tokens:
            finish = "stop"
        elif r.generated == r.sampling.max_tokens:
            finish = "length"
        of_prompt = tuple(r.prompt_logprobs) if r.generated == 1 else ()
        return Step(r.number, (token,), logprobs, top_logprobs, finish, of_prompt)

    def _forget(self, r: _Request) -> None:
        del self._running[r.number]
        self._free_blocks += r.blocks

    def _require_open(self) -> Steps:
        if self._steps is None:
            raise RuntimeError("engine: expected one that is open, got a closed one")
        return self._steps
