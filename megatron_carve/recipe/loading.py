"""Recipes: strict YAML, inheritance and command-line overrides, resolved into one typed object."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from megatron_carve.model.config import MixerConfig, describe_type
from megatron_carve.model.variants import MIXER_LETTERS
from megatron_carve.recipe.experts import LETTER, Experts, Mlp
from megatron_carve.recipe.schema import Checkpoint, Data, Model, Parallel, Run, Training

INHERIT = "inherit"
# Keys whose values are paths, or lists with paths in them; those of tokenizers are looked at when they are loaded.
PATHS = (
    ("data", "text"),
    ("data", "indexed"),
    ("data", "validation"),
    ("data", "cache"),
    ("run", "folder"),
    ("checkpoint", "load"),
)
OVERRIDES = "command line"


class RecipeError(ValueError):
    """A mistake in a recipe or an override. The message names the file, the key, what was expected and what came."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines a training run. The sections' fields are documented in schema.py and model/config.py."""

    model: Model
    mixer: MixerConfig = field(default_factory=MixerConfig)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    run: Run = field(default_factory=Run)
    megatron: dict[str, Any] = field(default_factory=dict)
    """Any other Megatron argument, by the name of its attribute (recompute_granularity, fp8, ...)."""

    def __post_init__(self) -> None:
        sequence, context = self.training.seq_length, self.parallel.context
        if self.parallel.sequence and self.parallel.tensor > 1 and sequence % (self.parallel.tensor * context):
            raise ValueError(
                f"training.seq_length: expected a multiple of parallel.tensor * parallel.context = "
                f"{self.parallel.tensor} * {context} under sequence parallelism, got {sequence}"
            )
        stages = self.model.pattern.split("/")[0].split("|")
        if len(stages) > 1 and len(stages) % self.parallel.pipeline:
            raise ValueError(
                f"model.pattern: expected a number of '|'-separated stages that parallel.pipeline="
                f"{self.parallel.pipeline} divides, got {len(stages)}"
            )
        if len(stages) == 1 and self.model.num_layers % self.parallel.pipeline:
            raise ValueError(
                f"parallel.pipeline: expected a divisor of the pattern's {self.model.num_layers} layers (or '|' "
                f"between stages in model.pattern), got {self.parallel.pipeline}"
            )
        if context > 1 and sequence % (2 * context):
            raise ValueError(
                f"training.seq_length: expected a multiple of 2 * parallel.context = {2 * context}, got {sequence}"
            )
        if self.data.documents == "apart":
            self._check_documents_apart()
        if LETTER in self.model.pattern:
            _ = self.experts  # raises if they are not what Megatron could build
            if self.parallel.tensor > 1 and not self.parallel.sequence:
                raise ValueError("parallel.sequence: expected true with the layer E and parallel.tensor > 1, got false")
        if self.model.attention_convolution != "none":
            self._check_attention_convolution()
        for letter in set(self.model.pattern) & set(MIXER_LETTERS):
            try:
                self.mixer.check_kind(MIXER_LETTERS[letter])
            except ValueError as error:
                raise ValueError(f"mixer.{error}") from None
        if set(self.model.pattern) & set(MIXER_LETTERS):
            if self.training.precision != "fp32" and not self.parallel.distributed_optimizer:
                raise ValueError(
                    "parallel.distributed_optimizer: expected true with mixer layers in "
                    f"{self.training.precision}, since Megatron's plain optimizer cannot save their float32 decay"
                )
            by_heads = context if self.parallel.context_method == "heads" else 1
            for name, sizes in (("tensor", (self.parallel.tensor,)), ("context", (self.parallel.tensor, by_heads))):
                try:
                    self.mixer.check_parallel(*sizes)
                except ValueError as error:
                    raise ValueError(f"parallel.{name}: {error}") from None
            for letter, kind in MIXER_LETTERS.items():
                if letter in self.model.pattern and self.megatron.get("fp8"):
                    try:
                        self.mixer.check_fp8(kind, self.model.hidden_size, self.parallel.tensor)
                    except ValueError as error:
                        raise ValueError(f"megatron.{error}") from None

    def _check_documents_apart(self) -> None:
        expected = "data.documents: apart"
        if self.data.source == "recall":
            raise ValueError(f"{expected} is for data.text and data.indexed, whose sequences hold several; got neither")
        known = {*MIXER_LETTERS, *"*-E|"}
        if others := sorted(set(self.model.pattern) - known):
            raise ValueError(
                f"{expected} is known to the layers {' '.join(sorted(known - {'|'}))}, got {' '.join(others)} in "
                f"model.pattern {self.model.pattern!r}"
            )
        self.check_attention_by_heads(expected)
        if self.megatron.get("cuda_graph_impl", "none") != "none":
            raise ValueError(f"{expected} has other shapes at every step, which megatron.cuda_graph_impl cannot record")

    def check_attention_by_heads(self, reason: str) -> None:
        """Raise ValueError where context-parallel ranks cannot exchange tokens for heads of attention.

        Args:
            reason: the key and value for which they must.
        """
        m, p = self.model, self.parallel
        if "*" not in m.pattern or p.context == 1:
            return
        key = "num_attention_heads" if m.num_query_groups is None else "num_query_groups"
        if (found := getattr(m, key)) % (p.tensor * p.context):
            raise ValueError(
                f"model.{key}: expected a multiple of parallel.tensor * parallel.context = {p.tensor} * {p.context} "
                f"with {reason}, got {found}"
            )
        for name, expected in (("softmax_type", "vanilla"), ("qk_clip", False), ("cp_comm_type", None)):
            if (given := self.megatron.get(name, expected)) != expected:
                wanted = "null" if expected is None else str(expected).lower()
                raise ValueError(
                    f"megatron.{name}: expected {wanted} with {reason} and parallel.context > 1, where ranks exchange "
                    f"tokens for heads of attention, got {given}"
                )

    @property
    def mlp(self) -> Mlp:
        """What the MLPs of the model are made of."""
        return Mlp.of(self.megatron)

    @property
    def experts(self) -> Experts:
        """What an E layer of the model is."""
        return Experts.of(self.model, self.parallel, self.megatron)

    def _check_attention_convolution(self) -> None:
        chosen = f"model.attention_convolution: {self.model.attention_convolution}"
        if "*" not in self.model.pattern:
            raise ValueError(f"{chosen} is for the layers *, got model.pattern {self.model.pattern!r}")
        for name in ("attention_output_gate", "fused_single_qkv_rope", "multi_latent_attention"):
            if self.megatron.get(name):
                raise ValueError(f"{chosen} takes megatron.{name} false, got true")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, origin: str = "recipe") -> Recipe:
        """The recipe of plain nested values, such as to_dict gives: sections, and keys in them.

        Args:
            origin: where the values come from, for messages; its stem names the run where run.name does not.

        Raises:
            RecipeError: an unknown key, or a value that is not what the schema says.
        """
        if INHERIT in values:
            raise RecipeError(f"{origin}: {INHERIT}: a file alone inherits, got {values[INHERIT]!r}")
        _check_keys(values, origin)
        own = copy.deepcopy(dict(values))
        _expand_home(own)
        return _build(own, dict.fromkeys(_dotted(own), origin), Path(origin).stem)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, in the order of the fields: what is saved with a run, and loads again as a recipe."""
        return dataclasses.asdict(self)

    def dump(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def check_layout(recipe: Recipe, world_size: int) -> None:
    """Raise ValueError unless processes, batch and heads divide as the recipe says."""
    p, t, m = recipe.parallel, recipe.training, recipe.model
    model_size = p.tensor * p.pipeline * p.context
    if world_size % model_size:
        raise ValueError(
            f"parallel: expected a number of processes that tensor * pipeline * context = {model_size} divides, "
            f"got {world_size}"
        )
    replicas = world_size // model_size
    if t.global_batch_size % (t.micro_batch_size * replicas):
        raise ValueError(
            "training.global_batch_size: expected a multiple of micro_batch_size * data-parallel replicas = "
            f"{t.micro_batch_size} * {replicas}, got {t.global_batch_size}"
        )
    micro_batches = t.global_batch_size // (t.micro_batch_size * replicas)
    stages = m.pattern.split("/")[0].count("|") + 1
    if p.pipeline > 1 and stages > p.pipeline and micro_batches % p.pipeline:
        raise ValueError(
            f"training.global_batch_size: with {stages} stages on parallel.pipeline={p.pipeline}, expected a number of "
            f"micro-batches per replica that {p.pipeline} divides, got {micro_batches}"
        )
    tensor_parallel = {"model.vocab_multiple": m.vocab_multiple}
    if "*" in m.pattern:
        tensor_parallel["model.num_attention_heads"] = m.num_attention_heads
        tensor_parallel["model.num_query_groups"] = m.num_query_groups or m.num_attention_heads
    if "-" in m.pattern:
        tensor_parallel["model.ffn_hidden_size"] = m.ffn_hidden_size
    if LETTER in m.pattern:
        _check_experts(recipe, world_size)
        tensor_parallel["megatron.moe_shared_expert_intermediate_size"] = recipe.experts.shared_width
    for key, value in tensor_parallel.items():
        if value % p.tensor:
            raise ValueError(f"{key}: expected a multiple of parallel.tensor={p.tensor}, got {value}")


def _check_experts(recipe: Recipe, world_size: int) -> None:
    x, pipeline = recipe.experts, recipe.parallel.pipeline
    if x.width % x.tensor:
        raise ValueError(f"megatron.moe_ffn_hidden_size: expected a multiple of {x.tensor} tensor ranks, got {x.width}")
    if world_size // pipeline % (x.parallel * x.tensor):
        raise ValueError(
            f"megatron.expert_model_parallel_size: expected, times expert_tensor_parallel_size={x.tensor} (that of "
            f"parallel.tensor if null), a divisor of the {world_size // pipeline} processes of a pipeline stage, got "
            f"{x.parallel}"
        )


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("megatron_carve.recipes")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe, its ancestors and the overrides.

    Args:
        name_or_path: a name from recipe_names(), or the path of a YAML file.
        overrides: "section.key=value", the value in YAML; the last one wins.

    Raises:
        RecipeError: anything that is wrong with them, before anything else has happened.
    """
    values, origin = _with_ancestors(_find(name_or_path, base=Path.cwd(), named_by=OVERRIDES), ())
    for override in overrides:
        _apply_override(values, origin, override)
    _expand_home(values)
    return _build(values, origin, Path(name_or_path).stem)


def written(path: Path) -> Mapping[str, Any]:
    """What a recipe file itself says, without its ancestors and unchecked.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        document = _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    return document if isinstance(document, Mapping) else {}


class _Loader(yaml.SafeLoader):
    """YAML with floats like 4e-4, and without duplicate keys."""


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that _Loader would read as floats."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)$"),
        list("-+.0123456789"),
    )


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # construct_mapping sees to it: keys written out win
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise RecipeError(f"line {key_node.start_mark.line + 1}: expected a name as key, got {key!r}")
        if key in seen:
            raise RecipeError(f"line {key_node.start_mark.line + 1}: key {key!r} appears twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{where}: not valid YAML: {reason}") from None
    except ValueError as error:  # ours, or of a scalar such as an impossible date
        raise RecipeError(f"{where}: {error}") from None


def _find(name_or_path: str, *, base: Path, named_by: str) -> Path:
    if name_or_path in recipe_names():
        return Path(str(resources.files("megatron_carve.recipes") / f"{name_or_path}.yaml"))
    path = base / name_or_path
    if path.is_file():
        return path
    raise RecipeError(f"{named_by}: no recipe {name_or_path!r}: neither a file nor one of {', '.join(recipe_names())}")


def _with_ancestors(path: Path, descendants: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merged raw values, and for each dotted key the file that set it."""
    path = path.resolve()
    if path in descendants:
        raise RecipeError(f"{path}: inherits from itself through {' -> '.join(p.name for p in descendants)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    document = _parse(text, str(path))
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: expected sections such as model and training, got {document!r}")
    parent = document.pop(INHERIT, None)
    _check_keys(document, str(path))
    if parent is None:
        return document, {key: str(path) for key in _dotted(document)}
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: {INHERIT}: expected a recipe's name or path, got {parent!r}")
    values, origin = _with_ancestors(_find(parent, base=path.parent, named_by=str(path)), (*descendants, path))
    _merge(values, document)
    return values, origin | {key: str(path) for key in _dotted(document)}


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _apply_override(values: dict[str, Any], origin: dict[str, str], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"{OVERRIDES}: expected section.key=value, got {override!r}")
    path = key.strip().split(".")
    kind = _type_of(path)
    is_text = kind in (str, str | None) or (kind == str | list[str] | None and not text.lstrip().startswith("["))
    value: Any = _text_value(text) if is_text else _parse(text, f"{OVERRIDES}: {key}")
    nested: Any = value
    for part in reversed(path):
        nested = {part: nested}
    _check_keys(nested, OVERRIDES)
    _merge(values, nested)
    origin.update(dict.fromkeys(_dotted(nested), OVERRIDES))


def _expand_home(values: Mapping[str, Any]) -> None:
    """Put a user's home for ~ at the beginning of paths, as a shell does, but not behind `key=`."""
    for section, name in PATHS:
        keys = values.get(section)
        if isinstance(keys, dict) and isinstance(keys.get(name), str):
            keys[name] = os.path.expanduser(keys[name])
        elif isinstance(keys, dict) and isinstance(keys.get(name), list):
            keys[name] = [os.path.expanduser(x) if isinstance(x, str) else x for x in keys[name]]


def _text_value(text: str) -> str | None:
    """What is typed for a text is text (a run named 2026, a pattern *-C-, corpus #1); null and quotes are YAML's."""
    try:
        value = _parse(text, "")
    except RecipeError:
        return text
    quoted = text.strip()[:1] in ("'", '"') and isinstance(value, str)
    return value if (value is None and text.strip()[:1] != "#") or quoted else text


def _sections(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _all_keys(cls: type = Recipe, prefix: str = "") -> Iterator[str]:
    for name, hint in _sections(cls).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


def _type_of(path: Sequence[str]) -> Any:
    hint: Any = Recipe
    for part in path:
        if not dataclasses.is_dataclass(hint):
            return None
        hint = _sections(hint).get(part)  # type: ignore[arg-type]
    return hint


def _check_keys(values: Mapping[str, Any], where: str, cls: type = Recipe, prefix: str = "") -> None:
    hints = _sections(cls)
    for key, value in values.items():
        if key not in hints:
            raise RecipeError(f"{where}: unknown key {prefix}{key}{_suggestion(f'{prefix}{key}')}")
        hint = hints[key]
        if not dataclasses.is_dataclass(hint) and key != "megatron":
            continue
        if value is not None and not isinstance(value, Mapping):
            raise RecipeError(f"{where}: {prefix}{key}: expected keys and values, got {value!r}")
        if dataclasses.is_dataclass(hint):
            _check_keys(value or {}, where, hint, f"{prefix}{key}.")  # type: ignore[arg-type]


def _suggestion(key: str) -> str:
    known = list(_all_keys())
    same_name = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _build(values: Mapping[str, Any], origin: Mapping[str, str], name: str) -> Recipe:
    try:
        recipe = _construct(Recipe, values, origin, "")
    except RecipeError:
        raise
    except ValueError as error:  # checks across sections
        raise RecipeError(f"{_files(origin.values())}: {error}") from None
    if recipe.run.name is None:
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, name=recipe.data.run_name(name)))
    return recipe


def _construct(cls: Any, values: Mapping[str, Any], origin: Mapping[str, str], prefix: str) -> Any:
    arguments: dict[str, Any] = {}
    for key, hint in _sections(cls).items():
        if dataclasses.is_dataclass(hint):
            arguments[key] = _construct(hint, values.get(key) or {}, origin, f"{prefix}{key}.")
        elif values.get(key) is not None or (key in values and hint != dict[str, Any]):
            arguments[key] = _words(values[key]) if list[str] in get_args(hint) else values[key]
    set_here = [f for k, f in origin.items() if k.startswith(prefix)] or list(origin.values())
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in arguments:
            hint = describe_type(_sections(cls)[f.name])
            raise RecipeError(f"{_files(set_here)}: {prefix}{f.name}: required, expected {hint}")
    try:
        return cls(**arguments)
    except RecipeError:
        raise
    except ValueError as error:
        if not prefix:
            raise
        key = f"{prefix}{str(error).partition(':')[0]}"
        where = [origin[key]] if key in origin else set_here
        if where != [OVERRIDES] and OVERRIDES in set_here:  # an override may have broken a key of the file
            where = [*where, OVERRIDES]
        raise RecipeError(f"{_files(where)}: {prefix}{error}") from None


def _words(value: Any) -> Any:
    """YAML reads the weights among the words of `data.indexed` as numbers, and a file named 2026."""
    if not isinstance(value, list):
        return value
    return [str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in value]


def _files(origins: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(origins)) or OVERRIDES
