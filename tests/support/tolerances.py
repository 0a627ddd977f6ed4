"""The one table of tolerances, and the comparison that uses it.

An error is the largest absolute difference from the float64 truth over the largest absolute value of the truth. Each
row says where the error comes from; the numbers stand a few times above what the reference shows (in brackets).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Largest error of o, of the final state's parts and of the gradients."""

    o: float
    state: float
    grad: float


TOLERANCES = {
    # products and sums of a chunk in another order than the recurrence's (1e-15); steep decays add the rounding of a
    # cumulative log-decay of up to 64 * 1000, 64000 * 2^-53 = 7e-12, in an exponent (4e-12)
    "float64": Tolerance(o=1e-9, state=1e-9, grad=1e-9),
    # the same order of operations, and no sum of large log-decays at all (1e-15)
    "float64 recurrent": Tolerance(o=1e-12, state=1e-12, grad=1e-12),
    # rounding 2^-24 = 6e-8 in sums of up to 64 terms, and in the exponents, which float64 sums keep exact (4e-7;
    # gradients of the content projections, sums over all tokens, 6e-7)
    "float32": Tolerance(o=2e-6, state=2e-6, grad=4e-6),
    # one rounding of o and of the gradients to the inputs' dtype, 2^-9 and 2^-12 relative, doubled; the computation
    # and the state are float32
    "bfloat16": Tolerance(o=2**-8, state=2e-6, grad=2**-8),
    "float16": Tolerance(o=2**-11, state=2e-6, grad=2**-11),
}

# Sums over all tokens, and over channels, that cancel: their error is larger beside what is left.
CONTENT_PATH = ("grad_mean", "grad_partial", "grad_content_down", "grad_content_up", "grad_erase_bias")

# A truth this small counts as this large, so that a vanishing output does not turn rounding into an error.
SMALLEST_SCALE = 1e-3


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, relative to the truth's largest absolute value; nan if anything is not finite."""
    if actual.shape != truth.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} instead of {tuple(truth.shape)}")
    if not (actual.isfinite().all() and truth.isfinite().all()):
        return float("nan")
    scale = max(truth.double().abs().max().item(), SMALLEST_SCALE)
    return (actual.double() - truth.double()).abs().max().item() / scale


def assert_close(
    actual: Mapping[str, Any], truth: Mapping[str, Any], tolerance: str, plain: Mapping[str, Any] | None = None
) -> None:
    """Compare results by name; "count" exactly. A gradient that the truth lacks (None) must be there and be zero.

    Args:
        plain: what the torch backend gives in the dtype of `actual`; three times its error is allowed in addition.
    """
    bound = TOLERANCES[tolerance]
    assert actual.keys() == truth.keys()
    failures = []
    for name, expected in truth.items():
        assert actual[name] is not None, f"{name} is None"
        if name == "count":
            assert torch.equal(actual[name], expected), f"count {actual[name]} instead of {expected}"
            continue
        expected = torch.zeros_like(actual[name]) if expected is None else expected
        limit = bound.o if name == "o" else bound.grad if name.startswith("grad_") else bound.state
        if plain is not None:
            limit += 3 * error(torch.zeros_like(expected) if plain[name] is None else plain[name], expected)
        found = error(actual[name], expected)
        if not found <= limit:
            failures.append(f"{name}: error {found:.2e} above {limit:.2e}")
    assert not failures, "; ".join(failures)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
