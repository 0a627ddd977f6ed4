"""What tests on a GPU ask."""

from collections.abc import Callable, Iterator

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


def memory_of_nan() -> Iterator[None]:
    """Every torch.empty is filled with NaN: nothing may depend on memory that no kernel has written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
