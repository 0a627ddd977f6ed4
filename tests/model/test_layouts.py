"""Every parallel layout trains the same model: losses, outputs, gradients of inputs and of every parameter."""

import pytest
import torch
from support.parallel import run_layout

# Rounding of float32 sums taken in another order, over a few layers.
LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 2e-4

HYBRID, CARVE, GDN2 = {"pattern": "C-2-*-"}, {"pattern": "C-C-"}, {"pattern": "2-2-"}
DYNAMIC = {"short_convolution": "dynamic", "convolution_rank": 4}
KDA = {"pattern": "K-K-", "mixer": DYNAMIC}
DELTA = {"pattern": "C-C-", "mixer": {"content_rank": 4, "erase": "delta", **DYNAMIC}}
# Pairs of queries share a key and a value.
CONVOLVED = {
    "pattern": "*-*-", "attention_convolution": "dynamic", "mixer": {"convolution_rank": 3}, "heads": 8, "groups": 4,
}  # fmt: skip
STATIC = {"pattern": "*-*-", "attention_convolution": "static"}
FAR = {"pattern": "*-*-", "heads": 8, "groups": 4, "window": None}
# Documents of random lengths that 2 * cp divides, packed into one sequence. Local attention does not take them.
PACKED = {"pattern": "C-2-", "documents": [24, 80, 8, 72], "seq_length": 184, "steps": 2}
# Documents of any lengths in the rows of a batch, kept apart.
ROWS = {"rows": [[1, 90, 53], [144]], "micro_batch_size": 2, "seq_length": 144, "micro_batches": 2, "steps": 2}
APART, APART_HYBRID = {"pattern": "C-2-K-", **ROWS}, {"pattern": "C-2-*-", **ROWS}
# Not under context parallelism: there Megatron weighs the tokens of every rank apart.
MULTI_TOKEN = {"pattern": "C-2-/C-", "steps": 2}
EXPERTS = {"pattern": "C-CE*E"}
SEQUENCE = {"mixer_context": "sequence"}
FULL = {"recompute": "full"}
CORE = {"recompute": "selective", "recompute_modules": ["core_attn"]}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A run on one process and its checkpoint, by model."""
    found = {}

    def run(model: dict) -> tuple[dict, str]:
        key = str(model)
        if key not in found:
            folder = tmp_path_factory.mktemp("single")
            checkpoint = str(folder / "checkpoint")
            found[key] = run_layout(folder / "out", save=checkpoint, **model), checkpoint
        return found[key]

    return run


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(HYBRID, {"tp": 2}, marks=pytest.mark.slow),
        pytest.param(HYBRID, {"tp": 2, "sp": True, "dp": 2}, marks=pytest.mark.long),
        pytest.param(HYBRID, {"pp": 2}, marks=pytest.mark.slow),
        pytest.param(HYBRID, {"pp": 2, "pattern": "C-2|-*-", "dp": 2}, marks=pytest.mark.slow),
        pytest.param(HYBRID, {"pp": 2, "pattern": "C|-2|-*|-", "virtual": 2}, marks=pytest.mark.slow),
        pytest.param(HYBRID, {"tp": 2, "sp": True, "pp": 2}, marks=pytest.mark.slow),
        pytest.param(HYBRID, {"cp": 2}, marks=pytest.mark.slow),
        pytest.param(HYBRID, {"cp": 2, "dp": 2}, marks=pytest.mark.long),
        pytest.param(HYBRID, {"cp": 2, "pp": 2}, marks=pytest.mark.slow),
        pytest.param(HYBRID, {"cp": 4, **SEQUENCE}, marks=pytest.mark.slow),
        (HYBRID, {"tp": 2, "sp": True, "cp": 2}),
        pytest.param(HYBRID, FULL, marks=pytest.mark.slow),
        pytest.param(CONVOLVED, {"tp": 2, "sp": True, "cp": 2}, marks=pytest.mark.long),
        pytest.param(CONVOLVED, {"tp": 2}, marks=pytest.mark.slow),
        pytest.param(CONVOLVED, {"tp": 2, "pp": 2, "pattern": "*-|*-", **FULL}, marks=pytest.mark.long),
        pytest.param(CONVOLVED, {"cp": 4}, marks=pytest.mark.long),
        pytest.param(STATIC, {"tp": 4, "sp": True}, marks=pytest.mark.long),
        pytest.param(STATIC, {"cp": 2, "dp": 2}, marks=pytest.mark.long),
        pytest.param(CARVE, {"tp": 4, "sp": True}, marks=pytest.mark.long),
        pytest.param(DELTA, {"tp": 4, "sp": True}, marks=pytest.mark.long),
        pytest.param(DELTA, {"tp": 2, "cp": 2, **SEQUENCE}, marks=pytest.mark.long),
        pytest.param(CARVE, {"tp": 2, "cp": 2, **SEQUENCE, **FULL}, marks=pytest.mark.long),
        pytest.param(CARVE, {"cp": 4, "mixer_recompute": True}, marks=pytest.mark.long),
        pytest.param(CARVE, {"cp": 2, **SEQUENCE, "mixer_recompute": True}, marks=pytest.mark.slow),
        pytest.param(GDN2, {"dp": 4}, marks=pytest.mark.long),
        pytest.param(GDN2, {"tp": 2, "sp": True, "cp": 2, **SEQUENCE}, marks=pytest.mark.long),
        pytest.param(KDA, {"tp": 2, "sp": True, "cp": 2}, marks=pytest.mark.long),
        pytest.param(KDA, {"tp": 4}, marks=pytest.mark.long),
        pytest.param(GDN2, {"cp": 2, **FULL}, marks=pytest.mark.long),
        pytest.param(GDN2, {"recompute": "selective", "recompute_modules": ["mlp"], "tp": 2}, marks=pytest.mark.long),
        pytest.param(PACKED, {"cp": 2}, marks=pytest.mark.long),
        pytest.param(PACKED, {"cp": 4, **SEQUENCE}, marks=pytest.mark.long),
        pytest.param(PACKED, {"tp": 2, "sp": True, "cp": 2, "mixer_recompute": True}, marks=pytest.mark.long),
        pytest.param(APART_HYBRID, {"tp": 2, "sp": True, "pp": 2}, marks=pytest.mark.slow),
        pytest.param(APART_HYBRID, {"tp": 2, "dp": 2, **FULL}, marks=pytest.mark.long),
        pytest.param({**CONVOLVED, **ROWS}, {"tp": 2, "sp": True}, marks=pytest.mark.long),
        pytest.param(APART_HYBRID, {"pp": 4, "pattern": "C-|2|-|*-"}, marks=pytest.mark.long),
        pytest.param(APART_HYBRID, {"cp": 2}, marks=pytest.mark.slow),
        pytest.param(APART_HYBRID, {"tp": 2, "sp": True, "cp": 2}, marks=pytest.mark.long),
        pytest.param(APART_HYBRID, {"cp": 4, **SEQUENCE, **FULL}, marks=pytest.mark.long),
        pytest.param(APART_HYBRID, {"cp": 2, "pp": 2, "pattern": "C-2|-*-"}, marks=pytest.mark.long),
        pytest.param({**CONVOLVED, **ROWS}, {"tp": 2, "cp": 2}, marks=pytest.mark.long),
        pytest.param({**STATIC, **ROWS}, {"cp": 2, "dp": 2}, marks=pytest.mark.long),
        pytest.param({**FAR, **ROWS}, {"cp": 2, **CORE}, marks=pytest.mark.long),
        pytest.param(FAR, {"cp": 4, **CORE}, marks=pytest.mark.long),
        pytest.param(APART, {"tp": 2, "sp": True, "cp": 2}, marks=pytest.mark.long),
        pytest.param(APART, {"cp": 4, **SEQUENCE, "mixer_recompute": True}, marks=pytest.mark.long),
        pytest.param(APART, {"cp": 2, "pp": 2, **SEQUENCE}, marks=pytest.mark.long),
        pytest.param(EXPERTS, {"ep": 2, "dp": 2}, marks=pytest.mark.slow),
        pytest.param(EXPERTS, {"ep": 2, "tp": 2, "sp": True}, marks=pytest.mark.long),
        pytest.param(EXPERTS, {"tp": 2, "sp": True, "dp": 2}, marks=pytest.mark.long),
        pytest.param(EXPERTS, {"ep": 2, "dp": 2, "pp": 2}, marks=pytest.mark.long),
        pytest.param(MULTI_TOKEN, {"pp": 2}, marks=pytest.mark.long),
        pytest.param(MULTI_TOKEN, {"tp": 2, "sp": True, "dp": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda layout: " ".join(f"{k}={v}" for k, v in layout.items() if k not in ("steps", "seq_length")),
)
def test_layout_equals_one_process(single, model, layout, tmp_path):
    expected, checkpoint = single(model)
    compare(run_layout(tmp_path / "out", load=checkpoint, **{**model, **layout}), expected)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "layout", "without"),
    [
        (HYBRID, {"tp": 2}, "norm_weight"),
        (HYBRID, {"tp": 2}, "low_rank"),
        (HYBRID, {"tp": 2}, "content_maps"),
        (HYBRID, {"tp": 2, "sp": True}, "norm_weight_mark"),
        (CONVOLVED, {"tp": 2}, "tap_features"),
        (CONVOLVED, {"tp": 2, "sp": True}, "tap_features_mark"),
        (STATIC, {"cp": 2}, "tokens_before"),
        (HYBRID, {"tp": 2, "sp": True}, "content_maps_mark"),
        (HYBRID, {"tp": 2, "sp": True}, "sequence_parallel_norms"),
        (HYBRID, {"dp": 2, "distributed_optimizer": False}, "data_and_context"),
        (CARVE, {"cp": 2}, "data_and_context"),
        (CARVE, {"cp": 2}, "tokens_for_heads"),
        (FAR, {"cp": 2}, "tokens_for_heads"),
        (CARVE, {"cp": 2, **SEQUENCE}, "tokens_before"),
        (CARVE, {"cp": 2, **SEQUENCE}, "states"),
        (GDN2, {"cp": 2, **SEQUENCE}, "transitions"),
        (GDN2, {"cp": 2, **SEQUENCE}, "transitions_backward"),
    ],
)
def test_a_missing_collective_is_seen(single, model, layout, without, tmp_path):
    expected, checkpoint = single(model)
    with pytest.raises(AssertionError) as seen:
        compare(run_layout(tmp_path / "out", load=checkpoint, **{**model, **layout}, without=without), expected)
    complaint = [line for line in str(seen.value).splitlines() if "error" in line.lower() and "torchrun" not in line]
    print(f"{without}: {complaint[0].strip()}")


def compare(actual: dict, expected: dict) -> None:
    assert not expected["outputs"].isnan().any() and not expected["d_embedded"].isnan().any()
    pairs = {name: (actual["gradients"].get(name), g) for name, g in expected["gradients"].items()}
    assert actual["gradients"].keys() == pairs.keys()
    pairs["embedded tokens"] = actual["d_embedded"], expected["d_embedded"]
    for name, (found, gradient) in pairs.items():
        assert gradient.abs().max() > 0, f"{name} has no gradient, so comparing it shows nothing"
        error = (found - gradient).norm() / gradient.norm()
        assert error < GRADIENT_TOLERANCE, f"{name}: relative error {error:.2e}"
    torch.testing.assert_close(actual["outputs"], expected["outputs"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual["losses"], expected["losses"], rtol=LOSS_TOLERANCE, atol=0)
    torch.testing.assert_close(actual["grad_norms"], expected["grad_norms"], rtol=1e-4, atol=0)
