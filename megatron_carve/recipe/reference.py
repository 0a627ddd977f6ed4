"""Every key of a recipe, from the docstrings of its fields.

`python -m megatron_carve.recipe.reference` prints docs/recipe.md, `python -m megatron_carve.train --help` the same as
text.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, get_type_hints

from megatron_carve.model.config import describe_type
from megatron_carve.recipe import Recipe

HEAD = """# Recipe keys

Made from the docstrings in [schema.py](../megatron_carve/recipe/schema.py) and
[config.py](../megatron_carve/model/config.py) by `python -m megatron_carve.recipe.reference`.
A key without a default must be given, by the recipe or one that it inherits (`inherit: NAME`, or a path relative to
the file); `section.key=value` on the command line wins over the file.
"""


class Key(NamedTuple):
    """A key of a section, as a user reads it; default None where the key must be given."""

    name: str
    type: str
    default: str | None
    meaning: str


def sections() -> Iterator[tuple[str, str, list[Key]]]:
    """Name, meaning and keys of every section, in order; a section within another follows it as outer.inner."""
    yield from _sections(Recipe, "")


def _sections(cls: type, prefix: str) -> Iterator[tuple[str, str, list[Key]]]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield prefix + field.name, _first_paragraph(hint), list(_keys(hint))
            yield from _sections(hint, f"{prefix}{field.name}.")
        elif cls is Recipe:  # a mapping of free keys
            yield field.name, _meanings(cls)[field.name], []


def _keys(cls: type) -> Iterator[Key]:
    hints, meanings = get_type_hints(cls), _all_meanings(cls)
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[field.name]):
            default = None if field.default is dataclasses.MISSING else _as_yaml(field.default)
            yield Key(field.name, describe_type(hints[field.name]), default, meanings.get(field.name, ""))


def _all_meanings(cls: type) -> dict[str, str]:
    """Those of inherited fields too."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _meanings(base)
    return found


def _meanings(cls: type) -> dict[str, str]:
    """Of a class's own fields: the string that follows a field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _first_paragraph(cls: type) -> str:
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def _as_yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def page() -> str:
    """docs/recipe.md."""
    lines = [HEAD]
    for name, meaning, keys in sections():
        lines += [f"## {name}", "", meaning, ""]
        if keys:
            lines += ["| key | value | default | |", "| --- | --- | --- | --- |"]
            lines += [_row(key) for key in keys]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def listing(width: int = 100) -> str:
    """Every key as text for a terminal with this many columns: section.key=default, its type and its meaning."""
    lines = []
    for section, meaning, keys in sections():
        lines += ["", *textwrap.wrap(f"{section}: {meaning}", width)]
        for key in keys:
            default = " (must be given)" if key.default is None else f"={key.default}"
            lines.append(f"  {section}.{key.name}{default}  [{key.type}]")
            lines += textwrap.wrap(key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines).lstrip()


def _row(key: Key) -> str:
    default = "" if key.default is None else f"`{key.default}`"
    type_, meaning = (text.replace("|", "\\|") for text in (key.type, key.meaning))
    return f"| `{key.name}` | {type_} | {default} | {meaning} |"


if __name__ == "__main__":
    print(page(), end="")
