"""Recipes in Megatron-Bridge's form, of ours: `NAME_pretrain_config`, `NAME_sft_config` and `NAME_peft_config`.

NAME is a recipe that this package has, as `carve_1p3b_hybrid`. Each is a function of overrides, as our programs take
them, that returns a ConfigContainer: `carve_125m_pretrain_config("training.steps=1000", "data.text=my.txt")`. What
training needs beyond the model may also be set in what it returns, and the parallel layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.bridge.peft.lora import LoRA
from megatron.bridge.recipes.common import _peft_common, _sft_common
from megatron.bridge.training import config as bridge
from megatron.bridge.training.tokenizers.config import TokenizerConfig
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args

from megatron_carve.bridge.data import RecipeData
from megatron_carve.bridge.patches import ARGUMENTS
from megatron_carve.bridge.provider import MixerModelProvider
from megatron_carve.recipe import Recipe, load_recipe, recipe_names
from megatron_carve.run.folder import RunFolder
from megatron_carve.run.launch import use_device
from megatron_carve.run.preflight import check_backend, check_options, choose_layers, megatron_arguments
from megatron_carve.run.session import command_line
from megatron_carve.run.task import transformer_config
from megatron_carve.run.vocabulary import vocab_size
from megatron_carve.use.hugging_face import kept_recipe

# Megatron-Bridge's classes are made of Megatron's, whose values they take.
SECTIONS: dict[str, type] = {
    "train": bridge.TrainingConfig,
    "validation": bridge.ValidationConfig,
    "optimizer": bridge.OptimizerConfig,
    "scheduler": bridge.SchedulerConfig,
    "ddp": bridge.DistributedDataParallelConfig,
    "dist": bridge.DistributedInitConfig,
    "rng": bridge.RNGConfig,
    "logger": bridge.LoggerConfig,
    "checkpoint": bridge.CheckpointConfig,
    "tokenizer": TokenizerConfig,
    "rerun_state_machine": bridge.RerunStateMachineConfig,
}
"""Of both containers."""
ADAPTED = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj", "out_proj"]
"""Linear layers that get low-rank adapters: of attention, MLP and mixers."""


def pretrain_config(recipe: str | Recipe, *overrides: str) -> bridge.ConfigContainer:
    """The training that a recipe of ours describes, for megatron.bridge.training.pretrain.

    Checkpoints lie in the run's folder, where training goes on from the newest.

    Args:
        recipe: its name, its file, or itself.
        overrides: key=value, as our programs take them.

    Raises:
        ValueError, ImportError, NotImplementedError: what is wrong with the recipe, or does not fit this machine.
    """
    resolved = _resolved(recipe, overrides)
    config = _container(resolved)
    config.checkpoint.load = config.checkpoint.save
    config.checkpoint.ckpt_step = _newest_step(resolved)
    return config


def sft_config(recipe: str | Recipe, *overrides: str) -> bridge.ConfigContainer:
    """Fine-tuning of all weights, with Megatron-Bridge's settings and data, for megatron.bridge.training.finetune.

    What it begins with is `checkpoint.pretrained_checkpoint`, the tokenizer `tokenizer.tokenizer_model` and the data
    `dataset`: for the caller to set.
    """
    return _finetuning(_sft_common(), recipe, overrides)


def peft_config(recipe: str | Recipe, *overrides: str) -> bridge.ConfigContainer:
    """As sft_config, of low-rank adapters of the attention's, the MLPs' and the mixers' linear layers."""
    config = _finetuning(_peft_common(), recipe, overrides)
    assert isinstance(config.peft, LoRA)
    config.peft.target_modules = list(ADAPTED)
    return config


def _container(resolved: Recipe) -> bridge.ConfigContainer:
    args = _megatron_args(resolved)
    container = pretrain_cfg_container_from_args(args, object())
    made = {name: _as(kind, getattr(container, name)) for name, kind in SECTIONS.items()}
    data = RecipeData(
        recipe=resolved.to_dict(), cache_path=args.data_cache_path, dataloader_type=args.dataloader_type or "single",
        num_workers=args.num_workers, persistent_workers=args.num_workers > 0,
    )  # fmt: skip
    return bridge.ConfigContainer(model=_provider(args, resolved), dataset=data, mixed_precision=None, **made)


def _finetuning(config: bridge.ConfigContainer, recipe: str | Recipe, overrides: tuple[str, ...]) -> Any:
    own = _container(_resolved(recipe, overrides))
    config.model = own.model
    config.model.seq_length = config.dataset.seq_length
    config.dist, config.ddp, config.mixed_precision = own.dist, own.ddp, None
    for name in ("bf16", "fp16", "params_dtype", "use_distributed_optimizer"):
        setattr(config.optimizer, name, getattr(own.optimizer, name))
    config.dataset.offline_packing_specs = None
    config.dataset.enable_offline_packing = False
    config.dataset.num_workers = own.dataset.num_workers
    return config


def _resolved(recipe: str | Recipe, overrides: tuple[str, ...]) -> Recipe:
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    if resolved.data.documents == "apart":
        raise ValueError("data.documents: Megatron-Bridge's steps know no documents apart; expected joined, got apart")
    if (optimizer := resolved.megatron.get("optimizer", "adam")) != "adam":
        raise ValueError(f"megatron.optimizer: expected adam with Megatron-Bridge, got {optimizer}")
    if resolved.megatron.get("tp_comm_overlap"):
        raise ValueError("megatron.tp_comm_overlap: expected false with Megatron-Bridge, which has its own, got true")
    device = use_device(resolved.run.device)
    return dataclasses.replace(resolved, run=dataclasses.replace(resolved.run, device=device))


def _megatron_args(recipe: Recipe) -> Any:
    """Megatron's validated arguments, for one replica of the model; Megatron-Bridge counts the replicas itself."""
    device = recipe.run.device
    check_backend(recipe, device)
    layers = choose_layers(recipe, device)
    check_options(recipe, device)
    argv = megatron_arguments(recipe, vocab_size=vocab_size(recipe), layers=layers, device=device)
    p = recipe.parallel
    with command_line(argv), contextlib.redirect_stdout(io.StringIO()):
        args = parse_args()
        replica = p.tensor * p.pipeline * p.context
        args.rank, args.world_size = 0, replica * (recipe.megatron.get("expert_model_parallel_size") or 1)
        return validate_args(args)


def _newest_step(recipe: Recipe) -> int | None:
    """Of the run's checkpoints, whichever program saved it; Megatron-Bridge looks for its own alone.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    run = RunFolder(recipe.run.path)
    step = run.checkpoint_step()
    if step is not None:
        run.check_same_model(recipe)
    return step


def model_provider(recipe: Recipe, padded_vocab: int) -> MixerModelProvider:
    """A provider of a recipe's model, with the layers that this machine has, for one process until changed."""
    return _provider(_megatron_args(_resolved(recipe, ())), recipe, padded_vocab)


def _provider(args: Any, recipe: Recipe, padded_vocab: int | None = None) -> MixerModelProvider:
    provider = transformer_config(args, recipe, MixerModelProvider)
    multiple = recipe.model.vocab_multiple
    # Padded here: a size that is given Megatron-Bridge takes as it is, whatever the layout.
    provider.vocab_size = padded_vocab or -(-args.vocab_size // multiple) * multiple
    provider.should_pad_vocab = False
    provider.share_embeddings_and_output_weights = recipe.model.tie_embeddings
    if provider.tensor_parallel_num_weight_shards == recipe.parallel.tensor:
        provider.tensor_parallel_num_weight_shards = None  # as many as ranks, also of another layout
    provider.recipe = kept_recipe(recipe)
    setattr(provider, ARGUMENTS, args)
    return provider


def _as(kind: type, source: Any) -> Any:
    names = {f.name for f in dataclasses.fields(kind) if f.init}
    return kind(**{f.name: getattr(source, f.name) for f in dataclasses.fields(source) if f.name in names})


KINDS: dict[str, Callable[..., bridge.ConfigContainer]] = {
    "_pretrain_config": pretrain_config,
    "_sft_config": sft_config,
    "_peft_config": peft_config,
}


def __dir__() -> list[str]:
    return [*globals(), *(name + kind for name in recipe_names() for kind in KINDS)]


def __getattr__(name: str) -> Callable[..., bridge.ConfigContainer]:
    for ending, make in KINDS.items():
        if name.endswith(ending) and name.removesuffix(ending) in recipe_names():
            return partial(make, name.removesuffix(ending))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
