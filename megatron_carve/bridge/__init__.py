"""Our models in NVIDIA's Megatron-Bridge: recipes in its form, a model provider, and its conversion of weights.

First of all `prepare()`, before megatron.bridge is imported; then:

    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron_carve.bridge.recipes import carve_1p3b_hybrid_pretrain_config

    pretrain(carve_1p3b_hybrid_pretrain_config(), forward_step)

docs/bridge.md says the rest.
"""

from __future__ import annotations

import importlib.util
from typing import Literal


def prepare(device: Literal["auto", "cuda", "cpu"] = "auto") -> None:
    """Make this process one in which Megatron-Bridge knows our models. A second call does nothing.

    Patches Megatron as our own runs do and Megatron-Bridge where it does not run without a Makefile, Transformer Engine
    or a GPU, and registers our exported models with its AutoBridge. Afterwards `megatron.bridge` is imported.

    Args:
        device: that Megatron-Bridge is to use; "auto" for a GPU where there is one.

    Raises:
        ImportError: Megatron-Bridge, or a package that it needs, is not installed.
        ValueError: a GPU asked for where there is none.
        PatchError: another version of either is installed, or Transformer Engine was imported before device "cpu".
    """
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.bridge") is None:
        raise ImportError('Megatron-Bridge is not installed; run: pip install "megatron-carve[bridge]"')
    from megatron_carve.run.launch import use_device
    from megatron_carve.run.session import choose_device

    chosen = use_device(device)
    choose_device(chosen)
    from megatron_carve.bridge import patches
    from megatron_carve.run.session import patch_megatron

    patches.without_transformer_engine.apply()
    patch_megatron()
    always = (patches.adapters, patches.dataset_helpers, patches.checkpoint_arguments)
    for patch in (*always, *([patches.cpu] if chosen == "cpu" else [])):
        patch.apply()
    from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix

    import megatron_carve.bridge.conversion  # noqa: F401  registers its kind of model

    for module in ("provider", "data"):  # what its checkpoints' run_config.yaml may make
        register_allowed_target_prefix(f"megatron_carve.bridge.{module}")
