"""CARVE and GDN-2 hybrid language models for Hugging Face transformers.

This file is copied into exported folders, where it stands alone: it needs torch and transformers. On a GPU it takes
the Triton kernels of the package megatron-carve where that is installed, else, for GDN-2 in 16 bits, those of
flash-linear-attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

try:
    from megatron_carve import kernels
except ImportError:
    kernels = None
    try:
        from fla.ops.gdn2 import chunk_gdn2 as peer_gdn2
    except ImportError:
        peer_gdn2 = None
else:
    peer_gdn2 = None

CHUNK = 64


class CarveConfig(PretrainedConfig):
    """Sizes and options of a model, by the names of a megatron_carve recipe.

    Args:
        pattern: a letter for each layer: C (CARVE), 2 (GDN-2), * (attention), - (MLP).
        mixer: heads, widths and options of the C and 2 layers.
        recipe: the model, mixer and precision of the recipe, from which megatron_carve imports the folder again.
    """

    model_type = "megatron_carve"

    def __init__(
        self,
        pattern: str = "C-",
        vocab_size: int = 256,
        hidden_size: int = 64,
        ffn_hidden_size: int = 128,
        num_attention_heads: int = 2,
        num_key_value_heads: int = 2,
        attention_head_dim: int = 32,
        attention_window: int | None = None,
        position_embedding: str = "rope",
        rotary_base: int = 10000,
        norm_epsilon: float = 1e-5,
        mixer: dict[str, Any] | None = None,
        recipe: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.pattern = pattern
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.attention_head_dim = attention_head_dim
        self.attention_window = attention_window
        self.position_embedding = position_embedding
        self.rotary_base = rotary_base
        self.norm_epsilon = norm_epsilon
        self.mixer = mixer or {}
        self.recipe = recipe
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.pattern)


class CarveCache:
    """What the layers remember of the tokens so far, by layer; its size does not grow beyond attention's window."""

    def __init__(self, layers: int) -> None:
        self.tokens = 0
        self.layers: list[dict[str, Any]] = [{} for _ in range(layers)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config: CarveConfig) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False) for _ in range(2)
        )
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, memory: dict[str, Any] | None, position: int) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Causal attention over the last attention_window tokens, or all."""

    def __init__(self, config: CarveConfig) -> None:
        super().__init__()
        self.config = config
        heads, groups, D = config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * D, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, groups * D, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(heads * D, config.hidden_size, bias=False)

    def forward(self, x: Tensor, memory: dict[str, Any] | None, position: int) -> Tensor:
        c, T = self.config, x.shape[1]
        q, k, v = (
            p(x).unflatten(-1, (-1, c.attention_head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if c.position_embedding == "rope":
            q, k = (rotate(part, position, c.rotary_base) for part in (q, k))
        if memory is not None:
            if memory:
                k, v = torch.cat([memory["k"], k], 2), torch.cat([memory["v"], v], 2)
            first = 0 if c.attention_window is None else max(0, k.shape[2] - c.attention_window + 1)
            memory.update(k=k[:, :, first:].clone(), v=v[:, :, first:].clone())  # views would keep the whole prompt
        places = torch.arange(k.shape[2], device=x.device)
        age = places[-T:, None] - places
        seen = age >= 0 if c.attention_window is None else (age >= 0) & (age < c.attention_window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(out.transpose(1, 2).flatten(-2))


def rotate(x: Tensor, position: int, base: int) -> Tensor:
    """Rotary embedding of [B, heads, T, D] from a position on."""
    D = x.shape[-1]
    rates = 1.0 / base ** (torch.arange(0, D, 2, dtype=torch.float32, device=x.device) / D)
    angles = torch.arange(position, position + x.shape[2], dtype=torch.float32, device=x.device)[:, None] * rates
    angles = torch.cat([angles, angles], -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos().to(x.dtype) + torch.cat([-second, first], -1) * angles.sin().to(x.dtype)


class Mixer(nn.Module):
    """CARVE (arXiv 2606.27229) or GDN-2 (arXiv 2605.22791)."""

    def __init__(self, config: CarveConfig, kind: str) -> None:
        super().__init__()
        m, h = config.mixer, config.hidden_size
        self.kind, self.m, self.eps = kind, m, config.norm_epsilon
        H, HV, K, V = (m[n] for n in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"))
        sizes = {"query": H * K, "key": H * K, "value": HV * V, "erase": H * K}
        sizes["write"] = HV if kind == "carve" else HV * V
        sizes["decay"] = V if m["decay_projection"] == "low_rank" else H * K
        sizes["gate"] = V if m["output_gate_projection"] == "low_rank" else HV * V
        linear = {name: nn.Linear(h, size, bias=False) for name, size in sizes.items()}
        self.query_proj, self.key_proj, self.value_proj = linear["query"], linear["key"], linear["value"]
        self.erase_proj, self.write_proj = linear["erase"], linear["write"]
        self.decay_proj, self.gate_proj = linear["decay"], linear["gate"]
        channels = 2 * H * K + HV * V
        self.conv_weight = nn.Parameter(torch.empty(channels, m["conv_width"]))
        self.conv_bias = nn.Parameter(torch.empty(channels)) if m["conv_bias"] else None
        self.A_log = nn.Parameter(torch.empty(H, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(H * K, dtype=torch.float32))
        self.decay_up = nn.Linear(V, H * K, bias=False) if m["decay_projection"] == "low_rank" else None
        self.gate_up = nn.Linear(V, HV * V) if m["output_gate_projection"] == "low_rank" else None
        if kind == "carve":
            self.content_down = nn.Parameter(torch.empty(HV, m["content_rank"], V))
            self.content_up = nn.Parameter(torch.empty(HV, K, m["content_rank"]))
        self.norm_weight = nn.Parameter(torch.empty(V))
        self.out_proj = nn.Linear(HV * V, h, bias=False)

    def forward(self, x: Tensor, memory: dict[str, Any] | None, position: int) -> Tensor:
        m = self.m
        K, V = m["key_head_dim"], m["value_head_dim"]
        convolved = torch.cat([self.query_proj(x), self.key_proj(x), self.value_proj(x)], -1)
        q, k, v = self._convolve(convolved, memory)
        q, k = (part.unflatten(-1, (-1, K)) for part in (q, k))
        decay, gate = self.decay_proj(x), self.gate_proj(x)
        decay = decay if self.decay_up is None else self.decay_up(decay)
        gate = gate if self.gate_up is None else self.gate_up(gate)
        rate = -self.A_log.float().exp()[:, None]
        g = rate * F.softplus(decay.float().unflatten(-1, (-1, K)) + self.dt_bias.float().unflatten(0, (-1, K)))
        erase, write = self.erase_proj(x).unflatten(-1, (-1, K)), self.write_proj(x)
        v = v.unflatten(-1, (-1, V))
        if self.kind == "gdn2":
            write = write.unflatten(-1, (-1, V))
        state = None if memory is None else memory.get("state")
        o, state = self._recurrence(q, k, v, g, erase, write, state)
        if memory is not None:
            memory["state"] = state
        act = F.silu if m["output_gate_activation"] == "silu" else torch.sigmoid
        normed = F.rms_norm(o.float(), (V,), self.norm_weight.float(), self.eps)
        out = (normed * act(gate.float().unflatten(-1, (-1, V)))).to(x.dtype)
        return self.out_proj(out.flatten(-2))

    def _convolve(self, x: Tensor, memory: dict[str, Any] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Causal depthwise convolution, SiLU, and the L2 norm of every head of queries and keys."""
        m, before = self.m, self.m["conv_width"] - 1
        earlier = None if memory is None else memory.get("tokens")
        wide = F.pad(x, (0, 0, before, 0)) if earlier is None else torch.cat([earlier, x], 1)
        if memory is not None:
            memory["tokens"] = wide[:, wide.shape[1] - before :].clone()
        y = F.conv1d(
            wide.transpose(1, 2), self.conv_weight[:, None], self.conv_bias, groups=wide.shape[2]
        ).transpose(1, 2)  # fmt: skip
        y = F.silu(y)
        keys = m["num_key_heads"] * m["key_head_dim"]
        q, k, v = y.split([keys, keys, y.shape[2] - 2 * keys], -1)
        return unit_heads(q, m["key_head_dim"]), unit_heads(k, m["key_head_dim"]), v

    def _recurrence(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, erase: Tensor, write: Tensor, state: Any
    ) -> tuple[Tensor, Any]:
        """[B, T, heads, ...] -> o, and the state to go on from: S, and CARVE's mean, partial sum and count.

        erase and write are logits of the gates.
        """
        m, carve = self.m, self.kind == "carve"
        scale = 2.0 if m["negative_eigenvalues"] else 1.0
        content = (self.content_down, self.content_up) if carve else ()
        detached = m["content_grad"] == "detached"
        if kernels is not None and q.is_cuda:
            options: dict[str, Any] = {"gate_logits": True, "erase_scale": scale, "output_final_state": True}
            if not carve:
                return kernels.chunk_gdn2(q, k, v, g, erase, write, initial_state=state, **options)
            options |= {"content_chunk": m["content_chunk"], "content_grad": m["content_grad"]}
            state = None if state is None else kernels.CarveState(*state)
            return kernels.chunk_carve(q, k, v, g, erase, write, *content, initial_state=state, **options)
        if peer_gdn2 is not None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and not carve:
            q, k, g, b = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k, g, scale * erase.sigmoid()))
            return peer_gdn2(q, k, v, g, b, write.sigmoid(), initial_state=state, output_final_state=True)
        return recurrence(q, k, v, g, erase, write, scale, content, m["content_chunk"], detached, state)


def unit_heads(x: Tensor, D: int) -> Tensor:
    wide = x.float().unflatten(-1, (-1, D))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).flatten(-2).to(x.dtype)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, erase: Tensor, write: Tensor, scale: float,
    content: tuple[Tensor, ...], content_chunk: int, detached: bool, state: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Both mixers in plain torch, float32, in chunks that end where content chunks do.

    S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T        o_t = K^-1/2 S_t^T q_t
    b_t = scale * sigmoid(erase_t + U D m),    m the mean output of the content chunk before (CARVE)
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    q, k, g, erase = (
        x.float().repeat_interleave(HV // H, 2).transpose(1, 2) for x in (q, k, g, erase)
    )  # fmt: skip
    write = write.float().sigmoid()
    z = ((write if write.ndim == 4 else write[..., None]) * v.float()).transpose(1, 2)
    q = q * K**-0.5
    zeros = v.new_zeros(B, HV, V, dtype=torch.float32)
    if state is None:
        S = v.new_zeros(B, HV, K, V, dtype=torch.float32)
        state = (S, zeros, zeros, torch.zeros(B, dtype=torch.int64, device=v.device)) if content else S
    filled = 0
    if content:
        S, mean, partial, count = state
        filled = int(count[0])
        down, up = (x.float() for x in content)
    else:
        S, mean, partial = state, zeros, zeros
    outputs, start = [], 0
    while start < T:
        end = min(start + CHUNK - filled % CHUNK, T)
        part = slice(start, end)
        logits = erase[:, :, part]
        if content:
            seen = mean.detach() if detached else mean
            logits = logits + torch.einsum("hkr,hrv,bhv->bhk", up, down, seen)[:, :, None]
        o, S = chunk(q[:, :, part], k[:, :, part], z[:, :, part], g[:, :, part], scale * logits.sigmoid(), S)
        outputs.append(o)
        filled, start = filled + end - start, end
        partial = partial + o.sum(2)
        if content and filled == content_chunk:
            mean, partial, filled = partial / content_chunk, zeros, 0
    o = torch.cat(outputs, 2).transpose(1, 2).to(v.dtype)
    return o, (S, mean, partial, torch.full_like(count, filled)) if content else S


def chunk(q: Tensor, k: Tensor, z: Tensor, g: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk of at most 64 tokens: q, k, g, b [B, HV, C, K], z = w v [B, HV, C, V], S [B, HV, K, V] -> (o, S)."""
    G = g.cumsum(-2)
    C = q.shape[-2]
    later = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    # every pair's own decay: never above 1, however steep
    decay = (G[..., :, None, :] - G[..., None, :, :]).masked_fill(~later[..., None], -math.inf).exp()
    bk = b * k
    T = torch.einsum("...rk,...rsk,...sk->...rs", bk, decay, k).tril(-1)
    P = torch.einsum("...rk,...rsk,...sk->...rs", q, decay, k)
    R = torch.linalg.solve_triangular(
        T + torch.eye(C, device=q.device), z - (G.exp() * bk) @ S, upper=False, unitriangular=True
    )  # fmt: skip
    o = (G.exp() * q) @ S + P @ R
    return o, G[..., -1, :, None].exp() * S + (k * (G[..., -1:, :] - G).exp()).transpose(-1, -2) @ R


class Layer(nn.Module):
    """Norm, mixer or attention or MLP, and the residual sum."""

    def __init__(self, config: CarveConfig, letter: str) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mixer: nn.Module
        if letter in "C2":
            self.mixer = Mixer(config, {"C": "carve", "2": "gdn2"}[letter])
        elif letter == "*":
            self.mixer = Attention(config)
        elif letter == "-":
            self.mixer = MLP(config)
        else:
            raise ValueError(f"pattern: expected layers of C, 2, * and -, got {letter!r}")

    def forward(self, x: Tensor, memory: dict[str, Any] | None, position: int) -> Tensor:
        return x + self.mixer(self.norm(x), memory, position)


class CarvePreTrainedModel(PreTrainedModel):
    config_class = CarveConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]  # noqa: RUF012
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("A_log", "dt_bias", "content_up", "conv_bias", "bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)


class CarveModel(CarvePreTrainedModel):
    def __init__(self, config: CarveConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, letter) for letter in config.pattern)
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.post_init()

    def forward(self, input_ids: Tensor, past_key_values: CarveCache | None = None) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, hidden]; a cache is brought up to date."""
        x = self.embed_tokens(input_ids)
        position = 0 if past_key_values is None else past_key_values.tokens
        for i, layer in enumerate(self.layers):
            x = layer(x, None if past_key_values is None else past_key_values.layers[i], position)
        if past_key_values is not None:
            past_key_values.tokens += input_ids.shape[1]
        return self.norm(x)


class CarveForCausalLM(CarvePreTrainedModel, GenerationMixin):
    # The loss is a mean over the batch, whatever a trainer says about its size.
    accepts_loss_kwargs = False
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CarveConfig) -> None:
        super().__init__(config)
        self.model = CarveModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: CarveCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids [B, T] -> logits [B, T, vocab], of the last logits_to_keep tokens if that is above 0.

        Raises:
            ValueError: padded sequences; a recurrence would remember the padding.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("attention_mask: expected sequences of one length, without padding, got zeros in it")
        if use_cache and past_key_values is None:
            past_key_values = CarveCache(self.config.num_hidden_layers)
        hidden = self.model(input_ids, past_key_values)
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: CarveCache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        seen = 0 if past_key_values is None else past_key_values.tokens
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": kwargs.get("attention_mask"),
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
        }
