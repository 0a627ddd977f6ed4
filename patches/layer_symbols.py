"""Two more letters in hybrid layer patterns: C for CARVE and 2 for GDN-2."""

from megatron_carve.patches.patch import Patch, Replacement

_SYMBOLS = "megatron.core.models.hybrid.hybrid_layer_allocation:Symbols"

layer_symbols = Patch(
    name="layer_symbols",
    reason="hybrid layer patterns are checked against a closed set of letters",
    upstream="megatron/core/models/hybrid/hybrid_layer_allocation.py, class Symbols",
    remove_when="Megatron-Core lets plugins register layer letters",
    replacements=[
        Replacement(f"{_SYMBOLS}.CARVE", lambda _: "C", new=True),
        Replacement(f"{_SYMBOLS}.GDN2", lambda _: "2", new=True),
        # A new set, so that reverting restores the old one.
        Replacement(f"{_SYMBOLS}.VALID_LAYERS", lambda letters: letters | {"C", "2"}),
    ],
)
