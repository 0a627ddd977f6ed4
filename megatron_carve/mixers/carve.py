"""The CARVE mixer: an erase gate that also sees the memory, and one scalar write gate per head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_carve import kernels
from megatron_carve.kernels import CarveState
from megatron_carve.mixers.base import LinearAttentionMixer, MixerInputs
from megatron_carve.mixers.parts import EraseBias, replicated_parameter, summed_over_ranks
from megatron_carve.parallel import Span
from megatron_carve.state_passing import chunk_carve


class CarveMixer(LinearAttentionMixer):
    """CARVE (arXiv 2606.27229). What the paper leaves open is chosen as the README says."""

    kind = "carve"

    def _build_head_parameters(self) -> None:
        super()._build_head_parameters()
        c = self.mixer
        heads = c.num_key_heads // self.tp_size
        self.erase_bias = EraseBias(self.config, heads, c.key_head_dim, initial=c.initial_erase_bias)
        if c.content_rank:  # one pair of maps for all heads
            options = {"dtype": self.config.params_dtype, "device": torch.cuda.current_device()}
            down = torch.empty(c.content_rank, c.value_head_dim, **options)
            up = torch.empty(c.key_head_dim, c.content_rank, **options)
            self.content_down = replicated_parameter(self.config, down)
            self.content_up = replicated_parameter(self.config, up)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.erase_bias.reset_parameters()

    def reset_replicated_parameters(self) -> None:
        if self.mixer.content_rank:
            nn.init.normal_(self.content_down, std=self.mixer.value_head_dim**-0.5)
            # Zero: the gate begins without content, and content_up gets a gradient at the first step.
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
        tensors = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.erase, inputs.write)
        options: dict[str, Any] = {
            "erase": self.mixer.erase,
            "prediction": self.mixer.prediction,
            "erase_bias": self.erase_bias(self.exchange),
            "erase_scale": self.erase_scale,
            "content_chunk": self.mixer.content_chunk,
            "content_grad": self.mixer.content_grad,
            "gate_logits": True,
            "backend": self.backend,
        }
        for name in ("content_down", "content_up"):
            shared = getattr(self, name, None)
            options[name] = None if shared is None else summed_over_ranks(shared, self.config, self.tp_group)
        return tensors, self.decay(self.exchange) | options
