"""Steps of a model in a dynamic inference context, those in which all requests generate as CUDA graphs if wanted."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_carve.use.graphs import rehearse

# Steps before one is recorded as a CUDA graph: compiling cannot be recorded.
TRIALS = 2


class Part(NamedTuple):
    """A request's part of a step.

    Attributes:
        request: its number.
        start: its tokens before the step.
        tokens: where those of the step are.
    """

    request: int
    start: int
    tokens: slice


class Steps:
    """One step after another: begin, logits, end.

    Args:
        model: that the context was made for.
        context: without requests. Graphs are recorded here for the sizes that it lists.
        vocab_size: logits that count; the model's may be padded.
    """

    def __init__(self, model: Any, context: DynamicInferenceContext, vocab_size: int) -> None:
        self.model, self.context, self.vocab_size = model, context, vocab_size
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        for dimensions in context.cuda_graph_batch_dimensions_list:
            self._record(dimensions)

    def read(self, request: DynamicInferenceRequest, room: int) -> bool:
        """Let a request's next tokens of its prompt, `room` at most, take part in the step; whether that is its rest.

        One whose prompt is partly read comes first in the next step, before others begin.
        """
        rest = request.remaining_prompt_length
        piece = min(rest, room)
        if rest - piece == 1 and piece > 1:
            piece -= 1  # Megatron leaves FlashAttention no last piece of one token either
        whole = piece == rest
        self.context.chunked_prefill_request_id = -1
        self.context.add_request(request, prefill_chunk_length=piece)
        request.remaining_prompt_tokens = request.remaining_prompt_tokens[piece:]
        if not whole:
            self.context.chunked_prefill_request_id = request.request_id
            request.finished_chunk_token_count += piece
        return whole

    def drop_partly_read(self) -> None:
        """Forget the request whose prompt is partly read, between two steps."""
        context = self.context
        row = context.get_index_of_chunked_prefill_request(safe=False)
        context.release_memory_blocks_from_request_indexes(torch.tensor([row]))
        context.request_ids[row] = context.chunked_prefill_request_id = -1

    def begin(self) -> list[Part]:
        """Lay out the step; its requests in the order of their logits."""
        context = self.context
        context.initialize_attention_state()
        active = slice(context.paused_request_count, context.total_request_count)
        starts, lengths = context.request_kv_length_offsets[active], context.request_query_lengths[active]
        ends = lengths.cumsum(0)
        rows = zip(context.request_ids[active].tolist(), starts.tolist(), lengths.tolist(), ends.tolist(), strict=True)
        return [Part(number, start, slice(end - length, end)) for number, start, length, end in rows]

    @torch.no_grad()
    def logits(self, all_tokens: bool = False) -> Tensor:
        """Of the requests' last tokens, [N, V], or of all tokens of the step, [T, V]; float32. The next step may write
        over them."""
        if self.context.using_cuda_graph_this_step():
            graph, logits = self._graphs[self.context.padded_active_token_count]
            graph.replay()
            return logits[: self.context.get_active_request_count()]
        self.context.config.materialize_only_last_token_logits = not all_tokens
        return self._forward()

    def end(self, tokens: Tensor, goes_on: list[bool]) -> None:
        """Give every request its next token, [N] int64 on the CPU; those that do not go on are forgotten, with their
        memory."""
        self.context.update_requests(torch.tensor(goes_on, dtype=torch.int32), tokens)
        if self.context.paused_request_count:
            raise RuntimeError("dynamic inference context: expected room for all requests, got some put off")

    def _forward(self) -> Tensor:
        tokens, positions = self.context.current_input_and_position_ids()
        with InferenceMode.active():
            logits = self.model(tokens, positions, None, inference_context=self.context, runtime_gather_output=True)
        return logits[0, :, : self.vocab_size].float()

    def _record(self, dimensions: Any) -> None:
        """Keep a graph of the steps of one size, made of requests that Megatron makes up."""
        self.context.config.materialize_only_last_token_logits = True
        self.context.initialize_attention_state(construct_graph_dimensions=dimensions)
        self._graphs[dimensions.token_count] = self._capture()
        self.context.reset()

    @torch.no_grad()
    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        rehearse(self._forward, TRIALS)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = self._forward()
        return graph, logits
