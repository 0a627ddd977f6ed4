"""From a recipe to Megatron's arguments."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_carve.model.config import LayerImplementation
from megatron_carve.recipe import Recipe, RecipeError

DATA_PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path")

# Megatron reads these in its own scripts, not in its library: here they would be accepted and do nothing.
WITHOUT_EFFECT = frozenset(
    [
        "mock_data",
        "sft",
        "eod_mask_loss",
        "reset_position_ids",
        "reset_attention_mask",
        "per_split_data_args_path",
        "yaml_cfg",
        "dataloader_inter_document_masking",
        "fim_data",
        "multiple_validation_sets",
        "per_dataset_sequences_path",
        "use_checkpoint_args",
        "padded_vocab_size",
        "full_validation",
        "lr_wsd_decay_samples",
    ]
)

# NVIDIA's package, to which Megatron leaves saving beside training.
NVRX = "nvidia_resiliency_ext"


def owned_settings(
    recipe: Recipe, *, vocab_size: int, layers: LayerImplementation, device: str
) -> dict[str, tuple[str, Any]]:
    """Megatron's argument -> (the recipe key that decides it, its value).

    Args:
        vocab_size: token ids in use, before padding.
        layers: "transformer_engine" or "local".
        device: "cuda" or "cpu".
    """
    m, x, t, p, r = recipe.model, recipe.mixer, recipe.training, recipe.parallel, recipe.run
    run = r.path
    spread_optimizer = p.distributed_optimizer
    return {
        # On one pipeline stage the boundaries mean nothing, and Megatron would take them for virtual stages.
        "hybrid_layer_pattern": ("model.pattern", m.pattern if p.pipeline > 1 else m.pattern.replace("|", "")),
        "hidden_size": ("model.hidden_size", m.hidden_size),
        "ffn_hidden_size": ("model.ffn_hidden_size", m.ffn_hidden_size),
        "num_attention_heads": ("model.num_attention_heads", m.num_attention_heads),
        "kv_channels": ("model.attention_head_dim", m.attention_head_dim),
        "group_query_attention": ("model.num_query_groups", m.num_query_groups is not None),
        "num_query_groups": ("model.num_query_groups", m.num_query_groups),
        # Megatron counts the earlier keys on each side; ours includes the token itself.
        "window_size": ("model.attention_window", m.attention_window and f"{m.attention_window - 1},0"),
        "position_embedding_type": ("model.position_embedding", m.position_embedding),
        "rotary_base": ("model.rotary_base", m.rotary_base),
        "vocab_size": ("model.vocab_size", vocab_size),
        "make_vocab_size_divisible_by": ("model.vocab_multiple", m.vocab_multiple // p.tensor),
        "untie_embeddings_and_output_weights": ("model.tie_embeddings", not m.tie_embeddings),
        "layernorm_epsilon": ("model.norm_epsilon", m.norm_epsilon),
        "init_method_std": ("model.init_std", m.init_std),
        "transformer_impl": ("model.layers", layers),
        "linear_num_key_heads": ("mixer.num_key_heads", x.num_key_heads),
        "linear_num_value_heads": ("mixer.num_value_heads", x.num_value_heads),
        "linear_key_head_dim": ("mixer.key_head_dim", x.key_head_dim),
        "linear_value_head_dim": ("mixer.value_head_dim", x.value_head_dim),
        "linear_conv_kernel_dim": ("mixer.conv_width", x.conv_width),
        "tokenizer_type": ("data.tokenizer", "NullTokenizer"),
        "seq_length": ("training.seq_length", t.seq_length),
        "max_position_embeddings": ("training.seq_length", t.seq_length),
        "micro_batch_size": ("training.micro_batch_size", t.micro_batch_size),
        "global_batch_size": ("training.global_batch_size", t.global_batch_size),
        "train_iters": ("training.steps", t.total_steps),
        "lr": ("training.lr", t.lr),
        "min_lr": ("training.min_lr", t.final_lr),
        "lr_decay_style": ("training.lr_schedule", "WSD" if t.lr_schedule == "wsd" else t.lr_schedule),
        "lr_wsd_decay_iters": (
            "training.decay_fraction",
            max(1, round(t.decay_fraction * t.total_steps)) if t.lr_schedule == "wsd" else None,
        ),
        "lr_warmup_fraction": ("training.warmup_fraction", t.warmup_fraction),
        "weight_decay": ("training.weight_decay", t.weight_decay),
        "adam_beta1": ("training.adam_beta1", t.adam_beta1),
        "adam_beta2": ("training.adam_beta2", t.adam_beta2),
        "adam_eps": ("training.adam_eps", t.adam_eps),
        "clip_grad": ("training.clip_grad", t.clip_grad),
        "bf16": ("training.precision", t.precision == "bf16"),
        "fp16": ("training.precision", t.precision == "fp16"),
        "seed": ("training.seed", t.seed),
        "eval_interval": ("training.eval_interval", t.eval_interval),
        "eval_iters": ("training.eval_iters", t.eval_iters),
        "tensor_model_parallel_size": ("parallel.tensor", p.tensor),
        "sequence_parallel": ("parallel.sequence", p.sequence and p.tensor > 1),
        "pipeline_model_parallel_size": ("parallel.pipeline", p.pipeline),
        "context_parallel_size": ("parallel.context", p.context),
        "use_distributed_optimizer": ("parallel.distributed_optimizer", spread_optimizer),
        "overlap_grad_reduce": ("parallel.overlap", p.overlap and spread_optimizer),
        "overlap_param_gather": ("parallel.overlap", p.overlap and spread_optimizer),
        "distributed_backend": ("run.device", "nccl" if device == "cuda" else "gloo"),
        "save": ("checkpoint.interval", str(run / "checkpoints") if recipe.checkpoint.interval else None),
        "save_interval": ("checkpoint.interval", recipe.checkpoint.interval),
        "tensorboard_dir": ("run.folder", str(run / "tensorboard")),
        "log_interval": ("run.log_interval", r.log_interval),
        **_wandb(recipe),
        # Decided by the keys named, so that these arguments stay as they are.
        "load": ("checkpoint.load", None),
        "finetune": ("checkpoint.weights_only", False),
        "train_samples": ("training.steps", None),
        "lr_warmup_iters": ("training.warmup_fraction", 0),
        "lr_warmup_samples": ("training.warmup_fraction", 0),
        "lr_decay_iters": ("training.steps", None),
        "lr_decay_samples": ("training.steps", None),
        "spec": ("model.pattern", None),
        "num_layers": ("model.pattern", None),
        "split": ("data.split", None),
        **dict.fromkeys(DATA_PATHS, ("data.indexed", None)),
        **dict.fromkeys(("tokenizer_model", "vocab_file", "merge_file"), ("data.tokenizer", None)),
    }


def _wandb(recipe: Recipe) -> dict[str, tuple[str, Any]]:
    """Megatron's arguments for Weights & Biases, which are free where the recipe has no run.wandb."""
    if recipe.run.wandb is None:
        return {}
    entity, _, project = recipe.run.wandb.rpartition("/")
    values = {
        "wandb_project": project,
        "wandb_entity": entity or None,
        "wandb_exp_name": recipe.run.name,
        "wandb_save_dir": str(recipe.run.path / "wandb"),
    }
    return {name: ("run.wandb", value) for name, value in values.items()}


def default_settings(recipe: Recipe, *, layers: LayerImplementation, device: str) -> dict[str, Any]:
    """What this project sets differently from Megatron; the recipe's `megatron` section may set it back."""
    settings: dict[str, Any] = {
        "swiglu": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "create_attention_mask_in_dataloader": False,
        "calculate_per_token_loss": True,  # tokens that count weigh alike, however they are spread over ranks
        # It waits for the GPU at every bucket of gradients; our loop looks at their norm, where Megatron tells it.
        "check_for_nan_in_loss_and_grad": recipe.training.clip_grad == 0 or "loss_scale" in recipe.megatron,
        "gradient_accumulation_fusion": False,  # Megatron's own output layer needs NVIDIA apex for it
        "dist_ckpt_optim_fully_reshardable": recipe.parallel.distributed_optimizer,
        "override_opt_param_scheduler": True,  # the recipe decides, also when a run is resumed
        "exit_signal_handler": True,
        "log_timers_to_tensorboard": True,
        "data_cache_path": str(recipe.run.path / "data" / "index"),
        "enable_one_logger": False,
    }
    if recipe.megatron.get("use_megatron_fsdp"):
        settings["ckpt_format"] = "fsdp_dtensor"  # the one that it has
    if recipe.parallel.context > 1 and recipe.model.attention_window is not None:
        settings["cp_comm_type"] = ["all_gather"]  # Megatron's choice, p2p, knows no windows; see attend_by_window
    if recipe.training.lr_schedule == "wsd":
        settings["lr_wsd_decay_style"] = "linear"
    if layers == "local":
        settings |= {"no_persist_layer_norm": True, "masked_softmax_fusion": False, "apply_rope_fusion": False}
    if device == "cpu":
        settings |= {"bias_swiglu_fusion": False, "bias_dropout_fusion": False, "num_workers": 0}
    return settings


def check_extra(recipe: Recipe) -> None:
    """What Megatron would find wrong with the recipe's `megatron` section only in the midst of training.

    Raises:
        RecipeError, ImportError: naming the argument, what was expected and what came.
    """
    extra = recipe.megatron
    if "lr_wsd_decay_style" in extra and recipe.training.lr_schedule != "wsd":
        raise RecipeError("megatron.lr_wsd_decay_style: has no effect without training.lr_schedule=wsd")
    _check_optimizer(recipe)
    _check_overlap(recipe)
    workers = extra.get("num_workers", 0)
    if isinstance(workers, int) and workers < 0:
        raise RecipeError(f"megatron.num_workers: expected an integer of at least 0, got {workers}")
    if extra.get("use_persistent_ckpt_worker") and extra.get("async_strategy", "nvrx") == "nvrx" and not _found(NVRX):
        raise ImportError(f"megatron.use_persistent_ckpt_worker: needs {NVRX}, or megatron.async_strategy=mcore")
    if project := "run.wandb" if recipe.run.wandb else "megatron.wandb_project" if extra.get("wandb_project") else None:
        _require("wandb", project, "wandb")
    if extra.get("use_megatron_fsdp"):
        _require("einops", "megatron.use_megatron_fsdp", "einops")


def _check_optimizer(recipe: Recipe) -> None:
    extra = recipe.megatron
    optimizer = extra.get("optimizer", "adam")
    if optimizer not in ("adam", "muon"):  # whose states a checkpoint can be read into
        raise RecipeError(
            f"megatron.optimizer: expected adam or muon, whose checkpoints can be read, got {optimizer!r}"
        )
    if optimizer == "adam":
        return
    _require("emerging_optimizers", "megatron.optimizer=muon", '"megatron-carve[muon]"')
    if recipe.training.precision == "fp16":
        raise RecipeError("training.precision: expected bf16 or fp32 with megatron.optimizer=muon, got fp16")
    beside_muon = {
        "muon_scalar_optimizer": "adam", "optimizer_cpu_offload": False, "use_precision_aware_optimizer": False,
        "use_layer_wise_param_layout": True, "num_distributed_optimizer_instances": 1,
        "overlap_param_gather_with_optimizer_step": False,
    }  # fmt: skip
    for name, expected in beside_muon.items():
        if (found := extra.get(name, expected)) != expected:
            raise RecipeError(
                f"megatron.{name}: expected {str(expected).lower()} with megatron.optimizer=muon, got "
                f"{str(found).lower()}"
            )


def _check_overlap(recipe: Recipe) -> None:
    """What Transformer Engine's user buffers do not carry. It does not look: of other sizes and types they would hold
    something else, or sums of it that are wrong."""
    m, p, t, extra = recipe.model, recipe.parallel, recipe.training, recipe.megatron
    if extra.get("tp_comm_overlap") is not True:
        return
    evaluated, scaling = extra.get("eval_micro_batch_size"), extra.get("fp8_recipe", "delayed")
    backend, settings = extra.get("tp_comm_bootstrap_backend", "nccl"), extra.get("tp_comm_overlap_cfg")
    unset = {"fp4": "null", "first_last_layers_bf16": "false", "overlap_moe_expert_parallel_comm": "false"}
    rules = [
        ("parallel.tensor", p.tensor, p.tensor in (2, 4, 8), "2, 4 or 8"),
        ("parallel.sequence", p.sequence, p.sequence, "true"),
        ("training.precision", t.precision, t.precision == "bf16", "bf16"),
        ("model.hidden_size", m.hidden_size, m.hidden_size % 32 == 0, "a multiple of 32"),
        ("model.pattern", m.pattern, not set(m.pattern) & set("D+"), "no layers D and +, whose projections are others"),
        (
            "megatron.eval_micro_batch_size", evaluated, evaluated in (None, t.micro_batch_size),
            f"training.micro_batch_size={t.micro_batch_size}",
        ),
        (
            "megatron.fp8_recipe", scaling, not extra.get("fp8") or scaling in ("delayed", "tensorwise"),
            "delayed or tensorwise",
        ),
        *((f"megatron.{name}", extra.get(name), not extra.get(name), off) for name, off in unset.items()),
        ("megatron.tp_comm_bootstrap_backend", backend, backend in ("nccl", "gloo"), "nccl or gloo"),
        ("megatron.tp_comm_overlap_cfg", settings, settings is None or Path(settings).is_file(), "a file"),
    ]  # fmt: skip
    for key, found, fits, expected in rules:
        if not fits:
            shown = str(found).lower() if isinstance(found, bool) else found
            raise RecipeError(f"{key}: expected {expected} with megatron.tp_comm_overlap, got {shown}")


def _require(module: str, what: str, to_install: str) -> None:
    if not _found(module):
        package = module.replace("_", "-")
        raise ImportError(f"{what}: the package {package} is not installed; pip install {to_install}")


def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def megatron_argv(
    parser: argparse.ArgumentParser, owned: Mapping[str, tuple[str, Any]], defaults: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    """The command line that gives Megatron these settings.

    Args:
        parser: Megatron's.
        owned: see `owned_settings`.
        defaults: see `default_settings`.
        extra: the recipe's `megatron` section.

    Raises:
        RecipeError: an unknown argument, one that another key of the recipe decides, or a value it does not take.
    """
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, []).append(action)
    for name in extra:
        if name in owned:
            raise RecipeError(f"megatron.{name}: set {owned[name][0]} instead, which decides it")
        if name in WITHOUT_EFFECT:
            raise RecipeError(f"megatron.{name}: has no effect in this program")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            hint = f"; did you mean megatron.{near[0]}?" if near else ""
            raise RecipeError(f"unknown key megatron.{name}: Megatron has no such argument{hint}")
    settings = {**defaults, **{name: value for name, (_, value) in owned.items()}, **extra}
    argv: list[str] = []
    for name, value in settings.items():
        where = owned[name][0] if name in owned else f"megatron.{name}"
        argv += _flags(actions[name], value, where)
    return argv


def _flags(actions: list[argparse.Action], value: Any, where: str) -> list[str]:
    switches = [a for a in actions if a.nargs == 0]
    if switches:
        if not isinstance(value, bool):
            raise RecipeError(f"{where}: expected true or false, got {value!r}")
        if value == bool(switches[0].default):
            return []
        for switch in switches:
            if isinstance(switch, argparse.BooleanOptionalAction):
                return [switch.option_strings[0 if value else -1]]
            if switch.const == value:
                return [switch.option_strings[0]]
        raise RecipeError(f"{where}: Megatron has no way to set it to {str(value).lower()}")
    if value is None:
        return []
    action = actions[0]
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and action.nargs not in ("*", "+") and not isinstance(action.nargs, int):
        raise RecipeError(f"{where}: expected one value, got {value!r}")
    count_fits = len(items) == action.nargs if isinstance(action.nargs, int) else items or action.nargs == "*"
    if not count_fits:
        wanted = action.nargs if isinstance(action.nargs, int) else "at least one"
        raise RecipeError(f"{where}: expected {wanted} values, got {len(items)}")
    for item in items:
        _check_value(action, str(item), where)
    # One word, so that a value like -1 is not read as a flag; several values cannot be written so.
    if len(items) == 1:
        return [f"{action.option_strings[0]}={items[0]}"]
    return [action.option_strings[0], *map(str, items)]


def _check_value(action: argparse.Action, text: str, where: str) -> None:
    convert = action.type if callable(action.type) else str
    try:
        value = convert(text)
    except (ValueError, TypeError, KeyError, AssertionError, argparse.ArgumentTypeError):
        kind = getattr(convert, "__name__", "value")
        raise RecipeError(
            f"{where}: expected {kind} as --{action.dest.replace('_', '-')} takes it, got {text!r}"
        ) from None
    if action.choices is not None and value not in action.choices:
        choices = ", ".join(str(getattr(c, "name", c)) for c in action.choices)
        raise RecipeError(f"{where}: expected one of {choices}, got {text!r}")
