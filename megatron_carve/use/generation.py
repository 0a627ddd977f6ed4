"""Generate tokens with a trained model: read the prompts in pieces, then one token of every sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from torch import Tensor, nn

from megatron_carve.model.variants import MIXER_LETTERS
from megatron_carve.use.graphs import rehearse

# Tokens of a prompt that are read at once; bounds the memory that a long one takes.
PREFILL_TOKENS = 16384
# Steps before one is recorded as a CUDA graph.
TRIALS = 2
# Layers that go on from a static inference context as they should; of Megatron's others Mamba's forget which sequence
# of a batch is which.
LETTERS = (*MIXER_LETTERS, "*", "-")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the largest instead of drawing.
        top_k: draw among so many of the largest; None among all.
        top_p: draw among the fewest of the largest whose probabilities add up to this; None among all.
        seed: of the random numbers; one seed gives one text on one kind of device.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a number of at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {self.top_p}")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Token ids [B] int64 from logits [B, V] float32."""
        if self.temperature == 0:
            return logits.argmax(-1)
        # From the largest, in float64: however low the temperature, that one stays 0 and nothing becomes no number.
        logits = ((logits - logits.amax(-1, keepdim=True)).double() / self.temperature).float()
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, place = logits.sort(-1, descending=True)
            probability = ordered.softmax(-1)
            beyond = probability.cumsum(-1) - probability >= self.top_p  # the first is never beyond
            logits = logits.scatter(-1, place, ordered.masked_fill(beyond, -torch.inf))
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class Memory:
    """A model's memory of a batch of sequences, and the model going on from it.

    Args:
        model: a HybridModel in evaluation mode whose layers take static inference contexts.
        sequences: in the batch.
        max_length: tokens, prompt and generated together, that a sequence can get.
        vocab_size: logits that count; the model's may be padded.
        cuda_graph: replay the step of one token as a CUDA graph; None for whether there is a GPU.

    Raises:
        NotImplementedError: layers of other letters than LETTERS.
    """

    def __init__(
        self, model: nn.Module, sequences: int, max_length: int, *, vocab_size: int, cuda_graph: bool | None = None
    ) -> None:
        others = sorted(set(model.decoder.layer_type_list) - set(LETTERS))  # type: ignore[union-attr,arg-type]
        if others:
            raise NotImplementedError(f"generation: expected layers of {', '.join(LETTERS)}, got {', '.join(others)}")
        self.model, self.sequences, self.max_length, self.vocab_size = model, sequences, max_length, vocab_size
        self.device = next(model.parameters()).device
        self.context = StaticInferenceContext(sequences, max_length)
        self.lengths = [0] * sequences
        self.cuda_graph = self.device.type == "cuda" if cuda_graph is None else cuda_graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._token = torch.zeros(sequences, 1, dtype=torch.int64, device=self.device)
        self._logits = torch.zeros(0)

    @torch.no_grad()
    def read(self, place: int, tokens: Tensor, piece: int = PREFILL_TOKENS) -> Tensor:
        """Begin a sequence: read a prompt, int64 [T], `piece` tokens at a time. Returns the last logits, [V] float32.

        Raises:
            ValueError: an empty prompt, or one longer than max_length.
        """
        if not 0 < tokens.numel() <= self.max_length:
            raise ValueError(f"prompt: expected 1 to {self.max_length} tokens, got {tokens.numel()}")
        context = self.context
        context.reset()
        context.batch_size_offset = place
        logits = self._logits
        for part in tokens.to(self.device)[None].split(piece, 1):
            logits = self._forward(part, context)
            context.sequence_len_offset += part.shape[1]
        self.lengths[place] = tokens.numel()
        return logits[0]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Add one token, int64 [B], to every sequence. Returns the logits of the next, [B, V] float32.

        With a CUDA graph the next call writes over what this one returned.

        Raises:
            ValueError: a sequence has no prompt yet, or max_length tokens already.
        """
        if min(self.lengths) == 0:
            raise ValueError(f"step: expected a prompt of every sequence to be read first, got {self.lengths} tokens")
        if max(self.lengths) >= self.max_length:
            raise ValueError(f"max_length: expected room for another token, got {self.max_length} tokens already")
        self.lengths = [length + 1 for length in self.lengths]
        self._token.copy_(tokens[:, None])
        # Where a sequence stands its own layers count; here it only says that this is no beginning.
        self.context.batch_size_offset, self.context.sequence_len_offset = 0, 1
        if not self.cuda_graph:
            return self._forward(self._token, self.context)
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        return self._logits

    def _forward(self, tokens: Tensor, context: StaticInferenceContext) -> Tensor:
        """Logits of the last token, [B, V] float32."""
        first = context.sequence_len_offset
        positions = torch.arange(first, first + tokens.shape[1], device=self.device).expand(tokens.shape[0], -1)
        with InferenceMode.active():
            logits = self.model(tokens, positions, None, inference_context=context, runtime_gather_output=True)
        return logits[:, -1, : self.vocab_size].float()

    def _capture(self) -> None:
        """Record the step as a graph, after trying it out on a memory of its own: compiling cannot be recorded.

        That memory is as short as can be; the kernels that are compiled do not depend on the length.
        """
        other = StaticInferenceContext(self.sequences, TRIALS)
        other.sequence_len_offset = 1
        rehearse(lambda: self._forward(self._token, other), TRIALS)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._forward(self._token, self.context)


def generate(
    model: Any, prompts: Sequence[Tensor], *, max_new_tokens: int, sampling: Sampling, vocab_size: int,
    cuda_graph: bool | None = None, prefill_tokens: int = PREFILL_TOKENS,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the next token of every prompt, int64 [B] on the CPU, max_new_tokens times.

    Args:
        model: as in Memory.
        prompts: int64 [T] each, of any lengths.
        max_new_tokens: of every sequence.
        sampling: how they are drawn.
        vocab_size: ids that may be drawn.
        cuda_graph: see Memory.
        prefill_tokens: of a prompt that are read at once.

    Raises:
        ValueError: no prompt, an empty one, or no token to generate.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    length = max(prompt.numel() for prompt in prompts) + max_new_tokens
    memory = Memory(model, len(prompts), length, vocab_size=vocab_size, cuda_graph=cuda_graph)
    generator = torch.Generator(memory.device).manual_seed(sampling.seed)
    logits = torch.stack([memory.read(place, prompt, prefill_tokens) for place, prompt in enumerate(prompts)])
    for number in range(max_new_tokens):
        tokens = sampling.draw(logits, generator)
        yield tokens.cpu()
        if number + 1 < max_new_tokens:
            logits = memory.step(tokens)
