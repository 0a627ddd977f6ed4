"""End the processes that Megatron saves checkpoints with when the one that trains ends, be it killed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_carve.patches.patch import Patch, Replacement
from megatron_carve.processes import end_with_parent


def _of_a_mortal_server(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        if filesystem_async._results_queue is None:
            server = SyncManager(ctx=get_context(mp_mode))
            server.start(end_with_parent)
            filesystem_async._results_queue = server.Queue()
        return original(mp_mode)

    return get_write_results_queue


def mortal_loop(*args: Any) -> None:
    """Megatron's loop of its persistent worker, in that process, where nothing is replaced."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    end_with_parent()
    PersistentAsyncCaller.async_loop(*args)


_STRATEGIES = "megatron.core.dist_checkpointing.strategies"

saving_processes = Patch(
    name="saving_processes",
    reason="of a run that is killed, the server of the queue for saves (a multiprocessing.Manager) and the persistent "
    "worker stay for ever, with the run's output open, for whose end `train | tee log` waits",
    upstream="megatron/core/dist_checkpointing/strategies/filesystem_async.py, get_write_results_queue; async_utils.py "
    "beside it, PersistentAsyncCaller._get_process",
    remove_when="both end with the process that started them",
    replacements=[
        Replacement(f"{_STRATEGIES}.filesystem_async:get_write_results_queue", _of_a_mortal_server),
        Replacement(f"{_STRATEGIES}.async_utils:PersistentAsyncCaller.async_loop", lambda _: mortal_loop),
    ],
)
