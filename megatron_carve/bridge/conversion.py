"""Between our exported Hugging Face folders and Megatron-Bridge: what its AutoBridge asks of a kind of model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from megatron_carve.bridge.provider import MixerModelProvider
from megatron_carve.bridge.recipes import model_provider
from megatron_carve.data.tokenizer import load_tokenizer
from megatron_carve.recipe import Recipe
from megatron_carve.run.vocabulary import vocab_size
from megatron_carve.use import hugging_face
from megatron_carve.use.hugging_face import Link, links


class Piece(NamedTuple):
    """A section of a tensor, one after another along its first axis, and this tensor-parallel rank's part of it."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    own: tuple[int, ...]
    """The shape of the rank's part."""

    def take(self, section: Tensor) -> Tensor:
        return section[tuple(slice(o, o + n) for o, n in zip(self.offset, self.own, strict=True))]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The section of all ranks' parts of it, in their order."""
        axes = [axis for axis, (n, all_) in enumerate(zip(self.own, self.shape, strict=True)) if n != all_]
        return torch.cat(parts, axes[0]) if axes else parts[0]


class LinkMapping(MegatronParamMapping[Any]):
    """One of use/hugging_face.py's links, for a model that is spread over ranks."""

    pieces: list[Piece] | None = None
    """None on pipeline stages that lack the tensor."""

    def __init__(self, link: Link, name: str) -> None:
        theirs = link.theirs
        super().__init__(name, theirs[0] if len(theirs) == 1 else {part: part for part in theirs})
        self.link = link

    def resolve(self, captures: tuple[str, ...]) -> LinkMapping:
        return self  # its names are those of one layer

    def hf_to_megatron(self, hf_weights: Any, megatron_module: torch.nn.Module) -> Tensor:
        """This rank's part of the tensor that the weights are.

        Raises:
            ValueError: they make a tensor of another shape.
        """
        parts = [hf_weights] if isinstance(hf_weights, Tensor) else [hf_weights[name] for name in self.link.theirs]
        whole = self.link.join(*parts)
        assert self.pieces is not None
        rows = [piece.shape[0] for piece in self.pieces]
        expected = (sum(rows), *self.pieces[0].shape[1:])
        if tuple(whole.shape) != expected:
            names = ", ".join(self.link.theirs)
            raise ValueError(f"{names}: expected {self.link.ours} of shape {expected}, got {tuple(whole.shape)}")
        return torch.cat([p.take(section) for p, section in zip(self.pieces, whole.split(rows), strict=True)])

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, Tensor]:  # fmt: skip
        """The weights, on every rank, of the parts that ranks have."""
        own = self.broadcast_from_pp_rank(megatron_weights, cache_key=self.link.ours)
        pieces = self.broadcast_obj_from_pp_rank(self.pieces, f"{self.link.ours} pieces")
        rows = [piece.own[0] for piece in pieces]
        ranks = [part.split(rows) for part in self.gather_from_tp_ranks(own.contiguous())]
        whole = torch.cat([p.join(list(parts)) for p, parts in zip(pieces, zip(*ranks, strict=True), strict=True)])
        return dict(zip(self.link.theirs, (x.contiguous() for x in self.link.split(whole)), strict=True))


@MegatronModelBridge.register_bridge(
    source="CarveForCausalLM", target=HybridModel, provider=MixerModelProvider, model_type="megatron_carve"
)
class CarveBridge(MegatronModelBridge):
    """AutoBridge's knowledge of the folders that megatron_carve.export writes."""

    def provider_bridge(self, hf_pretrained: Any) -> MixerModelProvider:
        """A provider of the model of a folder, with the layers that this machine has."""
        return model_provider(kept_recipe_of(hf_pretrained.config.recipe), hf_pretrained.config.vocab_size)

    @classmethod
    def megatron_to_hf_config(cls, provider: MixerModelProvider) -> dict[str, Any]:
        """What config.json holds; the end of a document and the step are the reference folder's."""
        config = hugging_face.configuration(kept_recipe_of(provider.recipe), provider.vocab_size, None, 0)
        return {key: value for key, value in config.items() if key not in ("eos_token_id", "step")}

    def mapping_registry(self) -> MegatronMappingRegistry:
        """The links of the model, by the names that local layers have and those of Transformer Engine's."""
        return MegatronMappingRegistry(
            *(LinkMapping(link, name) for link, *names in _named(self._links()) for name in names)
        )

    def build_conversion_tasks(self, hf_pretrained: Any, megatron_model: Any, weight_dtype: Any = None) -> list[Any]:
        """As upstream, which passes over weights that are missing or have no place; here they are errors.

        Raises:
            ValueError: such weights.
        """
        tasks = super().build_conversion_tasks(hf_pretrained, megatron_model, weight_dtype)
        known = self._links()
        if hasattr(hf_pretrained, "state"):
            there = set(hf_pretrained.state.source.get_all_keys())
            if getattr(self.hf_config, "tie_word_embeddings", False):
                there.discard("lm_head.weight")
            hugging_face.check_names(there, known)
        if None in tasks:
            raise ValueError(f"the model has {len(tasks)} tensors, and its config.json knows {len(known)} of them")
        models = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        state = {name: entry for model in models for name, entry in model.sharded_state_dict().items()}
        for task in tasks:
            if task.megatron_module is not None:
                task.mapping.pieces = _pieces(state[self._get_lora_unwrapped_name(task.param_name)])
        return tasks

    def _links(self) -> list[Link]:
        return links(kept_recipe_of(self.hf_config.recipe))


def kept_recipe_of(kept: dict[str, Any]) -> Recipe:
    """The recipe of kept sections, with nothing left to train, for whatever layers and kernels are here."""
    values = {**kept, "training": {**kept["training"], "steps": 1}}
    recipe = Recipe.from_dict(values, origin="config.json: recipe")
    return dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, layers="auto", mixer_backend="auto")
    )  # fmt: skip


def reference_folder(provider: MixerModelProvider, out: Path) -> list[str]:
    """Write a folder without weights, which AutoBridge takes what is not weights from when it exports a run.

    Args:
        provider: of the run, a ConfigContainer's model.
        out: a folder that is not there yet, or empty.

    Returns:
        what a user should know about it.
    """
    recipe = kept_recipe_of(provider.recipe)
    tokenizer = None if recipe.data.source == "recall" else load_tokenizer(recipe.data.tokenizer)
    config = hugging_face.configuration(recipe, provider.vocab_size, None if tokenizer is None else tokenizer.eod, 0)
    return hugging_face.write_folder(out, None, config, vocab_size=vocab_size(recipe), tokenizer=tokenizer)


def _named(found: list[Link]) -> Iterator[tuple[Link, str] | tuple[Link, str, str]]:
    """(link, name, another name): Transformer Engine has a layer's first norm in the linear layer after it."""
    for link, following in zip(found, [*found[1:], None], strict=True):
        if following is not None and link.ours.endswith("layernorm.weight"):
            yield link, link.ours, following.ours.removesuffix("weight") + "layer_norm_weight"
        else:
            yield link, link.ours


def _pieces(entry: Any) -> list[Piece]:
    """How Megatron's checkpoints divide a tensor into sections, and those over ranks."""
    tensors = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
    tensors = list(tensors.values()) if isinstance(tensors, dict) else tensors
    return [
        Piece(tuple(x.global_shape[x.prepend_axis_num :]), tuple(x.global_offset[x.prepend_axis_num :]), tuple(x.local_shape))
        for x in tensors
    ]
