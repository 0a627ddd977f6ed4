"""Documents kept apart on a GPU: Transformer Engine's packed attention beside the local layers' masks."""

import importlib.util
import json
import random

import pytest
import torch
from support.train import losses, train

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
@pytest.mark.parametrize("window", ["40", "null"])
def test_both_kinds_of_layers_keep_documents_apart_alike(tmp_path, window):
    draw = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "sleeps"]
    texts = [" ".join(draw.choices(words, k=draw.choice([1, 5, 20, 90]))) for _ in range(300)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    common = [
        "debug", "data.text=texts.jsonl", "model.pattern=C-*-2-*-", f"model.attention_window={window}",
        "training.precision=bf16", "training.steps=20", "training.seq_length=256", "training.micro_batch_size=4",
        "training.global_batch_size=4", "checkpoint.interval=20", "run.log_interval=1",
        f"model.attention_convolution={'dynamic' if window == '40' else 'none'}",
    ]  # fmt: skip
    # One start for all: the kinds of layers draw their weights in other orders.
    train(tmp_path, *common, "training.steps=1", "run.name=start", "model.layers=local")
    kinds = {"local": "local apart", "transformer_engine": "te apart"}
    start = f"checkpoint.load={tmp_path / 'runs/start'}"
    for layers, name in kinds.items():
        train(
            tmp_path, *common, start, "checkpoint.weights_only=true", "data.documents=apart", f"model.layers={layers}",
            f"run.name={name}",
        )  # fmt: skip
    train(tmp_path, *common, start, "checkpoint.weights_only=true", "model.layers=local", "run.name=joined")
    local, te, joined = (
        torch.tensor(list(losses(tmp_path, name).values())) for name in ("local apart", "te apart", "joined")
    )
    error, effect = ((other / local - 1).abs() for other in (te, joined))
    print(f"largest relative difference of losses {error.max():.1e}; to joined documents {effect.max():.1e}")
    assert error.max() < 0.01 < effect.max()
