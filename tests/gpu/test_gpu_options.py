"""Megatron's options with a CARVE hybrid on a GPU: each trains, saves, and goes on as if it had not stopped."""

import importlib.util
import shutil

import pytest
from support.train import losses, train

pytestmark = pytest.mark.gpu

needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


SMALL = (
    "debug", "model.layers=transformer_engine", "training.precision=bf16", "training.steps=12", "training.eval_iters=1",
    "training.micro_batch_size=4", "training.global_batch_size=8", "checkpoint.interval=6", "run.log_interval=1",
)  # fmt: skip
FSDP = ("megatron.use_megatron_fsdp=true", "megatron.data_parallel_sharding_strategy=optim_grads_params")
PRECISION = ("megatron.use_precision_aware_optimizer=true",)
OFFLOAD = (*PRECISION, "megatron.optimizer_cpu_offload=true")
BF16_MOMENTS = ("megatron.exp_avg_dtype=bf16", "megatron.exp_avg_sq_dtype=bf16")
EXPERTS = ("model.pattern=C-CE*E", "megatron.num_experts=4", "megatron.moe_router_topk=2")
CASES = {
    "adam": (),
    "fsdp": FSDP,
    "offload": OFFLOAD,
    "offload_half": (*OFFLOAD, "megatron.optimizer_offload_fraction=0.5"),
    "offload_overlapped": (*OFFLOAD, "megatron.overlap_cpu_optimizer_d2h_h2d=true"),
    "muon": ("megatron.optimizer=muon",),
    "muon_float32": ("megatron.optimizer=muon", "training.precision=fp32"),
    "muon_experts": ("megatron.optimizer=muon", *EXPERTS),
    "experts": EXPERTS,
    "mtp": ("model.pattern=C-*-/C-",),
    "graphs_local": ("megatron.cuda_graph_impl=local",),
    "graphs_te": ("megatron.cuda_graph_impl=transformer_engine",),
    "async_save": ("megatron.async_save=true",),
    "precision_aware": PRECISION,
    "bf16_moments": (*PRECISION, *BF16_MOMENTS),
    "precision_aware_to_adam": PRECISION,
    "adam_to_precision_aware": (),
    "offload_to_adam": OFFLOAD,
}
# What a run is resumed with, where that is another option.
RESUMED = {"precision_aware_to_adam": (), "adam_to_precision_aware": PRECISION, "offload_to_adam": ()}
PACKAGES = {"muon": "emerging_optimizers", "fsdp": "einops"}
# Relative; what rounding makes of two runs of one seed in six steps is far below, a lost state of an optimizer above.
SAME_CURVE = 2e-3


def case(name: str) -> object:
    package = PACKAGES.get(name.partition("_")[0])
    return pytest.param(name, marks=[needs_te, *([needs(package)] if package else [])])


@pytest.mark.parametrize("name", [case(name) for name in CASES])
def test_a_resumed_run_goes_on_as_a_straight_one(tmp_path, name):
    train(tmp_path, *SMALL, *CASES[name], "run.name=straight")
    resumed = tmp_path / "runs/resumed"
    shutil.copytree(tmp_path / "runs/straight", resumed)
    (resumed / "metrics.jsonl").unlink()
    (resumed / "checkpoints/latest_checkpointed_iteration.txt").write_text("6")
    out = train(tmp_path, *SMALL, *RESUMED.get(name, CASES[name]), "run.name=resumed").stdout
    assert "resuming at step 6" in out
    expected, actual = losses(tmp_path, "straight"), losses(tmp_path, "resumed")
    print(f"{name}: straight {expected}, resumed {actual}")
    assert expected[12] < expected[1]
    assert list(actual) == list(range(7, 13))
    for step in actual:
        assert actual[step] == pytest.approx(expected[step], rel=SAME_CURVE), f"step {step}"


@needs_te
@needs("emerging_optimizers")
def test_muon_beside_adam_in_tokens_per_second(tmp_path):
    words = (
        "carve_125m", "data.text=text.txt", "data.tokenizer=bytes", "training.tokens=null", "training.steps=12",
        "training.micro_batch_size=8", "training.global_batch_size=8", "training.warmup_fraction=0",
        "training.eval_iters=1", "checkpoint.interval=null", "run.log_interval=4",
    )  # fmt: skip
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4000)
    speed = {}
    for optimizer in ("adam", "muon"):
        name = f"run.name={optimizer}"
        out = train(tmp_path, *words, name, f"megatron.optimizer={optimizer}").stdout
        print(f"{optimizer}:", *(line for line in out.splitlines() if "tokens/s" in line), sep="\n  ")
        speed[optimizer] = losses(tmp_path, optimizer)
    assert all(curve[12] < curve[4] for curve in speed.values())
