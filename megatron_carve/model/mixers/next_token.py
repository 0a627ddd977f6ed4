"""A mixer's step of one token of every sequence, from its projection on in one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_carve.kernels import CarveState
from megatron_carve.kernels.backends import HEAD_WIDTHS
from megatron_carve.kernels.decoding import mix_token
from megatron_carve.kernels.token_call import FEW_SEQUENCES, TokenCall
from megatron_carve.model.mixers.dynamic import layer_memory
from megatron_carve.model.mixers.parts import (
    EraseBias,
    GatedHeadNorm,
    HeadParallelLinear,
    LogDecay,
    PlainActivation,
    ShortConvolution,
)
from megatron_carve.model.requests import requests_of_step
from megatron_carve.model.variants import VARIANTS

if TYPE_CHECKING:
    from megatron_carve.model.mixers.base import LinearAttentionMixer

# What a mixer has between its projections; of dynamic taps and of adapted maps the kernel knows nothing.
PARTS = (ShortConvolution, PlainActivation, HeadParallelLinear, LogDecay, EraseBias, GatedHeadNorm)

# Numbers in the states of a key head's value heads, tiles of which the kernel takes one after another without a loop:
# of more it compiles for longer than it could save.
MOST_NUMBERS = 65536


def is_one_token(context: Any, hidden_states: Tensor) -> bool:
    """Whether hidden_states, [T, B, hidden], are one token of every sequence of an inference context.

    In a dynamic one T counts requests, all of which generate, and B is 1; padding counts where it has slots, of nobody.
    """
    if context.is_static_batching():
        return hidden_states.shape[0] == 1
    requests = requests_of_step(context)
    return not requests.prompts and requests.decoding == hidden_states.shape[0]


def mixes_in_one_launch(mixer: LinearAttentionMixer) -> bool:
    """Whether the kernel has what this mixer computes between its projections."""
    c, projections = mixer.mixer, ("in_proj", "out_proj")
    return (
        all(type(part) in PARTS for name, part in mixer.named_children() if name not in projections)
        and not any(map(is_hooked, mixer.modules()))
        and mixer.exchange.size == 1
        and c.key_head_dim in HEAD_WIDTHS
        and c.value_head_dim in HEAD_WIDTHS
        and c.num_value_heads // c.num_key_heads * c.key_head_dim * c.value_head_dim <= MOST_NUMBERS
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody watches or replaces what a module computes."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def mix_next_token(
    mixer: LinearAttentionMixer, context: Any, hidden: Tensor, project: Callable[[Tensor], Tensor]
) -> Tensor:
    """From hidden states, [N, hidden], to what out_proj takes, [N, HV * V]; memory is brought up to date.

    Args:
        context: static or dynamic.
        project: to [N, sections], the norm before included.
    """
    # Before the projection, during which the kernel may begin to read it: whatever clears it must be done by then.
    memory = _memory(mixer, context, hidden)
    projected, sizes = project(hidden), mixer.local_sizes
    convolved = sizes["query"] + sizes["key"] + sizes["value"]
    parts = dict(zip(list(sizes)[3:], projected[:, convolved:].split(list(sizes.values())[3:], 1), strict=True))
    call = TokenCall(
        convolved=projected[:, :convolved], erase=parts.get("erase"), write=parts["write"],
        write_gates=VARIANTS[mixer.kind].write, key_heads=sizes["key"] // mixer.mixer.key_head_dim,
        taps=getattr(mixer.conv, "weight", None), convolution_bias=getattr(mixer.conv, "bias", None),
        norm_weight=mixer.out_norm.weight, eps=mixer.out_norm.eps, activation=mixer.out_norm.activation,
        **_decay_and_gate(mixer, parts["decay"], parts.get("gate")), **_erase(mixer), **memory,
    )  # fmt: skip
    return mix_token(call, mixer.backend)


def _memory(mixer: LinearAttentionMixer, context: Any, hidden: Tensor) -> dict[str, Any]:
    """What a context keeps of this layer, and of a dynamic one which slots are whose."""
    if context.is_static_batching():
        cache = mixer.cache(context, hidden[None])
        return {"kept": cache.tokens, "state": _state(*cache.state)}
    requests, memory = requests_of_step(context), layer_memory(mixer, context)
    positions = requests.positions[: requests.decoding]
    # Where they are in a content chunk follows from positions: nobody reads that count.
    state = _state(memory.S, *memory.sums, *([positions] if memory.sums else []))
    return {"kept": memory.tokens, "state": state, "rows": requests.slots, "positions": positions}


def _state(*parts: Tensor) -> CarveState | tuple[Tensor]:
    return CarveState(*parts) if len(parts) > 1 else (parts[0],)


def _decay_and_gate(mixer: LinearAttentionMixer, decay: Tensor, gate: Tensor | None) -> dict[str, Any]:
    """Raw decay and output gate, or what they are made of."""
    A_log, dt_bias = mixer.decay(mixer.exchange).values()
    found: dict[str, Any] = {"A_log": A_log, "dt_bias": dt_bias, "decay": decay, "gate": gate}
    if mixer.tp_size > 1:  # features are spread over the ranks
        part = mixer.whole_features({"decay": decay[None]} | ({} if gate is None else {"gate": gate[None]}))
        expanded = mixer.raw_decay_and_gate(part["decay"], part.get("gate"))
        return found | {n: None if x is None else x[0] for n, x in zip(("decay", "gate"), expanded, strict=True)}
    inside = decay.shape[0] <= FEW_SEQUENCES
    if mixer.mixer.decay_projection == "low_rank":
        up = mixer.decay_up.weight
        found |= {"decay_up": up} if inside else {"decay": F.linear(decay, up)}
    if mixer.mixer.has_low_rank_gate and gate is not None:
        up, bias = mixer.gate_up.weight, mixer.gate_up.bias
        found |= {"gate_up": up, "gate_bias": bias} if inside else {"gate": F.linear(gate, up, bias)}
    return found


def _erase(mixer: LinearAttentionMixer) -> dict[str, Any]:
    """How the erase gate is formed, and CARVE's parts of it."""
    c, found = mixer.mixer, {"erase_scale": mixer.erase_scale}
    if VARIANTS[mixer.kind].op != "carve":
        return found
    maps = {name: getattr(mixer, name, None) for name in ("content_down", "content_up")}
    chosen = {"erase_form": c.erase, "prediction": c.prediction, "content_chunk": c.content_chunk}
    return found | maps | chosen | {"erase_bias": mixer.erase_bias(mixer.exchange)}
