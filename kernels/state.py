"""The recurrent state that an op carries from one call to the next."""

from typing import NamedTuple

import torch
from torch import Tensor


class CarveState(NamedTuple):
    """Everything a later call needs to continue a CARVE sequence exactly.

    N is the batch size, or the number of packed sequences. Floats are float32, or float64 for float64 inputs. A call
    without content keeps S alone: its mean and partial are zero.

    Attributes:
        S: recurrent state, [N, HV, K, V].
        mean: m of the last finished content chunk, the mean of S^T q (without the output scale), [N, HV, V]; zero
            before the first one ends.
        partial: sum of S^T q in the running content chunk, [N, HV, V].
        count: tokens in the running content chunk, [N], int64, 0 <= count < content_chunk.
    """

    S: Tensor
    mean: Tensor
    partial: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs on a state


def state_shapes(op: str, value_heads: int, K: int, V: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape per sequence, and dtype beside 16- and 32-bit inputs, of the tensors of an op's state.

    Args:
        op: "gdn2", whose state is S alone, or "carve", in the order of CarveState.
    """
    S = (value_heads, K, V)
    if op == "gdn2":
        return [(S, torch.float32)]
    mean = (value_heads, V)
    return [(S, torch.float32), (mean, torch.float32), (mean, torch.float32), ((), torch.int64)]
