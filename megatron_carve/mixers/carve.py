"""The CARVE mixer: an erase gate that also sees the memory, and one scalar write gate per head."""

from __future__ import annotations

from torch import Tensor, nn

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
        return chunk_carve(
            span, inputs.q, inputs.k, inputs.v, inputs.g, inputs.erase,
            inputs.write, self.exchange.share(self.content_down), self.exchange.share(self.content_up),
            **self.decay(self.exchange),
            gate_logits=True,
            content_chunk=self.mixer.content_chunk,
            content_grad=self.mixer.content_grad,
            erase_scale=self.erase_scale,
            backend=self.backend,
        )  # fmt: skip
