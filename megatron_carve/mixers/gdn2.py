"""The GDN-2 mixer: key-axis erase gate, value-axis write gate, channel-wise decay."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_carve import kernels
from megatron_carve.mixers.base import LinearAttentionMixer, MixerInputs
from megatron_carve.parallel import Span
from megatron_carve.state_passing import chunk_gdn2
from megatron_carve.variants import MixerKind


class GDN2Mixer(LinearAttentionMixer):
    """Gated DeltaNet-2 (arXiv 2605.22791)."""

    kind: ClassVar[MixerKind] = "gdn2"

    def mix(self, inputs: MixerInputs, span: Span) -> Tensor:
        tensors, options = self._arguments(inputs)
        return chunk_gdn2(span, *tensors, **options)

    def mix_from(self, inputs: MixerInputs, state: tuple[Tensor, ...]) -> Tensor:
        tensors, options = self._arguments(inputs)
        (S,) = state
        if inputs.q.shape[1] == 1:
            return kernels.recurrent_gdn2(*tensors, initial_state=S, inplace_state=True, **options)[0]
        o, final = kernels.chunk_gdn2(*tensors, initial_state=S, output_final_state=True, **options)
        assert final is not None
        S.copy_(final)
        return o

    @staticmethod
    def state_shapes(heads: int, K: int, V: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((heads, K, V), torch.float32)]

    def _arguments(self, inputs: MixerInputs) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """What the ops take of these inputs, by position and by name."""
        write = inputs.write.unflatten(-1, inputs.v.shape[-2:])
        return (inputs.q, inputs.k, inputs.v, inputs.g, inputs.erase, write), self._options()

    def _options(self) -> dict[str, Any]:
        options = {"gate_logits": True, "erase_scale": self.erase_scale, "backend": self.backend}
        return self.decay(self.exchange) | options
