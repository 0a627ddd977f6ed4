"""Between our exported Hugging Face folders and Megatron-Bridge: what its AutoBridge asks of a kind of model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.bridge.models.conversion.auto_bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping
from megatron.bridge.training.checkpointing import read_run_config
from megatron.bridge.training.model_load_save import load_model_config, temporary_distributed_context
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
    """What a tensor-parallel rank has of a section of a tensor; sections, and a rank's pieces, follow one another."""

    section: str
    shape: tuple[int, ...]
    """Of the section."""
    offset: tuple[int, ...]
    """Of the piece in it."""
    own: tuple[int, ...]
    """The shape of the piece."""

    @property
    def place(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.own, strict=True))


def _sections(pieces: list[Piece]) -> dict[str, tuple[int, ...]]:
    return {piece.section: piece.shape for piece in pieces}


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
        sections = _sections(self.pieces)
        rows = [shape[0] for shape in sections.values()]
        expected = (sum(rows), *self.pieces[0].shape[1:])
        if tuple(whole.shape) != expected:
            names = ", ".join(self.link.theirs)
            raise ValueError(f"{names}: expected {self.link.ours} of shape {expected}, got {tuple(whole.shape)}")
        found = dict(zip(sections, whole.split(rows), strict=True))
        return torch.cat([found[piece.section][piece.place] for piece in self.pieces])

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, Tensor]:  # fmt: skip
        """The weights, on every rank, of the parts that ranks have."""
        own = self.broadcast_from_pp_rank(megatron_weights, cache_key=self.link.ours)
        pieces = self.broadcast_obj_from_pp_rank(self.pieces, f"{self.link.ours} pieces")
        of_ranks = [pieces]
        if self.tp_size > 1:
            of_ranks = [[]] * self.tp_size
            torch.distributed.all_gather_object(of_ranks, pieces, group=self.tp_group)
        found = {section: own.new_empty(shape) for section, shape in _sections(pieces).items()}
        for its_pieces, its_part in zip(of_ranks, self.gather_from_tp_ranks(own.contiguous()), strict=True):
            for piece, x in zip(its_pieces, its_part.split([piece.own[0] for piece in its_pieces]), strict=True):
                found[piece.section][piece.place] = x
        whole = torch.cat(list(found.values()))
        return dict(zip(self.link.theirs, (x.contiguous() for x in self.link.split(whole)), strict=True))


@MegatronModelBridge.register_bridge(
    source="CarveForCausalLM", target=HybridModel, provider=MixerModelProvider, model_type="megatron_carve"
)
class CarveBridge(MegatronModelBridge):
    """AutoBridge's knowledge of the folders that megatron_carve.export writes."""

    def provider_bridge(self, hf_pretrained: Any) -> MixerModelProvider:
        """A provider of the model of a folder, with the layers that this machine has."""
        config = hf_pretrained.config
        recipe = recipe_of(config.recipe)
        here = dataclasses.replace(recipe.model, layers="auto", mixer_backend="auto")
        return model_provider(dataclasses.replace(recipe, model=here), config.vocab_size)

    @classmethod
    def megatron_to_hf_config(cls, provider: MixerModelProvider) -> dict[str, Any]:
        """What config.json holds; the end of a document and the step are the reference folder's."""
        config = hugging_face.configuration(recipe_of(provider.recipe), provider.vocab_size, None, 0)
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
        return links(recipe_of(self.hf_config.recipe))


def recipe_of(kept: dict[str, Any]) -> Recipe:
    """The recipe of the sections that a folder or a provider keeps, with nothing left to train."""
    values = {**kept, "training": {**kept["training"], "steps": 1}}
    return Recipe.from_dict(values, origin="config.json: recipe")


def reference_folder(provider: MixerModelProvider, out: Path) -> list[str]:
    """Write a folder without weights, which AutoBridge takes what is not weights from when it exports a run.

    Args:
        provider: of the run, a ConfigContainer's model.
        out: a folder that is not there yet, or empty.

    Returns:
        what a user should know about it.
    """
    recipe = recipe_of(provider.recipe)
    tokenizer = None if recipe.data.source == "recall" else load_tokenizer(recipe.data.tokenizer)
    config = hugging_face.configuration(recipe, provider.vocab_size, None if tokenizer is None else tokenizer.eod, 0)
    return hugging_face.write_folder(out, None, config, vocab_size=vocab_size(recipe), tokenizer=tokenizer)


def export(checkpoints: Path, out: Path) -> list[str]:
    """Write the newest checkpoint of a run that Megatron-Bridge trained as our own program writes ours.

    AutoBridge's export_ckpt does so too, from a `reference_folder` that has a tokenizer.json; this needs none.

    Args:
        checkpoints: the folder with iter_... in it.
        out: a folder that is not there yet, or empty.

    Returns:
        what a user should know about it.

    Raises:
        ValueError: the newest is not Megatron-Bridge's, or of adapters.
    """
    places = {int(place.name.removeprefix("iter_")): place for place in checkpoints.glob("iter_*")}
    newest = places[max(places)] if places else checkpoints
    settings = newest / "run_config.yaml"
    if not settings.exists():
        raise ValueError(f"{newest}: expected a checkpoint of Megatron-Bridge, with a run_config.yaml, got none")
    if read_run_config(str(settings)).get("peft"):
        raise ValueError(f"{newest}: expected a checkpoint of all weights, got one of adapters alone")
    notes = reference_folder(load_model_config(str(newest))[0], out)
    bridge = AutoBridge.from_auto_config(str(newest), str(out), trust_remote_code=True)
    with temporary_distributed_context(backend="gloo"):
        bridge.save_hf_weights(bridge.load_megatron_model(newest), out, show_progress=False)
    return notes


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
        Piece(
            x.key, tuple(x.global_shape[x.prepend_axis_num :]), tuple(x.global_offset[x.prepend_axis_num :]),
            tuple(x.local_shape),
        )
        for x in tensors
    ]  # fmt: skip
