"""The ops on shards of sequences: every rank of a group holds one, in order, and starts from the state before its own.

GDN-2's and KDA's transition does not depend on the state: from shard to shard S becomes M S + N, and an output o + E S.
So all ranks run at once. M and E are what the op makes of the columns of an identity in place of a state, without
values: more value heads of the same call. Every rank then puts the (M, N) of the ranks before it together.

CARVE's gates see the state through the content, so its ranks run one after another, each from the state that it
receives (without content too, where they need not).
While one works on some heads, the next can work on heads that are done before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_carve.kernels import CarveState, OpCall, run_chunk
from megatron_carve.model.context.exchange import Span

# Heads and sequences that one turn of CARVE's ranks takes. The op runs a program for each, and a GPU about this many
# side by side: fewer would take as long, and make the ranks' turns more.
PROGRAMS_IN_TURN = 128

# What of a call belongs to tokens, [B, T, heads, ...], and what to heads.
BY_TOKEN = ("q", "k", "v", "g", "b", "w")
BY_HEAD = ("A_log", "dt_bias", "erase_bias")


def with_tokens_before(x: Tensor, span: Span, tokens: int) -> tuple[Tensor, Tensor | None]:
    """A shard x, [B, T, D], with the last `tokens` of the shard before in front (zeros on the first rank).

    Returns:
        [B, tokens + T, D] and the boundaries of packed documents in it.

    Raises:
        ValueError: a shard with fewer tokens.
    """
    if x.shape[1] < tokens:
        raise ValueError(
            f"context parallelism by sequence: expected at least conv_width - 1 = {tokens} tokens on a rank, got "
            f"{x.shape[1]}"
        )
    rank, size = span.group.rank(), span.group.size()
    to_next, from_last = ([tokens * (other == rank + step) for other in range(size)] for step in (1, -1))
    tail = x[:, x.shape[1] - tokens :].transpose(0, 1)[: sum(to_next)]
    before = all_to_all(span.group, tail, from_last, to_next).transpose(0, 1)
    missing = x.new_zeros(x.shape[0], tokens - before.shape[1], x.shape[2])
    boundaries = None
    if span.whole_cu_seqlens is not None:
        first = rank * x.shape[1] - tokens
        boundaries = (span.whole_cu_seqlens - first).clamp(0, tokens + x.shape[1])
        boundaries[0] = 0  # on the first rank the zeros in front belong to the first document
    return torch.cat([missing, before, x], 1), boundaries


def chunk_on_span(span: Span, call: OpCall) -> Tensor:
    """What a chunk op makes of a span of the sequences.

    Args:
        call: of either op, of this rank's tokens, without what is said of states and packing; D and U are for all
            heads.

    Returns:
        o, [B, T, HV, V].
    """
    call = replace(call, cu_seqlens=span.cu_seqlens)
    if span.group is None:
        return run_chunk(call)[0]
    return _in_turns(span, call) if call.op == "carve" else _at_once(span, call)


def _at_once(span: Span, call: OpCall) -> Tensor:
    """GDN-2: all ranks run at once, and put together what the ranks before them do to a state."""
    assert span.group is not None and span.enters is not None
    (H, K), (HV, V) = call.q.shape[2:], call.v.shape[2:]
    more = -(-K // V)  # value heads, per key head, that hold the columns of an identity

    def with_more_heads(x: Tensor) -> Tensor:
        x = x.unflatten(2, (H, -1))
        return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 4) + (0, more)).flatten(2, 3)

    identity = torch.eye(K, more * V, dtype=torch.float32, device=call.q.device)
    identity = identity.unflatten(1, (more, V)).transpose(0, 1)
    state = identity.new_zeros(len(span.enters), H, HV // H + more, K, V)
    state[:, :, HV // H :] = identity * span.enters[:, None, None, None, None]
    o, final = run_chunk(
        replace(
            call,
            v=with_more_heads(call.v),
            w=with_more_heads(call.w),
            output_final_state=True,
            initial_state=state.flatten(1, 2).to(call.state_dtype),
        )
    )
    shards = gather_from_sequence_parallel_region(_leaving(final, span)[None].contiguous(), group=span.group)
    N, M = shards.unflatten(2, (H, -1)).split([HV // H, more], 3)  # [ranks, B, H, heads, K, V]
    M = M.transpose(3, 4).flatten(4)[..., :K]
    S = [torch.zeros_like(N[0])]
    for i in range(span.group.size() - 1):
        S.append(M[i][:, :, None] @ S[-1] + N[i])
    # every rank computes all of them, so that every rank takes part in the collective of the backward
    S_before = torch.stack(S)[span.group.rank()]
    o, E = o.unflatten(2, (H, -1)).split([HV // H, more], 3)
    E = E.flatten(3)[..., :K]
    return (o + torch.einsum("bthk,bhnkv->bthnv", E, S_before.to(E.dtype))).flatten(2, 3)


def _in_turns(span: Span, call: OpCall) -> Tensor:
    """CARVE: every rank waits for the state of the rank before, of some heads at a time."""
    assert span.group is not None and span.enters is not None and span.before is not None
    (B, _, H, K), (HV, V) = call.q.shape, call.v.shape[2:]
    count = span.before % call.content_chunk
    turns = carve_turns(B, H, HV)
    by_turn = _divided(call, BY_TOKEN, turns, 2), _divided(call, BY_HEAD, turns, 0)
    sizes = [K * V, V, V]  # of S, mean and partial: they travel in one message
    given = [getattr(call, name) for name in (*BY_TOKEN, "content_down", "content_up", *BY_HEAD)]
    turn = _Turn.apply(*(x for x in given if x is not None))
    outputs = []
    for by_token, by_head in zip(*by_turn, strict=True):
        received, turn = _TakeOver.apply(turn, (B, HV // turns, sum(sizes)), call.state_dtype, span.group)
        entering = torch.where(span.enters[:, None, None], received, 0.0)
        S, mean, partial = entering.split(sizes, -1)
        initial = CarveState(S.unflatten(-1, (K, V)), mean, partial, count)
        o, final = run_chunk(replace(call, **by_token, **by_head, initial_state=initial, output_final_state=True))
        passed = torch.cat([final.S.flatten(2), final.mean, final.partial], -1)
        o, turn = _PassOn.apply(o, turn, _leaving(passed, span), span.group)
        outputs.append(o)
    return torch.cat(outputs, 2)


def _divided(call: OpCall, names: Sequence[str], parts: int, dim: int) -> list[dict[str, Any]]:
    """These tensors of a call, those that it has, divided along one dimension."""
    pieces = {name: x.chunk(parts, dim) for name in names if (x := getattr(call, name)) is not None}
    return [{name: x[i] for name, x in pieces.items()} for i in range(parts)]


def carve_turns(sequences: int, key_heads: int, value_heads: int) -> int:
    """Into how many groups of key heads the ranks' turns are divided."""
    wanted = max(sequences * value_heads // PROGRAMS_IN_TURN, 1)
    return max(n for n in range(1, key_heads + 1) if key_heads % n == 0 and n <= wanted)


def _leaving(states: Tensor, span: Span) -> Tensor:
    """Of [N, ...] final states the one of each of B sequences that goes on on the next rank, zeros where none does."""
    assert span.leaves is not None
    leaving = torch.where(span.leaves.view(-1, *[1] * (states.ndim - 1)), states, 0.0)
    return leaving if span.cu_seqlens is None else leaving.sum(0, keepdim=True)


class _Turn(torch.autograd.Function):
    """What makes a rank's messages follow each other, in the backward in reverse: a number that all pass through.

    It comes from all inputs, without a gradient for them, so that the messages are sent whichever of them needs one.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.inputs = len(inputs)
        return torch.zeros((), device=inputs[0].device)

    @staticmethod
    def backward(ctx: Any, d_turn: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.inputs


class _TakeOver(torch.autograd.Function):
    """Receive the state of the rank before; in the backward send it its gradient. Zeros on the first rank."""

    @staticmethod
    def forward(
        ctx: Any, turn: Tensor, shape: tuple[int, ...], dtype: torch.dtype, group: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.group = group
        state = turn.new_zeros(shape, dtype=dtype)
        if group.rank() > 0:
            dist.recv(state, group=group, group_src=group.rank() - 1)
        return state, turn.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_state: Tensor, d_turn: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.group.rank() > 0:
            dist.send(d_state.contiguous(), group=ctx.group, group_dst=ctx.group.rank() - 1)
        return d_turn, None, None, None


class _PassOn(torch.autograd.Function):
    """Send a state to the next rank; in the backward receive its gradient. Zeros on the last rank."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, turn: Tensor, state: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.state = group, (state.shape, state.dtype)
        # Where the forward is computed again in the backward, asking for what was saved here is what begins it: before
        # this rank waits for the next one, which waits for the state that this rank sends it then.
        ctx.save_for_backward(turn)
        if group.rank() < group.size() - 1:
            dist.send(state.contiguous(), group=group, group_dst=group.rank() + 1)
        return o.view_as(o), turn.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_o: Tensor, d_turn: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        _ = ctx.saved_tensors
        shape, dtype = ctx.state
        d_state = d_o.new_zeros(shape, dtype=dtype)
        if ctx.group.rank() < ctx.group.size() - 1:
            dist.recv(d_state, group=ctx.group, group_src=ctx.group.rank() + 1)
        return d_o, d_turn, d_state, None
