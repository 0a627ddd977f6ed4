"""The GDN-2 mixer: key-axis erase gate, value-axis write gate, channel-wise decay."""

from __future__ import annotations

from torch import Tensor

from megatron_carve.mixers.base import LinearAttentionMixer, MixerInputs
from megatron_carve.parallel import Span
from megatron_carve.state_passing import chunk_gdn2


class GDN2Mixer(LinearAttentionMixer):
    """Gated DeltaNet-2 (arXiv 2605.22791)."""

    kind = "gdn2"

    def mix(self, inputs: MixerInputs, span: Span) -> Tensor:
        return chunk_gdn2(
            span, inputs.q, inputs.k, inputs.v, inputs.g, inputs.erase,
            inputs.write.unflatten(-1, inputs.v.shape[-2:]),
            **self.decay(self.exchange),
            gate_logits=True,
            erase_scale=self.erase_scale,
            backend=self.backend,
        )  # fmt: skip
