"""The requests of one step of Megatron's dynamic inference context, as the layers see them.

A step's tokens are one row: a token of every request that generates, then the next piece of every prompt that is being
read, then padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Requests:
    """What a step does for whom. Tensors are on the model's device, and in a CUDA graph those that it reads.

    Attributes:
        tokens: of the step, padding included.
        decoding: requests that generate, with one token each. In a CUDA graph the last may be padding, else none is.
        prompts: requests of which a prompt's next tokens are read.
        positions: [decoding + prompts] int32, tokens of a request before this step.
        slots: [decoding] int64, where the context keeps the states of those that generate; less than 0 for padding.
        written: in a CUDA graph [decoding] int64 each: which request's tokens before its convolution each one writes,
            and where. Padding repeats what the first one writes, which is never padding.
        prompt_starts, prompt_lengths: of the prompts on the host, tokens before this step and in it.
    """

    tokens: int
    decoding: int
    prompts: int
    positions: Tensor
    slots: Tensor | None
    written: tuple[Tensor, Tensor] | None
    prompt_starts: list[int]
    prompt_lengths: list[int]

    @property
    def prompt_tokens(self) -> slice:
        """Where the prompts' pieces are among the step's tokens."""
        return slice(self.decoding, self.decoding + sum(self.prompt_lengths))


def set_requests(context: Any) -> None:
    """Work out a step's requests once for all layers, where every forward begins: its CUDA graph must hold that too."""
    context.requests = _requests(context)


def requests_of_step(context: Any) -> Requests:
    """The requests of a DynamicInferenceContext after its initialize_attention_state; nothing is read from the device.

    Raises:
        NotImplementedError: a context for speculative decoding, or a step with prompts in a CUDA graph.
    """
    # Nothing is set where a layer is a CUDA graph by itself, or its model has no stack of ours.
    return context.requests if hasattr(context, "requests") else _requests(context)


def _requests(context: Any) -> Requests:
    if context.num_speculative_tokens:
        raise NotImplementedError("inference_context: the mixers support no speculative decoding, got a context for it")
    in_graph = context.using_cuda_graph_this_step()
    padded, real = context.padded_batch_dimensions, context.batch_dimensions
    if in_graph and padded.prefill_req_count:
        raise NotImplementedError(
            "inference_context: prompts are read outside of CUDA graphs, expected "
            "use_cuda_graphs_for_non_decode_steps=False, got True"
        )
    decoding, prompts = padded.decode_req_count if in_graph else real.decode_req_count, real.prefill_req_count
    first = context.paused_request_count + decoding
    read = slice(first, first + prompts)
    slots = written = None
    if decoding and context.mamba_metadata is not None:
        slots = context.mamba_metadata.batch_indices_decode[:decoding]
        if in_graph:
            whose = torch.arange(decoding, device=slots.device).masked_fill(slots < 0, 0)
            written = whose, slots[whose]
    return Requests(
        tokens=padded.token_count,
        decoding=decoding,
        prompts=prompts,
        positions=context.gpu_view.request_kv_length_offsets[: decoding + prompts],
        slots=slots,
        written=written,
        prompt_starts=context.request_kv_length_offsets[read].tolist(),
        prompt_lengths=context.request_query_lengths[read].tolist(),
    )
