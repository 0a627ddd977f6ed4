"""The process group's environment and store, before Megatron starts."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Literal

import torch
from torch.distributed import PrefixStore, Store, TCPStore, rendezvous

from megatron_carve.recipe import Recipe

# Tokenising a large corpus takes the first process hours; the others wait for it.
PREPARATION_TIMEOUT = timedelta(days=7)


def join_processes() -> tuple[Store, int, int]:
    """(store shared by all processes, rank, world size), from torchrun's environment or for one process alone.

    Raises:
        ValueError: the environment is torchrun's only in part, or many processes were started without it.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    present = [n for n in names if n in os.environ]
    if not present or ("RANK" not in os.environ and "WORLD_SIZE" not in os.environ):
        # Takes a free port and keeps it, for later calls too, which find it in the environment.
        alone = TCPStore("127.0.0.1", 0, 1, is_master=True, multi_tenant=True)
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(alone.port)
        )
        return alone, 0, 1
    if len(present) < len(names):
        missing = ", ".join(n for n in names if n not in present)
        raise ValueError(f"environment: {missing} not set beside {', '.join(present)}; launch with torchrun")
    store, rank, world = next(rendezvous("env://"))
    return store, rank, world


def set_connections(recipe: Recipe) -> None:
    """Before CUDA starts: one queue to the GPU where Megatron insists on it, before Blackwell, so that a collective of
    tensor or context parallelism starts before the computation that hides it. Sharded data parallelism wants more.
    Buffers of tp_comm_overlap are other ranks' memory by CUDA's handles, not by multicast, unless the user says so.
    A process whose peer is gone has seconds for torch's record of calls, not the two minutes of torch's own."""
    wants_more = ("use_megatron_fsdp", "use_torch_fsdp2", "overlap_moe_expert_parallel_comm")
    divided = recipe.parallel.tensor > 1 or recipe.parallel.context > 1
    if divided and not any(recipe.megatron.get(name) for name in wants_more):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if recipe.megatron.get("tp_comm_overlap"):
        os.environ.setdefault("UB_SKIPMC", "1")  # multicast of NVLink, which not every host lets a program use
        # Seconds after which a kernel goes on without another rank's part. NCCL's calls in between end the run before.
        os.environ.setdefault("UB_TIMEOUT", "86400")
    # Each process group that notices waits a multiple of it, also where the record is written at once.
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "1250")


def world_size() -> int:
    """The number of processes that torchrun says it started; 1 without it.

    Raises:
        ValueError: WORLD_SIZE is no number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit():
        raise ValueError(f"environment: WORLD_SIZE: expected a number of processes, got {text!r}")
    return int(text)


def on_first_process[T](store: Store, rank: int, name: str, work: Callable[[], T]) -> T:
    """Run `work`, called `name` (once a program), on rank 0 and give its result to all; if it fails there, all end.

    Raises:
        Exception: on rank 0 what `work` raised; elsewhere SystemExit(1), without a message of its own.
    """
    with _shared(store) as shared:
        if rank == 0:
            try:
                result = work()
            except BaseException:
                shared.set(name, "")
                raise
            shared.set(name, pickle.dumps(result))  # type: ignore[arg-type]  # bytes are taken, whatever the stub says
            return result
        answer = shared.get(name)
        if not answer:
            raise SystemExit(1)
        return pickle.loads(answer)


def on_every_process(store: Store, rank: int, processes: int, name: str, work: Callable[[], None]) -> None:
    """Run `work`, called `name` (once a program), on every rank; if it fails on one, it fails on all.

    Raises:
        ValueError: what `work` raised on the first rank where it did, of which an OSError is one line too.
    """
    complaint = ""
    try:
        work()
    except (ValueError, OSError) as error:
        complaint = str(error)
    with _shared(store) as shared:
        if rank:
            shared.set(f"{name}/{rank}", complaint)
        else:
            found = [complaint, *(shared.get(f"{name}/{other}").decode() for other in range(1, processes))]
            shared.set(name, next(filter(None, found), ""))
        if complaint := shared.get(name).decode():
            raise ValueError(complaint)


@contextlib.contextmanager
def _shared(store: Store) -> Iterator[Store]:
    """A part of the store for what is prepared together, with the patience for it."""
    patience = store.timeout  # type: ignore[attr-defined]  # its type stub lacks it
    store.set_timeout(PREPARATION_TIMEOUT)
    try:
        # Keys stay in the store when torchrun restarts the processes.
        yield PrefixStore(f"megatron_carve/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    finally:
        store.set_timeout(patience)


def use_device(device: str) -> Literal["cuda", "cpu"]:
    """Resolve "auto" to "cuda" or "cpu" by what is there.

    Raises:
        ValueError: a GPU asked for where torch finds none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("run.device: expected a GPU for cuda, but torch finds none; use cpu or auto")
    return "cuda" if device == "cuda" or (device == "auto" and available) else "cpu"
