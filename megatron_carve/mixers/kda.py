"""The KDA mixer: one number per head both erases and writes, with channel-wise decay."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from megatron_carve.mixers.base import MixerInputs
from megatron_carve.mixers.gdn2 import GDN2Mixer
from megatron_carve.variants import MixerKind


class KDAMixer(GDN2Mixer):
    """Kimi Delta Attention (arXiv 2510.26692): GDN-2 whose erase and write gates are one beta per key head, which the
    value heads of a key head share."""

    kind: ClassVar[MixerKind] = "kda"

    def _arguments(self, inputs: MixerInputs) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        beta, shared = inputs.erase, inputs.v.shape[2] // inputs.q.shape[2]
        write = beta if shared == 1 else beta.repeat_interleave(shared, 2)
        # The op's scale is of the erase gate alone; beta writes with it too.
        v = inputs.v if self.erase_scale == 1.0 else self.erase_scale * inputs.v
        return (inputs.q, inputs.k, v, inputs.g, beta, write), self._options()
