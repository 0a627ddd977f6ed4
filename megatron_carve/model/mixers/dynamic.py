"""A mixer in Megatron's dynamic inference context, to which its layer is one of Mamba.

Such a context keeps two tensors of a layer and request, of the same shapes in all layers. Here the convolution's holds
the last projected tokens before the short convolution, [taps - 1, channels], and the recurrence's S in its first HV * K
rows of V numbers, then CARVE's mean and partial sum, in HV rows each. The place in a content chunk is not kept: it
follows from a request's position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from megatron_carve.kernels import CarveState, run_chunk, run_recurrent
from megatron_carve.model.context.exchange import Span
from megatron_carve.model.requests import Requests, requests_of_step
from megatron_carve.model.variants import VARIANTS

if TYPE_CHECKING:
    from megatron_carve.model.mixers.base import LinearAttentionMixer


class StateShapes(NamedTuple):
    """Of what a dynamic context keeps of one request in one layer."""

    convolution: tuple[int, ...]
    recurrence: tuple[int, ...]


def state_shapes_per_request(mixer: LinearAttentionMixer) -> StateShapes:
    """What this rank's heads of a mixer need."""
    heads, c = mixer.mixer.num_value_heads // mixer.tp_size, mixer.mixer
    rows = heads * (c.key_head_dim + (2 if _keeps_content(mixer) else 0))
    channels = sum(mixer.local_sizes[name] for name in ("query", "key", "value"))
    return StateShapes((c.taps - 1, channels), (rows, c.value_head_dim))


def mix_requests(mixer: LinearAttentionMixer, context: Any, pieces: Sequence[Tensor]) -> Tensor:
    """Projected tokens of a step, [T, 1, channels] each, to the op's outputs, [1, T, HV, V], zeros for padding.

    What the context holds of the requests in this layer is brought up to date.
    """
    requests, memory = requests_of_step(context), layer_memory(mixer, context)
    outputs = []
    if requests.decoding:
        outputs.append(_next_tokens(mixer, memory, requests, [x[: requests.decoding] for x in pieces]))
    if requests.prompts:
        slots = context.mamba_metadata.batch_indices_prefill[: requests.prompts].long()
        boundaries = context.mamba_metadata.cu_seqlens[: requests.prompts + 1].long()
        mine = [x[requests.prompt_tokens] for x in pieces]
        outputs.append(_prompts(mixer, memory, requests, slots, boundaries, mine))
    rest = requests.tokens - sum(x.shape[1] for x in outputs)
    if rest:
        outputs.append(outputs[0].new_zeros(1, rest, *outputs[0].shape[2:]))
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


def layer_memory(mixer: LinearAttentionMixer, context: Any) -> LayerMemory:
    """What a dynamic context holds of a mixer's layer.

    Raises:
        NotImplementedError: a context that keeps states within prompts too.
    """
    if context.mamba_slot_allocator is not None:
        raise NotImplementedError(
            "inference_context: the mixers do not say what they remember within a prompt, expected "
            "enable_prefix_caching=False, got prefix caching of states"
        )
    return LayerMemory(mixer, *context.mamba_states_cache((mixer.layer_number or 0) - mixer.pp_layer_offset))


def _next_tokens(mixer: LinearAttentionMixer, memory: LayerMemory, requests: Requests, pieces: list[Tensor]) -> Tensor:
    """A token of every request, [N, 1, channels] -> [1, N, HV, V]; of fixed shapes, for a CUDA graph to hold."""
    slots, pieces = requests.slots, [x.transpose(0, 1) for x in pieces]  # [1, N, channels]: requests are a batch
    assert slots is not None
    whose, where = requests.written or (None, slots)
    before = memory.tokens[where]
    inputs = mixer.op_inputs(pieces, Span(None), before)
    after = torch.cat([before, pieces[0].transpose(0, 1)], 1)[:, 1:]
    memory.tokens.index_copy_(0, where, after if whose is None else after[whose])
    state = memory.states(requests.positions[: requests.decoding])
    call = replace(mixer.op_call(inputs), initial_state=state, inplace_state=True, state_rows=slots)
    return run_recurrent(call)[0].transpose(0, 1)


def _prompts(
    mixer: LinearAttentionMixer, memory: LayerMemory, requests: Requests, slots: Tensor, boundaries: Tensor,
    pieces: list[Tensor],
) -> Tensor:  # fmt: skip
    """The next pieces of prompts, packed with `boundaries`, [N + 1] int64: [T, 1, channels] -> [1, T, HV, V]."""
    kept = memory.tokens.shape[1]
    number = torch.arange(requests.prompts, device=slots.device)
    # Room for the `kept` tokens before every piece, whose output is dropped; then the pieces follow each other again.
    begins = boundaries[:-1] + kept * number
    lengths = boundaries.diff()
    tokens = sum(requests.prompt_lengths)
    request = torch.repeat_interleave(number, lengths, output_size=tokens)
    place = torch.arange(tokens, device=slots.device) + kept * (request + 1)
    room = torch.arange(kept, device=slots.device)
    longer = pieces[0].new_zeros(tokens + kept * requests.prompts, *pieces[0].shape[1:])
    longer[place] = pieces[0]
    longer[begins[:, None] + room] = memory.tokens[slots][:, :, None]
    inside = Span(boundaries + kept * torch.arange(requests.prompts + 1, device=slots.device))

    def convolve(x: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        spread = []
        for part in features:
            wide = part.new_zeros(1, longer.shape[0], part.shape[2])
            wide[:, place] = part
            spread.append(wide)
        mixed = mixer.conv(longer.transpose(0, 1), mixer.exchange, inside, mixer.backend, None, *spread)
        return tuple(part[:, place] for part in mixed)

    inputs = mixer.op_inputs(pieces, Span(boundaries), convolve=convolve)
    memory.tokens.index_copy_(0, slots, longer[(begins + lengths)[:, None] + room][:, :, 0])
    state = memory.copy(slots, requests.positions[requests.decoding :])
    call = replace(mixer.op_call(inputs), cu_seqlens=boundaries, initial_state=state, output_final_state=True)
    out, after = run_chunk(call)
    memory.write(slots, after)
    return out


class LayerMemory:
    """What a context holds of one layer, of all its slots."""

    def __init__(self, mixer: LinearAttentionMixer, convolution: Tensor, recurrence: Tensor) -> None:
        c = mixer.mixer
        heads, K = c.num_value_heads // mixer.tp_size, c.key_head_dim
        self.content_chunk = c.content_chunk
        self.tokens = convolution
        self.S = recurrence[:, : heads * K].unflatten(1, (heads, K))
        self.sums: list[Tensor] = []
        if _keeps_content(mixer):
            self.sums = [recurrence[:, heads * (K + i) : heads * (K + i + 1)] for i in range(2)]

    def states(self, positions: Tensor) -> Tensor | CarveState:
        """Of all slots, as they lie; the counts of requests at `positions`."""
        if not self.sums:
            return self.S
        mean, partial = self.sums
        return CarveState(self.S, mean, partial, positions.long() % self.content_chunk)

    def copy(self, slots: Tensor, positions: Tensor) -> Tensor | CarveState:
        """Of the requests in some slots."""
        states = self.states(positions)
        if isinstance(states, Tensor):
            return states[slots]
        return CarveState(states.S[slots], states.mean[slots], states.partial[slots], states.count)

    def write(self, slots: Tensor, state: Tensor | CarveState) -> None:
        parts = [state] if isinstance(state, Tensor) else state[:3]
        for kept, part in zip([self.S, *self.sums], parts, strict=True):
            kept.index_copy_(0, slots, part)


def _keeps_content(mixer: LinearAttentionMixer) -> bool:
    return VARIANTS[mixer.kind].op == "carve"
