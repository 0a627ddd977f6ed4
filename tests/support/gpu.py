"""What tests on a GPU ask."""

from collections.abc import Callable

import torch


def assert_no_host_synchronisation(step: Callable[[], object]) -> None:
    """The second time; the first compiles."""
    step()
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
