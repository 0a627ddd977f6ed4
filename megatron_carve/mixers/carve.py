"""The CARVE mixer: an erase gate that also sees the memory, and one scalar write gate per head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_carve import kernels
from megatron_carve.kernels import CarveState
from megatron_carve.mixers.base import LinearAttentionMixer, MixerInputs
from megatron_carve.mixers.parts import tensor_parallel_parameter
from megatron_carve.parallel import Span
from megatron_carve.state_passing import chunk_carve


class CarveMixer(LinearAttentionMixer):
    """CARVE (arXiv 2606.27229), in the reading that the README states."""

    kind = "carve"

    def _build_head_parameters(self) -> None:
        super()._build_head_parameters()
        c = self.mixer
        heads = c.num_value_heads // self.tp_size
        self.content_down = tensor_parallel_parameter(self.config, heads, c.content_rank, c.value_head_dim)
        self.content_up = tensor_parallel_parameter(self.config, heads, c.key_head_dim, c.content_rank)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.content_down, std=0.02)
        # Zero: the layer starts as GDN-2 with a scalar write gate, and content_up gets a gradient at the first step.
        nn.init.zeros_(self.content_up)

    def mix(self, inputs: MixerInputs, span: Span) -> Tensor:
        tensors, options = self._arguments(inputs)
        return chunk_carve(span, *tensors, **options)

    def mix_from(self, inputs: MixerInputs, state: tuple[Tensor, ...]) -> Tensor:
        tensors, options = self._arguments(inputs)
        before = CarveState(*state)
        if inputs.q.shape[1] == 1:
            return kernels.recurrent_carve(*tensors, initial_state=before, inplace_state=True, **options)[0]
        o, after = kernels.chunk_carve(*tensors, initial_state=before, output_final_state=True, **options)
        assert after is not None
        for old, new in zip(before, after, strict=True):
            old.copy_(new)
        return o

    @staticmethod
    def state_shapes(heads: int, K: int, V: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        floats = [(heads, K, V), (heads, V), (heads, V)]
        return [*((shape, torch.float32) for shape in floats), ((), torch.int64)]

    def _arguments(self, inputs: MixerInputs) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """What the ops take of these inputs, by position and by name."""
        content = (self.exchange.share(p) for p in (self.content_down, self.content_up))
        tensors = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.erase, inputs.write, *content)
        options = {
            "gate_logits": True,
            "content_chunk": self.mixer.content_chunk,
            "content_grad": self.mixer.content_grad,
            "erase_scale": self.erase_scale,
            "backend": self.backend,
        }
        return tensors, self.decay(self.exchange) | options
