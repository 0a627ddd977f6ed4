"""Choices made on the user's behalf, said once in the log."""

from __future__ import annotations

import logging
from functools import cache

import torch

logger = logging.getLogger("megatron_carve")


@cache
def say_once(message: str) -> None:
    """Log `message` at INFO on rank 0, the first time it is said in this process."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        logger.info(message)
