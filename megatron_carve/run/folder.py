"""A run's folder: where things are, and whether its checkpoint can be continued."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_carve import checksums
from megatron_carve.data.tokenizer import Tokenizer
from megatron_carve.model.variants import MIXER_LETTERS
from megatron_carve.notices import say_once
from megatron_carve.recipe import Recipe, RecipeError, load_recipe, written
from megatron_carve.run.session import TRUSTING, trusts_pickles

# Beginnings of the Megatron arguments that make a model what it is; the rest may change between two parts of a run.
MODEL_ARGUMENTS = (
    "normalization", "layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm",
    "add_bias_linear", "add_qkv_bias", "swiglu", "openai_gelu", "squared_relu", "quick_geglu", "glu_linear_offset",
    "activation_func_clamp_value", "add_position_embedding", "use_rotary_position_embeddings", "rotary_", "rope_type",
    "use_rope_scaling", "rope_scaling_factor", "no_rope_freq", "yarn_", "mrope_section", "mscale",
    "relative_attention_", "window_attn_skip_freq", "softmax_type", "qk_layernorm", "qk_l2_norm",
    "attention_output_gate", "apply_query_key_layer_scaling", "multi_latent_attention", "q_lora_rank", "kv_lora_rank",
    "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "experimental_attention_variant", "linear_attention_freq",
    "dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk", "dsa_indexer_skip_topk_offset",
    "dsa_indexer_rope_interleaved", "dsa_indexer_rotate_activation", "dsa_indexer_scoring_relu",
    "dsa_indexer_k_norm_epsilon", "mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads",
    "mtp_num_layers", "mtp_use_repeated_layer", "mtp_hybrid_override_pattern", "use_mup", "mup_", "num_experts",
    "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
    "moe_latent_size", "moe_router_topk", "moe_router_num_groups", "moe_router_group_topk", "moe_router_pre_softmax",
    "moe_router_score_function", "moe_router_enable_expert_bias", "moe_apply_probs_on_input", "heterogeneous_layers",
)  # fmt: skip


# First line of a run's recipe: as it was before it had a checksum, and what the checksum follows.
PLAIN_HEAD = "# The resolved recipe of this run.\n"
RECIPE_TITLE = "The resolved recipe of this run"

# What the names of an optimizer's tensors have in them.
OPTIMIZER = "optimizer."


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued. Nothing in its folder has been changed."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tracker(self) -> Path:
        """Megatron's file with the step of the checkpoint to go on from."""
        return self.checkpoints / "latest_checkpointed_iteration.txt"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss.png"

    @property
    def tokenizer(self) -> Path:
        """The run's copy of its tokenizer's files, where it has some; see data.tokenizer."""
        return self.path / "tokenizer"

    @property
    def data_contents(self) -> Path:
        """What datasets.contents of its data was when the run was last started."""
        return self.path / "data.txt"

    def save_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe, whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(self.recipe, checksums.seal(RECIPE_TITLE, recipe.dump()))

    def lock(self) -> IO[str]:
        """Keep other programs from training in this run, until the file returned is closed or this process ends.

        On storage of several machines it holds for all of them where that passes POSIX locks on, as NFS does.

        Raises:
            CheckpointError: another program trains here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "it has just begun"
            file.close()
            raise CheckpointError(
                f"{self.path}: another program trains in this run ({who}); wait for its end, or choose another run.name"
            ) from None
        except OSError as error:
            say_once(
                f"{self.path}: this storage has no locks ({error.strerror}): let no other program train in this run"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file

    def checkpoint_step(self) -> int | None:
        """The step of the newest finished checkpoint, or None if there is none.

        Raises:
            CheckpointError: the checkpoint that Megatron's tracker file names is not whole.
        """
        if not self.tracker.exists():
            return None
        text = self.tracker.read_text(encoding="utf-8", errors="replace").strip()
        if not text.isdigit():
            raise CheckpointError(f"{self.tracker}: expected the step of a checkpoint, got {text!r}")
        step = int(text)
        self.check_whole(step)
        return step

    def check_whole(self, step: int) -> None:
        """Raise CheckpointError unless the checkpoint of this step is there with every byte its index refers to, and
        index and description are as they were written."""
        _check_whole(self.checkpoint(step))

    @contextlib.contextmanager
    def data_check(
        self, step: int, *, weights_only: bool = False, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Callable[[], None]]:
        """Compare the data of this step's checkpoint with the checksums that they were saved with, beside other work.

        What it gives waits until that is done, and raises CheckpointError if there is damage. Checkpoints of earlier
        versions have no checksums, which is said.

        Args:
            weights_only: leave out what is an optimizer's.
            share: see checksums.check.
        """
        folder, stop, outcome = self.checkpoint(step), threading.Event(), Future[None]()
        with ThreadPoolExecutor(1, "checksums") as pool, contextlib.ExitStack() as at_the_end:
            at_the_end.callback(stop.set)
            try:
                # Read in this thread, since reading the index imports.
                outcome = pool.submit(_compare, folder, _data(folder, weights_only), share, stop)
            except (CheckpointError, OSError) as error:
                outcome.set_exception(error)
            yield outcome.result

    def check_contents(self, step: int) -> None:
        """Raise CheckpointError if the checkpoint of this step holds pickled objects that Megatron does not keep there.

        This imports Megatron, which tells torch what it keeps.
        """
        if not trusts_pickles():
            _check_contents(self.checkpoint(step))

    def checkpoint_steps(self) -> list[int]:
        """Steps of all checkpoints that were begun here, whole or not."""
        return sorted(int(path.name.removeprefix("iter_")) for path in self.checkpoints.glob("iter_*[0-9]"))

    def newer_checkpoints(self, step: int) -> list[int]:
        """Steps of finished checkpoints after this one, which Megatron's tracker file passes over."""
        return [s for s in self.checkpoint_steps() if s > step and (self.checkpoint(s) / checksums.LIST).exists()]

    def saved_recipe(self) -> Recipe:
        """The recipe that the checkpoint here was trained with.

        Raises:
            CheckpointError: it is gone or cannot be read.
        """
        if not self.recipe.exists():
            raise CheckpointError(f"{self.checkpoints}: holds a checkpoint, but {self.recipe}, its recipe, is gone")
        self._check_recipe()
        try:
            if is_earlier_carve(written(self.recipe)):
                raise CheckpointError(f"{self.checkpoints}: the checkpoint is of {EARLIER_CARVE}")
            return load_recipe(str(self.recipe.resolve()))
        except RecipeError as error:
            raise CheckpointError(f"{self.recipe}: cannot tell which model the checkpoint is of: {error}") from None

    def _check_recipe(self) -> None:
        text = self.recipe.read_text(encoding="utf-8", errors="replace")
        if text.startswith("#") and not text.startswith(PLAIN_HEAD):
            try:
                checksums.unseal(text, str(self.recipe))
            except checksums.Damaged:
                raise CheckpointError(
                    f"{self.recipe}: is not as this program wrote it, damaged or edited; if you have edited it, remove "
                    "its first line"
                ) from None

    def check_same_model(self, recipe: Recipe) -> None:
        """Raise CheckpointError unless the checkpoint here is of the model that `recipe` describes."""
        theirs, ours = architecture(self.saved_recipe()), architecture(recipe)
        different = [key for key in ours | theirs if theirs.get(key) != ours.get(key)]
        if different:
            listed = "; ".join(f"{k} is {theirs.get(k)!r} there and {ours.get(k)!r} here" for k in different)
            raise CheckpointError(
                f"{self.checkpoints}: the checkpoint is of another model ({listed}); choose another run.name, "
                "or change the recipe back"
            )

    def check_format(self, step: int, *, fsdp: bool) -> None:
        """Raise CheckpointError unless the checkpoint here is in the format that Megatron-FSDP, or all else, reads."""
        if (self.checkpoint(step) / "metadata.json").is_file() == fsdp:
            which = "Megatron's own, and {} does not read it" if fsdp else "Megatron-FSDP's, and only {} reads it"
            reader = "training with megatron.use_megatron_fsdp=true"
            raise CheckpointError(f"{self.checkpoints}: the checkpoint is {which.format(reader)}")

    def check_optimizer(self, step: int, recipe: Recipe) -> None:
        """Raise CheckpointError unless the checkpoint here has what the recipe's optimizer goes on from."""
        remedy = "begin another run from its weights alone: checkpoint.load=RUN checkpoint.weights_only=true"
        if not any(OPTIMIZER in name for name in _index(self.checkpoint(step)).state_dict_metadata):
            raise CheckpointError(f"{self.checkpoints}: the checkpoint has no state of an optimizer; {remedy}")
        theirs, ours = (r.megatron.get("optimizer", "adam") for r in (self.saved_recipe(), recipe))
        if theirs != ours:
            raise CheckpointError(
                f"{self.checkpoints}: the checkpoint has the state of another optimizer (megatron.optimizer is "
                f"{theirs!r} there and {ours!r} here); {remedy}"
            )
        if ours == "adam" and recipe.parallel.distributed_optimizer:
            return
        there, here = (r.megatron.get("expert_model_parallel_size") or 1 for r in (self.saved_recipe(), recipe))
        if there != here:
            raise CheckpointError(
                f"{self.checkpoints}: megatron.expert_model_parallel_size is {there} there and {here} here; only with "
                f"adam and parallel.distributed_optimizer does an optimizer's state go on with another; {remedy}"
            )

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of this step."""
        return self.checkpoints / f"iter_{step:07d}"


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy a tokenizer's files into a folder, which is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as partial:
        tokenizer.copy_to(partial)
    with contextlib.suppress(OSError):  # it is empty where there are none
        folder.rmdir()


def replace_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all: beside the one of this name, then renamed."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill: what is in it when the block ends is in `path`, and nothing is if the block fails.

    What a killed program left of it is removed first.

    Raises:
        FileExistsError: `path` is a file, or holds others.
    """
    partial = path / ".partial"
    there = path.exists()
    if there and (not path.is_dir() or any(found != partial for found in path.iterdir())):
        raise FileExistsError(f"{path}: expected a new or empty folder")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for made in partial.iterdir():
            made.rename(path / made.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not there and not any(path.iterdir()):
            path.rmdir()


EARLIER_CARVE = (
    "CARVE as this package built it before the paper's text was known (its recipe has no mixer.erase): other gates and "
    "other parameters, which this version does not have; train it anew"
)


def is_earlier_carve(resolved: Mapping[str, Any]) -> bool:
    """Whether a resolved recipe, as it was written, is of when letter C was an earlier form of CARVE."""
    model, mixer = (resolved.get(section) for section in ("model", "mixer"))
    named = isinstance(model, Mapping) and "C" in str(model.get("pattern"))
    return named and not (isinstance(mixer, Mapping) and "erase" in mixer)


def architecture(recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint of this recipe's model depends on, by recipe key; the parallel layout is not part of it."""
    values = recipe.to_dict()
    model = values["model"]
    for choice_of_implementation in ("layers", "mixer_backend", "mixer_recompute", "init_std"):
        del model[choice_of_implementation]
    model["pattern"] = model["pattern"].replace("|", "")
    flat = {f"model.{k}": v for k, v in model.items()}
    if set(model["pattern"]) & {*MIXER_LETTERS, "G"}:
        flat |= {f"mixer.{k}": v for k, v in values["mixer"].items() if k not in ("content_grad", "erase_bias")}
    elif model["attention_convolution"] != "none":
        flat |= {f"mixer.{k}": values["mixer"][k] for k in ("conv_width", "convolution_rank")}
    if recipe.data.source == "recall":
        flat |= {f"data.recall.{k}": values["data"]["recall"][k] for k in ("num_keys", "num_values")}
    else:
        flat["data.tokenizer"] = recipe.data.tokenizer
    flat |= {f"megatron.{k}": v for k, v in values["megatron"].items() if k.startswith(MODEL_ARGUMENTS)}
    return flat


def _index(folder: Path) -> Any:
    """torch's description of the checkpoint in a folder."""
    from megatron_carve.patches import ForeignObject, read_index

    def require(name: str) -> None:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the checkpoint is incomplete: {name} is missing; it was left as it is")

    require(".metadata")
    if (folder / checksums.LIST).exists():
        require("metadata.json")
    _compare(folder, {".metadata": None, "metadata.json": None})
    try:
        with (folder / ".metadata").open("rb") as file:
            index = read_index(file)
    except ForeignObject as error:
        raise CheckpointError(f"{folder}: the checkpoint's index .metadata holds {error}; it was not loaded") from None
    except Exception as error:  # whatever a damaged pickle may raise
        raise CheckpointError(f"{folder}: the checkpoint's index .metadata is damaged: {error}") from None
    # A checkpoint of Megatron-FSDP, which alone names a model so, is written when its index is.
    if not any(name.startswith("model.") for name in index.state_dict_metadata):
        require("metadata.json")
    return index


def _compare(
    folder: Path, wanted: Mapping[str, Sequence[tuple[int, int]] | None], share: tuple[int, int] = (0, 1),
    stop: threading.Event | None = None,
) -> None:  # fmt: skip
    try:
        if (files := checksums.read_list(folder)) is not None:
            checksums.check(folder, files, wanted, share, stop)
        elif share[0] == 0:
            say_once(
                f"{folder}: the checkpoint has no checksums, as of an earlier version or Megatron-FSDP; damage may go "
                "unnoticed"
            )
    except checksums.Damaged as error:
        raise CheckpointError(f"{folder}: the checkpoint is damaged: {error}; it was left as it is") from None


def _data(folder: Path, weights_only: bool) -> Mapping[str, Sequence[tuple[int, int]] | None]:
    """Files of a checkpoint, and the ranges of bytes that are read of them; None for all."""
    wanted: dict[str, list[tuple[int, int]]] = {}
    for place, part in (_index(folder).storage_data or {}).items():
        if not (weights_only and OPTIMIZER in place.fqn):
            wanted.setdefault(part.relative_path, []).append((part.offset, part.offset + part.length))
    return wanted if weights_only else dict.fromkeys(wanted)


def _check_contents(folder: Path) -> None:
    import megatron.core  # noqa: F401
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata
    from torch.serialization import get_unsafe_globals_in_checkpoint

    index = _index(folder)
    for place, part in (index.storage_data or {}).items():
        if not isinstance(index.state_dict_metadata.get(place.fqn), BytesStorageMetadata):
            continue
        with (folder / part.relative_path).open("rb") as file:
            file.seek(part.offset)
            entry = io.BytesIO(file.read(part.length))
        name = place.fqn.partition("/")[0]
        try:
            foreign = get_unsafe_globals_in_checkpoint(entry)
        except Exception as error:  # whatever a damaged archive may raise
            raise CheckpointError(f"{folder}: {name} in {part.relative_path} is damaged: {error}") from None
        if foreign:
            raise CheckpointError(
                f"{folder}: {name} holds {', '.join(sorted(foreign))}, which Megatron does not keep in checkpoints and "
                f"may run anything; it was not loaded. {TRUSTING}=1 in the environment loads what you trust"
            )


def _check_whole(folder: Path) -> None:
    """Raise CheckpointError unless every byte range that the checkpoint's index refers to is there."""
    needed: dict[str, int] = {}
    for part in (_index(folder).storage_data or {}).values():
        needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
    for name, size in needed.items():
        file = folder / name
        actual = file.stat().st_size if file.is_file() else None
        if actual is None or actual < size:
            state = "missing" if actual is None else f"cut short ({actual} of {size} bytes)"
            raise CheckpointError(f"{folder}: the checkpoint is incomplete: {name} is {state}; it was left as it is")
