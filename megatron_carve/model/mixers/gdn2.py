"""The GDN-2 mixer: key-axis erase gate, value-axis write gate, channel-wise decay."""

from __future__ import annotations

from typing import ClassVar

from megatron_carve.kernels import OpCall
from megatron_carve.model.mixers.base import LinearAttentionMixer, MixerInputs
from megatron_carve.model.variants import MixerKind


class GDN2Mixer(LinearAttentionMixer):
    """Gated DeltaNet-2 (arXiv 2605.22791)."""

    kind: ClassVar[MixerKind] = "gdn2"

    def op_call(self, inputs: MixerInputs) -> OpCall:
        write = inputs.write.unflatten(-1, inputs.v.shape[-2:])
        return OpCall(
            op="gdn2", q=inputs.q, k=inputs.k, v=inputs.v, g=inputs.g, b=inputs.erase, w=write, **self.shared_options()
        )
