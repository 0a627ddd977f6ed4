"""Programs that work in teams: those of a team wait for each other's results, which pass through memory.

A program takes its place when it starts, not by its number: so all places before it are taken, and the programs that
are there first can always finish, in whatever order and however few at a time a GPU starts them; as many as a team has
must run at once.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def take_place(tickets, TEAM: tl.constexpr):
    """(team, place in it) of this program; `tickets` holds 0 before the launch."""
    ticket = tl.atomic_add(tickets, 1, sem="relaxed", scope="gpu")
    return (ticket // TEAM).to(tl.int64), ticket % TEAM


@triton.jit
def wait_for(counter, least):
    """Wait until another program has announced at least this; what it had stored by then can be read."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < least:
        pass


@triton.jit
def announce(counter, value):
    """Let the programs go on that wait for the counter to reach this value."""
    tl.debug_barrier()  # the stores of all threads come first
    tl.atomic_xchg(counter, value, sem="release", scope="gpu")


@triton.jit
def announced(counter, least):
    """Whether another program has announced at least this; if so, what it had stored by then can be read."""
    return tl.atomic_add(counter, 0, sem="acquire", scope="gpu") >= least


@triton.jit
def announce_one_more(counter):
    """Let the programs go on that wait for so many to have come as far."""
    tl.debug_barrier()  # the stores of all threads come first
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


def make_counters(device: torch.device, *numbers: int) -> tuple[Tensor, ...]:
    """Tensors of at least so many counters each, all of them 0, aligned as memory from torch is."""
    return torch.zeros(len(numbers), -(-max(numbers) // 4) * 4, dtype=torch.int32, device=device).unbind()


def cooperates(device: torch.device) -> bool:
    """Whether programs of a launch can run at the same time; where kernels are interpreted they follow each other."""
    return device.type == "cuda"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; where kernels are interpreted there is one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
