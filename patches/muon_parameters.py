"""Let a parameter of two dimensions that is no linear map of features be updated by Adam where others are by Muon."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_carve.patches.patch import Patch, Replacement

# The attribute that such a parameter has.
BY_ELEMENT = "updated_by_element"


def _is_by_element(parameter: torch.Tensor) -> bool:
    return getattr(parameter, BY_ELEMENT, False)


def _but_by_element(original: Callable[[torch.Tensor], bool]) -> Callable[[torch.Tensor], bool]:
    @functools.wraps(original)
    def is_managed(param: torch.Tensor) -> bool:
        return original(param) and not _is_by_element(param)

    return is_managed


def _with_their_override(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build(config: Any, model_chunks: Any, config_overrides: Any = None, pg_collection: Any = None) -> Any:
        from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

        key = ParamKey(predicate=ParamPredicate(name=BY_ELEMENT, fn=_is_by_element))
        overrides = {**(config_overrides or {}), key: {"optimizer": config.muon_scalar_optimizer}}
        return original(config, model_chunks, overrides, pg_collection)

    return build


muon_parameters = Patch(
    name="muon_parameters",
    reason="Muon takes all matrices but embeddings for linear maps, also the taps of a depthwise convolution",
    upstream="megatron/core/optimizer/emerging_optimizers.py, _is_nonlinear_or_embedding, and "
    "is_managed_by_layer_wise_optimizer beside it",
    remove_when="a parameter can say which optimizer updates it",
    replacements=[
        Replacement("megatron.core.optimizer:_get_megatron_emerging_optimizer", _with_their_override),
        Replacement("megatron.core.optimizer:is_managed_by_layer_wise_optimizer", _but_by_element),
        Replacement("megatron.core.optimizer.layer_wise_optimizer:is_managed_by_layer_wise_optimizer", _but_by_element),
    ],
)
