"""Every parallel layout trains the same model: losses, gradient norms and every parameter's gradient."""

import pytest
import torch
from support.parallel import run_layout

# Rounding of float32 sums taken in another order, over a few layers.
LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    checkpoint = str(folder / "checkpoint")
    return run_layout(folder / "out", save=checkpoint), checkpoint


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2},
        {"tp": 2, "sp": True},
        {"pp": 2},
        {"pp": 2, "pattern": "C-2|-*-"},
        {"dp": 2},
        {"cp": 2},
        {"cp": 4},
        {"cp": 2, "dp": 2},
        {"tp": 2, "sp": True, "cp": 2},
        {"tp": 2, "cp": 2},
        {"pp": 2, "cp": 2},
        {"recompute": "full"},
        {"mixer_recompute": True, "cp": 2},
    ],
    ids=lambda layout: " ".join(f"{k}={v}" for k, v in layout.items()),
)
def test_layout_equals_one_process(single, layout, tmp_path):
    expected, checkpoint = single
    actual = run_layout(tmp_path / "out", load=checkpoint, **layout)
    torch.testing.assert_close(actual["losses"], expected["losses"], rtol=LOSS_TOLERANCE, atol=0)
    torch.testing.assert_close(actual["grad_norms"], expected["grad_norms"], rtol=1e-4, atol=0)
    assert actual["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert gradient.abs().max() > 0, f"{name} has no gradient, so comparing it shows nothing"
        error = (actual["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < GRADIENT_TOLERANCE, f"{name}: relative error {error:.2e}"
