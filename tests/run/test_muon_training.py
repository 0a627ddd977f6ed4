"""Training with Muon: stopped, resumed, and resumed in another layout, it is one run."""

import pytest
from support.train import losses, train, train_ranks

# Its Newton-Schulz iterations see whole maps in every layout; without, a tensor-parallel rank's part of one alone.
TINY = """
inherit: debug
model: {pattern: C-*, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}
mixer: {num_key_heads: 2, num_value_heads: 2, key_head_dim: 16, value_head_dim: 16, content_rank: 4}
training: {steps: 5, seq_length: 64, micro_batch_size: 2, global_batch_size: 4, eval_iters: 1}
checkpoint: {interval: 3}
run: {log_interval: 1}
megatron: {optimizer: muon, muon_tp_mode: duplicated}
"""
# Relative, of losses after two steps.
SAME_CURVE = {"fp32": 1e-5, "bf16": 5e-4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "layout"),
    [pytest.param("fp32", "parallel.tensor=2", marks=pytest.mark.long), ("bf16", "parallel.tensor=1")],
    ids=["float32, then divided", "bfloat16, then spread over two replicas"],
)
def test_a_resumed_run_goes_on_as_a_straight_one(tmp_path, precision, layout):
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = ["tiny.yaml", f"training.precision={precision}"]
    train(tmp_path, *words, "run.name=straight")
    (tmp_path / "runs/straight/checkpoints/latest_checkpointed_iteration.txt").write_text("3")
    words += [layout, "run.name=resumed", "checkpoint.load=runs/straight", "checkpoint.interval=null"]
    train_ranks(2, tmp_path, *words)
    expected, actual = losses(tmp_path, "straight"), losses(tmp_path, "resumed")
    assert list(actual) == [4, 5]
    for step in actual:
        assert actual[step] == pytest.approx(expected[step], rel=SAME_CURVE[precision]), f"step {step}"
