"""GDN-2's chain of chunks cut into segments that run side by side, where heads are few and sequences long.

What a segment does to a state is affine, S -> M S + N. So the chain runs twice, both times through all segments at
once: first from zero, for N, and from an identity, for M; then from the states that enter the segments, which follow
from all M and N one after another. Backward a state's gradient goes through a segment as dS -> M^T dS + N', with the
same M.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cooperation import multiprocessors
from .launching import launch
from .products import matmul
from .stages import HOPPER, Call, Tuning

# Two runs through segments cost as much as one through all, where there are fewer.
FEWEST = 4
# Chunks of a segment: to enter one takes as long as two chunks, and its transition, which is kept for the backward, as
# much memory as what is kept of one and a half.
SHORTEST = 16
TUNING = {HOPPER: Tuning(0, 64, 8)}


class Segments(NamedTuple):
    """As many segments of each sequence, and the index of each one's first chunk, [N of_sequence + 1] int64."""

    of_sequence: int
    first: Tensor


def segments_of(call: Call, programs: int) -> Segments | None:
    """The segments of a call whose chain has so many programs, or None where one chain a sequence is as fast.

    Sequences whose lengths are known on the device alone have none.
    """
    chunks = call.chunks
    if chunks.spare or chunks.sequences == 0:
        return None
    available = multiprocessors(chunks.first.device) // programs
    most = min(available, chunks.count // chunks.sequences // SHORTEST)
    return segments_of_sequences(call, 1 << (most.bit_length() - 1)) if most >= FEWEST else None


def segments_of_sequences(call: Call, count: int) -> Segments:
    """So many segments of each sequence of a call."""
    chunks = call.chunks
    of_sequence = chunks.count // chunks.sequences
    return Segments(count, _first_chunks(chunks.sequences, of_sequence, count, chunks.first.device))


@functools.lru_cache(maxsize=64)
def _first_chunks(sequences: int, chunks: int, segments: int, device: torch.device) -> Tensor:
    begin = torch.arange(segments, device=device) * chunks // segments
    first = (torch.arange(sequences, device=device)[:, None] * chunks + begin).flatten()
    return torch.cat([first, first.new_full((1,), sequences * chunks)])


@triton.jit
def entering_states_kernel(
    states, transitions, effects, entering, segments, H, HV,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, GIVEN: tl.constexpr, BACK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, value head and block of value columns.

    states: [N, HV, K, V], those that enter the sequences, or None; transitions: M, [N segments, H, K, K];
    effects: N, [N segments, HV, K, V]; entering: like it, what enters each segment. BACK: gradients, which come from
    the last segment on. All float32.
    """
    i_n, i_hv = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    o_k, o_v = tl.arange(0, K), tl.program_id(1) * BV + tl.arange(0, BV)
    o_S, o_M = o_k[:, None] * V + o_v[None, :], o_k[:, None] * K + o_k[None, :]
    b_S = tl.zeros([K, BV], tl.float32)
    if GIVEN:
        b_S += tl.load(states + (i_n * HV + i_hv) * K * V + o_S)
    for i in range(segments):
        i_s = i_n * segments + (segments - 1 - i if BACK else i)
        p_S = (i_s * HV + i_hv) * K * V + o_S
        tl.store(entering + p_S, b_S)
        b_M = tl.load(transitions + (i_s * H + i_hv // (HV // H)) * K * K + o_M)
        if BACK:
            b_M = tl.trans(b_M)
        b_S = tl.load(effects + p_S) + matmul(b_M, b_S, tl.float32, PRECISION)


def entering_states(
    call: Call, segments: Segments, states: Tensor | None, transitions: Tensor, effects: Tensor, back: bool
) -> Tensor:
    """What enters each segment, [N segments, HV, K, V] float32; see entering_states_kernel."""
    entering = torch.empty_like(effects)
    BV = call.value_block(TUNING)
    launch(
        entering_states_kernel, (call.chunks.sequences * call.HV, call.V // BV),
        states, transitions, effects, entering, segments.of_sequence, call.H, call.HV,
        K=call.K, V=call.V, BV=BV, GIVEN=states is not None, BACK=back, PRECISION=call.arithmetic["PRECISION"],
        **call.tuning(TUNING).launch(torch.float32, call.K, BV),
    )  # fmt: skip
    return entering
