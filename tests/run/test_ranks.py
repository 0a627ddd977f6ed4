"""Processes that stay for several runs, which the tests of layouts on GPUs take, on the CPU."""

import pytest
from support.ranks import Ranks
from support.train import losses

WORDS = (
    "debug", "model.pattern=C-2-", "training.steps=2", "training.seq_length=64", "training.micro_batch_size=2",
    "training.global_batch_size=4", "training.eval_iters=1", "data.recall.num_pairs=4", "run.log_interval=1",
    "checkpoint.interval=null",
)  # fmt: skip


@pytest.mark.long
def test_two_processes_train_in_one_layout_after_another_until_one_fails(tmp_path):
    ranks = Ranks(2, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    try:
        layouts = {"data": [], "tensor": ["parallel.tensor=2"], "again": []}
        for name, words in layouts.items():
            assert "to step 2" in ranks.train(tmp_path, *WORDS, f"run.name={name}", *words, timeout=100)
        found = {name: losses(tmp_path, name) for name in layouts}
        assert found["again"] == found["data"] != found["tensor"]
        with pytest.raises(RuntimeError, match=r"training\.seq_length: expected a multiple"):
            ranks.train(tmp_path, *WORDS, "parallel.tensor=3", timeout=100)
        assert not ranks.alive
    finally:
        ranks.end()
