"""The token mixers, in one table: what tells one from another, read by all that must know them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MixerKind = Literal["carve", "gdn2", "kda"]


@dataclass(frozen=True)
class Variant:
    """One mixer.

    Attributes:
        letter: of its layers in a hybrid pattern.
        kind: by which code names it.
        name: by which people do.
        source: the paper.
        op: of megatron_carve.kernels, that computes its recurrence.
        erase: whose own erase gate it has: each key channel's, or none, and the write gate also erases.
        write: whose the write gate is.
        sees_state: its erase gate has a bias and takes in content, and its A_log is of each key channel, not key head.
    """

    letter: str
    kind: MixerKind
    name: str
    source: str
    op: Literal["gdn2", "carve"]
    erase: Literal["key_channels", "none"]
    write: Literal["value_channels", "value_heads", "key_heads"]
    sees_state: bool = False


VARIANTS: dict[MixerKind, Variant] = {
    v.kind: v
    for v in (
        Variant("C", "carve", "CARVE", "arXiv 2606.27229", "carve", "key_channels", "value_heads", sees_state=True),
        Variant("2", "gdn2", "GDN-2", "arXiv 2605.22791", "gdn2", "key_channels", "value_channels"),
        Variant("K", "kda", "KDA", "arXiv 2510.26692", "gdn2", "none", "key_heads"),
    )
}

MIXER_LETTERS: dict[str, MixerKind] = {v.letter: v.kind for v in VARIANTS.values()}
