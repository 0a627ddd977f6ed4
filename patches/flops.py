"""Count the operations of our layers, and of what they add to Megatron's, in its throughput figures."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from megatron_carve.patches.patch import Patch, Replacement


def flops(layer_flops: Callable[[Any, str], float], letters: Iterable[str]) -> Patch:
    """A patch that adds to Megatron's count, which is silent about letters it does not know.

    Args:
        layer_flops: (Megatron's args, layer letter) -> forward floating-point operations per token of one layer that
            Megatron does not count.
        letters: those that `layer_flops` knows.
    """

    def make(original: Callable[..., float]) -> Callable[..., float]:
        @functools.wraps(original)
        def num_floating_point_operations(
            args: Any, batch_size: int, seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None, **kwargs: Any
        ) -> float:
            total = original(args, batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch, **kwargs)
            pattern = getattr(args, "hybrid_layer_pattern", None) or ""
            tokens = total_real_tokens_in_batch or batch_size * args.seq_length
            # Forward once, backward twice the forward.
            ours = sum(pattern.count(letter) * layer_flops(args, letter) for letter in letters if letter in pattern)
            return total + 3 * tokens * ours

        return num_floating_point_operations

    return Patch(
        name="flops",
        reason="letters that Megatron-Core does not know count as zero operations",
        upstream="megatron/training/training.py, num_floating_point_operations",
        remove_when="layers report their own operation counts",
        replacements=[Replacement("megatron.training.training:num_floating_point_operations", make)],
    )
