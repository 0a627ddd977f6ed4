"""The token mixers."""

from megatron_carve.model.mixers.base import LinearAttentionMixer, MixerSubmodules
from megatron_carve.model.mixers.carve import CarveMixer
from megatron_carve.model.mixers.gdn2 import GDN2Mixer
from megatron_carve.model.mixers.kda import KDAMixer
from megatron_carve.model.variants import MixerKind

MIXERS: dict[MixerKind, type[LinearAttentionMixer]] = {m.kind: m for m in (CarveMixer, GDN2Mixer, KDAMixer)}

__all__ = ["MIXERS", "CarveMixer", "GDN2Mixer", "KDAMixer", "MixerSubmodules"]
