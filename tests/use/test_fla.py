"""KDA models of flash-linear-attention become runs that compute what its layers say they do."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.programs import assert_complaints, program
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from megatron_carve.use.trained import trained_model

pytestmark = pytest.mark.slow

CONFIG = {
    "model_type": "kda", "architectures": ["KDAForCausalLM"], "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2,
    "head_dim": 16, "expand_v": 1.5, "intermediate_size": 48, "vocab_size": 260, "norm_eps": 1e-5,
    "allow_neg_eigval": True, "max_position_embeddings": 64, "dtype": "float32",
    "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 9, "rope_theta": 5000.0},
}  # fmt: skip
H, K, V, T = 2, 16, 24, 40
SHAPES = {
    "q_proj.weight": (H * K, 32), "k_proj.weight": (H * K, 32), "v_proj.weight": (H * V, 32),
    "q_conv1d.weight": (H * K, 1, 4), "k_conv1d.weight": (H * K, 1, 4), "v_conv1d.weight": (H * V, 1, 4),
    "f_proj.0.weight": (V, 32), "f_proj.1.weight": (H * K, V), "b_proj.weight": (H, 32),
    "A_log": (H,), "dt_bias": (H * K,), "g_proj.0.weight": (V, 32), "g_proj.1.weight": (H * V, V),
    "g_proj.1.bias": (H * V,), "o_norm.weight": (V,), "o_proj.weight": (32, H * V),
}  # fmt: skip
ATTENTION = {"q_proj.weight": (32, 32), "k_proj.weight": (16, 32), "v_proj.weight": (16, 32), "o_proj.weight": (32, 32)}
MLP = {"gate_proj.weight": (48, 32), "up_proj.weight": (48, 32), "down_proj.weight": (32, 48)}


def their_weights() -> dict[str, torch.Tensor]:
    shapes = {"model.embeddings.weight": (260, 32), "model.norm.weight": (32,), "lm_head.weight": (260, 32)}
    for i in range(3):
        for name, shape in (ATTENTION if i == 1 else SHAPES).items():
            shapes[f"model.layers.{i}.attn.{name}"] = shape
        for name, shape in MLP.items():
            shapes[f"model.layers.{i}.mlp.{name}"] = shape
        shapes |= {f"model.layers.{i}.{name}_norm.weight": (32,) for name in ("attn", "mlp")}
    torch.manual_seed(5)
    return {name: torch.randn(shape) / max(1, shape[-1]) ** 0.5 for name, shape in shapes.items()}


def write(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def logits(w: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Of one sequence [T], by the equations of its layers."""
    x = w["model.embeddings.weight"][tokens]
    for i in range(3):
        layer = {name.partition(f"layers.{i}.")[2]: p for name, p in w.items() if f".layers.{i}." in name}
        normed = norm(x, layer["attn_norm.weight"])
        x = x + (attention if i == 1 else kda)({n.removeprefix("attn."): p for n, p in layer.items()}, normed)
        normed = norm(x, layer["mlp_norm.weight"])
        inner = F.silu(normed @ layer["mlp.gate_proj.weight"].T) * (normed @ layer["mlp.up_proj.weight"].T)
        x = x + inner @ layer["mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def kda(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    def convolved(name: str) -> torch.Tensor:
        y = F.pad((x @ w[f"{name}_proj.weight"].T).T, (3, 0))
        return F.silu(F.conv1d(y, w[f"{name}_conv1d.weight"], groups=y.shape[0])).T

    q, k = (convolved(name).view(-1, H, K) for name in "qk")
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    v = convolved("v").view(-1, H, V)
    decay = x @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"]
    g = -w["A_log"].exp()[:, None] * F.softplus(decay).view(-1, H, K)
    beta = 2 * torch.sigmoid(x @ w["b_proj.weight"].T)
    S, out = torch.zeros(H, K, V), []
    for t in range(x.shape[0]):
        S = g[t].exp()[:, :, None] * S
        missing = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
        S = S + k[t][:, :, None] * missing[:, None]
        out.append(torch.einsum("hkv,hk->hv", S, q[t]) * K**-0.5)
    gate = x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
    o = norm(torch.stack(out), w["o_norm.weight"]) * torch.sigmoid(gate).view(-1, H, V)
    return o.flatten(1) @ w["o_proj.weight"].T


def attention(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    q, k, v = (
        (x @ w[f"{name}_proj.weight"].T).unflatten(1, (-1, 8)).transpose(0, 1) for name in "qkv"
    )  # fmt: skip
    angle = torch.arange(x.shape[0])[:, None] * 5000.0 ** (-torch.arange(4) / 4)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    q, k = rotated(q), rotated(k)
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    distance = torch.arange(x.shape[0])[:, None] - torch.arange(x.shape[0])
    scores = (q @ k.transpose(1, 2) / math.sqrt(8)).masked_fill((distance < 0) | (distance >= 9), -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w["o_proj.weight"].T


def test_an_imported_model_computes_what_their_layers_do(tmp_path):
    w = their_weights()
    write(tmp_path / "theirs", CONFIG, w)
    tokenizer = Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path / "theirs")
    done = program(tmp_path, "import", "theirs", "runs/theirs")
    assert f"{sum(x.numel() for x in w.values()):,} parameters" in done.stdout
    tokens = torch.randint(0, 260, (T,))
    with trained_model(tmp_path / "runs/theirs", device="cpu") as trained, torch.no_grad():
        ours = trained.model(tokens[None], torch.arange(T)[None], None)[0]
        assert trained.tokenizer.encode("a").tolist() == [0]
    torch.testing.assert_close(ours, logits(w, tokens), rtol=1e-4, atol=1e-4)


REFUSED = [
    ({"safe_gate": True, "lower_bound": -5.0}, "config.json: safe_gate: expected False, as ours is, got True"),
    ({"num_v_heads": 4}, "config.json: num_v_heads: expected num_heads = 2, got 4"),
    ({"hidden_act": "powlu"}, "config.json: hidden_act: expected 'swish', as ours is, got 'powlu'"),
    ({"attnres_block_size": 2}, "attnres_block_size: expected None"),
    ({"attn": {**CONFIG["attn"], "qk_norm": True}}, "attn.qk_norm: expected False"),
    ({"attn": None}, "model.layers.1.attn.b_proj.weight of flash-linear-attention's KDA model is missing"),
    ({"use_short_conv": False}, "there is no place for model.layers.0.attn.k_conv1d.weight"),
]


def test_what_does_not_map_is_refused_by_name(tmp_path):
    cases = []
    for i, (changes, complaint) in enumerate(REFUSED):
        write(tmp_path / f"theirs{i}", {**CONFIG, **changes}, their_weights())
        cases.append(([f"theirs{i}", f"runs/theirs{i}"], complaint))
    assert_complaints(tmp_path, "import", cases)
    assert not list((tmp_path / "runs").glob("*"))
