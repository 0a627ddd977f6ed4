"""Whether kernels round no more than they have to.

An error is the root mean square of the difference over that of the truth. It may be twice that of the torch backend in
the same dtype (three times for gradients) plus the floor of its dtype: the torch backend rounds nothing inside, while
the kernels round every operand of a product, to bfloat16 (2^-9), to tf32 for float16 inputs (2^-11), or hardly at all
(tf32x3).
"""

from collections.abc import Mapping
from typing import Any

import torch
from support.tolerances import CONTENT_PATH

# Of outputs and states, then of gradients: a few roundings of operands, one after another. The gradient of the
# log-decays is a sum of differences, where more of it shows.
# Those of CONTENT_PATH twice as much.
FLOORS = {"bf16": (2.0**-7, 2.0**-6), "fp16": (2.0**-9, 2.0**-8), "fp32": (4e-6, 1e-5)}


def rms_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    truth = truth.double()
    return ((found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp(min=1e-6)).item()


def assert_rounded_alike(
    found: Mapping[str, Any], truth: Mapping[str, Any], plain: Mapping[str, Any], dtype: str
) -> None:
    """
    Args:
        found: of the kernels, by name; gradients are called grad_...
        plain: of the torch backend in the same dtype, which is one of FLOORS.
    """
    failures = []
    for name, expected in truth.items():
        if name == "count":
            assert torch.equal(found[name], expected)
            continue
        assert found[name].isfinite().all(), name
        if expected is None or not expected.any():
            # what cancels leaves the rounding of its terms, which are of order 0.1
            assert found[name].abs().max() <= 0.1 * FLOORS[dtype][1], name
            continue
        is_gradient = name.startswith("grad_")
        floor = FLOORS[dtype][is_gradient] * (2 if name in CONTENT_PATH else 1)
        limit = (3 if is_gradient else 2) * rms_error(plain[name], expected) + floor
        error = rms_error(found[name], expected)
        if not error <= limit:
            failures.append(f"{name}: {error:.1e} above {limit:.1e}")
    assert not failures, "; ".join(failures)
