"""Megatron's dynamic inference context for a model with mixers: memory of many requests, which come and go.

The context knows two kinds of layers: of attention, whose keys and values lie in blocks, and of Mamba, with a state of
fixed size a request. A mixer is shown to it as the second; see model/mixers/dynamic.py for what is in that state.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.inference.config import InferenceConfig, MambaInferenceStateConfig
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from torch import nn

from megatron_carve.model.attention import WindowedSelfAttention
from megatron_carve.model.convolved_attention import ConvolvedSelfAttention
from megatron_carve.model.mixers.base import LinearAttentionMixer
from megatron_carve.model.mixers.dynamic import StateShapes, state_shapes_per_request

GB = 1024**3


class _ContextOnCpu(DynamicInferenceContext):
    """Without padding, which a CPU would compute like any other token."""

    TOKEN_ROUNDER = REQUEST_ROUNDER = 1


class Layers:
    """What the layers of a model need of a dynamic context.

    Args:
        model: a HybridModel.

    Attributes:
        letters: of the layers as the context knows them.
        config: Megatron's, for the context.
        states: shapes of what a mixer remembers of a request; the largest, as all layers get the same.
        dtypes: of those.

    Raises:
        NotImplementedError: a layer that is none of the mixers, attention as here, without convolution, and MLP.
    """

    def __init__(self, model: Any) -> None:
        mixing = [getattr(layer, "self_attention", None) for layer in model.decoder.layers]
        self.letters = [
            _letter(letter, module, layer)
            for letter, module, layer in zip(model.decoder.layer_type_list, mixing, model.decoder.layers, strict=True)
        ]
        self.config = model.config
        if Symbols.ATTENTION not in self.letters:
            # The context refuses models without attention: it is shown a layer of one channel behind the last.
            self.letters.append(Symbols.ATTENTION)
            self.config = copy.copy(model.config)
            self.config.kv_channels = self.config.num_query_groups = 1
        shapes = [state_shapes_per_request(m) for m in mixing if isinstance(m, LinearAttentionMixer)]
        self.states = StateShapes(*(max(s) for s in zip(*shapes, strict=True))) if shapes else StateShapes((1,), (1,))
        dtype = model.config.params_dtype
        self.dtypes = dtype, torch.promote_types(dtype, torch.float32)

    @property
    def state_bytes(self) -> int:
        """Of one request in all layers."""
        sizes = (torch.Size(s).numel() * d.itemsize for s, d in zip(self.states, self.dtypes, strict=True))
        return self.letters.count(Symbols.MAMBA) * sum(sizes)

    def block_bytes(self, tokens: int) -> int:
        """Of the keys and values of so many tokens in all layers."""
        c = self.config
        groups = max(1, (c.num_query_groups or c.num_attention_heads) // c.tensor_model_parallel_size)
        return 2 * self.letters.count(Symbols.ATTENTION) * tokens * groups * c.kv_channels * c.params_dtype.itemsize


def dynamic_context(
    model: nn.Module, *, max_requests: int, max_tokens: int, max_sequence: int, blocks: int, block_tokens: int = 256,
    cuda_graphs: int | None = None,
) -> DynamicInferenceContext:  # fmt: skip
    """A context for a HybridModel with mixers, on its device; Megatron's own engine takes it too.

    Args:
        model: in evaluation mode, not divided over pipeline stages.
        max_requests: at a time.
        max_tokens: of a step, at least max_requests.
        max_sequence: tokens of a request, prompt and generated together.
        blocks: of keys and values, for all requests together.
        block_tokens: in a block.
        cuda_graphs: sizes at most for which steps that only generate are recorded; None for no graphs.

    Raises:
        NotImplementedError: see Layers.
    """
    layers = Layers(model)
    # one block that belongs to nobody, and one that rounding may cost
    memory = max_requests * layers.state_bytes + (blocks + 2) * layers.block_bytes(block_tokens)
    config = InferenceConfig(
        block_size_tokens=block_tokens,
        buffer_size_gb=memory / GB,  # type: ignore[arg-type]  # a fraction is taken too
        mamba_inference_state_config=MambaInferenceStateConfig(
            layer_type_list=layers.letters,
            conv_states_shape=layers.states.convolution,  # type: ignore[arg-type]
            ssm_states_shape=layers.states.recurrence,  # type: ignore[arg-type]
            conv_states_dtype=layers.dtypes[0],
            ssm_states_dtype=layers.dtypes[1],
        ),
        max_requests=max_requests,
        max_tokens=max_tokens,
        enable_chunked_prefill=True,
        max_sequence_length=max_sequence,
        num_cuda_graphs=cuda_graphs,
        use_cuda_graphs_for_non_decode_steps=False,
    )
    on_cpu = next(model.parameters()).device.type == "cpu"
    return (_ContextOnCpu if on_cpu else DynamicInferenceContext)(layers.config, config)


def _letter(letter: str, mixing: Any, layer: Any) -> str:
    if isinstance(mixing, LinearAttentionMixer):
        return str(Symbols.MAMBA)
    if isinstance(mixing, ConvolvedSelfAttention):
        raise NotImplementedError(
            "dynamic batching: expected model.attention_convolution none; static batching takes it"
        )
    if isinstance(mixing, WindowedSelfAttention):
        return str(Symbols.ATTENTION)
    if letter == Symbols.MLP:
        return letter
    raise NotImplementedError(f"dynamic batching: expected layers of C, 2, K, * and -, got {letter!r}")
