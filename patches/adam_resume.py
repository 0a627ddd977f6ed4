"""Resume with torch's own Adam, with another Adam than was saved, or with other rates."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_carve.patches.patch import Patch, Replacement

_RATES = ("max_lr", "min_lr")
_NOBODY = "no parameter"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def _uses_torch_adam(distributed: Any) -> bool:
    return isinstance(distributed.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _with_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """A fresh torch Adam has no state, one without parameters never has, but describing it needs one step count."""

    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        if not _uses_torch_adam(self):
            return original(self)
        kept = self.optimizer.state
        if not kept and self.init_state_fn is not None:
            self.init_state_fn(self.optimizer)
            for state in kept.values():
                state.setdefault("step", torch.tensor(0.0))
        if kept:
            return original(self)
        kept[_NOBODY] = {"step": torch.tensor(0.0)}
        try:
            return original(self)
        finally:
            del kept[_NOBODY]

    return state_dict


def _complete_groups(saved: list[dict[str, Any]], current: list[dict[str, Any]]) -> None:
    """Give saved groups this Adam's options that another did not save, this run's learning rates, and whole steps.

    Upstream tells groups apart by their rates too, so that it finds none when those have changed.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    def kind(group: dict[str, Any]) -> list[Any]:
        return [group.get(key) for key in param_group_identifier_keys if key not in _RATES]

    for group in saved:
        own = [g for g in current if kind(g) == kind(group)]
        if own:
            group.update({key: value for key, value in own[0].items() if key not in group and key != "params"})
        if len(own) == 1:
            group.update({key: own[0].get(key) for key in _RATES})
        if group.get("step") is not None:  # torch's Adam counts in float32; a fused one's kernel takes an int alone
            group["step"] = int(group["step"])


def _with_own_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Loading puts one shared step tensor into every parameter's state; torch Adam then counts it up per parameter."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        if "optimizer" in state_dict:  # Megatron-FSDP keeps a parameter's options by its name
            _complete_groups(state_dict["optimizer"]["param_groups"], self.optimizer.param_groups)
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    return load_state_dict


def _without_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Per-parameter checkpoints hold no step, but the setter looks one up for every entry of torch Adam's state."""

    @functools.wraps(original)
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        return original(self, model_param, {"step": None, **tensors} if _uses_torch_adam(self) else tensors)

    return set_states


def _with_other_rates(original: staticmethod) -> staticmethod:
    """The optimizers that are not spread find their groups as the distributed one does."""

    @functools.wraps(original.__func__)
    def reorder(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        _complete_groups(saved, current)
        return original.__func__(current, saved)

    return staticmethod(reorder)


adam_resume = Patch(
    name="adam_resume",
    reason="resuming the distributed optimizer assumes a fused Adam, the one it was saved with, and the same rates; "
    "else it fails or counts steps wrongly",
    upstream="megatron/core/optimizer/distrib_optimizer.py, state_dict, load_state_dict, "
    "_set_main_param_and_optimizer_states; optimizer.py beside it, _filter_and_reorder_param_groups",
    remove_when="the distributed optimizer resumes with torch.optim.AdamW, and with other learning rates",
    replacements=[
        Replacement(f"{_OPTIMIZER}.state_dict", _with_step),
        Replacement(f"{_OPTIMIZER}.load_state_dict", _with_own_step),
        Replacement(f"{_OPTIMIZER}._set_main_param_and_optimizer_states", _without_step),
        Replacement(
            "megatron.core.optimizer.optimizer:MegatronOptimizer._filter_and_reorder_param_groups", _with_other_rates
        ),
    ],
)
