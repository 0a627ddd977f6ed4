"""CARVE, GDN-2 and KDA hybrid language models for Hugging Face transformers.

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
from transformers.utils import logging

try:
    from megatron_carve import kernels
except ImportError:
    kernels = None  # type: ignore[assignment]
    try:
        from fla.ops.gdn2 import chunk_gdn2 as peer_gdn2
    except ImportError:
        peer_gdn2 = None
else:
    peer_gdn2 = None

logger = logging.get_logger(__name__)

# Of the mixers by letter, as in megatron_carve/model/variants.py.
MIXERS: dict[str, dict[str, Any]] = {
    "C": {"op": "carve", "erase": "key_channels", "write": "value_heads", "sees_state": True},
    "2": {"op": "gdn2", "erase": "key_channels", "write": "value_channels", "sees_state": False},
    "K": {"op": "gdn2", "erase": "none", "write": "key_heads", "sees_state": False},
}

# By which transformers hands a cache on: "cache" from 5.24 on.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

# What CarveConfig takes for keys of `mixer` that are not given.
DEFAULT_MIXER: dict[str, Any] = {
    "num_key_heads": 2, "num_value_heads": 2, "key_head_dim": 32, "value_head_dim": 32, "conv_width": 4,
    "decay_projection": "low_rank", "output_gate_projection": "low_rank", "output_gate_activation": "silu",
    "short_convolution": "static", "convolution_rank": 16, "conv_bias": False, "negative_eigenvalues": False,
    "erase": "diagonal", "prediction": "previous", "erase_bias": None, "content_rank": 16, "content_chunk": 64,
    "content_grad": "full",
}  # fmt: skip

CHUNK = 64
# A log-decay of a step from which on nothing is left in float32.
NO_STATE = -110.0


class CarveConfig(PretrainedConfig):
    """Sizes and options of a model, by the names of a megatron_carve recipe.

    Args:
        pattern: a letter for each layer: C (CARVE), 2 (GDN-2), K (KDA), * (attention), - (MLP).
        mixer: heads, widths and options of the C, 2 and K layers, those that differ from DEFAULT_MIXER. Of
            attention_convolution (static, dynamic or none) it says how many taps and features there are.
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
        attention_convolution: str = "none",
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
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.attention_head_dim = attention_head_dim
        self.attention_window = attention_window
        self.attention_convolution = attention_convolution
        self.position_embedding = position_embedding
        self.rotary_base = rotary_base
        self.norm_epsilon = norm_epsilon
        self.mixer = {**DEFAULT_MIXER, **(mixer or {})}
        self.recipe = recipe
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.pattern)


class Memory:
    """What a layer remembers of the tokens so far, by name: tensors [B, ...], and tuples of them. No mapping: libraries
    that move arguments between devices would hand a layer a copy, and what it writes there would be lost."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""

        def chosen(x: Any) -> Any:
            if isinstance(x, tuple):
                return type(x)(*map(chosen, x)) if hasattr(x, "_fields") else tuple(map(chosen, x))
            return x.index_select(0, rows.to(x.device))

        self.parts = {name: chosen(x) for name, x in self.parts.items()}


class CarveCache:
    """What the layers remember of the tokens so far, by layer; its size does not grow beyond attention's window."""

    # What transformers asks of caches: no graph is made of them, and what has been read is cut off the input.
    is_compileable = False
    is_linear = (False,)

    def __init__(self, layers: int) -> None:
        self.tokens = self.rows = 0
        self.layers = [Memory() for _ in range(layers)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows of the batch, as beam search does."""
        self.rows = len(beam_idx)
        for layer in self.layers:
            layer.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))


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

    def forward(self, x: Tensor, memory: Memory | None, position: int, real: Tensor | None) -> Tensor:
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
        self.taps_proj = None
        if config.attention_convolution != "none":
            self.sections = [heads * D, groups * D, groups * D]
            taps, rank = config.mixer["conv_width"], config.mixer["convolution_rank"]
            self.conv_weight = nn.Parameter(torch.empty(sum(self.sections), taps))
            if config.attention_convolution == "dynamic":
                self.taps_proj = nn.Linear(config.hidden_size, 3 * rank, bias=False)
                self.conv_up = nn.Parameter(torch.empty(sum(self.sections), taps, rank))

    def forward(self, x: Tensor, memory: Memory | None, position: int, real: Tensor | None) -> Tensor:
        c, T = self.config, x.shape[1]
        projected: Any = [p(x) for p in (self.q_proj, self.k_proj, self.v_proj)]
        if c.attention_convolution != "none":
            projected = self._convolve(torch.cat(projected, -1), x, memory, real)
        q, k, v = (part.unflatten(-1, (-1, c.attention_head_dim)).transpose(1, 2) for part in projected)
        if c.position_embedding == "rope":
            q, k = (rotate(part, position, c.rotary_base) for part in (q, k))
        if memory is not None:
            parts = memory.parts
            if "k" in parts:
                k, v = torch.cat([parts["k"], k], 2), torch.cat([parts["v"], v], 2)
            if "real" in parts:
                new = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
                real = torch.cat([parts["real"], new], 1)
            first = 0 if c.attention_window is None else max(0, k.shape[2] - c.attention_window + 1)
            parts.update(k=k[:, :, first:].clone(), v=v[:, :, first:].clone())  # views would keep the whole prompt
            if real is not None:
                parts["real"] = real[:, first:].clone()
        places = torch.arange(k.shape[2], device=x.device)
        age = places[-T:, None] - places
        seen = age >= 0 if c.attention_window is None else (age >= 0) & (age < c.attention_window)
        if real is not None:  # padding sees itself, so that no row of the softmax is empty
            seen = (seen & real[:, None, None, :]) | (age == 0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def _convolve(self, projected: Tensor, x: Tensor, memory: Memory | None, real: Tensor | None) -> tuple[Tensor, ...]:
        if real is not None:  # what is before a sequence's first token is zero
            projected = projected * real[..., None]
        wide = with_tokens_before(projected, self.conv_weight.shape[1] - 1, memory)
        if self.taps_proj is None:
            convolved = convolve(wide, self.conv_weight, None)
        else:
            convolved = convolve_dynamically(
                wide, self.taps_proj(x), self.conv_weight, self.conv_up, None, self.sections
            )  # fmt: skip
        return convolved.split(self.sections, -1)


def with_tokens_before(x: Tensor, before: int, memory: Memory | None) -> Tensor:
    """x, [B, T, D], with so many tokens before it in front, zeros before the first; the memory keeps the last ones."""
    if not before:
        return x
    earlier = None if memory is None else memory.parts.get("tokens")
    wide = F.pad(x, (0, 0, before, 0)) if earlier is None else torch.cat([earlier, x], 1)
    if memory is not None:
        memory.parts["tokens"] = wide[:, wide.shape[1] - before :].clone()
    return wide


def convolve(wide: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Causal depthwise convolution, weight [D, W], of [B, W - 1 + T, D] -> [B, T, D]."""
    return F.conv1d(wide.transpose(1, 2), weight[:, None], bias, groups=wide.shape[2]).transpose(1, 2)


def convolve_dynamically(
    wide: Tensor, features: Tensor, weight: Tensor, up: Tensor, bias: Tensor | None, sections: list[int]
) -> Tensor:
    """As convolve, beside the token itself; of features of queries, keys and values, [B, T, 3 * rank], is made what is
    added to the taps, by up [D, W, rank]. sections: channels of the three."""
    taps = weight.shape[1]
    T, x = features.shape[1], wide[:, taps - 1 :]
    # one product for each tap and section: all at once would be as many numbers as taps for every channel
    y = x if bias is None else x + bias
    for tap in range(taps):
        parts = zip(features.chunk(3, -1), up[:, tap].split(sections), strict=True)
        y = y + (torch.cat([F.linear(z, part) for z, part in parts], -1) + weight[:, tap]) * wide[:, tap : tap + T]
    return y


def rotate(x: Tensor, position: int, base: int) -> Tensor:
    """Rotary embedding of [B, heads, T, D] from a position on."""
    D = x.shape[-1]
    rates = 1.0 / base ** (torch.arange(0, D, 2, dtype=torch.float32, device=x.device) / D)
    angles = torch.arange(position, position + x.shape[2], dtype=torch.float32, device=x.device)[:, None] * rates
    angles = torch.cat([angles, angles], -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos().to(x.dtype) + torch.cat([-second, first], -1) * angles.sin().to(x.dtype)


class Mixer(nn.Module):
    """CARVE (arXiv 2606.27229), GDN-2 (arXiv 2605.22791) or KDA (arXiv 2510.26692)."""

    def __init__(self, config: CarveConfig, letter: str) -> None:
        super().__init__()
        m, h = config.mixer, config.hidden_size
        self.variant, self.m, self.eps = MIXERS[letter], m, config.norm_epsilon
        H, HV, K, V = (m[n] for n in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"))
        gated = m["output_gate_activation"] != "none"
        low_rank_gate = gated and m["output_gate_projection"] == "low_rank"
        sizes = {"query": H * K, "key": H * K, "value": HV * V}
        sizes["write"] = {"key_heads": H, "value_heads": HV, "value_channels": HV * V}[self.variant["write"]]
        sizes["decay"] = V if m["decay_projection"] == "low_rank" else H * K
        linear = {name: nn.Linear(h, size, bias=False) for name, size in sizes.items()}
        self.query_proj, self.key_proj, self.value_proj = linear["query"], linear["key"], linear["value"]
        self.write_proj, self.decay_proj = linear["write"], linear["decay"]
        has_erase = self.variant["erase"] != "none"
        self.erase_proj = nn.Linear(h, H * K, bias=False) if has_erase else None
        self.gate_proj = nn.Linear(h, V if low_rank_gate else HV * V, bias=False) if gated else None
        self.taps = 1 if m["short_convolution"] == "none" else m["conv_width"]
        self.taps_proj = None
        if m["short_convolution"] != "none":
            channels = 2 * H * K + HV * V
            self.conv_weight = nn.Parameter(torch.empty(channels, self.taps))
            self.conv_bias = nn.Parameter(torch.empty(channels)) if m["conv_bias"] else None
            if m["short_convolution"] == "dynamic":
                self.taps_proj = nn.Linear(h, 3 * m["convolution_rank"], bias=False)
                self.conv_up = nn.Parameter(torch.empty(channels, self.taps, m["convolution_rank"]))
        self.A_log = nn.Parameter(torch.empty(H * K if self.variant["sees_state"] else H, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(H * K, dtype=torch.float32))
        self.decay_up = nn.Linear(V, H * K, bias=False) if m["decay_projection"] == "low_rank" else None
        self.gate_up = nn.Linear(V, HV * V) if low_rank_gate else None
        if self.variant["sees_state"]:
            self.erase_bias = nn.Parameter(torch.empty(H * K, dtype=torch.float32))
            given = m["erase_bias"]
            self.initial_erase_bias = given if given is not None else -4.0 if m["erase"] == "diagonal" else 0.0
            if m["content_rank"]:
                self.content_down = nn.Parameter(torch.empty(m["content_rank"], V))
                self.content_up = nn.Parameter(torch.empty(K, m["content_rank"]))
        self.norm_weight = nn.Parameter(torch.empty(V))
        self.out_proj = nn.Linear(HV * V, h, bias=False)

    def forward(self, x: Tensor, memory: Memory | None, position: int, real: Tensor | None) -> Tensor:
        m = self.m
        H, K, V = m["num_key_heads"], m["key_head_dim"], m["value_head_dim"]
        convolved = torch.cat([self.query_proj(x), self.key_proj(x), self.value_proj(x)], -1)
        if real is not None:  # what is before a sequence's first token is zero
            convolved = convolved * real[..., None]
        q, k, v = self._convolve(convolved, None if self.taps_proj is None else self.taps_proj(x), memory)
        q, k = (part.unflatten(-1, (-1, K)) for part in (q, k))
        decay = self.decay_proj(x)
        decay = decay if self.decay_up is None else self.decay_up(decay)
        rate = -self.A_log.float().clamp(max=70.0).exp().view(H, -1)  # beyond, float32 does not go
        g = rate * F.softplus(decay.float().unflatten(-1, (-1, K)) + self.dt_bias.float().view(H, K))
        v, write = v.unflatten(-1, (-1, V)), self.write_proj(x)
        # Without a gate of its own the erasure is the write gate's, of each key head.
        erase = write if self.erase_proj is None else self.erase_proj(x).unflatten(-1, (-1, K))
        if self.variant["write"] == "value_channels":
            write = write.unflatten(-1, (-1, V))
        elif self.variant["write"] == "key_heads":
            write = write.repeat_interleave(v.shape[2] // H, 2)
            v = 2.0 * v if m["negative_eigenvalues"] else v  # the gate writes with its scale too
        state = None if memory is None else memory.parts.get("state")
        if real is not None:  # padding neither decays what is there nor writes nor counts
            q, k, v, g = (part * real[:, :, None, None] for part in (q, k, v, g))
            state = self._state_before(real, v) if state is None else state
        o, state = self._recurrence(q, k, v, g, erase, write, state)
        if memory is not None:
            memory.parts["state"] = state
        out = F.rms_norm(o.float(), (V,), self.norm_weight.float(), self.eps)
        if self.gate_proj is not None:
            gate = self.gate_proj(x)
            gate = gate if self.gate_up is None else self.gate_up(gate)
            act = F.silu if m["output_gate_activation"] == "silu" else torch.sigmoid
            out = out * act(gate.float().unflatten(-1, (-1, V)))
        return self.out_proj(out.to(x.dtype).flatten(-2))

    def _kernels_take(self, dtype: torch.dtype) -> bool:
        """Whether the package is installed and its kernels have this layer's widths in this dtype."""
        if kernels is None:
            return False
        m = self.m
        op = self.variant["op"]
        content = {"erase": m["erase"], "content": m["content_rank"] > 0} if op == "carve" else {}
        try:
            kernels.require_triton_support(op, dtype, m["key_head_dim"], m["value_head_dim"], **content)
        except NotImplementedError as error:
            logger.warning_once(f"{error}: plain torch is used instead")
            return False
        return True

    def _state_before(self, real: Tensor, v: Tensor) -> Any:
        """Zeros, with counts by which content chunks begin at the first token that is no padding."""
        if self.variant["op"] != "carve":
            return None
        B, K, HV, V = len(v), self.m["key_head_dim"], *v.shape[2:]
        S, mean, partial = (v.new_zeros(B, HV, *size, dtype=torch.float32) for size in ((K, V), (V,), (V,)))
        return S, mean, partial, -(~real).sum(1) % self.m["content_chunk"]

    def _convolve(
        self, x: Tensor, features: Tensor | None, memory: Memory | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Causal depthwise convolution if there is one, SiLU, and the L2 norm of every head of queries and keys.

        Of features, [B, T, 3 * rank] of queries, keys and values, taps are made that depend on the token.
        """
        m = self.m
        keys = m["num_key_heads"] * m["key_head_dim"]
        sections = [keys, keys, x.shape[2] - 2 * keys]
        x = with_tokens_before(x, self.taps - 1, memory)
        if m["short_convolution"] == "static":
            x = convolve(x, self.conv_weight, self.conv_bias)
        elif features is not None:
            x = convolve_dynamically(x, features, self.conv_weight, self.conv_up, self.conv_bias, sections)
        q, k, v = F.silu(x).split(sections, -1)
        return unit_heads(q, m["key_head_dim"]), unit_heads(k, m["key_head_dim"]), v

    def _recurrence(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, erase: Tensor, write: Tensor, state: Any
    ) -> tuple[Tensor, Any]:
        """[B, T, heads, ...] -> o, and the state to go on from: S, and CARVE's mean, partial sum and count.

        erase and write are logits of the gates.
        """
        m, carve = self.m, self.variant["op"] == "carve"
        scale = 2.0 if m["negative_eigenvalues"] else 1.0
        if q.is_cuda and self._kernels_take(q.dtype):
            options: dict[str, Any] = {"gate_logits": True, "erase_scale": scale, "output_final_state": True}
            if not carve:
                return kernels.chunk_gdn2(q, k, v, g, erase, write, initial_state=state, **options)
            options |= {name: m[name] for name in ("erase", "prediction", "content_chunk", "content_grad")}
            bias = self.erase_bias.float().view(q.shape[2:])
            content = (self.content_down, self.content_up) if m["content_rank"] else (None, None)
            state = None if state is None else kernels.CarveState(*state)
            return kernels.chunk_carve(
                q, k, v, g, erase, write, *content, erase_bias=bias, initial_state=state, **options
            )  # fmt: skip
        if not carve:
            if erase.ndim == 3:  # one number for all channels
                erase, write = erase[..., None], write[..., None]
            if peer_gdn2 is not None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
                b, write = scale * erase.sigmoid().expand_as(k), write.expand_as(v)
                q, k, g, b = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k, g, b))
                return peer_gdn2(q, k, v, g, b, write.sigmoid(), initial_state=state, output_final_state=True)
            return gdn2(q, k, v, g, scale * erase.float().sigmoid(), write.float().sigmoid(), state)
        erase = erase.float() + self.erase_bias.float().view(q.shape[2:])
        maps = (self.content_down, self.content_up) if m["content_rank"] else None
        return carve_recurrence(q, k, v, g, erase, write.float().sigmoid(), scale, maps, m, state)


def unit_heads(x: Tensor, D: int) -> Tensor:
    wide = x.float().unflatten(-1, (-1, D))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).flatten(-2).to(x.dtype)


def by_value_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, H, D] -> [B, heads, T, D] float32, where H divides heads."""
    return x.float().repeat_interleave(heads // x.shape[2], 2).transpose(1, 2)


def gdn2(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor]:
    """GDN-2 in plain torch, float32, chunk after chunk; tensors [B, T, heads, ...], S [B, HV, K, V] -> (o, S)."""
    B, T, HV, V = v.shape
    K = q.shape[3]
    z = (w * v.float()).transpose(1, 2)
    q, k, g, b = (by_value_head(x, HV) for x in (q, k, g, b))
    S = v.new_zeros(B, HV, K, V, dtype=torch.float32) if S is None else S
    outputs = []
    for start in range(0, T, CHUNK):
        part = slice(start, start + CHUNK)
        y, S = chunk(q[:, :, part], k[:, :, part], z[:, :, part], g[:, :, part], b[:, :, part], S, False)
        outputs.append(y)
    return (K**-0.5 * torch.cat(outputs, 2)).transpose(1, 2).to(v.dtype), S


def carve_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, erase: Tensor, w: Tensor, scale: float,
    content: tuple[Tensor, Tensor] | None, m: dict[str, Any], state: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """CARVE in plain torch, float32, in chunks that end where content chunks do -> (o, (S, mean, partial, count)).

    S_t = Diag((1 - b_t) exp g_t) S_{t-1} + w_t k_t (v_t - P_t^T k_t)^T,    P_t = S_{t-1}, or S_{t-1} decayed
    b_t = sigmoid(erase_t + U tanh(D m)),    m the mean of S_t^T q_t over the content chunk before

    or, with m["erase"] "delta", GDN-2's recurrence with this erase gate. erase: logits with their bias.
    """
    B, T, HV, V = v.shape
    K = q.shape[3]
    z = (w[..., None] * v.float()).transpose(1, 2)
    q, k, g, erase = (by_value_head(x, HV) for x in (q, k, g, erase))
    w = w.transpose(1, 2)[..., None]
    if state is None:
        vectors = (v.new_zeros(B, HV, V, dtype=torch.float32) for _ in range(2))
        state = (v.new_zeros(B, HV, K, V, dtype=torch.float32), *vectors, None)
    S, mean, partial, count = state
    # Of every row, tokens in its running content chunk; Python's numbers, which a compiler can see through.
    filled, outputs, start = [0] * B if count is None else count.tolist(), [], 0
    while start < T:
        end = min(start + CHUNK - max(n % CHUNK for n in filled), T)
        part = slice(start, end)
        logits = erase[:, :, part]
        if content is not None:
            down, up = (x.float() for x in content)
            seen = mean.detach() if m["content_grad"] == "detached" else mean
            logits = logits + (torch.tanh(seen @ down.T) @ up.T)[:, :, None]
        if m["erase"] == "diagonal":
            log_decay, b = g[:, :, part] + F.logsigmoid(-logits), w[:, :, part]
        else:
            log_decay, b = g[:, :, part], scale * logits.sigmoid()
        before_decay = m["erase"] == "diagonal" and m["prediction"] == "previous"
        y, S = chunk(q[:, :, part], k[:, :, part], z[:, :, part], log_decay, b, S, before_decay)
        outputs.append(y)
        filled, start = [n + end - start for n in filled], end
        if content is not None:
            partial = partial + y.sum(2)
        if m["content_chunk"] in filled:
            ends = [n == m["content_chunk"] for n in filled]
            done = torch.tensor(ends, device=v.device)[:, None, None]
            mean = torch.where(done, partial / m["content_chunk"], mean)
            partial, filled = (
                partial.masked_fill(done, 0.0),
                [0 if end else n for n, end in zip(filled, ends, strict=True)],
            )
    o = (K**-0.5 * torch.cat(outputs, 2)).transpose(1, 2).to(v.dtype)
    return o, (S, mean, partial, torch.tensor(filled))


def chunk(
    q: Tensor, k: Tensor, z: Tensor, g: Tensor, b: Tensor, S: Tensor, before_decay: bool
) -> tuple[Tensor, Tensor]:
    """A chunk of at most 64 tokens: q, k, g, what erases along the key b [B, HV, C, K or 1], z = w v [B, HV, C, V],
    S [B, HV, K, V] -> (S_t^T q_t, S). before_decay: what a key finds in S is taken before the token's own decay."""
    g = g.clamp(min=NO_STATE)
    G = g.cumsum(-2)
    found = F.pad(G[..., :-1, :], (0, 0, 1, 0)) if before_decay else G  # through which step what a key finds decayed
    C = q.shape[-2]
    earlier = torch.ones(C, C, dtype=torch.bool, device=q.device).tril(-1)

    def decays(rows: Tensor) -> Tensor:
        """Of every pair of rows its own, never above 1, however steep; [..., C, C, K]."""
        return (rows[..., :, None, :] - G[..., None, :, :]).masked_fill(~earlier[..., None], -math.inf).exp()

    bk, own = b * k, decays(G)
    T = torch.einsum("...rk,...rsk,...sk->...rs", bk, decays(found) if before_decay else own, k)
    P = torch.einsum("...rk,...rsk,...sk->...rs", q, own, k) + torch.diag_embed((q * k).sum(-1))
    R = torch.linalg.solve_triangular(
        T + torch.eye(C, device=q.device), z - (found.exp() * bk) @ S, upper=False, unitriangular=True
    )  # fmt: skip
    y = (G.exp() * q) @ S + P @ R
    return y, G[..., -1, :, None].exp() * S + (k * (G[..., -1:, :] - G).exp()).transpose(-1, -2) @ R


class Layer(nn.Module):
    """Norm, mixer or attention or MLP, and the residual sum."""

    def __init__(self, config: CarveConfig, letter: str) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mixer: nn.Module
        if letter in MIXERS:
            self.mixer = Mixer(config, letter)
        elif letter == "*":
            self.mixer = Attention(config)
        elif letter == "-":
            self.mixer = MLP(config)
        else:
            raise ValueError(f"pattern: expected layers of {', '.join(MIXERS)}, * and -, got {letter!r}")

    def forward(self, x: Tensor, memory: Memory | None, position: int, real: Tensor | None) -> Tensor:
        return x + self.mixer(self.norm(x), memory, position, real)


class CarvePreTrainedModel(PreTrainedModel):
    config_class = CarveConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "erase_bias"]  # noqa: RUF012
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        """As megatron_carve begins, but for matrices, whose spread there depends on the depth."""
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue  # loaded: some versions of transformers call this afterwards
            if name == "A_log":
                parameter.data.uniform_(1.0, 16.0).log_()
            elif name == "dt_bias":  # softplus of it is log-uniform in [0.001, 0.1]
                step = parameter.data.uniform_(math.log(0.001), math.log(0.1)).exp_()
                step.add_(torch.log(-torch.expm1(-step)))
            elif name == "erase_bias":
                nn.init.constant_(parameter, float(module.initial_erase_bias))  # type: ignore[arg-type]
            elif name == "content_down":
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif name == "conv_weight":
                nn.init.uniform_(parameter, -(parameter.shape[1] ** -0.5), parameter.shape[1] ** -0.5)
            elif name in ("content_up", "conv_up", "conv_bias", "bias"):
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
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: CarveCache | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """Token ids [B, T] -> hidden states behind the last layer and the norm, [B, T, hidden]; before them, if
        output_hidden_states, what enters each layer. A cache is brought up to date.

        attention_mask: [B, T] or, behind a cache, [B, all tokens]; zero for padding, before or behind a row's tokens,
        with a cache before them.
        """
        T = input_ids.shape[1]
        real = None if attention_mask is None else attention_mask[:, -T:].bool()
        if past_key_values is None and real is not None:
            # Without a memory padding may stand behind the tokens, where nothing that counts sees it.
            padding = real.long().argmax(1, keepdim=True)
            places = torch.arange(T, device=input_ids.device)
            hidden = self._through(input_ids.gather(1, (places + padding) % T), None, None, output_hidden_states)
            back = ((places - padding) % T)[..., None]
            return tuple(x.gather(1, back.expand_as(x)) for x in hidden)
        if real is not None and past_key_values is not None and (past_key_values.tokens or bool(real.all())):
            real = None  # all new tokens count
        return self._through(input_ids, past_key_values, real, output_hidden_states)

    def _through(
        self, input_ids: Tensor, cache: CarveCache | None, real: Tensor | None, keep: bool | None
    ) -> tuple[Tensor, ...]:
        x = self.embed_tokens(input_ids)
        entered = []
        for i, layer in enumerate(self.layers):
            if keep:
                entered.append(x)
            if self.gradient_checkpointing and self.training and cache is None:
                x = self._gradient_checkpointing_func(layer.__call__, x, None, 0, real)
            else:
                x = layer(x, *((None, 0) if cache is None else (cache.layers[i], cache.tokens)), real)
        if cache is not None:
            cache.tokens += input_ids.shape[1]
            cache.rows = len(input_ids)
        return *entered, self.norm(x)


def require_padding_outside(mask: Tensor, memory: CarveCache | None, T: int) -> None:
    """Raise ValueError for padding that a recurrence would have to leave out of the middle of a row."""
    if mask.ndim != 2 or mask.shape[1] < T:
        raise ValueError(f"attention_mask: expected [B, T] with T of at least {T}, got {list(mask.shape)}")
    if memory is not None and memory.tokens:  # what is before these tokens has been looked at
        if not bool(mask[:, -T:].all()):
            raise ValueError("attention_mask: expected no padding among tokens that follow a cache, got some")
        return
    steps = mask.bool().long().diff(dim=1)
    if memory is not None and bool((steps < 0).any()):
        raise ValueError(
            "attention_mask: expected padding before the tokens of a row (padding_side='left'), got others"
        )
    if bool((steps != 0).sum(1).gt(1).any()) or not bool(mask.any(1).all()):
        raise ValueError("attention_mask: expected rows of tokens with padding on one side, got others")


def require_consecutive(position_ids: Tensor, first: int, length: int) -> None:
    """Raise ValueError for positions that begin anew within a row, as those of packed documents do."""
    expected = torch.arange(first, first + length, device=position_ids.device).expand_as(position_ids)
    if not torch.equal(position_ids, expected.to(position_ids.dtype)):
        raise ValueError(
            f"position_ids: expected {length} consecutive positions from {first} on, since packed documents would not "
            f"be kept apart, got others"
        )


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
        logits_to_keep: int | Tensor = 0,
        cache: CarveCache | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids [B, T] -> logits [B, T, vocab], of the last logits_to_keep tokens if that is above 0.

        Args:
            attention_mask: [B, T], zero for padding on one side of a row, with a cache on the left.
            past_key_values, cache: what a call before returned, by either name.
            labels: [B, T] token ids, -100 where they do not count.
            logits_to_keep: or the places of those tokens, [n].
            output_hidden_states: also return what enters each layer, and what leaves the last one, normalised.

        Raises:
            ValueError: padding elsewhere; packed sequences; what else this model does not take.
        """
        memory = past_key_values if cache is None else cache
        if use_cache and memory is None:
            memory = CarveCache(self.config.num_hidden_layers)
        position_ids = kwargs.pop("position_ids", None)
        if not torch.compiler.is_compiling():  # which cannot look at values
            if attention_mask is not None:
                require_padding_outside(attention_mask, memory, input_ids.shape[1])
            if position_ids is not None and (attention_mask is None or bool(attention_mask.all())):
                # else positions begin where a row's tokens do
                require_consecutive(position_ids, 0 if memory is None else memory.tokens, input_ids.shape[1])
            if memory is None and attention_mask is not None and bool(attention_mask.all()):
                attention_mask = None
        kwargs.pop("return_dict", None)
        if unknown := sorted(name for name, value in kwargs.items() if value is not None and value is not False):
            raise ValueError(f"{', '.join(unknown)}: this model takes no such argument")
        *entered, hidden = self.model(input_ids, memory, attention_mask, output_hidden_states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=(*entered, hidden) if output_hidden_states else None,
            **{CACHE: memory},  # type: ignore[arg-type]
        )  # fmt: skip

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        memory = kwargs.get(CACHE)
        seen = 0 if memory is None else memory.tokens
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": kwargs.get("attention_mask"),
            CACHE: memory,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
        }
