"""Megatron-Bridge fine-tunes our models, all weights or adapters, from runs of either program."""

import json

import pytest
import torch
from support.bridge import alone
from support.programs import program

WORDS = ("training.seq_length=64", "data.text=cats.txt")


@pytest.fixture(scope="module")
def questions(folder):
    place = folder / "questions"
    place.mkdir()
    lines = [json.dumps({"input": f"{i} times {i} is", "output": str(i * i)}) + "\n" for i in range(40)]
    for split in ("training", "validation", "test"):
        (place / f"{split}.jsonl").write_text("".join(lines))
    return place


def finetuned(make, folder, text_run, questions, name):
    """What a recipe function of fine-tuning makes, with what it leaves to the caller, trained for two steps."""
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    config = make(str(folder / "tiny.yaml"), f"data.text={folder / 'cats.txt'}", "model.vocab_size=257")
    config.dataset = GPTSFTDatasetConfig(dataset_root=str(questions), seq_length=64, num_workers=0)
    config.model.seq_length = 64
    config.tokenizer.tokenizer_model = str(folder / "tokenizer")
    config.checkpoint.pretrained_checkpoint = str(text_run / "checkpoints")
    config.checkpoint.save = config.checkpoint.load = str(folder / name)
    config.logger.tensorboard_dir = None
    config.train.train_iters, config.train.global_batch_size, config.scheduler.lr_warmup_iters = 2, 2, 0
    config.validation.eval_iters = 0
    with alone():
        finetune(config, forward_step)
    return config


@pytest.fixture(scope="module", autouse=True)
def tokenizer(folder, text_run):
    program(folder, "export", str(text_run), "tokenizer")


def stored(checkpoint) -> dict[str, torch.Size]:
    """Shapes of the tensors in a checkpoint, but for the optimizer's."""
    from torch.distributed.checkpoint import FileSystemReader

    found = FileSystemReader(checkpoint / "iter_0000002").read_metadata().state_dict_metadata
    return {name: x.size for name, x in found.items() if hasattr(x, "size") and not name.startswith("optimizer")}


def test_all_weights(folder, text_run, questions):
    from megatron_carve.bridge.conversion import export
    from megatron_carve.bridge.recipes import sft_config

    finetuned(sft_config, folder, text_run, questions, "all")
    assert stored(folder / "all") == stored(text_run / "checkpoints")
    with alone():
        export(folder / "all", folder / "all_exported")
    program(folder, "import", "all_exported", "all_run")


def test_adapters_of_attention_mlps_and_mixers(folder, text_run, questions):
    from megatron_carve.bridge.conversion import export
    from megatron_carve.bridge.recipes import peft_config

    finetuned(peft_config, folder, text_run, questions, "adapters")
    found = stored(folder / "adapters")
    assert all(".adapter." in name for name in found)
    layers = {name.split(".adapter.")[0] for name in found}
    assert {"decoder.layers.0.self_attention.in_proj", "decoder.layers.0.self_attention.out_proj"} <= layers
    assert {"decoder.layers.2.self_attention.linear_qkv", "decoder.layers.1.mlp.linear_fc1"} <= layers
    assert len(layers) == 16
    with pytest.raises(ValueError, match="iter_0000002: expected a checkpoint of all weights, got one of adapters"):
        export(folder / "adapters", folder / "adapters_exported")
    assert not (folder / "adapters_exported").exists()
