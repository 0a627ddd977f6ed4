"""Everything that can fail through a user's input, checked before a model is built."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch
from torch.distributed import Store

from megatron_carve.data.blend import Blend, contents, require_known_ids
from megatron_carve.data.tokenizer import load_tokenizer
from megatron_carve.kernels import (
    require_triton_convolution,
    require_triton_dynamic_taps,
    require_triton_support,
    require_triton_width,
    resolve_backend,
)
from megatron_carve.model.config import LayerImplementation
from megatron_carve.model.variants import MIXER_LETTERS, VARIANTS
from megatron_carve.notices import say_once
from megatron_carve.recipe import Recipe, check_layout
from megatron_carve.recipe.arguments import check_extra, default_settings, megatron_argv, owned_settings
from megatron_carve.run.data import blend_lines, check_texts, find_blend, prepared_blend, run_tokenizer
from megatron_carve.run.folder import CheckpointError, RunFolder, keep_tokenizer, replace_text
from megatron_carve.run.launch import (
    join_processes,
    on_every_process,
    on_first_process,
    set_connections,
    use_device,
    world_size,
)
from megatron_carve.run.session import choose_device, command_line, patch_megatron
from megatron_carve.run.vocabulary import recall_task

logger = logging.getLogger(__name__)

# Letters that exist with Transformer Engine's layers only.
TRANSFORMER_ENGINE_LETTERS = "MD+"


@dataclass(frozen=True)
class Start:
    """Where a run begins; found on rank 0, the same for all."""

    load_from: Path | None
    """Folder of checkpoints, or None for fresh weights."""
    checkpoint: int
    """The step of that which is loaded, if one is."""
    step: int
    resumes: bool
    """The checkpoint is this run's own."""
    new_random_state: bool
    vocab_size: int
    eod: int
    chance_loss: float


@dataclass(frozen=True)
class Plan:
    """A checked recipe and what was decided for it."""

    recipe: Recipe
    folder: RunFolder
    store: Store
    rank: int
    device: str
    layers: LayerImplementation
    argv: list[str]
    start: Start
    blend: Blend | None
    """Its data; None for the generated task."""
    locks: list[IO[str]]
    """What keeps other programs from the run's folder while they are open; on rank 0."""


def prepare(recipe: Recipe) -> Plan:
    """Check the recipe against this machine, its data and its checkpoints; tokenise the text.

    Every process calls this. The run's folder, data and checkpoints are read and written on rank 0 alone.

    Raises:
        ValueError, OSError, ImportError, NotImplementedError: in one line what is wrong. SystemExit on the other
            ranks where only rank 0 can tell.
    """
    set_connections(recipe)
    device: Literal["cuda", "cpu"] = use_device(recipe.run.device)
    recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, device=device))
    check_layout(recipe, world_size())
    check_backend(recipe, device)
    folder = RunFolder(recipe.run.path)
    store, rank, processes = join_processes()
    start = on_first_process(store, rank, "start", lambda: _find_start(recipe, folder))
    with _data_check(recipe, start, (rank, processes)) as data_is_whole:
        choose_device(device)  # on the CPU, and else the next, are the first that import Megatron, which takes seconds
        layers = choose_layers(recipe, device)
        check_options(recipe, device)
        argv = _argv(recipe, start, layers, device)
        on_every_process(store, rank, processes, "checkpoint", lambda: _check_checkpoint(start, rank, data_is_whole))
    # Last, when nothing else can be wrong: the first writes, and tokenising takes long.
    locks: list[IO[str]] = []
    blend = on_first_process(store, rank, "data", lambda: _write(recipe, folder, start, locks))
    return Plan(recipe, folder, store, rank, device, layers, argv, start, blend, locks)


def check_backend(recipe: Recipe, device: str) -> None:
    """Raise NotImplementedError if the chosen kernels cannot serve the recipe's mixers."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[recipe.training.precision]
    try:
        if resolve_backend(recipe.model.mixer_backend, torch.device(device)) == "triton":
            for letter, kind in MIXER_LETTERS.items():
                if letter in recipe.model.pattern:
                    m = recipe.mixer
                    require_triton_support(
                        VARIANTS[kind].op,
                        dtype,
                        m.key_head_dim,
                        m.value_head_dim,
                        erase=m.erase,
                        content=m.content_rank > 0,
                    )
                    require_triton_convolution(m.taps)
                    if m.short_convolution == "dynamic":
                        require_triton_dynamic_taps(dtype, m.key_head_dim, m.conv_width, m.convolution_rank)
            if recipe.model.attention_convolution != "none":
                require_triton_convolution(recipe.mixer.conv_width)
            if recipe.model.attention_convolution == "dynamic":
                width = recipe.model.attention_head_dim or recipe.model.hidden_size // recipe.model.num_attention_heads
                require_triton_width("attention's dynamic taps", "model.attention_head_dim", width)
                require_triton_dynamic_taps(dtype, width, recipe.mixer.conv_width, recipe.mixer.convolution_rank)
    except NotImplementedError as error:
        raise NotImplementedError(f"model.mixer_backend: {error}") from None


def _write(recipe: Recipe, folder: RunFolder, start: Start, locks: list[IO[str]]) -> Blend | None:
    blend = prepared_blend(recipe)
    for line in [] if blend is None else blend_lines(blend, recipe):
        logger.info("%s", line)
    locks.append(folder.lock())
    if recipe.data.source != "recall" and not (start.resumes and folder.tokenizer.exists()):
        keep_tokenizer(load_tokenizer(recipe.data.tokenizer), folder.tokenizer)
    now = contents(blend.prefixes) if blend is not None else None
    if start.load_from is not None and start.step:
        _say_what_data_changed(recipe, RunFolder(start.load_from.parent), now)
    folder.save_recipe(recipe)
    if now is not None:
        replace_text(folder.data_contents, now + "\n")
    return blend


def _say_what_data_changed(recipe: Recipe, source: RunFolder, now: str | None) -> None:
    """A run that goes on with other data than its checkpoint was trained on does so in the knowledge of its user."""
    before = source.saved_recipe().data
    for key in ("text", "indexed"):
        was, is_ = getattr(before, key), getattr(recipe.data, key)
        if was != is_:
            say_once(f"data.{key} was {was} when the checkpoint was saved and is {is_} now")
            return
    if now is not None and source.data_contents.exists() and source.data_contents.read_text().strip() != now:
        key = "text" if recipe.data.text is not None else "indexed"
        say_once(f"data.{key}: {getattr(recipe.data, key)} is not what it was when the checkpoint was saved")


def _find_start(recipe: Recipe, folder: RunFolder) -> Start:
    """Everything that is read from disk before anything is written."""
    tokenizer = run_tokenizer(recipe)
    recall = recall_task(recipe)
    ids = tokenizer.vocab_size if recall is None else recall.vocab_size
    vocab_size = _vocab_size(recipe, ids)
    check_texts(recipe)
    if recipe.data.indexed is not None:
        require_known_ids(find_blend(recipe).prefixes, vocab_size=vocab_size)
    elif recall is None and vocab_size > 4 * ids:
        say_once(f"model.vocab_size={vocab_size}, but data.tokenizer {recipe.data.tokenizer} uses {ids} of the ids")
    source, checkpoint, resumes = _checkpoint_to_load(recipe, folder)
    saved_on = source.saved_recipe().run.device if source is not None else recipe.run.device
    if saved_on != recipe.run.device:
        say_once(f"the checkpoint was saved on {saved_on}: random states are drawn anew")
    return Start(
        load_from=source.checkpoints if source is not None else None,
        checkpoint=checkpoint,
        step=0 if recipe.checkpoint.weights_only and not resumes else checkpoint,
        resumes=resumes,
        new_random_state=saved_on != recipe.run.device,
        vocab_size=vocab_size,
        eod=tokenizer.eod,
        chance_loss=math.log(ids) if recall is None else recall.chance_loss,
    )


def _data_check(
    recipe: Recipe, start: Start, share: tuple[int, int]
) -> contextlib.AbstractContextManager[Callable[[], None]]:
    if start.load_from is None:
        return contextlib.nullcontext(lambda: None)
    weights_only = recipe.checkpoint.weights_only and not start.resumes
    return RunFolder(start.load_from.parent).data_check(start.checkpoint, weights_only=weights_only, share=share)


def _check_checkpoint(start: Start, rank: int, data_is_whole: Callable[[], None]) -> None:
    data_is_whole()
    if start.load_from is not None and rank == 0:
        RunFolder(start.load_from.parent).check_contents(start.checkpoint)


def _vocab_size(recipe: Recipe, needed: int) -> int:
    given = recipe.model.vocab_size
    if given is not None and given < needed:
        raise ValueError(f"model.vocab_size: expected at least the {needed} token ids of the data, got {given}")
    return needed if given is None else given


def _checkpoint_to_load(recipe: Recipe, folder: RunFolder) -> tuple[RunFolder | None, int, bool]:
    """(the run to load from, the step of its checkpoint, whether it is this run)."""
    step = folder.checkpoint_step()
    fsdp = bool(recipe.megatron.get("use_megatron_fsdp"))
    if step is not None:
        folder.check_same_model(recipe)
        folder.check_format(step, fsdp=fsdp)
        folder.check_optimizer(step, recipe)
        if newer := folder.newer_checkpoints(step):
            listed = ", ".join(map(str, newer))
            say_once(f"{folder.tracker} names step {step}; newer checkpoints ({listed}) are passed over and replaced")
        return folder, step, True
    if recipe.checkpoint.load is None:
        return None, 0, False
    other = RunFolder(Path(recipe.checkpoint.load))
    step = other.checkpoint_step()
    if step is None:
        raise CheckpointError(f"checkpoint.load: no checkpoint in {other.checkpoints}; expected the folder of a run")
    other.check_same_model(recipe)
    other.check_format(step, fsdp=fsdp)
    if not recipe.checkpoint.weights_only:
        other.check_optimizer(step, recipe)
    return other, step, False


def choose_layers(recipe: Recipe, device: str) -> LayerImplementation:
    """Resolve model.layers "auto" by what is installed.

    Raises:
        ValueError, ImportError: what the recipe asks of layers that are not there, or cannot do it.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.ssm.gated_delta_net import HAVE_FLA

    chosen = recipe.model.layers
    best: LayerImplementation = "transformer_engine" if HAVE_TE and device == "cuda" else "local"
    layers: LayerImplementation = best if chosen == "auto" else chosen
    if layers == "transformer_engine" and not HAVE_TE:
        raise ImportError(
            'model.layers: transformer_engine is not installed; install "transformer-engine[pytorch]" or choose local'
        )
    if layers == "transformer_engine" and device == "cpu":
        raise ValueError("model.layers: transformer_engine needs a GPU; choose local")
    if layers == "local" and (needy := sorted(set(recipe.model.pattern) & set(TRANSFORMER_ENGINE_LETTERS))):
        raise ValueError(f"model.pattern: the layers {', '.join(needy)} need Transformer Engine's layers")
    if layers == "local" and recipe.megatron.get("normalization", "RMSNorm") != "RMSNorm":
        raise ValueError(
            "megatron.normalization: layers without Transformer Engine support RMSNorm only, got "
            f"{recipe.megatron['normalization']!r}"
        )
    if layers == "local" and recipe.megatron.get("tp_comm_overlap"):
        raise ValueError(
            "megatron.tp_comm_overlap: expected Transformer Engine's layers, which need a GPU, got model.layers: local"
        )
    if layers == "local":
        recipe.check_attention_by_heads("model.layers: local")
    if "G" in recipe.model.pattern and not (HAVE_FLA and device == "cuda"):
        raise ImportError("model.pattern: the layer G (Megatron's GDN) needs flash-linear-attention and a GPU")
    return layers


def check_options(recipe: Recipe, device: str) -> None:
    """Raise ValueError or ImportError for options of Megatron that this machine cannot serve."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    graphs = recipe.megatron.get("cuda_graph_impl", "none") != "none"
    fsdp = bool(recipe.megatron.get("use_megatron_fsdp"))
    if device == "cpu" and (graphs or fsdp):
        raise ValueError(f"megatron.{'cuda_graph_impl' if graphs else 'use_megatron_fsdp'}: needs a GPU")
    if device == "cpu" and "E" in recipe.model.pattern and recipe.experts.parallel > 1 and recipe.experts.tensor > 1:
        raise ValueError(
            "megatron.expert_tensor_parallel_size: expected 1 on a CPU with experts spread over ranks, where gloo "
            f"gathers as many tokens of every rank only, got {recipe.experts.tensor}"
        )
    interleaved = recipe.model.pattern.split("/")[0].count("|") + 1 > recipe.parallel.pipeline > 1
    mixed = recipe.training.precision != "fp32" and bool(set(recipe.model.pattern) & set(MIXER_LETTERS))
    if device == "cpu" and interleaved and mixed and recipe.parallel.distributed_optimizer:
        raise ValueError(
            "training.precision: expected fp32 on a CPU with more stages in model.pattern than parallel.pipeline, as "
            "gloo gathers a stage's 16-bit parameters and the mixers' float32 ones as if they were of one type, got "
            f"{recipe.training.precision}"
        )
    if fsdp and not HAVE_TE and world_size() > recipe.parallel.tensor * recipe.parallel.pipeline:
        raise ImportError(
            'megatron.use_megatron_fsdp: the Adam of "transformer-engine[pytorch]" is not installed; with torch\'s, '
            "ranks that hold nothing of a parameter have no state of it, and the first save waits for them for ever"
        )


def megatron_arguments(recipe: Recipe, *, vocab_size: int, layers: LayerImplementation, device: str) -> list[str]:
    """Megatron's command line for a recipe, all but what a checkpoint adds."""
    from megatron.training.arguments import add_megatron_arguments

    check_extra(recipe)
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return megatron_argv(
        parser,
        owned_settings(recipe, vocab_size=vocab_size, layers=layers, device=device),
        default_settings(recipe, layers=layers, device=device),
        recipe.megatron,
    )


def _argv(recipe: Recipe, start: Start, layers: LayerImplementation, device: str) -> list[str]:
    argv = megatron_arguments(recipe, vocab_size=start.vocab_size, layers=layers, device=device)
    if start.load_from is not None:
        argv.append(f"--load={start.load_from}")
        argv += ["--no-load-rng"] if start.new_random_state else []
        argv += ["--finetune"] if recipe.checkpoint.weights_only and not start.resumes else []
    try_in_megatron(argv, recipe, layers)
    return argv


def try_in_megatron(argv: list[str], recipe: Recipe, layers: LayerImplementation) -> None:
    """Let Megatron check its arguments and build its configuration, which it does with assertions.

    Raises:
        ValueError: what Megatron objects to, in one line.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_carve.run.task import model_config

    patch_megatron()
    try:
        with command_line(argv), contextlib.redirect_stdout(io.StringIO()):
            args = parse_args()
            validate_args(args)
            model_config(args, recipe, layers)
            get_megatron_optimizer_config(args)
    except (AssertionError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ValueError(f"Megatron refuses its arguments: {reason}") from error
