"""Between a trained run and a Hugging Face folder: the names of weights, the configuration, the tokenizer."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_carve.data.tokenizer import Tokenizer
from megatron_carve.model.variants import MIXER_LETTERS, VARIANTS, MixerKind
from megatron_carve.recipe import Recipe
from megatron_carve.run.folder import architecture

MODELING = Path(__file__).with_name("modeling_carve.py")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX = f"{WEIGHTS}.index.json"
# Its key in the metadata of safetensors.
CHECKSUM = "crc32"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Sections of a recipe that say what the model is, from which it can be built again.
KEPT_SECTIONS = ("model", "mixer")


@dataclass(frozen=True)
class Link:
    """One tensor of Megatron's model, and what it is divided into on the other side.

    Attributes:
        ours: its name.
        theirs: the parts' names.
        split, join: from one to the other, and back.
    """

    ours: str
    theirs: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda x: (x,)
    join: Callable[..., Tensor] = lambda x: x


def links(recipe: Recipe) -> list[Link]:
    """All tensors of a recipe's model with local layers.

    Raises:
        ValueError: layers or options that have no counterpart.
    """
    _require_counterpart(recipe)
    found = [
        Link("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
        Link("decoder.final_norm.weight", ("model.norm.weight",)),
    ]
    if not recipe.model.tie_embeddings:
        found.append(Link("output_layer.weight", ("lm_head.weight",)))
    for i, letter in enumerate(recipe.model.pattern.replace("|", "")):
        if letter in MIXER_LETTERS:
            of_layer = _mixer(recipe, MIXER_LETTERS[letter])
        else:
            of_layer = _attention(recipe) if letter == "*" else _mlp()
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        found += [Link(ours + k.ours, tuple(theirs + name for name in k.theirs), k.split, k.join) for k in of_layer]
    return found


def _mlp() -> list[Link]:
    return [
        Link("pre_mlp_layernorm.weight", ("norm.weight",)),
        _rows("mlp.linear_fc1.weight", ("mixer.gate_proj.weight", "mixer.up_proj.weight"), None),
        Link("mlp.linear_fc2.weight", ("mixer.down_proj.weight",)),
    ]


def _attention(recipe: Recipe) -> list[Link]:
    m = recipe.model
    groups = m.num_query_groups or m.num_attention_heads
    width = m.attention_head_dim or m.hidden_size // m.num_attention_heads
    # Megatron keeps the query heads of a group, its key head and its value head together.
    sizes = [m.num_attention_heads // groups * width, width, width]

    def split(x: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1) for part in x.unflatten(0, (groups, -1)).split(sizes, 1)]

    def join(*parts: Tensor) -> Tensor:
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)

    found = [
        Link("input_layernorm.weight", ("norm.weight",)),
        Link("self_attention.linear_qkv.weight", tuple(f"mixer.{n}_proj.weight" for n in "qkv"), split, join),
        Link("self_attention.linear_proj.weight", ("mixer.o_proj.weight",)),
    ]
    dynamic = m.attention_convolution == "dynamic"
    by_channel = [] if m.attention_convolution == "none" else ["weight", *(["up"] if dynamic else [])]
    channels = [size * groups for size in sizes]
    found += [
        Link(
            f"self_attention.conv.{name}", (f"mixer.conv_{name}",),
            lambda x: [torch.cat(split(x))], lambda x: join(*x.split(channels)),
        )
        for name in by_channel
    ]  # fmt: skip
    return [*found, Link("self_attention.taps_proj.weight", ("mixer.taps_proj.weight",))] if dynamic else found


def _mixer(recipe: Recipe, kind: MixerKind) -> list[Link]:
    c = recipe.mixer
    sections = c.projection_sections(kind)
    names = tuple(f"mixer.{s.name}_proj.weight" for s in sections)
    same = {"decay.A_log": "A_log", "decay.dt_bias": "dt_bias"}
    if c.short_convolution != "none":
        same |= {"conv.weight": "conv_weight"} | ({"conv.bias": "conv_bias"} if c.conv_bias else {})
    if c.short_convolution == "dynamic":
        same["conv.up"] = "conv_up"
    if c.decay_projection == "low_rank":
        same["decay_up.weight"] = "decay_up.weight"
    if c.has_low_rank_gate:
        same |= {"gate_up.weight": "gate_up.weight", "gate_up.bias": "gate_up.bias"}
    if VARIANTS[kind].sees_state:
        same["erase_bias.bias"] = "erase_bias"
        if c.content_rank:
            same |= {"content_down": "content_down", "content_up": "content_up"}
    same |= {"out_norm.weight": "norm_weight", "out_proj.weight": "out_proj.weight"}
    return [
        Link("input_layernorm.weight", ("norm.weight",)),
        _rows("self_attention.in_proj.weight", names, [s.size for s in sections]),
        *(Link(f"self_attention.{ours}", (f"mixer.{theirs}",)) for ours, theirs in same.items()),
    ]


def _rows(ours: str, theirs: tuple[str, ...], sizes: list[int] | None) -> Link:
    """Rows one after another, in equal parts where no sizes are given."""

    def split(x: Tensor) -> Sequence[Tensor]:
        return x.chunk(len(theirs)) if sizes is None else x.split(sizes)

    return Link(ours, theirs, split, lambda *parts: torch.cat(parts))


def _require_counterpart(recipe: Recipe) -> None:
    unknown = sorted(set(recipe.model.pattern) - {*MIXER_LETTERS, "*", "-", "|"})
    if unknown:
        known = ", ".join((*MIXER_LETTERS, "*", "-"))
        raise ValueError(f"model.pattern: expected layers of {known} to export, got {', '.join(unknown)}")
    options = [key for key in architecture(recipe) if key.startswith("megatron.")]
    if options:
        raise ValueError(f"{options[0]}: has no counterpart in the exported model")


def to_hugging_face(state: dict[str, Any], recipe: Recipe) -> dict[str, Tensor]:
    """A model's state dict under the names of modeling_carve.py, contiguous on the CPU."""
    return {
        name: part.detach().cpu().contiguous()
        for link in links(recipe)
        for name, part in zip(link.theirs, link.split(state[link.ours]), strict=True)
    }


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder: of one file, or of several that transformers names in an index.

    Raises:
        OSError: a file is missing.
        ValueError: a file that is damaged, or an index that names no files of the folder.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return _read_file(folder / WEIGHTS)
    index = read_json(folder / INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or any(not isinstance(f, str) or Path(f).name != f for f in files.values()):
        raise ValueError(f"{folder / INDEX}: expected a weight_map of tensors to files of the folder")
    return {name: x for file in sorted(set(files.values())) for name, x in _read_file(folder / file).items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    """Weights of a file, which export gave a checksum; transformers writes none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            written = (file.metadata() or {}).get(CHECKSUM)
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged: {error}") from None
    if written not in (None, _checksum(weights)):
        raise ValueError(f"{path}: is damaged: its weights have another checksum than those that were exported")
    return weights


def _checksum(weights: dict[str, Tensor]) -> str:
    """CRC-32 of names, types, shapes and bytes."""
    crc = 0
    for name, x in sorted(weights.items()):
        crc = zlib.crc32(f"{name} {x.dtype} {tuple(x.shape)}".encode(), crc)
        crc = zlib.crc32(x.contiguous().view(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def read_json(path: Path) -> Any:
    """Raises ValueError, naming the file, where it holds no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None


def from_hugging_face(weights: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The inverse of to_hugging_face.

    Raises:
        ValueError: weights that are missing, or more than there should be.
    """
    known = links(recipe)
    check_names(set(weights), known)
    return {link.ours: link.join(*(weights[name] for name in link.theirs)) for link in known}


def check_names(found: set[str], known: Sequence[Link]) -> None:
    """Raise ValueError unless the names of weights that were found are those of the links."""
    expected = {name for link in known for name in link.theirs}
    if missing := sorted(expected - found):
        raise ValueError(f"{WEIGHTS}: expected {len(expected)} tensors, but {missing[0]} is missing")
    if extra := sorted(found - expected):
        raise ValueError(f"{WEIGHTS}: there is no place for {extra[0]} in this model")


def configuration(recipe: Recipe, padded_vocab: int, eod: int | None, step: int) -> dict[str, Any]:
    """What config.json holds."""
    m = recipe.model
    kept = kept_recipe(recipe)
    kept["model"]["pattern"] = m.pattern.replace("|", "")
    return {
        "architectures": ["CarveForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING.stem}.CarveConfig",
            "AutoModelForCausalLM": f"{MODELING.stem}.CarveForCausalLM",
        },
        "model_type": "megatron_carve",
        "dtype": DTYPES[recipe.training.precision],
        "pattern": kept["model"]["pattern"],
        "vocab_size": padded_vocab,
        "hidden_size": m.hidden_size,
        "ffn_hidden_size": m.ffn_hidden_size,
        "num_attention_heads": m.num_attention_heads,
        "num_key_value_heads": m.num_query_groups or m.num_attention_heads,
        "attention_head_dim": m.attention_head_dim or m.hidden_size // m.num_attention_heads,
        "attention_window": m.attention_window,
        "attention_convolution": m.attention_convolution,
        "position_embedding": m.position_embedding,
        "rotary_base": m.rotary_base,
        "norm_epsilon": m.norm_epsilon,
        "tie_word_embeddings": m.tie_embeddings,
        "eos_token_id": eod,
        "mixer": kept["mixer"],
        "recipe": kept,
        "step": step,
    }


def kept_recipe(recipe: Recipe) -> dict[str, Any]:
    """The sections that say what the model is and what it was trained on."""
    values = recipe.to_dict()
    kept = {section: values[section] for section in KEPT_SECTIONS}
    kept["data"] = _data(recipe)
    kept["training"] = {"precision": recipe.training.precision, "seq_length": recipe.training.seq_length}
    return kept


def _data(recipe: Recipe) -> dict[str, Any]:
    """What kind of tokens it was trained on; of files their names alone."""
    d = recipe.data
    if d.source == "recall":
        return {"recall": asdict(d.recall)}
    places = [d.text] if isinstance(d.text, str) else d.text or d.indexed or []
    names = [Path(str(place)).name for place in places]
    return {"tokenizer": d.tokenizer, "text": ", ".join(names)}


def copy_tokenizer(folder: Path, spec: str, place: Path) -> None:
    """Copy the tokenizer of an exported folder to where a run has its copy; nothing where the folder has none."""
    kind, _, value = spec.partition(":")
    names = TOKENIZER_FILES if kind == "huggingface" else (Path(value).name,)
    for file in (folder / name for name in names if name):
        if file.is_file():
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)


def write_folder(
    out: Path,
    weights: dict[str, Tensor] | None,
    config: dict[str, Any],
    *,
    vocab_size: int,
    tokenizer: Tokenizer | None,
) -> list[str]:
    """Write a Hugging Face folder; returns what a user should know about it.

    Args:
        out: a folder that is not there yet, or empty.
        weights: None for a folder without them.
        vocab_size: token ids that mean something; the others of config["vocab_size"] are never generated.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    generation = {"eos_token_id": config["eos_token_id"], "do_sample": True}
    if padding := list(range(vocab_size, config["vocab_size"])):
        generation["suppress_tokens"] = padding
    notes = [] if tokenizer is None else _write_tokenizer(out, tokenizer)
    for name, value in ((CONFIG, config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    shutil.copy(MODELING, out / MODELING.name)
    if weights is not None:
        save_file(weights, out / WEIGHTS, {"format": "pt", CHECKSUM: _checksum(weights)})
        _order_metadata(out / WEIGHTS)
    return notes


def _order_metadata(path: Path) -> None:
    """Safetensors writes it in an order of chance, and the same model is to be the same file."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(ordered) <= length, "another form of the same header"
        file.seek(8)
        file.write(ordered.ljust(length))


def _write_tokenizer(out: Path, tokenizer: Tokenizer) -> list[str]:
    kind = tokenizer.spec.partition(":")[0]
    if kind == "bytes":
        _bytes_tokenizer(tokenizer).save_pretrained(out)
        return []
    tokenizer.copy_to(out)
    if kind != "huggingface":
        return [f"the tokenizer {tokenizer.spec} has no Hugging Face form; the folder has no tokenizer.json"]
    return []


def _bytes_tokenizer(tokenizer: Tokenizer) -> Any:
    """The tokenizer "bytes" in Hugging Face's form: every byte is a token, in order, then the end of a document."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # byte-level vocabularies write a byte as a printable character: itself, or one from 256 on, in order
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    fast = Fast(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|endoftext|>"])
    assert fast.token_to_id("<|endoftext|>") == tokenizer.eod
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>")
