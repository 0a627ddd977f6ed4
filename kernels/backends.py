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
        "torch". A Triton implementation on a GPU will make this "triton" for "auto" and "triton".

    Raises:
        ValueError: `backend` is not one of the three names.
        NotImplementedError: the named implementation does not exist for this device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        raise NotImplementedError("backend 'triton': no Triton kernels exist yet, use backend='torch' or 'auto'")
    if backend == "auto":
        _log_choice("torch", device.type)
    return "torch"


@functools.cache
def _log_choice(chosen: str, device_type: str) -> None:
    """Say once per device type what "auto" became."""
    logger.info("backend 'auto' on %s: %s, the only implementation so far", device_type, chosen)
