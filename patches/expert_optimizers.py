"""Resume with experts spread over ranks whose checkpoint holds them with all other parameters, and the reverse."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

from megatron_carve.patches.patch import Patch, Replacement

_GROUPS = "param_groups"
_CHAINED = "megatron.core.optimizer.optimizer:ChainedOptimizer"
_EXPERTS = "is_expert_parallel"


def _of_experts(optimizer: Any) -> bool:
    return any(group[_EXPERTS] for group in optimizer.param_groups)


def _with_groups_of(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state with its groups named as this optimizer's are, which are all of experts or all of the rest."""
    groups = [{**group, _EXPERTS: _of_experts(optimizer)} for group in state["optimizer"][_GROUPS]]
    return {**state, "optimizer": {**state["optimizer"], _GROUPS: groups}}


def _as_these(state: Mapping[Any, Any], optimizers: list[Any]) -> Mapping[Any, Any]:
    """What was loaded, as that of so many optimizers.

    Tensors are found by the names of parameters and stand where these optimizers look for them. All else stands where
    it stood when it was saved: by the optimizer's number if there were several.
    """
    numbered = {key: part for key, part in state.items() if isinstance(key, int)}
    rest = {key: part for key, part in state.items() if not isinstance(key, int)}
    if len(optimizers) > 1 and "optimizer" in rest:
        return {
            i: _with_groups_of(optimizer, {**copy.deepcopy(rest), **numbered.get(i, {})})
            for i, optimizer in enumerate(optimizers)
        }
    if len(optimizers) == 1 and numbered:
        groups = [group for part in numbered.values() for group in part["optimizer"][_GROUPS]]
        of_all = {**numbered[0]["optimizer"], _GROUPS: groups}
        return _with_groups_of(optimizers[0], {**numbered[0], **rest, "optimizer": of_all})
    return state


def _in_other_numbers(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        given = isinstance(state_dict, dict)
        original(self, _as_these(state_dict, self.chained_optimizers) if given else state_dict)

    return load_state_dict


def _with_the_step_of_others(original: Callable[..., Any]) -> Callable[..., Any]:
    """A stage without experts has their optimizer too, which counts no steps; the first stage's are saved for all."""

    @functools.wraps(original)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(self, *args, **kwargs)
        if len(self.chained_optimizers) > 1:
            empty = {i: not any(g["params"] for g in o.param_groups) for i, o in enumerate(self.chained_optimizers)}
            counted = [g["step"] for i in empty if not empty[i] for g in _plain_groups(state[i]) if "step" in g]
            for group in (g for i in empty if empty[i] and counted for g in _plain_groups(state[i])):
                group["step"] = counted[0]
        return state

    return sharded_state_dict


def _plain_groups(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that are saved once for all ranks."""
    optimizer = state.get("optimizer")
    return optimizer.get(_GROUPS, []) if isinstance(optimizer, dict) else []


expert_optimizers = Patch(
    name="expert_optimizers",
    reason="experts that are spread over ranks have an optimizer of their own, others have not, and a checkpoint of "
    "one kind does not load into the other; of a first stage without experts it says that theirs made no steps",
    upstream="megatron/core/optimizer/optimizer.py, ChainedOptimizer.load_state_dict, sharded_state_dict",
    remove_when="a run is resumed with experts on more or fewer ranks, from one rank on, and in stages without experts",
    replacements=[
        Replacement(f"{_CHAINED}.load_state_dict", _in_other_numbers),
        Replacement(f"{_CHAINED}.sharded_state_dict", _with_the_step_of_others),
    ],
)
