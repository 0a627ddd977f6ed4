"""The data that a recipe names, as the programs take them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from megatron_carve.data.blend import Blend, indexed_blend, text_blend
from megatron_carve.data.inputs import InputError, find_inputs
from megatron_carve.data.text import Texts, find_prepared, prepare_text, require_tokens
from megatron_carve.data.tokenizer import Tokenizer, load_tokenizer
from megatron_carve.notices import say_once
from megatron_carve.recipe import Recipe
from megatron_carve.run.folder import RunFolder


def run_tokenizer(recipe: Recipe) -> Tokenizer:
    """The recipe's; of a run that goes on its own copy, wherever it is."""
    spec, folder = recipe.data.tokenizer, RunFolder(recipe.run.path)
    found = load_tokenizer(spec, folder.tokenizer if folder.tracker.exists() else None)
    named, read = Path(spec.partition(":")[2]).expanduser(), Path(found.source)
    is_copy = folder.tokenizer.resolve() in (read, read.parent)
    if is_copy and named.exists() and load_tokenizer(spec).fingerprint != found.fingerprint:
        say_once(f"data.tokenizer: {named} is not what it was when the run began; the copy in {folder.path} counts")
    return found


def check_texts(recipe: Recipe) -> None:
    """Raise ValueError or FileNotFoundError unless the recipe's texts are there."""
    data = recipe.data
    if data.text is None:
        return
    for key, given in (("data.text", data.text), ("data.validation", data.validation)):
        if given is not None:
            try:
                find_inputs(given)
            except (InputError, FileNotFoundError) as error:
                raise type(error)(f"{key}: {error}") from error


def find_blend(recipe: Recipe) -> Blend:
    """The blend of data.indexed, checked.

    Raises:
        ValueError: a dataset is missing, damaged or too small; names the key and the file.
    """
    data = recipe.data
    assert data.indexed is not None
    validation = [data.validation] if isinstance(data.validation, str) else data.validation
    blend = indexed_blend(data.indexed, split=data.split, validation=validation, examples=data.loss_on == "completion")
    blend.require_tokens(recipe.training.seq_length)
    return blend


def prepared_blend(recipe: Recipe) -> Blend | None:
    """The recipe's data, texts tokenised; None for the generated task."""
    data = recipe.data
    if data.source == "indexed":
        return find_blend(recipe)
    if data.text is None:
        return None
    workers = data.workers or len(os.sched_getaffinity(0))
    prepared = []
    for texts in _texts(recipe):
        prepared.append(prepare_text(texts, _cache(recipe), workers=workers))
        if not texts.examples:  # they are packed, and what is left is filled
            require_tokens(prepared[-1], recipe.training.seq_length, texts.argument)
    return text_blend(*prepared)


def blend_lines(blend: Blend, recipe: Recipe) -> list[str]:
    """What the sets of a blend hold, and what the run sees of them."""
    training = recipe.training
    return blend.counts(training.total_steps * training.tokens_per_step, training.seq_length)


def data_lines(recipe: Recipe) -> list[str]:
    """What the data hold and what the run sees of them, as far as that can be told without tokenising."""
    try:
        if recipe.data.source == "recall":
            return []
        if recipe.data.source == "indexed":
            return blend_lines(find_blend(recipe), recipe)
        found = [find_prepared(texts, _cache(recipe)) for texts in _texts(recipe)]
        if None in found:
            sizes = [source.size for texts in _texts(recipe) for source in find_inputs(texts.given)]
            many = "s" if len(sizes) > 1 else ""
            return [f"{len(sizes):,} file{many} of {sum(sizes) / 1e6:,.1f} MB, not tokenised yet"]
        return blend_lines(text_blend(*[text for text in found if text is not None]), recipe)
    except (ValueError, OSError, ImportError) as error:  # a plan may be made where the data are not
        return [f"{error}"]


def _cache(recipe: Recipe) -> str | Path:
    return recipe.data.cache or RunFolder(recipe.run.path).path / "data"


def _texts(recipe: Recipe) -> list[Texts]:
    """The text, and a validation text of its own."""
    data = recipe.data
    assert data.text is not None
    common = partial(
        Texts, tokenizer=run_tokenizer(recipe), text_key=data.text_key, examples=data.loss_on == "completion"
    )
    if data.validation is None:
        return [common(data.text, validation_fraction=data.validation_fraction)]
    apart = partial(common, validation_fraction=0.0)
    return [apart(data.text), apart(data.validation, argument="data.validation")]
