"""Which implementation serves a call."""

import functools
import logging

import torch

BACKENDS = ("auto", "torch", "triton")

logger = logging.getLogger(__name__)


def resolve_backend(backend: str, device: torch.device) -> str:
    """Name the implementation that serves `backend` on `device`.

    Args:
        backend: "auto", "torch" or "triton".
        device: where the inputs live.

    Returns:
        "torch" or "triton". "auto" is "torch" on every device in this release: the Triton kernels pass their tests
        in the interpreter and on a GPU, but no model has been trained with them yet, so they are asked for by name.

    Raises:
        ValueError: `backend` is not one of the three names.
        NotImplementedError: the named implementation does not exist for this device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        if device.type != "cuda" and not _interpreted():
            raise NotImplementedError(
                f"backend 'triton': needs a CUDA GPU, got {device.type}; use backend='torch' or 'auto'"
            )
        return "triton"
    if backend == "auto":
        _log_choice("torch", device.type)
    return "torch"


def _interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU in this process."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _log_choice(chosen: str, device_type: str) -> None:
    """Say once per device type what "auto" became."""
    logger.info(
        "backend 'auto' on %s: %s; the Triton kernels are experimental, backend 'triton' selects them",
        device_type,
        chosen,
    )
