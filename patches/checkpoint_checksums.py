"""Write checksums beside the files of a checkpoint: each process of its own, the first of all together."""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_carve import checksums
from megatron_carve.patches.patch import Patch, Replacement


def _with_checksums(write: Callable[..., None], folder: str, rank: int, *args: Any, **kwargs: Any) -> None:
    """Write a process's files, then their checksums; in the process beside training, if it is that which writes."""
    with _failures_of_writing():
        write(*args, **kwargs)
    place = Path(folder)
    if not place.is_dir():  # an address that Megatron's multi-storage client knows
        return
    # After them Megatron's index begins with the number of the process, whatever comes before that.
    names = [file.name for file in place.glob("*.distcp") if f"__{rank}_" in file.name]
    checksums.write_list(place, names, checksums.OF_A_PROCESS.format(rank))


@contextlib.contextmanager
def _failures_of_writing() -> Iterator[None]:
    """Raise at the end why a file could not be written, in the place of what torch makes of it."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    failures: list[OSError] = []

    class Stream(io.BufferedWriter):
        def write(self, data: Any) -> int:
            try:
                return super().write(data)
            except OSError as error:
                error.filename = self.name
                failures.append(error)
                raise

    filesystem_async.open = lambda name, mode: Stream(io.FileIO(name, mode))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del filesystem_async.open  # type: ignore[attr-defined]  # Python's own shows again
    if failures:
        raise failures[0]


def _callbacks(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _get_save_and_finalize_callbacks(self: Any, writer: Any, *args: Any) -> Any:
        import torch

        write, preload, arguments = writer.get_save_function_and_args()
        if write is not None:
            write = functools.partial(_with_checksums, write, str(writer.checkpoint_dir), torch.distributed.get_rank())
        writer.get_save_function_and_args = lambda: (write, preload, arguments)
        return original(self, writer, *args)

    return _get_save_and_finalize_callbacks


def _all_together(original: Callable[..., None]) -> Callable[..., None]:
    """Megatron's last file of a checkpoint, which the first process writes when all others are there; then ours."""

    @functools.wraps(original)
    def save_config(config: Any, checkpoint_dir: Any) -> None:
        original(config, checkpoint_dir)
        folder = Path(checkpoint_dir)
        if not folder.is_dir():
            return
        lists = sorted(folder.glob(checksums.OF_A_PROCESS.format("*")))
        files: dict[str, Any] = {}
        for place in lists:
            files |= checksums.read_list(folder, place.name) or {}
        checksums.write_list(folder, [".metadata", "metadata.json"], others=files)
        for place in lists:
            place.unlink()

    return save_config


_MODULE = "megatron.core.dist_checkpointing"

checkpoint_checksums = Patch(
    name="checkpoint_checksums",
    reason="a flipped byte in a checkpoint goes unnoticed; Megatron's verify_integrity reads all files by one process, "
    "and then takes no checkpoint without its list",
    upstream="megatron/core/dist_checkpointing/serialization.py, save; validation.py, save_integrity_manifest",
    remove_when="Megatron's list is written by all processes, in threads",
    replacements=[
        Replacement(f"{_MODULE}.strategies.torch:TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks",
                    _callbacks),
        Replacement(f"{_MODULE}.serialization:save_config", _all_together),
    ],
)  # fmt: skip
