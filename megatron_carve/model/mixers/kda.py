"""The KDA mixer: one number per head both erases and writes, with channel-wise decay."""

from __future__ import annotations

from typing import ClassVar

from megatron_carve.kernels import OpCall
from megatron_carve.model.mixers.base import LinearAttentionMixer, MixerInputs
from megatron_carve.model.variants import MixerKind


class KDAMixer(LinearAttentionMixer):
    """Kimi Delta Attention (arXiv 2510.26692): GDN-2 whose erase and write gates are one beta per key head, which the
    value heads of a key head share."""

    kind: ClassVar[MixerKind] = "kda"

    def op_call(self, inputs: MixerInputs) -> OpCall:
        beta, shared = inputs.erase, inputs.v.shape[2] // inputs.q.shape[2]
        write = beta if shared == 1 else beta.repeat_interleave(shared, 2)
        # The op's scale is of the erase gate alone; beta writes with it too.
        v = inputs.v if self.erase_scale == 1.0 else self.erase_scale * inputs.v
        return OpCall(op="gdn2", q=inputs.q, k=inputs.k, v=v, g=inputs.g, b=beta, w=write, **self.shared_options())
