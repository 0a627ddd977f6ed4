"""KDA models of flash-linear-attention 0.6, as folders of transformers, in the form of our exported ones.

Its KDA layer is ours with a sigmoid output gate; a block of its is a mixer or attention layer and an MLP layer of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_carve.use.hugging_face import CONFIG, TOKENIZER_FILES

MODEL_TYPE = "kda"
SOURCE = "flash-linear-attention's KDA model"
# What its configuration class has where a config.json is silent.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048, "expand_v": 1.0, "use_short_conv": True, "allow_neg_eigval": False, "safe_gate": False,
    "lower_bound": None, "conv_size": 4, "head_dim": 128, "num_heads": 16, "num_v_heads": None,
    "max_position_embeddings": 2048, "hidden_ratio": 4, "intermediate_size": None, "hidden_act": "swish",
    "num_hidden_layers": 24, "norm_eps": 1e-6, "attn": None, "eos_token_id": 2, "tie_word_embeddings": False,
    "initializer_range": 0.02, "vocab_size": 32000, "attnres_block_size": None,
}  # fmt: skip
# What our layers cannot be, by key: the values that they can.
ONLY: dict[str, tuple[Any, ...]] = {
    "safe_gate": (False,), "lower_bound": (None,), "hidden_act": ("swish",), "attnres_block_size": (None,),
}  # fmt: skip
ATTENTION_ONLY: dict[str, tuple[Any, ...]] = {"qkv_bias": (False,), "qk_norm": (False,)}
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

# A layer's tensors: their name, or those of parts that lie one after another, by ours. Vectors of heads are flat here.
MLP = {"norm.weight": "mlp_norm.weight"} | {
    f"mixer.{name}_proj.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")
}
ATTENTION = {"norm.weight": "attn_norm.weight"} | {
    f"mixer.{name}_proj.weight": f"attn.{name}_proj.weight" for name in "qkvo"
}
MIXER: dict[str, str | tuple[str, ...]] = {
    "norm.weight": "attn_norm.weight",
    "mixer.query_proj.weight": "attn.q_proj.weight",
    "mixer.key_proj.weight": "attn.k_proj.weight",
    "mixer.value_proj.weight": "attn.v_proj.weight",
    "mixer.write_proj.weight": "attn.b_proj.weight",
    "mixer.decay_proj.weight": "attn.f_proj.0.weight",
    "mixer.decay_up.weight": "attn.f_proj.1.weight",
    "mixer.gate_proj.weight": "attn.g_proj.0.weight",
    "mixer.gate_up.weight": "attn.g_proj.1.weight",
    "mixer.gate_up.bias": "attn.g_proj.1.bias",
    "mixer.A_log": "attn.A_log",
    "mixer.dt_bias": "attn.dt_bias",
    "mixer.norm_weight": "attn.o_norm.weight",
    "mixer.out_proj.weight": "attn.o_proj.weight",
}
CONVOLUTION = {"mixer.conv_weight": tuple(f"attn.{name}_conv1d.weight" for name in "qkv")}


def configuration(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Its config.json as one that megatron_carve.export wrote, as far as `import` reads that.

    Args:
        folder: with config.json in it, and perhaps a tokenizer.

    Raises:
        ValueError: what our layers cannot be; names the key.
    """
    origin = str(folder / CONFIG)
    c = {**DEFAULTS, **{key: value for key, value in config.items() if value is not None or key not in DEFAULTS}}
    _require(c, ONLY, origin, "")
    heads = c["num_heads"]
    if c["num_v_heads"] not in (None, heads):
        raise ValueError(
            f"{origin}: num_v_heads: expected num_heads = {heads}, got {c['num_v_heads']}: {SOURCE} then has a decay "
            "for each value head, and ours for each key head"
        )
    attention = _attention(c, origin)
    of_attention = {layer for spec in attention for layer in spec["layers"]}
    pattern = "".join("*-" if i in of_attention else "K-" for i in range(c["num_hidden_layers"]))
    wide = int(c["hidden_size"] * (c["hidden_ratio"] or 4) * 2 / 3)
    model = {
        "pattern": pattern,
        "hidden_size": c["hidden_size"],
        "ffn_hidden_size": c["intermediate_size"] or 256 * -(-wide // 256),
        "vocab_size": c["vocab_size"],
        "vocab_multiple": next(n for n in (128, 64, 32, 16, 8, 4, 2, 1) if c["vocab_size"] % n == 0),
        "tie_embeddings": c["tie_word_embeddings"],
        "norm_epsilon": c["norm_eps"],
        "init_std": c["initializer_range"],
        **_attention_options(attention, origin),
    }
    mixer = {
        "num_key_heads": heads, "num_value_heads": heads, "key_head_dim": c["head_dim"],
        "value_head_dim": int(c["head_dim"] * c["expand_v"]), "output_gate_activation": "sigmoid",
        "short_convolution": "static" if c["use_short_conv"] else "none", "conv_width": c["conv_size"],
        "negative_eigenvalues": c["allow_neg_eigval"],
    }  # fmt: skip
    precision = PRECISIONS.get(str(c.get("dtype", c.get("torch_dtype", "float32"))), "fp32")
    training = {"precision": precision, "seq_length": c["max_position_embeddings"]}
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    data = {"text": SOURCE, "tokenizer": f"huggingface:{folder.resolve()}" if has_tokenizer else "bytes"}
    return {"model_type": MODEL_TYPE, "recipe": {"model": model, "mixer": mixer, "training": training, "data": data}}


def weights(theirs: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> dict[str, Tensor]:
    """Its tensors under the names of modeling_carve.py.

    Args:
        recipe: what `configuration` made.

    Raises:
        ValueError: a tensor that is missing, or that has no place.
    """
    model, mixer = recipe["model"], recipe["mixer"]
    names: dict[str, str | tuple[str, ...]] = {
        "model.embed_tokens.weight": "model.embeddings.weight",
        "model.norm.weight": "model.norm.weight",
    }
    if not model["tie_embeddings"]:
        names["lm_head.weight"] = "lm_head.weight"
    of_mixer = {**MIXER, **(CONVOLUTION if mixer["short_convolution"] == "static" else {})}
    of_layers: dict[str, Mapping[str, str | tuple[str, ...]]] = {"K": of_mixer, "*": ATTENTION, "-": MLP}
    for place, letter in enumerate(model["pattern"]):
        for ours, of in of_layers[letter].items():
            parts = (of,) if isinstance(of, str) else of
            names[f"model.layers.{place}.{ours}"] = tuple(f"model.layers.{place // 2}.{part}" for part in parts)
    left = dict(theirs)
    if model["tie_embeddings"]:
        left.pop("lm_head.weight", None)

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"model.safetensors: {name} of {SOURCE} is missing")
        x = left.pop(name)
        return x.squeeze(1) if name.endswith("conv1d.weight") else x

    found = {ours: torch.cat([take(n) for n in ([of] if isinstance(of, str) else of)]) for ours, of in names.items()}
    if left:
        raise ValueError(f"model.safetensors: there is no place for {min(left)} of {SOURCE} in this model")
    return found


def _attention(c: Mapping[str, Any], origin: str) -> list[dict[str, Any]]:
    attn = c["attn"]
    if attn is None:
        return []
    specs = [attn] if isinstance(attn, dict) else attn
    if not isinstance(specs, list) or not all(isinstance(s, dict) and isinstance(s.get("layers"), list) for s in specs):
        raise ValueError(f"{origin}: attn: expected null or settings with a list of layers, got {attn!r}")
    for spec in specs:
        _require({**dict.fromkeys(ATTENTION_ONLY, False), **spec}, ATTENTION_ONLY, origin, "attn.")
    return specs


def _attention_options(specs: list[dict[str, Any]], origin: str) -> dict[str, Any]:
    """What all attention layers are; ours are alike."""
    if not specs:
        return {"num_attention_heads": 1, "position_embedding": "none"}
    kinds = [
        {
            "num_attention_heads": s["num_heads"],
            "num_query_groups": s.get("num_kv_heads") or s["num_heads"],
            "attention_window": s.get("window_size"),
            "rotary_base": int(s.get("rope_theta") or 10000),
        }
        for s in specs
    ]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"{origin}: attn: expected attention layers that are alike, got {kinds}")
    return {**kinds[0], "position_embedding": "rope"}


def _require(c: Mapping[str, Any], legal: Mapping[str, tuple[Any, ...]], origin: str, section: str) -> None:
    for key, values in legal.items():
        if c[key] not in values:
            raise ValueError(f"{origin}: {section}{key}: expected {values[0]!r}, as ours is, got {c[key]!r}")
