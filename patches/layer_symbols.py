"""The mixers' letters in hybrid layer patterns."""

from functools import partial

from megatron_carve.model.variants import MIXER_LETTERS, VARIANTS, Variant
from megatron_carve.patches.patch import Patch, Replacement


def _letter(variant: Variant, _: object) -> str:
    return variant.letter


_SYMBOLS = "megatron.core.models.hybrid.hybrid_layer_allocation:Symbols"

layer_symbols = Patch(
    name="layer_symbols",
    reason="hybrid layer patterns are checked against a closed set of letters",
    upstream="megatron/core/models/hybrid/hybrid_layer_allocation.py, class Symbols",
    remove_when="Megatron-Core lets plugins register layer letters",
    replacements=[
        *(Replacement(f"{_SYMBOLS}.{v.kind.upper()}", partial(_letter, v), new=True) for v in VARIANTS.values()),
        # A new set, so that reverting restores the old one.
        Replacement(f"{_SYMBOLS}.VALID_LAYERS", lambda letters: letters | set(MIXER_LETTERS)),
    ],
)
