"""The CARVE mixer: an erase gate that also sees the memory, and one scalar write gate per head."""

from __future__ import annotations

import torch
from torch import nn

from megatron_carve.kernels import OpCall
from megatron_carve.model.mixers.base import LinearAttentionMixer, MixerInputs
from megatron_carve.model.mixers.parts import EraseBias, by_element, replicated_parameter, summed_over_ranks


class CarveMixer(LinearAttentionMixer):
    """CARVE (arXiv 2606.27229). What the paper leaves open is chosen as docs/carve.md says."""

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
            self.content_down = by_element(replicated_parameter(self.config, down))
            self.content_up = by_element(replicated_parameter(self.config, up))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.erase_bias.reset_parameters()

    def reset_replicated_parameters(self) -> None:
        if self.mixer.content_rank:
            nn.init.normal_(self.content_down, std=self.mixer.value_head_dim**-0.5)
            # Zero: the gate begins without content, and content_up gets a gradient at the first step.
            nn.init.zeros_(self.content_up)

    def op_call(self, inputs: MixerInputs) -> OpCall:
        m = self.mixer
        down, up = (getattr(self, name, None) for name in ("content_down", "content_up"))
        return OpCall(
            op="carve", q=inputs.q, k=inputs.k, v=inputs.v, g=inputs.g, b=inputs.erase, w=inputs.write,
            content_down=None if down is None else summed_over_ranks(down, self.config, self.tp_group),
            content_up=None if up is None else summed_over_ranks(up, self.config, self.tp_group),
            erase_bias=self.erase_bias(self.exchange), erase=m.erase, prediction=m.prediction,
            content_chunk=m.content_chunk, content_grad=m.content_grad, **self.shared_options(),
        )  # fmt: skip
