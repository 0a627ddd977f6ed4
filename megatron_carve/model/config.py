"""Typed, validated configuration of the mixers, and the sizes that follow from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from megatron_carve.model.variants import VARIANTS, MixerKind

LayerImplementation = Literal["transformer_engine", "local"]
Convolution = Literal["static", "dynamic", "none"]

# With an erase gate of about a half, bias 0, the state of CARVE's diagonal form halves at every token.
DIAGONAL_ERASE_BIAS = -4.0

# Content chunks are made of whole WY chunks, the unit in which the recurrence is computed.
CHUNK_TOKENS = 64


@dataclass(frozen=True)
class Section:
    """One named slice of a fused projection; `size` counts output features over all tensor-parallel ranks."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class MixerOptions:
    """What a user may choose about a mixer beyond its sizes. Every field is part of the model.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """

    decay_projection: Literal["low_rank", "full_rank"] = "low_rank"
    """hidden -> value head dim -> H*K (low_rank), or hidden -> H*K (full_rank)."""
    output_gate_projection: Literal["low_rank", "full_rank"] = "low_rank"
    """hidden -> value head dim -> HV*V with a bias (low_rank), or hidden -> HV*V (full_rank)."""
    output_gate_activation: Literal["silu", "sigmoid", "none"] = "silu"
    """Activation of the gate that multiplies the normalised output; none: no gate."""
    short_convolution: Convolution = "static"
    """Convolution of queries, keys and values before their SiLU: of fixed taps (conv_width of them), of taps that
    depend on the token, beside the token itself (arXiv 2606.03825), or none."""
    convolution_rank: int = 16
    """Features of a token that the dynamic taps of its queries are made of; as many for keys and for values. Those of
    model.attention_convolution are as many."""
    conv_bias: bool = False
    """A bias in the short convolution."""
    negative_eigenvalues: bool = False
    """Erase gate in [0, 2] instead of [0, 1], so that the transition may have negative eigenvalues. Not with CARVE's
    diagonal erase, which decays by 1 - b."""
    erase: Literal["diagonal", "delta"] = "diagonal"
    """CARVE: diagonal decays every key channel by 1 - b (the paper's); delta erases along the key, as GDN-2 does."""
    prediction: Literal["previous", "decayed"] = "previous"
    """CARVE's diagonal erase: the state that a write is the difference to, before or after the token's own decay."""
    erase_bias: float | None = None
    """CARVE: initial bias of the erase logits, which is learned per channel; if null -4 with diagonal erase, 0 with
    delta."""
    content_rank: int = 16
    """CARVE: rank r of the projection of the chunk mean into the erase gate; 0 for an erase gate without content."""
    content_chunk: int = 64
    """CARVE: tokens per content chunk, a multiple of 64."""
    content_grad: Literal["full", "detached"] = "full"
    """CARVE: whether gradients flow back through the chunk mean."""

    def __post_init__(self) -> None:
        check_types(self)
        _require(self.convolution_rank >= 1, "convolution_rank", "a positive integer", self.convolution_rank)
        _require(self.content_rank >= 0, "content_rank", "an integer of at least 0", self.content_rank)
        if self.erase_bias is not None:
            _require(math.isfinite(self.erase_bias), "erase_bias", "a finite number", self.erase_bias)
        _require(
            self.content_chunk >= CHUNK_TOKENS and self.content_chunk % CHUNK_TOKENS == 0,
            "content_chunk",
            f"a positive multiple of {CHUNK_TOKENS}",
            self.content_chunk,
        )

    @property
    def initial_erase_bias(self) -> float:
        """What the bias of CARVE's erase logits starts at."""
        if self.erase_bias is not None:
            return self.erase_bias
        return DIAGONAL_ERASE_BIAS if self.erase == "diagonal" else 0.0


@dataclass
class MixerFields:
    """What a mixer reads of Megatron's configuration beyond Megatron's own fields; for a class that has both."""

    mixer: dict[str, Any] = field(default_factory=dict)
    """MixerOptions by name."""
    mixer_backend: str = "auto"
    """"auto", "triton" or "torch"."""
    mixer_recompute: bool = False
    """Compute the recurrence again in the backward instead of keeping what it needs."""
    mixer_context: str = "auto"
    """How context-parallel ranks share a mixer's work: "auto", "heads" or "sequence"."""
    mixer_packed_order: str = "document"
    """How packed sequences are divided over context-parallel ranks: "document" or "sequence"."""


# What Transformer Engine asks of both sizes of a matrix in 8 bits.
FP8_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class MixerConfig(MixerOptions):
    """Sizes and options of a mixer, independent of the hidden size.

    H key heads of K channels carry queries, keys, decay and erase gate; HV value heads of V channels carry
    values, write gate and output. HV is a multiple of H: each key head serves HV/H value heads.
    """

    num_key_heads: int = 16
    num_value_heads: int = 16
    key_head_dim: int = 128
    value_head_dim: int = 128
    conv_width: int = 4
    """Taps of the causal depthwise convolution on q, k and v, of model.attention_convolution too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_width"):
            _require(getattr(self, name) >= 1, name, "a positive integer", getattr(self, name))
        _require(
            self.num_value_heads % self.num_key_heads == 0,
            "num_value_heads",
            f"a multiple of num_key_heads={self.num_key_heads}",
            self.num_value_heads,
        )

    @property
    def key_dim(self) -> int:
        """H*K, the features of queries, keys, decay and erase gate."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """HV*V, the features of values, output gate and output."""
        return self.num_value_heads * self.value_head_dim

    @property
    def options(self) -> dict[str, Any]:
        """The options alone, as plain values (what a checkpoint stores beside Megatron's own sizes)."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(MixerOptions)}

    def projection_sections(self, kind: MixerKind) -> tuple[Section, ...]:
        """The fused input projection's named slices, in order: the one table that everything else follows."""
        low_rank, variant = self.value_head_dim, VARIANTS[kind]
        of_write = {
            "value_channels": self.value_dim,
            "value_heads": self.num_value_heads,
            "key_heads": self.num_key_heads,
        }
        sections = [
            Section("query", self.key_dim),
            Section("key", self.key_dim),
            Section("value", self.value_dim),
            *([Section("erase", self.key_dim)] if variant.erase == "key_channels" else []),
            Section("write", of_write[variant.write]),
            Section("decay", low_rank if self.decay_projection == "low_rank" else self.key_dim),
        ]
        if self.has_output_gate:
            gate = low_rank if self.output_gate_projection == "low_rank" else self.value_dim
            sections.append(Section("gate", gate))
        if self.short_convolution == "dynamic":
            sections.append(Section("taps", 3 * self.convolution_rank))
        return tuple(sections)

    @property
    def has_output_gate(self) -> bool:
        return self.output_gate_activation != "none"

    @property
    def has_low_rank_gate(self) -> bool:
        return self.has_output_gate and self.output_gate_projection == "low_rank"

    @property
    def taps(self) -> int:
        """Tokens that a convolved one is made of."""
        return 1 if self.short_convolution == "none" else self.conv_width

    def check_kind(self, kind: MixerKind) -> None:
        """Raise ValueError for options that do not fit this kind of mixer."""
        if VARIANTS[kind].op == "carve" and self.erase == "diagonal" and self.negative_eigenvalues:
            raise ValueError(
                "negative_eigenvalues: expected false with CARVE's diagonal erase, whose decay is 1 - b (true with "
                "erase: delta), got True"
            )

    def check_parallel(self, tensor: int, context: int = 1) -> None:
        """Raise ValueError unless heads and low-rank features split over the ranks.

        Args:
            tensor: size of the tensor-parallel groups, which share heads and the features of low-rank projections.
            context: size of the context-parallel groups, which share the heads of a tensor-parallel rank.
        """
        whole = [self.num_key_heads]  # num_value_heads is a multiple of it
        if self.decay_projection == "low_rank" or self.has_low_rank_gate:
            whole.append(self.value_head_dim)
        rank = ""
        if self.short_convolution == "dynamic":
            whole.append(self.convolution_rank)
            rank = f" and convolution_rank={self.convolution_rank}"
        if any(n % tensor for n in whole):
            legal = [n for n in range(1, self.num_key_heads + 1) if all(m % n == 0 for m in whole)]
            raise ValueError(
                f"tensor parallel size {tensor} does not divide num_key_heads={self.num_key_heads} and "
                f"value_head_dim={self.value_head_dim}{rank}; legal sizes: {', '.join(map(str, legal))}"
            )
        heads = self.num_key_heads // tensor
        if heads % context:
            legal = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"context parallel size {context} does not divide the {heads} key heads of a tensor-parallel rank "
                f"(num_key_heads={self.num_key_heads}, tensor parallel size {tensor}); "
                f"legal sizes: {', '.join(map(str, legal))}"
            )

    def check_fp8(self, kind: MixerKind, hidden_size: int, tensor: int) -> None:
        """Raise ValueError unless both projections can be multiplied in 8 bits on a rank of `tensor`.

        Only they are: convolution, decay, gates, the recurrence and its state stay as they are without.
        """

        def sizes(ranks: int) -> dict[str, int]:
            inner = sum(s.size for s in self.projection_sections(kind))
            return {"hidden_size": hidden_size, "input projection": inner // ranks, "values": self.value_dim // ranks}

        odd = {name: size for name, size in sizes(tensor).items() if size % FP8_MULTIPLE}
        if odd:
            divisors = [n for n in range(1, self.num_key_heads + 1) if self.num_key_heads % n == 0]
            legal = [n for n in divisors if not any(size % FP8_MULTIPLE for size in sizes(n).values())]
            raise ValueError(
                f"fp8: expected multiples of {FP8_MULTIPLE} on a tensor-parallel rank, got "
                f"{', '.join(f'{name} {size}' for name, size in odd.items())}; legal tensor parallel sizes: "
                f"{', '.join(map(str, legal)) or 'none'}"
            )

    def convolution_parameters(self, convolution: Convolution, channels: int) -> int:
        """Of the taps of a short convolution of so many channels, without bias and projection of features."""
        if convolution == "none":
            return 0
        return channels * self.conv_width * (1 if convolution == "static" else 1 + self.convolution_rank)

    def attention_convolution_parameters(self, convolution: Convolution, channels: int, hidden_size: int) -> int:
        """Of that of one attention layer: its taps, and what makes the features of dynamic ones."""
        features = 3 * self.convolution_rank if convolution == "dynamic" else 0
        return self.convolution_parameters(convolution, channels) + features * hidden_size

    def parameter_count(self, kind: MixerKind, hidden_size: int) -> int:
        """Parameters of one mixer layer, its input norm included."""
        count = hidden_size * sum(s.size for s in self.projection_sections(kind))
        if self.short_convolution != "none":
            channels = 2 * self.key_dim + self.value_dim
            count += self.convolution_parameters(self.short_convolution, channels) + channels * int(self.conv_bias)
        count += self.num_key_heads + self.key_dim  # A_log, dt_bias
        if VARIANTS[kind].sees_state:  # A_log is one of every channel; bias of the erase logits, D and U of all heads
            count += self.key_dim - self.num_key_heads + self.key_dim
            count += self.content_rank * (self.key_head_dim + self.value_head_dim)
        if self.decay_projection == "low_rank":
            count += self.value_head_dim * self.key_dim
        if self.has_low_rank_gate:
            count += (self.value_head_dim + 1) * self.value_dim
        return count + self.value_head_dim + self.value_dim * hidden_size + hidden_size

    def paper_parameter_count(self, kind: MixerKind, hidden_size: int) -> int:
        """What CARVE's paper (arXiv 2606.27229) counts as a mixer's parameters, which gives its 19.0 % fewer at 125M:
        queries, keys, values, erase and write gate, the decay with its expansion, and the content maps."""
        counted = ("query", "key", "value", "erase", "write", "decay")
        count = hidden_size * sum(s.size for s in self.projection_sections(kind) if s.name in counted)
        if VARIANTS[kind].sees_state:
            count += self.content_rank * (self.key_head_dim + self.value_head_dim)
        return count + (self.value_head_dim * self.key_dim if self.decay_projection == "low_rank" else 0)

    def flops_per_token(self, kind: MixerKind, hidden_size: int) -> int:
        """Forward floating-point operations per token of one mixer layer: its matrix products and its recurrence.

        The recurrence is counted as the token form does it, 8 K V per value head (erase read, update, output read),
        which is what a model needs; how a kernel spends more in chunks is not credited.
        """
        products = self.parameter_count(kind, hidden_size)
        return 2 * products + 8 * self.num_value_heads * self.key_head_dim * self.value_head_dim


def check_types(instance: Any) -> None:
    """Raise ValueError for the first dataclass field whose value is not of its annotated type.

    Understands bool, int, float, str, Literal, list[T] and T | None. An int is accepted for a float.
    """
    for name, hint in get_type_hints(type(instance)).items():
        value = getattr(instance, name)
        if not _matches(value, hint):
            raise ValueError(f"{name}: expected {describe_type(hint)}, got {value!r}")


def describe_type(hint: Any) -> str:
    """A type hint in a user's words."""
    args = get_args(hint)
    if type(None) in args:
        return " or ".join([describe_type(a) for a in args if a is not type(None)] + ["null"])
    if getattr(hint, "__origin__", None) is Literal:
        return "one of " + ", ".join(map(str, args))
    if getattr(hint, "__origin__", None) is list:
        return f"a list of {describe_type(args[0])}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _matches(value: Any, hint: Any) -> bool:
    args = get_args(hint)
    origin = getattr(hint, "__origin__", None)
    if type(None) in args:
        return value is None or any(_matches(value, a) for a in args if a is not type(None))
    if origin is Literal:
        return value in args and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(_matches(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _require(condition: bool, name: str, expected: str, actual: Any) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {actual!r}")
