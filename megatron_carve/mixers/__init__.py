"""The token mixers."""

from megatron_carve.mixers.base import LinearAttentionMixer, MixerSubmodules
from megatron_carve.mixers.carve import CarveMixer
from megatron_carve.mixers.gdn2 import GDN2Mixer
from megatron_carve.mixers.kda import KDAMixer
from megatron_carve.variants import MixerKind

MIXERS: dict[MixerKind, type[LinearAttentionMixer]] = {m.kind: m for m in (CarveMixer, GDN2Mixer, KDAMixer)}

__all__ = ["MIXERS", "CarveMixer", "GDN2Mixer", "KDAMixer", "MixerSubmodules"]
