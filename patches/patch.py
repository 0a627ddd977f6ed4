"""What a runtime patch to Megatron-Core is: version-gated, idempotent, loud, revertible."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from packaging.specifiers import SpecifierSet

logger = logging.getLogger("megatron_carve")

_MISSING = object()

# Patches in force by name, so that none is ever applied twice.
_applied: dict[str, Patch] = {}


class PatchError(RuntimeError):
    """A patch that does not fit the installed version."""


def applied_patches() -> list[str]:
    """Names of the patches in force, in the order of their application."""
    return list(_applied)


def revert(name: str) -> None:
    """Revert the patch of this name, which is in force."""
    _applied[name].revert()


@dataclass(frozen=True)
class Replacement:
    """One attribute to replace.

    Args:
        target: "package.module:attribute.path".
        make: called with the original value, returns the new one.
        new: the attribute is added; it is an error if it exists.
    """

    target: str
    make: Callable[[Any], Any]
    new: bool = False


@dataclass
class Patch:
    """A named set of replacements in an installed distribution.

    Args:
        name: short, for the log.
        reason: why it is needed, in one sentence.
        upstream: where upstream's code is that makes it necessary.
        remove_when: what must be true upstream for the patch to go.
        replacements: applied in order, reverted in reverse.
        versions: the versions of `distribution` that this was tested with.
        on_apply, on_revert: for what is not an attribute; on_apply runs before targets are imported.
    """

    name: str
    reason: str
    upstream: str
    remove_when: str
    replacements: list[Replacement]
    versions: str = ">=0.19.2,<0.20"
    distribution: str = "megatron-core"
    on_apply: Callable[[], None] | None = None
    on_revert: Callable[[], None] | None = None
    _originals: list[tuple[Any, str, Any]] = field(default_factory=list, repr=False)
    _applied: bool = field(default=False, repr=False)

    @property
    def applied(self) -> bool:
        return self._applied

    def apply(self) -> None:
        """Apply once; a second call does nothing.

        Raises:
            PatchError: the installed version is not among those tested, or a target is not where it should be.
                Nothing has been changed then.
        """
        if self._applied:
            return
        self._check_version()
        if (older := _applied.get(self.name)) is not None:
            older.revert()  # the same patch made anew, with another listener for instance
        self._applied = True
        _applied[self.name] = self
        try:
            if self.on_apply:
                self.on_apply()
            found = [self._find(r) for r in self.replacements]
            for replacement, (owner, attribute, original) in zip(self.replacements, found, strict=True):
                changed = replacement.make(None if original is _MISSING else original)
                inherited = isinstance(owner, type) and attribute not in vars(owner)
                self._originals.append((owner, attribute, _MISSING if inherited else original))
                setattr(owner, attribute, changed)
        except BaseException:
            self.revert()
            if older is not None:
                older.apply()
            raise
        logger.debug("patch %s applied: %s", self.name, self.reason)

    def revert(self) -> None:
        """Put the originals back; does nothing if not applied."""
        if not self._applied:
            return
        if self.on_revert:
            self.on_revert()
        while self._originals:
            owner, attribute, original = self._originals.pop()
            if original is _MISSING:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, original)
        self._applied = False
        _applied.pop(self.name, None)

    def _check_version(self) -> None:
        try:
            installed = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            raise PatchError(f"patch {self.name}: {self.distribution} is not installed") from None
        if not SpecifierSet(self.versions).contains(installed, prereleases=True):
            raise PatchError(
                f"patch {self.name}: tested with {self.distribution} {self.versions}, but {installed} is installed; "
                f"install a tested version, or check whether the patch can go ({self.remove_when})"
            )

    def _find(self, replacement: Replacement) -> tuple[Any, str, Any]:
        module_name, _, path = replacement.target.partition(":")
        *parents, attribute = path.split(".")
        try:
            owner: Any = importlib.import_module(module_name)
            for parent in parents:
                owner = getattr(owner, parent)
        except (ImportError, AttributeError) as error:
            raise self._moved(replacement.target) from error
        # Through __dict__ where possible, so that class attributes come back as they were (staticmethods, for one).
        original = vars(owner).get(attribute, getattr(owner, attribute, _MISSING))
        if replacement.new and original is not _MISSING:
            raise PatchError(f"patch {self.name}: {replacement.target} exists already; another plugin may own it")
        if not replacement.new and original is _MISSING:
            raise self._moved(replacement.target)
        return owner, attribute, original

    def _moved(self, target: str) -> PatchError:
        return PatchError(
            f"patch {self.name}: {target} was not found in {self.distribution} "
            f"{importlib.metadata.version(self.distribution)}; install a version in {self.versions}"
        )
