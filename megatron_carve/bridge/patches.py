"""Runtime patches to Megatron-Bridge, applied by `prepare`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

from megatron_carve.patches import Patch, Replacement
from megatron_carve.patches import dataset_helpers as core_dataset_helpers

VERSIONS = "==0.6.2"
NEEDY = "megatron.bridge.peft.lora_layers"
ABSENT = ("transformer_engine", "transformer_engine.pytorch")


class _Absent(ModuleType):
    """In the place of a package that is not installed, where only its names are wanted, for annotations."""

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"{self.__name__}: Transformer Engine is not installed")


class _NamesOnly(Loader):
    """Runs one module with names of Transformer Engine, which no other module sees."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        for name in ("megatron.core.transformer.moe.moe_utils", "megatron.bridge.peft.adapter_wrapper"):
            importlib.import_module(name)  # what the module imports must not see the names either
        kept = {name: sys.modules[name] for name in ABSENT if name in sys.modules}
        sys.modules.update({name: _Absent(name) for name in ABSENT})
        setattr(sys.modules[ABSENT[0]], "pytorch", sys.modules[ABSENT[1]])  # noqa: B010
        try:
            self.loader.exec_module(module)
        finally:
            for name in ABSENT:
                del sys.modules[name]
            sys.modules.update(kept)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:  # fmt: skip
        if fullname != NEEDY or importlib.util.find_spec(ABSENT[0]) is not None:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _NamesOnly(spec.loader)
        return spec


_finder = _Finder()

without_transformer_engine = Patch(
    name="bridge_without_transformer_engine",
    reason="megatron.bridge imports transformer_engine.pytorch for adapters of its layers, also where there are none",
    upstream="megatron/bridge/peft/lora_layers.py, line 20, and annotations in class TEFusedLoRALinear",
    remove_when="that import is guarded, as Megatron-Bridge's others of Transformer Engine are",
    replacements=[],
    versions=VERSIONS,
    distribution="megatron-bridge",
    on_apply=lambda: sys.meta_path.insert(0, _finder),
    on_revert=lambda: sys.meta_path.remove(_finder),
)


def _as_it_is(found: bool) -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return found and HAVE_TE


adapters = Patch(
    name="bridge_adapters",
    reason="without Transformer Engine its layers in Megatron-Core are mocks, which adapters take for classes",
    upstream="megatron/bridge/peft/utils.py, HAVE_TE",
    remove_when="that asks Megatron-Core's HAVE_TE",
    replacements=[Replacement("megatron.bridge.peft.utils:HAVE_TE", _as_it_is)],
    versions=VERSIONS,
    distribution="megatron-bridge",
)


def _as_core(_: Callable[[], None]) -> Callable[[], None]:
    from megatron.core.datasets.utils import compile_helpers

    assert core_dataset_helpers.applied
    return compile_helpers


dataset_helpers = Patch(
    name="bridge_dataset_helpers",
    reason=core_dataset_helpers.reason,
    upstream="megatron/bridge/training/initialize.py, which took compile_helpers by name",
    remove_when=core_dataset_helpers.remove_when,
    replacements=[Replacement("megatron.bridge.training.initialize:compile_helpers", _as_core)],
    versions=VERSIONS,
    distribution="megatron-bridge",
)


def _by_gloo(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        original("gloo" if backend == "nccl" else backend, *args, **kwargs)

    return init_process_group


cpu = Patch(
    name="bridge_cpu",
    reason="Megatron-Bridge asserts that there is a GPU, and for a model outside of training takes NCCL",
    upstream="megatron/bridge/training/initialize.py, initialize_megatron; megatron/bridge/models/model_provider.py, "
    "provide_distributed_model and initialize_model_parallel",
    remove_when="its pretrain has a way to say allow_no_cuda, and its models go by a configuration",
    replacements=[
        Replacement(
            "megatron.bridge.training.setup:initialize_megatron",
            lambda initialize: functools.partial(initialize, allow_no_cuda=True),
        ),
        Replacement("megatron.bridge.models.model_provider:torch.distributed.init_process_group", _by_gloo),
    ],
    versions=VERSIONS,
    distribution="megatron-bridge",
)


def _telling_what_is(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_checkpoint(state: Any, *args: Any, **kwargs: Any) -> None:
        if (megatron := getattr(state.cfg.model, ARGUMENTS, None)) is not None:
            megatron.iteration = state.train_state.step
            # What may have been changed since the arguments were made; no training where a model is only converted.
            for source, names in ((state.train_state, COUNTS), (state.cfg.model, LAYOUT), (state.cfg.train, BATCHES)):
                for name in names if source is not None else ():
                    setattr(megatron, name, getattr(source, name))
            megatron.world_size = torch.distributed.get_world_size()
            megatron.data_parallel_size = megatron.world_size // (
                megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size
                * megatron.context_parallel_size
            )  # fmt: skip
        original(state, *args, **kwargs)

    return save_checkpoint


def _with_arguments(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def generate_state_dict(
        config: Any, model: list[Any], *args: Any, iteration: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:  # fmt: skip
        state = original(config, model, *args, iteration=iteration, **kwargs)
        megatron = getattr(model[0].config, ARGUMENTS, None) if model else None
        if megatron is not None and iteration is not None:  # None where a checkpoint is loaded
            state["args"] = megatron
        return state

    return generate_state_dict


COUNTS = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
LAYOUT = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "sequence_parallel",
)  # fmt: skip
BATCHES = ("micro_batch_size", "global_batch_size")
ARGUMENTS = "_megatron_arguments"
"""A provider's attribute: the arguments by which Megatron, and so our own programs, knows the model again."""

checkpoint_arguments = Patch(
    name="bridge_checkpoint_arguments",
    reason="Megatron takes a checkpoint without its arguments for a GPT model's, and begins to count at step 0",
    upstream="megatron/training/checkpointing.py, _maybe_setup_gpt_to_hybrid_load",
    remove_when="Megatron's loading reads run_config.yaml and train_state.pt, or needs no arguments",
    replacements=[
        Replacement("megatron.bridge.training.checkpointing:save_checkpoint", _telling_what_is),
        Replacement("megatron.bridge.training.checkpointing:generate_state_dict", _with_arguments),
    ],
    versions=VERSIONS,
    distribution="megatron-bridge",
)
