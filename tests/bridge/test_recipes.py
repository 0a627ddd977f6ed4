"""Recipe functions: every recipe in Megatron-Bridge's form, of the same sizes and with the same training."""

import re

import pytest
import torch

from megatron_carve.model.config import MixerConfig
from megatron_carve.recipe import RecipeError, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_as_a_container(name):
    from megatron_carve.bridge import recipes

    recipe = load_recipe(name)
    config = getattr(recipes, f"{name}_pretrain_config")()
    model, own = config.model, recipe.model
    assert (model.hidden_size, model.ffn_hidden_size, model.layernorm_epsilon) == (
        own.hidden_size, own.ffn_hidden_size, own.norm_epsilon,
    )  # fmt: skip
    assert model.mixer == recipe.mixer.options and model.linear_num_value_heads == recipe.mixer.num_value_heads
    assert model.window_size == (None if own.attention_window is None else (own.attention_window - 1, 0))
    assert model.gated_linear_unit and model.activation_func is torch.nn.functional.silu
    assert model.vocab_size % own.vocab_multiple == 0 and not model.should_pad_vocab
    training = recipe.training
    assert config.train.train_iters == training.total_steps
    assert config.train.global_batch_size == training.global_batch_size
    assert (config.optimizer.lr, config.optimizer.min_lr) == (training.lr, training.final_lr)
    assert config.scheduler.lr_warmup_fraction == training.warmup_fraction
    assert (model.bf16, config.optimizer.bf16) == (training.precision == "bf16",) * 2
    assert config.ddp.use_distributed_optimizer and config.optimizer.use_distributed_optimizer
    assert f"{name}_sft_config" in dir(recipes) and f"{name}_peft_config" in dir(recipes)


def test_operations_are_those_of_our_own_runs():
    """Megatron-Bridge counts the other layers; ours are three times the forward's."""
    from megatron.bridge.training.utils.flop_utils import num_floating_point_operations

    from megatron_carve.bridge.recipes import debug_pretrain_config

    counts = []
    for pattern in ("C-*-C-", "-*-"):
        config = debug_pretrain_config(f"model.pattern={pattern}")
        counts.append(num_floating_point_operations(config, 2))
    recipe = load_recipe("debug")
    mixer = MixerConfig(**{**recipe.mixer.options, **{n: getattr(recipe.mixer, n) for n in SIZES}})
    mlp = 2 * 3 * 3 * recipe.model.hidden_size * recipe.model.ffn_hidden_size
    tokens = 2 * recipe.training.seq_length
    expected = 2 * 3 * tokens * mixer.flops_per_token("carve", recipe.model.hidden_size) + tokens * mlp
    assert counts[0] - counts[1] == pytest.approx(expected)


SIZES = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_width")


def test_sizes_that_are_not_the_recipes_are_refused():
    from megatron_carve.bridge.recipes import debug_pretrain_config

    for name, value, key in (
        ("hidden_size", 64, "model.hidden_size"),
        ("linear_conv_kernel_dim", 2, "mixer.conv_width"),
        ("hybrid_layer_pattern", "C-*-2-C-", "model.pattern"),
        ("num_query_groups", 1, "model.num_query_groups"),
        ("kv_channels", 16, "model.attention_head_dim"),
        ("rotary_base", 500000, "model.rotary_base"),
        ("layernorm_epsilon", 1e-3, "model.norm_epsilon"),
    ):
        model = debug_pretrain_config().model
        setattr(model, name, value)
        with pytest.raises(ValueError, match=re.escape(f"give the recipe function the override {key}={value}")):
            model.finalize()


def test_other_layouts_keep_their_sizes():
    from megatron_carve.bridge.recipes import pretrain_config

    model = pretrain_config("carve_125m", "run.device=cpu", "model.pattern=C-C-|C-C-").model
    assert model.hybrid_layer_pattern == "C-C-C-C-"
    model.tensor_model_parallel_size, model.pipeline_model_parallel_size = 4, 2
    model.finalize()
    assert (model.hybrid_layer_pattern, model.vocab_size) == ("C-C-|C-C-", 32000)
    assert model.num_attention_heads == 48  # which no layer has, and the ranks must divide


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("data.documents=apart", "data.text=x.txt"), "data.documents: Megatron-Bridge's steps know"),
        (("megatron.optimizer=muon",), "megatron.optimizer: expected adam with Megatron-Bridge, got muon"),
        (("megatron.tp_comm_overlap=true",), "megatron.tp_comm_overlap: expected false with Megatron-Bridge"),
        (("model.layers=transformer_engine",), "transformer_engine is not installed"),
        (("model.hiden_size=3",), "hidden_size"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(words, complaint):
    from megatron_carve.bridge.recipes import debug_pretrain_config

    with pytest.raises((ValueError, ImportError, RecipeError), match=complaint):
        debug_pretrain_config(*words)


def test_names_of_transformer_engines_layers_are_known(bridge):
    from megatron_carve.bridge.conversion import _named
    from megatron_carve.use.hugging_face import links

    others = {name: other for _, name, *rest in _named(links(load_recipe("debug"))) for other in rest}
    found = {
        name.removeprefix("decoder.layers."): other.removeprefix("decoder.layers.") for name, other in others.items()
    }
    assert found == {
        "0.input_layernorm.weight": "0.self_attention.in_proj.layer_norm_weight",
        "1.pre_mlp_layernorm.weight": "1.mlp.linear_fc1.layer_norm_weight",
        "2.input_layernorm.weight": "2.self_attention.linear_qkv.layer_norm_weight",
        "3.pre_mlp_layernorm.weight": "3.mlp.linear_fc1.layer_norm_weight",
        "4.input_layernorm.weight": "4.self_attention.in_proj.layer_norm_weight",
        "5.pre_mlp_layernorm.weight": "5.mlp.linear_fc1.layer_norm_weight",
    }
