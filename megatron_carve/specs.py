"""ModuleSpecs: mixer layers, hybrid stacks and GPT-style blocks, for Transformer Engine and local layers.

`carve_stack_spec`, `gdn2_stack_spec` and `kda_stack_spec` work with Megatron-LM's own `--spec`: their `G` layers are
CARVE, GDN-2 and KDA.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as megatron_hybrid_stack_spec
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_carve.model.attention import WindowedSelfAttention
from megatron_carve.model.config import Convolution, LayerImplementation
from megatron_carve.model.convolved_attention import ConvolvedSelfAttention
from megatron_carve.model.core_attention import LocalAttention
from megatron_carve.model.decoding import DecodingLayer
from megatron_carve.model.local_layers import RMSNorm, StandaloneRMSNorm, fused_rms_norm_affine
from megatron_carve.model.mixers.base import LinearAttentionMixer, MixerSubmodules
from megatron_carve.model.mixers.carve import CarveMixer
from megatron_carve.model.mixers.gdn2 import GDN2Mixer
from megatron_carve.model.mixers.kda import KDAMixer
from megatron_carve.model.stack import MixerStack, MixerStackSubmodules
from megatron_carve.model.variants import MIXER_LETTERS, MixerKind
from megatron_carve.notices import say_once

MIXERS: dict[MixerKind, type[LinearAttentionMixer]] = {m.kind: m for m in (CarveMixer, GDN2Mixer, KDAMixer)}


@dataclass(frozen=True)
class Toolkit:
    """The building blocks of one layer implementation.

    With Transformer Engine the norm before a projection is part of it (`norm` is IdentityOp and the projection
    normalises); `keys_map` makes local layers write the same checkpoint keys. A `final_norm` is a module of its own in
    both.
    """

    norm: Any
    final_norm: Any
    norm_linear: Any
    column_linear: Any
    row_linear: Any
    attention: Any
    experts: Any

    def keys_map(self, norm: str, linear: str) -> dict[str, str]:
        """Checkpoint keys of the norm in front of `linear`, as Transformer Engine's fused layer names them."""
        return {} if self.norm in (IdentityOp, self.final_norm) else {f"{norm}.": f"{linear}.layer_norm_"}


def default_layers() -> LayerImplementation:
    """Transformer Engine's layers when it is installed, else local ones."""
    return "transformer_engine" if HAVE_TE else "local"


def describe_layers(layers: LayerImplementation) -> str:
    """What was chosen and why, for the log."""
    if layers == "transformer_engine":
        return "layers: Transformer Engine"
    reason = "" if HAVE_TE else " (Transformer Engine is not available)"
    norm = "NVIDIA apex" if fused_rms_norm_affine is not None else "torch"
    return f"layers: Megatron-Core's own{reason}, RMSNorm by {norm}"


def toolkit(layers: LayerImplementation) -> Toolkit:
    """The building blocks of `layers`.

    Raises:
        ImportError: Transformer Engine asked for but not installed.
    """
    if layers == "local":
        return Toolkit(
            norm=RMSNorm,
            final_norm=StandaloneRMSNorm,
            norm_linear=ColumnParallelLinear,
            column_linear=ColumnParallelLinear,
            row_linear=RowParallelLinear,
            attention=LocalAttention,
            experts=get_moe_module_spec(use_te=False, num_experts=1),  # the number is the configuration's
        )
    if not HAVE_TE:
        raise ImportError(
            'model.layers: transformer_engine is not installed; install "transformer-engine[pytorch]" or choose local'
        )
    from megatron.core.extensions import transformer_engine as te

    from megatron_carve.model.core_attention import TransformerEngineAttention

    return Toolkit(
        norm=IdentityOp,
        final_norm=te.TENorm,
        norm_linear=te.TELayerNormColumnParallelLinear,
        column_linear=te.TEColumnParallelLinear,
        row_linear=te.TERowParallelLinear,
        attention=TransformerEngineAttention,
        experts=get_moe_module_spec(use_te=True, num_experts=1, moe_grouped_gemm=True),
    )


def mixer_layer_spec(kind: MixerKind, layers: LayerImplementation, **params: Any) -> ModuleSpec:
    """One residual layer: norm, mixer, add. `params` go to the mixer (`options`, for instance)."""
    return _mixing_layer(
        toolkit(layers),
        ModuleSpec(
            module=MIXERS[kind],
            params=params,
            submodules=MixerSubmodules(in_proj=toolkit(layers).norm_linear, out_proj=toolkit(layers).row_linear),
        ),
        "in_proj",
    )


def stack_spec(
    layers: LayerImplementation, g_layer: MixerKind | Literal["gdn"] = "gdn", *,
    attention_convolution: Convolution = "none",
) -> ModuleSpec:  # fmt: skip
    """A hybrid stack of mixers, `*` (attention), `-` (MLP), `E` (experts), `G`, and those that only Transformer Engine
    has.

    Args:
        layers: which implementation of norms, linear layers and attention.
        g_layer: what the letter `G` stands for: Megatron's GDN (needs flash-linear-attention), or one of the mixers.
        attention_convolution: of the queries, keys and values of `*` layers.
    """
    tools = toolkit(layers)
    g_spec = _gdn_layer_spec(tools) if g_layer == "gdn" else mixer_layer_spec(g_layer, layers)
    base: dict[str, Any] = {}
    if layers == "transformer_engine":  # Megatron's remaining layers exist in this implementation only
        upstream = megatron_hybrid_stack_spec.submodules
        base = {f.name: getattr(upstream, f.name) for f in dataclasses.fields(upstream)}
    own = {
        "mixer_layers": {letter: mixer_layer_spec(kind, layers) for letter, kind in MIXER_LETTERS.items()},
        "gdn_layer": g_spec,
        "attention_layer": _attention_layer(tools, attention_convolution),
        "mlp_layer": _mlp_layer_spec(tools),
        "moe_layer": _moe_layer_spec(tools),
        "mtp_block_spec": _mtp_block_spec(tools),
        "final_norm": None if tools.norm is IdentityOp else tools.final_norm,
        "description": describe_layers(layers),
    }
    return ModuleSpec(module=MixerStack, submodules=MixerStackSubmodules(**{**base, **own}))


def carve_gpt_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Layers of a GPT-style model with CARVE mixers, for Megatron's `--spec megatron_carve.specs carve_gpt_spec`.

    `--experimental-attention-variant gated_delta_net` and `--linear-attention-freq` say which layers are CARVE;
    the others are attention. Every layer has an MLP.
    """
    return _gpt_spec("carve", config, vp_stage)


def gdn2_gpt_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """As `carve_gpt_spec`, with GDN-2 mixers."""
    return _gpt_spec("gdn2", config, vp_stage)


def kda_gpt_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """As `carve_gpt_spec`, with KDA mixers."""
    return _gpt_spec("kda", config, vp_stage)


def _gpt_spec(kind: MixerKind, model_config: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_linear_attention_pattern

    config = getattr(model_config, "transformer", model_config)
    layers = default_layers()
    tools = toolkit(layers)
    say_once(describe_layers(layers))
    mixer = mixer_layer_spec(kind, layers)
    attention = _attention_layer(tools)
    mlp = _mlp_layer_spec(tools).submodules

    def block(mixing: ModuleSpec) -> ModuleSpec:
        merged = dataclasses.replace(
            mixing.submodules,
            pre_mlp_layernorm=mlp.pre_mlp_layernorm,
            mlp=mlp.mlp,
            mlp_bda=mlp.mlp_bda,
            sharded_state_dict_keys_map={
                **mixing.submodules.sharded_state_dict_keys_map,
                **mlp.sharded_state_dict_keys_map,
            },
        )
        return ModuleSpec(module=DecodingLayer, submodules=merged)

    specs = [block(mixer if linear else attention) for linear in get_linear_attention_pattern(config)]
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=specs[first : first + count], layer_norm=tools.final_norm)


def _mixing_layer(tools: Toolkit, mixing: ModuleSpec, first_linear: str) -> ModuleSpec:
    return ModuleSpec(
        module=DecodingLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=tools.norm,
            self_attention=mixing,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=tools.keys_map("input_layernorm", f"self_attention.{first_linear}"),
        ),
    )


def _attention_layer(tools: Toolkit, convolution: Convolution = "none") -> ModuleSpec:
    if convolution == "dynamic":  # its taps are made of normalised tokens, which stay inside of a fused projection
        tools = dataclasses.replace(tools, norm=tools.final_norm, norm_linear=tools.column_linear)
    options: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal}
    attention = ModuleSpec(
        module=WindowedSelfAttention if convolution == "none" else ConvolvedSelfAttention,
        params=options if convolution == "none" else {**options, "convolution": convolution},
        submodules=SelfAttentionSubmodules(
            linear_qkv=tools.norm_linear, core_attention=tools.attention, linear_proj=tools.row_linear
        ),
    )
    return _mixing_layer(tools, attention, "linear_qkv")


def _gdn_layer_spec(tools: Toolkit) -> ModuleSpec:
    submodules = GatedDeltaNetSubmodules(
        in_proj=tools.norm_linear, out_norm=tools.final_norm, out_proj=tools.row_linear
    )
    return _mixing_layer(tools, ModuleSpec(module=GatedDeltaNet, submodules=submodules), "in_proj")


def _mlp_layer_spec(tools: Toolkit) -> ModuleSpec:
    return ModuleSpec(
        module=DecodingLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=tools.norm,
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=tools.norm_linear, linear_fc2=tools.row_linear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=tools.keys_map("pre_mlp_layernorm", "mlp.linear_fc1"),
        ),
    )


def _moe_layer_spec(tools: Toolkit) -> ModuleSpec:
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=tools.final_norm,  # a module of its own, for the router sees what it gives too
            mlp=tools.experts,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mtp_block_spec(tools: Toolkit) -> ModuleSpec:
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=tools.final_norm,
            hnorm=tools.final_norm,
            eh_proj=tools.column_linear,
            mtp_model_layer=None,  # built from the pattern after '/'
            layer_norm=tools.final_norm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    )


carve_stack_spec = stack_spec(default_layers(), g_layer="carve")
gdn2_stack_spec = stack_spec(default_layers(), g_layer="gdn2")
kda_stack_spec = stack_spec(default_layers(), g_layer="kda")
