"""The sizes of E layers, mixtures of experts, from a recipe's `megatron` section: names and defaults are Megatron's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_carve.recipe.schema import Model, Parallel

LETTER = "E"


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """What an MLP is made of: of SwiGLU two maps to its inner width, and one back.

    Attributes:
        maps_in: to the inner width.
        biased: all maps add a bias; those of attention and of a router do too then.
    """

    maps_in: int
    biased: bool

    @classmethod
    def of(cls, megatron: Mapping[str, Any]) -> Mlp:
        return cls(maps_in=1 + bool(megatron.get("swiglu", True)), biased=bool(megatron.get("add_bias_linear", False)))

    def parameters(self, size: int, width: int) -> int:
        """Of one that takes and gives `size` channels, with an inner width."""
        return (self.maps_in + 1) * size * width + (self.maps_in * width + size) * self.biased


@dataclass(frozen=True, kw_only=True)
class Experts:
    """One E layer: a router sends each token to some of the experts, MLPs; all tokens see the shared one.

    Attributes:
        hidden_size: of the model.
        number: of routed experts.
        top_k: of them that a token is sent to.
        width: inner width of one.
        shared_width: of the shared one; 0 for none.
        shared_gate: whether a number of each token multiplies what the shared one says.
        latent_size: what routed experts see of a token, by a projection there and back; None for all of it.
        parallel: ranks that the experts are spread over.
        tensor: ranks that one expert is divided over.
        mlp: what they are made of.
    """

    hidden_size: int
    number: int
    top_k: int
    width: int
    shared_width: int
    shared_gate: bool
    latent_size: int | None
    parallel: int
    tensor: int
    mlp: Mlp

    @classmethod
    def of(cls, model: Model, parallel: Parallel, megatron: Mapping[str, Any]) -> Experts:
        """As Megatron would build them.

        Raises:
            ValueError: naming the key of `megatron`, what was expected and what came.
        """

        def size(name: str, default: int | None) -> int:
            given = megatron.get(name)
            value = default if given is None else given
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                got = "null" if value is None else repr(value)
                raise ValueError(f"megatron.{name}: expected an integer of at least 1 with the layer E, got {got}")
            return value

        number = size("num_experts", None)
        top_k = size("moe_router_topk", 2)
        if top_k > number:
            raise ValueError(
                f"megatron.moe_router_topk: expected at most num_experts={number}, got {top_k}"
                + ("" if "moe_router_topk" in megatron else ", Megatron's default")
            )
        spread = size("expert_model_parallel_size", 1)
        if number % spread:
            raise ValueError(
                f"megatron.expert_model_parallel_size: expected a divisor of num_experts={number}, got {spread}"
            )
        shared = megatron.get("moe_shared_expert_intermediate_size")
        latent = megatron.get("moe_latent_size")
        return cls(
            hidden_size=model.hidden_size,
            number=number,
            top_k=top_k,
            width=size("moe_ffn_hidden_size", model.ffn_hidden_size),
            shared_width=0 if shared is None else size("moe_shared_expert_intermediate_size", None),
            shared_gate=shared is not None and bool(megatron.get("moe_shared_expert_gate")),
            latent_size=None if latent is None else size("moe_latent_size", None),
            parallel=spread,
            tensor=size("expert_tensor_parallel_size", parallel.tensor),
            mlp=Mlp.of(megatron),
        )

    @property
    def seen_size(self) -> int:
        """Channels of a token that a routed expert takes and gives."""
        return self.hidden_size if self.latent_size is None else self.latent_size

    @property
    def of_one_expert(self) -> int:
        """Parameters of one routed expert."""
        return self.mlp.parameters(self.seen_size, self.width)

    @property
    def outside_routed(self) -> int:
        """Parameters of a layer that every token uses: norm, router, shared expert, latent projections."""
        h = self.hidden_size
        latent = 2 * h * self.latent_size if self.latent_size is not None else 0
        shared = self.mlp.parameters(h, self.shared_width) if self.shared_width else 0
        return h + (h + self.mlp.biased) * self.number + shared + h * self.shared_gate + latent

    @property
    def parameters(self) -> int:
        """Of a whole layer, its norm included."""
        return self.outside_routed + self.number * self.of_one_expert

    @property
    def active_parameters(self) -> int:
        """Those of a layer that one token uses."""
        return self.outside_routed + self.top_k * self.of_one_expert
