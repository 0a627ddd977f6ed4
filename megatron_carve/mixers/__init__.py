"""The two token mixers."""

from megatron_carve.mixers.base import MixerSubmodules
from megatron_carve.mixers.carve import CarveMixer
from megatron_carve.mixers.gdn2 import GDN2Mixer

__all__ = ["CarveMixer", "GDN2Mixer", "MixerSubmodules"]
