"""What a patch promises, shown on a stub."""

import importlib.metadata
import sys
import types

import pytest
from support.patches import refusal

from megatron_carve.patches import Patch, PatchError, Replacement, applied_patches

STUB = "stub_of_a_library"


class Base:
    def inherited(self):
        return "inherited"


@pytest.fixture
def stub(monkeypatch):
    """A module to patch, importable under the name STUB."""

    class Thing(Base):
        number = 1

        @staticmethod
        def static():
            return "static"

        @classmethod
        def name(cls):
            return cls.__name__

        class Inner:
            letter = "a"

    module = types.ModuleType(STUB)
    module.function = lambda: "original"
    module.Thing = Thing
    monkeypatch.setitem(sys.modules, STUB, module)
    return module


made: list[Patch] = []


@pytest.fixture(autouse=True)
def tidy():
    """No test leaves a patch of its own in force."""
    yield
    while made:
        made.pop().revert()


def make_patch(*replacements, **changes):
    """A patch of the stub: (attribute path, make[, new]) for each replacement."""
    details = {
        "name": "example",
        "reason": "to show it",
        "upstream": "nowhere",
        "remove_when": "pigs fly",
        "replacements": [Replacement(f"{STUB}:{target}", *rest) for target, *rest in replacements],
    }
    made.append(Patch(**{**details, **changes}))
    return made[-1]


def snapshot(module):
    """The very objects that are in a module and in its classes."""
    found = {}
    for name, value in vars(module).items():
        found[name] = value
        if isinstance(value, type):
            found |= {f"{name}.{inner}": held for inner, held in vars(value).items()}
    return found


def assert_unchanged(module, before):
    after = snapshot(module)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] is not before[name]] == []


class TestPatch:
    def test_replaces_what_it_names(self, stub):
        patch = make_patch(
            ("function", lambda original: lambda: original() + " wrapped"),
            ("Thing.number", lambda number: number + 1),
            ("Thing.static", lambda _: staticmethod(lambda: "other")),
            ("Thing.Inner.letter", lambda letter: letter * 2),
            ("Thing.added", lambda original: original, True),
        )
        assert not patch.applied
        patch.apply()
        assert patch.applied
        assert stub.function() == "original wrapped"
        assert (stub.Thing.number, stub.Thing.static(), stub.Thing().static()) == (2, "other", "other")
        assert stub.Thing.Inner.letter == "aa"
        assert stub.Thing.added is None

    def test_applies_once(self, stub):
        calls = []
        patch = make_patch(
            ("Thing.number", lambda number: calls.append(number) or number + 1),
            on_apply=lambda: calls.append("applied"),
        )
        patch.apply()
        patch.apply()
        assert calls == ["applied", 1]
        assert stub.Thing.number == 2

    def test_revert_puts_the_very_originals_back(self, stub):
        before = snapshot(stub)
        patch = make_patch(
            ("function", lambda _: None),
            ("Thing.number", lambda _: None),
            ("Thing.static", lambda _: len),
            ("Thing.name", lambda _: len),
            ("Thing.Inner", lambda _: None),
            ("Thing.added", lambda _: 5, True),
            ("added", lambda _: 5, True),
        )
        for _ in range(2):  # a patch can be applied again
            patch.apply()
            assert (stub.added, stub.Thing.added, stub.function, stub.Thing.Inner) == (5, 5, None, None)
            patch.revert()
            assert not patch.applied
            assert_unchanged(stub, before)
        assert isinstance(vars(stub.Thing)["static"], staticmethod)
        assert (stub.Thing().static(), stub.Thing.name()) == ("static", "Thing")

    def test_two_patches_of_one_target_stack(self, stub):
        before = snapshot(stub)
        inner = make_patch(("Thing.number", lambda n: n + 1), ("Thing.Inner.letter", lambda a: a + "b"))
        outer = make_patch(("Thing.number", lambda n: n * 10), name="outer")
        inner.apply()
        outer.apply()
        assert (stub.Thing.number, stub.Thing.Inner.letter) == (20, "ab")
        assert applied_patches()[-2:] == ["example", "outer"]
        outer.revert()
        assert (stub.Thing.number, stub.Thing.Inner.letter) == (2, "ab")
        inner.revert()
        assert_unchanged(stub, before)
        assert stub.Thing.Inner.letter == "a"

    def test_the_same_patch_made_anew_takes_the_place_of_the_older(self, stub):
        before = snapshot(stub)
        calls = []
        older = make_patch(("Thing.number", lambda n: n + 1), on_revert=lambda: calls.append("older off"))
        newer = make_patch(("Thing.number", lambda n: n * 10), on_apply=lambda: calls.append("newer on"))
        older.apply()
        newer.apply()
        assert stub.Thing.number == 10  # of the original, not of what the older made
        assert (older.applied, newer.applied, calls) == (False, True, ["older off", "newer on"])
        assert applied_patches().count("example") == 1
        older.revert()
        assert stub.Thing.number == 10
        newer.revert()
        assert_unchanged(stub, before)
        assert "example" not in applied_patches()

    def test_an_older_patch_stays_if_the_newer_cannot_be_applied(self, stub):
        older = make_patch(("Thing.number", lambda n: n + 1))
        older.apply()
        with pytest.raises(PatchError):
            make_patch(("gone", lambda _: None)).apply()
        assert older.applied
        assert stub.Thing.number == 2

    def test_revert_without_apply_does_nothing(self, stub):
        calls = []
        before = snapshot(stub)
        patch = make_patch(("Thing.number", lambda n: n + 1), on_revert=lambda: calls.append("reverted"))
        patch.revert()
        assert calls == []
        patch.apply()
        patch.revert()
        patch.revert()
        assert calls == ["reverted"]
        assert_unchanged(stub, before)

    def test_revert_leaves_no_copy_of_an_inherited_attribute(self, stub):
        before = snapshot(stub)
        patch = make_patch(("Thing.inherited", lambda _: lambda self: "replaced"))
        patch.apply()
        assert stub.Thing().inherited() == "replaced"
        patch.revert()
        assert stub.Thing().inherited() == "inherited"
        assert_unchanged(stub, before)

    @pytest.mark.parametrize(
        "target",
        [
            f"{STUB}:gone",
            f"{STUB}:Thing.gone",
            f"{STUB}:Gone.number",
            f"{STUB}:Thing.Gone.letter",
            f"{STUB}.submodule:function",
            "no_such_module_anywhere:function",
        ],
    )
    def test_a_missing_target_changes_nothing(self, stub, target):
        before = snapshot(stub)
        asked = []
        patch = make_patch(("function", asked.append), ("Thing.added", asked.append, True))
        patch.replacements.append(Replacement(target, asked.append))
        patch.replacements.append(Replacement(f"{STUB}:Thing.number", asked.append))
        installed = importlib.metadata.version("megatron-core")
        assert refusal(patch) == (
            f"patch example: {target} was not found in megatron-core {installed}; install a version in >=0.19.2,<0.20"
        )
        assert asked == []
        assert_unchanged(stub, before)
        patch.replacements.pop(2)
        patch.apply()
        assert len(asked) == 3

    @pytest.mark.parametrize("name", ["number", "inherited"])
    def test_an_addition_must_not_exist(self, stub, name):
        before = snapshot(stub)
        patch = make_patch(("function", lambda _: None), (f"Thing.{name}", lambda _: None, True))
        assert refusal(patch) == (f"patch example: {STUB}:Thing.{name} exists already; another plugin may own it")
        assert_unchanged(stub, before)

    @pytest.mark.parametrize("version", ["0.19.1", "0.20.0", "1.0", "0.20.0rc1", "0.18.9.post1"])
    def test_another_version_is_refused_by_name(self, stub, installed, version):
        before = snapshot(stub)
        calls = []
        patch = make_patch(("function", calls.append), on_apply=lambda: calls.append("applied"))
        installed(version)
        assert refusal(patch) == (
            f"patch example: tested with megatron-core >=0.19.2,<0.20, but {version} is installed; install a tested "
            "version, or check whether the patch can go (pigs fly)"
        )
        assert calls == []
        assert_unchanged(stub, before)

    @pytest.mark.parametrize("version", ["0.19.2", "0.19.9", "0.19.3rc1", "0.19.2+local"])
    def test_tested_versions(self, stub, installed, version):
        installed(version)
        patch = make_patch(("function", lambda _: 7))
        patch.apply()
        assert stub.function == 7

    def test_nothing_installed(self, stub, installed):
        installed(None)
        assert refusal(make_patch(("function", lambda _: 7))) == "patch example: megatron-core is not installed"

    def test_hooks(self, stub, monkeypatch):
        calls = []
        monkeypatch.delitem(sys.modules, STUB)
        patch = make_patch(
            ("function", lambda original: calls.append("made") or original),
            on_apply=lambda: calls.append("on_apply") or sys.modules.__setitem__(STUB, stub),  # before any import
            on_revert=lambda: calls.append("on_revert"),
        )
        patch.apply()
        assert calls == ["on_apply", "made"]
        patch.revert()
        assert calls == ["on_apply", "made", "on_revert"]

    def test_on_revert_follows_a_failed_apply(self, stub):
        calls = []
        patch = make_patch(
            ("gone", lambda _: None),
            on_apply=lambda: calls.append("on_apply"),
            on_revert=lambda: calls.append("on_revert"),
        )
        refusal(patch)
        assert calls == ["on_apply", "on_revert"]

    def test_a_replacement_that_cannot_be_made_changes_nothing(self, stub):
        before = snapshot(stub)
        calls = []

        def fails(original):
            raise ValueError("unexpected original")

        patch = make_patch(
            ("function", lambda _: None), ("Thing.number", fails), on_revert=lambda: calls.append("on_revert")
        )
        with pytest.raises(ValueError, match="unexpected original"):
            patch.apply()
        assert calls == ["on_revert"]
        assert not patch.applied
        assert_unchanged(stub, before)

    def test_a_module_that_cannot_be_imported_undoes_on_apply(self, tmp_path, monkeypatch):
        (tmp_path / "broken_at_import.py").write_text("raise OSError('no such library')\n")
        monkeypatch.syspath_prepend(tmp_path)
        calls = []
        patch = make_patch(on_revert=lambda: calls.append("on_revert"))
        patch.replacements.append(Replacement("broken_at_import:function", lambda _: None))
        with pytest.raises((OSError, PatchError)):
            patch.apply()
        assert not patch.applied
        assert calls == ["on_revert"]
