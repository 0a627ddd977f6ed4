"""Launches that begin while the one before still runs (programmatic dependent launch, from Hopper on).

A kernel loads what the launch before has not written (weights, and a layer's memory, which that layer alone writes),
then waits for it. As every kernel waits before it lets the next one begin, all but the launch before is complete then,
and what is written from there on, nobody still reads. A launch of another kind lets none begin before its end, but what
it writes need not be seen before the wait either.

Where a launch takes what the one before announces piece by piece (cooperation.py), that one, which itself began when
all before it was complete, lets it begin at once, and waits for nothing: so all its programs have their places before
any of the other's has one. Nothing may be launched between the two.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .special import INTERPRETED

FIRST_CAPABILITY = 9


def overlaps(device: torch.device) -> bool:
    """Whether a GPU has it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= FIRST_CAPABILITY


@triton.jit
def wait_for_launch_before(OVERLAP: tl.constexpr):
    """Nothing that the launch before writes may be read, and nothing at all written, before this."""
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def let_next_launch_begin():
    """As soon as all programs of this launch are here or over: those of the next one may wait for them."""
    if not INTERPRETED:
        cuda.gdc_launch_dependents()


@triton.jit
def end_after_launch_before():
    """For a launch that began beside the one before: what comes after it finds both complete."""
    if not INTERPRETED:
        cuda.gdc_wait()
