"""Megatron-Bridge's provider of our models."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_carve.model.config import MixerFields
from megatron_carve.model.variants import MIXER_LETTERS
from megatron_carve.run.session import patch_megatron
from megatron_carve.run.task import ATTENTION_LETTERS, layer_flops
from megatron_carve.specs import stack_spec


def mixer_stack_spec(config: Any) -> ModuleSpec:
    """The layers of a model with mixers; a named function, which a saved configuration can name."""
    return stack_spec(config.transformer_impl, attention_convolution=_attention_convolution(config))


def _attention_convolution(config: Any) -> Any:
    return config.recipe.get("model", {}).get("attention_convolution", "none")


@dataclass
class MixerModelProvider(HybridModelProvider, MixerFields):
    """HybridModelProvider with the mixers' letters, layers and options.

    `recipe` holds the sections of a recipe that say what the model is; recipes.pretrain_config and AutoBridge make
    providers from it.
    """

    hybrid_stack_spec: Any = mixer_stack_spec
    recipe: dict[str, Any] = field(default_factory=dict)
    """What config.json of an exported folder has as its recipe: the sections model, mixer, data, training."""

    def finalize(self) -> None:
        """As upstream, with our layer letters, and for every layout the same sizes.

        Raises:
            ValueError: sizes that are not the recipe's, by which weights are named and checked.
        """
        patch_megatron()  # a provider may also come from a checkpoint, without a recipe function
        if self.recipe:
            self._require_its_recipe()
            model = self.recipe["model"]
            staged = self.pipeline_model_parallel_size > 1
            self.hybrid_layer_pattern = model["pattern"] if staged else model["pattern"].replace("|", "")
            if not set(model["pattern"]) & ATTENTION_LETTERS:
                # Megatron asks for heads that the tensor-parallel size divides, also where no layer has any.
                self.num_attention_heads = model["num_attention_heads"] * self.tensor_model_parallel_size
        super().finalize()

    def _require_its_recipe(self) -> None:
        model = self.recipe["model"]
        own = {
            "model.pattern": (self.hybrid_layer_pattern or "").replace("|", ""),
            "model.hidden_size": self.hidden_size,
            "model.ffn_hidden_size": self.ffn_hidden_size,
            "model.norm_epsilon": self.layernorm_epsilon,
            "model.tie_embeddings": self.share_embeddings_and_output_weights,
            "mixer.num_key_heads": self.linear_num_key_heads,
            "mixer.num_value_heads": self.linear_num_value_heads,
            "mixer.key_head_dim": self.linear_key_head_dim,
            "mixer.value_head_dim": self.linear_value_head_dim,
            "mixer.conv_width": self.linear_conv_kernel_dim,
            **{f"mixer.{name}": value for name, value in self.mixer.items()},
        }
        implied = {"model.pattern": model["pattern"].replace("|", "")}
        if set(model["pattern"]) & ATTENTION_LETTERS:
            heads = model["num_attention_heads"]
            own |= {
                "model.num_attention_heads": self.num_attention_heads,
                "model.num_query_groups": self.num_query_groups or self.num_attention_heads,
                "model.attention_head_dim": self.kv_channels or self.hidden_size // self.num_attention_heads,
                "model.attention_window": self.window_size and self.window_size[0] + 1,
                "model.position_embedding": self.position_embedding_type,
                "model.rotary_base": self.rotary_base,
            }
            implied |= {
                "model.num_query_groups": model["num_query_groups"] or heads,
                "model.attention_head_dim": model["attention_head_dim"] or model["hidden_size"] // heads,
            }
        for key, value in own.items():
            section, _, name = key.partition(".")
            expected = implied.get(key, self.recipe[section][name])
            if value != expected:
                raise ValueError(
                    f"{key}: the provider has {value!r} and its recipe {expected!r}; give the recipe function the "
                    f"override {key}={value}"
                )

    def _get_num_floating_point_operations(self, batch_size: int) -> float:
        """Megatron-Bridge's count, which is silent about what it does not know, and our layers'."""
        from megatron.bridge.training.utils.flop_utils import num_floating_point_operations

        plain = copy.copy(self)
        plain.__class__ = HybridModelProvider
        total = num_floating_point_operations(SimpleNamespace(model=plain, peft=None, dataset=None), batch_size)
        args = SimpleNamespace(
            **vars(self),
            group_query_attention=self.num_query_groups is not None,
            attention_convolution=_attention_convolution(self),
        )
        pattern = self.hybrid_layer_pattern or ""
        letters = [letter for letter in (*MIXER_LETTERS, "*") if letter in pattern]
        ours = sum(pattern.count(letter) * layer_flops(args, letter) for letter in letters)
        return total + 3 * batch_size * self.seq_length * ours  # forward once, backward twice the forward
