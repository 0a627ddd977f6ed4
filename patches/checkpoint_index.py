"""Read the index of a checkpoint, which torch pickles, without running what a stranger may have put there."""

import pickle
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_carve.patches.patch import Patch, Replacement

_CHECKPOINT = "torch.distributed.checkpoint."
# What torch writes: these modules have the same classes in 2.9, 2.11 and 2.14.
ADMITTED = {
    _CHECKPOINT + "metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    _CHECKPOINT + "planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    _CHECKPOINT + "filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}  # fmt: skip


class ForeignObject(pickle.UnpicklingError):
    """Something that does not belong into an index; the message names it."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ADMITTED.get(module, ()):
            raise ForeignObject(f"{module}.{name}, which does not belong there and may run anything")
        return super().find_class(module, name)


def read_index(file: IO[bytes]) -> Metadata:
    """torch's Metadata from an open .metadata file.

    Raises:
        ForeignObject: see there; nothing of it was run.
        Exception: whatever a damaged pickle may raise.
    """
    found = _Reader(file).load()
    if not isinstance(found, Metadata):
        raise TypeError(f"expected torch's Metadata, got {type(found).__name__}")
    return found


checkpoint_index = Patch(
    name="checkpoint_index",
    reason="torch unpickles whatever a checkpoint's index holds, and so runs it",
    upstream="torch/distributed/checkpoint/filesystem.py, FileSystemReader.read_metadata",
    remove_when="torch reads the index with an unpickler that admits its own types alone",
    replacements=[
        Replacement(
            "torch.distributed.checkpoint.filesystem:pickle",
            lambda original: SimpleNamespace(**vars(original) | {"load": read_index}),
        ),
    ],
)
