"""The GDN-2 mixer: key-axis erase gate, value-axis write gate, channel-wise decay."""

from __future__ import annotations

from torch import Tensor

from megatron_carve.kernels import chunk_gdn2
from megatron_carve.mixers.base import LinearAttentionMixer, MixerInputs


class GDN2Mixer(LinearAttentionMixer):
    """Gated DeltaNet-2 (arXiv 2605.22791)."""

    kind = "gdn2"

    def mix(self, inputs: MixerInputs, cu_seqlens: Tensor | None) -> Tensor:
        out, _ = chunk_gdn2(
            inputs.q, inputs.k, inputs.v, inputs.g, inputs.erase,
            inputs.write.unflatten(-1, inputs.v.shape[-2:]),
            **self.decay(self.exchange),
            gate_logits=True,
            erase_scale=self.erase_scale,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )  # fmt: skip
        return out
