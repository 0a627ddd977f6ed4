"""One collective left out of a run, for the proof that the comparison of layouts sees it."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _OwnGradient(torch.autograd.Function):
    """Another function's output, whose gradient is this rank's own part of it, not summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Tensor, rank: int, axis: int) -> Tensor:
        ctx.ranks, ctx.rank, ctx.axis = whole.shape[axis] // x.shape[axis], rank, axis
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None, None]:
        return d.chunk(ctx.ranks, ctx.axis)[ctx.rank].contiguous(), None, None, None


def _without_sum(gather: Callable[..., Tensor], axis: int) -> Callable[..., Tensor]:
    def mutant(x: Tensor, group: Any) -> Tensor:
        with torch.no_grad():
            whole = gather(x, group=group)
        return _OwnGradient.apply(x, whole, group.rank(), axis)

    return mutant


def _take_marks(kind: type, builder: str, *names: str) -> None:
    """Let a method that builds these parameters leave out their mark of sequence parallelism."""
    build = getattr(kind, builder)

    def unmarked(self: Any, *arguments: Any) -> None:
        build(self, *arguments)
        for name in names:
            getattr(self, name).sequence_parallel = False

    setattr(kind, builder, unmarked)


def norm_weight() -> None:
    """The all-reduce of the gradient of the output norm's weight."""
    from megatron_carve.model.mixers import parts

    parts.copy_to_tensor_model_parallel_region = lambda x, group: x


def norm_weight_mark() -> None:
    """The mark by which Megatron sums that gradient under sequence parallelism."""
    from megatron_carve.model.mixers.parts import GatedHeadNorm

    _take_marks(GatedHeadNorm, "__init__", "weight")


def content_maps() -> None:
    """The all-reduces of the gradients of CARVE's content maps."""
    from megatron_carve.model.mixers import carve

    carve.summed_over_ranks = lambda parameter, *_: parameter


def content_maps_mark() -> None:
    """The mark by which Megatron sums these gradients under sequence parallelism."""
    from megatron_carve.model.mixers.carve import CarveMixer

    _take_marks(CarveMixer, "_build_head_parameters", "content_down", "content_up")


def tap_features() -> None:
    """The all-reduce of the gradient of the features of attention's dynamic taps."""
    from megatron_carve.model import convolved_attention

    convolved_attention.copy_to_tensor_model_parallel_region = lambda x, group: x


def tap_features_mark() -> None:
    """The mark by which Megatron sums the gradient of their projection under sequence parallelism."""
    from megatron_carve.model.convolved_attention import TapFeatures

    _take_marks(TapFeatures, "__init__", "weight")


def low_rank() -> None:
    """The reduction of the gradient of the low-rank features."""
    from megatron_carve.model.mixers import base

    name = "all_gather_last_dim_from_tensor_parallel_region"
    setattr(base, name, _without_sum(getattr(base, name), -1))


def tokens_for_heads() -> None:
    """Both all-to-alls of the exchange of tokens for heads."""
    from megatron_carve.model.context import exchange

    exchange.all_to_all = lambda group, x, *splits: x


def tokens_before() -> None:
    """The last tokens of the shard before, which the convolution needs: zeros instead."""
    from megatron_carve.model.context import state_passing

    state_passing.all_to_all = lambda group, x, received, sent: x.new_zeros(sum(received), *x.shape[1:]) + 0 * x.sum()


def transitions() -> None:
    """The all-gather of GDN-2's transitions."""
    from megatron_carve.model.context import state_passing

    state_passing.gather_from_sequence_parallel_region = lambda x, group: torch.cat([x] * group.size())


def transitions_backward() -> None:
    """The reduction of the gradient of GDN-2's transitions."""
    from megatron_carve.model.context import state_passing

    name = "gather_from_sequence_parallel_region"
    setattr(state_passing, name, _without_sum(getattr(state_passing, name), 0))


def states() -> None:
    """The messages with CARVE's states, forward and backward."""
    from megatron_carve.model.context import state_passing

    class Silent:
        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *_, **__: None

    state_passing.dist = Silent()


def sequence_parallel_norms() -> None:
    """Megatron's sum over tensor-parallel ranks of the norms' gradients, at the end of a step."""
    # the package has a function of the module's name
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    module._allreduce_non_tensor_model_parallel_grads = lambda *_, **__: None


def data_and_context() -> None:
    """Megatron's sum over data- and context-parallel ranks of all gradients."""
    from megatron.core.distributed import DistributedDataParallel

    DistributedDataParallel.start_grad_sync = lambda *_, **__: None  # type: ignore[method-assign]
    DistributedDataParallel.finish_grad_sync = lambda *_, **__: None  # type: ignore[method-assign]
