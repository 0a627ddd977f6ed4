"""Runtime patches: what a patch promises, shown on a stub, and what each real one does to Megatron-Core."""

import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from megatron_carve import patches
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


def refusal(patch):
    in_force = applied_patches()
    with pytest.raises(PatchError) as error:
        patch.apply()
    assert not patch.applied
    assert applied_patches() == in_force
    return str(error.value)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that a version of Megatron-Core is installed; None for not at all."""

    def pretend(version):
        def answer(distribution):
            assert distribution == "megatron-core"
            if version is None:
                raise importlib.metadata.PackageNotFoundError(distribution)
            return version

        monkeypatch.setattr(importlib.metadata, "version", answer)

    return pretend


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


def real_patches():
    """Every patch of the package, new where it takes an argument."""
    return {
        "dataset_helpers": patches.dataset_helpers,
        "layer_symbols": patches.layer_symbols,
        "adam_resume": patches.adam_resume,
        "mixed_precision_groups": patches.mixed_precision_groups,
        "cpu_mode": patches.cpu_mode,
        "flops": patches.flops(lambda args, letter: 0.0, "C2"),
        "mtp_stack": patches.mtp_stack(Base),
        "training_events": patches.training_events(SimpleNamespace()),
    }


@pytest.fixture
def nothing_applied():
    """Megatron-Core as it was installed, whatever other tests have done; then back to that."""
    left = [patch for patch in real_patches().values() if patch.applied]
    for patch in left:
        patch.revert()
    yield
    for patch in left:
        patch.apply()


@pytest.fixture
def applied(nothing_applied):
    """Apply patches for one test."""
    done = []

    def apply(patch):
        patch.apply()
        done.append(patch)
        return patch

    yield apply
    for patch in reversed(done):
        patch.revert()


class TestRealPatches:
    def test_all_are_here(self):
        exported = {name for name in patches.__all__ if name.islower()} - {"applied_patches"}
        assert set(real_patches()) == exported - {"applied_patches"}

    @pytest.mark.parametrize("name", sorted(real_patches()))
    @pytest.mark.parametrize("version", ["0.19.1", "0.20.0"])
    def test_refused_with_another_version(self, nothing_applied, installed, name, version):
        patch = real_patches()[name]
        is_available = torch.cuda.is_available
        installed(version)
        text = refusal(patch)
        assert f"patch {name}: tested with megatron-core >=0.19.2,<0.20, but {version} is installed" in text
        assert patch.remove_when in text
        assert torch.cuda.is_available is is_available

    @pytest.mark.parametrize("name", sorted(set(real_patches()) - {"cpu_mode"}))
    def test_applies_to_the_installed_megatron_and_comes_off(self, applied, name):
        patch = real_patches()[name]
        targets = [patch._find(replacement) for replacement in patch.replacements]
        applied(patch)
        for owner, attribute, original in targets:
            assert vars(owner)[attribute] is not original
        patch.revert()
        for (owner, attribute, original), replacement in zip(targets, patch.replacements, strict=True):
            assert replacement.new is not (attribute in vars(owner))
            assert replacement.new or vars(owner)[attribute] is original

    @pytest.mark.parametrize("name", sorted(real_patches()))
    def test_says_why_and_until_when(self, name):
        patch = real_patches()[name]
        assert patch.name == name
        installed = importlib.metadata.distribution(patch.distribution).locate_file("")
        assert (installed / patch.upstream.partition(",")[0].partition(" and ")[0]).is_file()
        assert patch.reason
        assert patch.remove_when


class TestLayerSymbols:
    def test_two_more_letters(self, applied):
        from megatron.core.models.hybrid.hybrid_layer_allocation import (
            Symbols,
            get_hybrid_layer_counts,
            parse_hybrid_pattern,
            validate_segment_layers,
        )

        letters = Symbols.VALID_LAYERS
        kept = set(letters)
        for ours in "C2":
            with pytest.raises(ValueError, match=f"'{ours}' is not a valid layer symbol"):
                parse_hybrid_pattern(f"{ours}-*")

        patch = applied(patches.layer_symbols)
        parsed = parse_hybrid_pattern("C-2*|2-/C-/C-")
        assert (parsed.main_pattern, parsed.mtp_pattern, parsed.mtp_num_depths) == ("C-2*|2-", "C-", 2)
        assert validate_segment_layers("C-2*-") == ["C", "-", "2", "*", "-"]
        counts = get_hybrid_layer_counts("C-2*|2-/C-/C-")
        assert {letter: n for letter, n in counts.items() if n} == {"C": 3, "2": 2, "*": 1, "-": 4}
        with pytest.raises(ValueError, match="'X' is not a valid layer symbol"):
            parse_hybrid_pattern("C-X")

        patch.revert()
        assert Symbols.VALID_LAYERS is letters
        assert letters == kept
        with pytest.raises(ValueError, match="'C' is not a valid layer symbol"):
            parse_hybrid_pattern("C-*")
        assert "C" not in get_hybrid_layer_counts("*-")


class TestDatasetHelpers:
    def test_nothing_is_built(self, applied, monkeypatch):
        from megatron.core.datasets import utils

        def never(*args, **kwargs):
            raise AssertionError(f"runs {args}")

        monkeypatch.setattr(subprocess, "run", never)
        with pytest.raises(AssertionError, match="make"):
            utils.compile_helpers()
        applied(patches.dataset_helpers)
        utils.compile_helpers()

    def test_a_missing_library_is_an_error(self, applied, monkeypatch):
        from megatron.core.datasets import utils

        applied(patches.dataset_helpers)
        monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
        with pytest.raises(ImportError, match="helpers_cpp"):
            utils.compile_helpers()


class TestFlops:
    OURS = {"C": 1000.0, "2": 10.0}  # noqa: RUF012

    @pytest.fixture
    def arguments(self):
        """Megatron's arguments of a small model, by its own parser."""
        import argparse

        from megatron.training.arguments import add_megatron_arguments

        parser = add_megatron_arguments(argparse.ArgumentParser())
        words = "--hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 4 --seq-length 32 --swiglu"
        args = parser.parse_args(words.split())
        args.padded_vocab_size = 128
        return args

    @pytest.mark.parametrize(
        ("pattern", "ours"),
        [
            ("C-*-", 1000), ("C-2*-C", 2010), ("22|2-", 30), ("C-*-/2-/2-", 1020), ("*-", 0), ("G-", 0),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize(
        ("batch", "given", "tokens"), [(6, {}, 6 * 32), (6, {"total_real_tokens_in_batch": 50}, 50)]
    )
    def test_adds_three_times_the_forward(self, applied, arguments, pattern, ours, batch, given, tokens):
        from megatron.training import training

        applied(patches.layer_symbols)
        asked = []

        def mixer_flops(args, letter):
            asked.append((args, letter))
            return self.OURS[letter]

        arguments.hybrid_layer_pattern = pattern
        before = training.num_floating_point_operations(arguments, batch, **given)
        assert before > 0
        applied(patches.flops(mixer_flops, self.OURS))
        assert training.num_floating_point_operations(arguments, batch, **given) - before == 3 * tokens * ours
        assert all(args is arguments and letter in pattern for args, letter in asked)

    def test_longer_sequences_cost_megatrons_layers_more(self, applied, arguments):
        """What the caller says of attention still reaches Megatron's count."""
        from megatron.training import training

        applied(patches.layer_symbols)
        applied(patches.flops(lambda args, letter: 7.0, "C2"))
        arguments.hybrid_layer_pattern = "C-*-"
        count = training.num_floating_point_operations
        few, many = (count(arguments, 6, seqlen_squared_sum_in_batch=square) for square in (1000, 2000))
        assert many - few == pytest.approx(3 * 2 * 1000 * 64)

    def test_models_without_a_pattern(self, applied, arguments):
        from megatron.training import training

        arguments.num_layers, arguments.kv_channels, arguments.hybrid_layer_pattern = 2, 16, None
        before = training.num_floating_point_operations(arguments, 6)
        applied(patches.flops(lambda args, letter: 7.0, "C2"))
        assert training.num_floating_point_operations(arguments, 6) == before > 0


class TestMtpStack:
    def test_stands_where_the_prediction_layer_looks(self, applied):
        from megatron.core.models.hybrid import hybrid_block
        from megatron.core.transformer import multi_token_prediction

        class Stack(hybrid_block.HybridStack):
            pass

        original = hybrid_block.HybridStack
        source = inspect.getsource(multi_token_prediction.MultiTokenPredictionLayer.__init__)
        assert "from megatron.core.models.hybrid.hybrid_block import HybridStack" in source
        patch = applied(patches.mtp_stack(Stack))
        assert hybrid_block.HybridStack is Stack
        patch.revert()
        assert hybrid_block.HybridStack is original


class TestAdamResume:
    """Megatron's own methods on a distributed optimizer without processes: two parameters and torch's AdamW."""

    @pytest.fixture
    def make(self, monkeypatch):
        from megatron.core.optimizer import distrib_optimizer

        # As where neither Transformer Engine nor apex is installed.
        monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", False)

        def init_state(optimizer, config=None):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if not optimizer.state[p]:
                        optimizer.state[p]["exp_avg"] = torch.zeros_like(p)
                        optimizer.state[p]["exp_avg_sq"] = torch.zeros_like(p)

        def build(kind=torch.optim.AdamW):
            parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
            distributed = object.__new__(distrib_optimizer.DistributedOptimizer)
            distributed.optimizer = kind(parameters, lr=0.5)
            distributed.init_state_fn = init_state
            distributed.grad_scaler = None
            distributed.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
            distributed.config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False, fp16=False)
            distributed.model_param_group_index_map = {p: (0, i) for i, p in enumerate(parameters)}
            return distributed

        return build

    @staticmethod
    def step(distributed, count):
        for _ in range(count):
            for p in distributed.optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            distributed.optimizer.step()

    @staticmethod
    def steps(distributed):
        return [state["step"].item() for state in distributed.optimizer.state.values()]

    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
    def test_a_fresh_optimizer_can_be_described(self, applied, make, kind):
        distributed = make(kind)
        with pytest.raises(AssertionError):
            distributed.state_dict()
        applied(patches.adam_resume)
        described = make(kind).state_dict()
        assert described["optimizer"]["param_groups"][0]["step"] == 0
        assert described["optimizer"]["param_groups"][0]["lr"] == 0.5

    def test_a_trained_one_keeps_its_steps(self, applied, make):
        applied(patches.adam_resume)
        distributed = make()
        self.step(distributed, 3)
        assert distributed.state_dict()["optimizer"]["param_groups"][0]["step"] == 3
        assert self.steps(distributed) == [3, 3]

    @pytest.mark.parametrize("patched", [False, True])
    def test_steps_are_counted_once_each_after_loading(self, applied, make, patched):
        saved = make()
        self.step(saved, 5)
        state = saved.state_dict()
        loaded = make()
        self.step(loaded, 1)
        if patched:
            applied(patches.adam_resume)
        loaded.load_state_dict(state)
        assert self.steps(loaded) == [5, 5]
        self.step(loaded, 2)
        # Unpatched, one shared tensor counts both parameters; when that changes, the patch can go.
        assert self.steps(loaded) == ([7, 7] if patched else [9, 9])

    @pytest.mark.parametrize("patched", [False, True])
    def test_learning_rates_of_this_run_count(self, applied, make, patched):
        saved, loaded = make(), make()
        self.step(saved, 2)
        self.step(loaded, 1)
        saved.optimizer.param_groups[0].update(max_lr=0.5, min_lr=0.1)
        loaded.optimizer.param_groups[0].update(max_lr=0.25, min_lr=0.05)
        state = saved.state_dict()
        if not patched:
            with pytest.raises(KeyError):  # when this is no longer so, the patch can go
                loaded.load_state_dict(state)
            return
        applied(patches.adam_resume)
        loaded.load_state_dict(state)
        (group,) = loaded.optimizer.param_groups
        assert (group["max_lr"], group["min_lr"]) == (0.25, 0.05)
        assert self.steps(loaded) == [2, 2]

    def test_options_that_another_adam_did_not_save_stay(self, applied, make):
        applied(patches.adam_resume)
        saved, loaded = make(), make()
        self.step(saved, 2)
        self.step(loaded, 1)
        state = saved.state_dict()
        del state["optimizer"]["param_groups"][0]["foreach"]
        loaded.optimizer.param_groups[0]["bias_correction"] = True
        loaded.load_state_dict(state)
        (group,) = loaded.optimizer.param_groups
        assert group["bias_correction"] is True and group["foreach"] is None
        self.step(loaded, 1)

    def test_groups_that_only_their_rates_tell_apart_keep_theirs(self, applied):
        from megatron_carve.patches.adam_resume import _complete_groups

        current = [{"wd_mult": 1.0, "max_lr": 1.0, "new": 1}, {"wd_mult": 1.0, "max_lr": 2.0, "new": 1}]
        saved = [{"wd_mult": 1.0, "max_lr": 2.0}, {"wd_mult": 0.0, "max_lr": 3.0}]
        _complete_groups(saved, current)
        assert saved == [{"wd_mult": 1.0, "max_lr": 2.0, "new": 1}, {"wd_mult": 0.0, "max_lr": 3.0}]

    @pytest.mark.parametrize("patched", [False, True])
    def test_a_step_is_a_whole_number(self, applied, make, patched):
        if patched:
            applied(patches.adam_resume)
        saved, loaded = make(), make()
        self.step(saved, 2)
        self.step(loaded, 1)
        state = saved.state_dict()
        assert type(state["optimizer"]["param_groups"][0]["step"]) is float
        loaded.load_state_dict(state)
        # Unpatched it is what torch's Adam saved; a fused one's kernel takes no float.
        assert type(loaded.optimizer.param_groups[0]["step"]) is (int if patched else float)

    def test_parameters_load_without_a_step(self, applied, make):
        distributed = make()
        self.step(distributed, 4)
        parameter = distributed.optimizer.param_groups[0]["params"][1]
        tensors = {
            name: torch.full((2,), value) for name, value in (("param", 2.0), ("exp_avg", 3.0), ("exp_avg_sq", 4.0))
        }
        with torch.no_grad():
            with pytest.raises(KeyError, match="step"):
                distributed._set_main_param_and_optimizer_states(parameter, tensors)
            applied(patches.adam_resume)
            distributed._set_main_param_and_optimizer_states(parameter, tensors)
        state = distributed.optimizer.state[parameter]
        assert parameter.tolist() == [2, 2]
        assert (state["exp_avg"].tolist(), state["exp_avg_sq"].tolist()) == ([3, 3], [4, 4])
        assert state["step"] == 4
        assert set(tensors) == {"param", "exp_avg", "exp_avg_sq"}

    def test_other_optimizers_are_left_alone(self, applied, make):
        applied(patches.adam_resume)
        distributed = make(torch.optim.RAdam)
        with pytest.raises(AssertionError):
            distributed.state_dict()
        assert distributed.optimizer.state == {}


class TestMixedPrecisionGroups:
    """Megatron's own two steps: one says where a parameter is in its group, the other fills the group."""

    DTYPES = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float16)

    def build(self):
        """Where each of ten parameters of two groups is said to be, and the groups that the optimizer gets.

        A parameter is told by its number of elements.
        """
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range

        names = {torch.bfloat16: "BFloat16", torch.float16: "Half", torch.float32: "Float"}
        parameters = [torch.nn.Parameter(torch.ones(n + 1, dtype=self.DTYPES[n % 5])) for n in range(10)]
        for p in parameters:
            p.type = lambda p=p: f"torch.cuda.{names[p.dtype]}Tensor"  # what Megatron asks for on a GPU
        groups = [{"params": parameters[:5]}, {"params": parameters[5:]}]
        buckets = [{"param_map": {p: {"param": Range(0, p.numel())} for p in parameters}}]
        positions, ranges = DistributedOptimizer._build_optimizer_group_ranges(groups, [{"any": buckets}])
        DistributedOptimizer._build_model_and_main_param_groups(
            [{"any": buckets}], dict.fromkeys(parameters, (0, "any", 0)), ranges,
            SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False, fp8_recipe="delayed"),
        )  # fmt: skip
        sizes = [[p.numel() for p in group["params"]] for group in groups]
        return {p.numel(): place for p, place in positions.items()}, sizes

    @pytest.mark.parametrize("patched", [False, True])
    def test_a_parameter_is_where_it_is_said_to_be(self, applied, patched):
        if patched:
            applied(patches.mixed_precision_groups)
        positions, groups = self.build()
        # Within a group those in float32 come first.
        assert groups == [[2, 4, 1, 3, 5], [7, 9, 6, 8, 10]]
        found = {size: groups[group][order] for size, (group, order) in positions.items()}
        # Unpatched, states go to other parameters; when that changes, the patch can go.
        assert (found == {size: size for size in range(1, 11)}) is patched


class TestTrainingEvents:
    @pytest.fixture
    def loop(self, monkeypatch, applied):
        """(megatron.training.training with recorders for its log and evaluation, what was called)."""
        from megatron.training import training

        calls = []
        listener = SimpleNamespace(
            on_step=lambda *values: calls.append(("on_step", *values)),
            on_evaluation=lambda losses: calls.append(("on_evaluation", losses)),
        )
        monkeypatch.setattr(
            training, "training_log", lambda *args, **kwargs: calls.append(("log", args, kwargs)) or "report"
        )

        def evaluate(*args, **kwargs):
            calls.append(("evaluate", args, kwargs))
            return {"lm loss": 2.5}, "collected", kwargs.get("verbose") == "timed out"

        monkeypatch.setattr(training, "evaluate", evaluate)
        applied(patches.training_events(listener))
        return training, calls

    def test_steps(self, loop):
        training, calls = loop
        losses, totals = {"lm loss": 3.0}, {}
        given = (losses, totals, 1e-3, 17, 1.0, True, 0, 0.25)
        assert training.training_log(*given, "params norm", 0, None, is_first_iteration=True) == "report"
        assert calls == [
            ("on_step", 17, losses, 1e-3, 0.25),
            ("log", (*given, "params norm", 0, None), {"is_first_iteration": True}),
        ]
        assert calls[0][2] is losses

    def test_evaluations(self, loop):
        training, calls = loop
        result = training.evaluate("forward", None, verbose=True)
        assert result == ({"lm loss": 2.5}, "collected", False)
        assert calls == [("evaluate", ("forward", None), {"verbose": True}), ("on_evaluation", {"lm loss": 2.5})]

    def test_an_evaluation_that_ran_out_of_time_is_no_event(self, loop):
        training, calls = loop
        assert training.evaluate("forward", verbose="timed out")[2] is True
        assert [name for name, *_ in calls] == ["evaluate"]

    def test_megatron_still_passes_what_the_patch_names(self):
        from megatron.training import training

        names = list(inspect.signature(training.training_log).parameters)
        assert names[:8] == [
            "loss_dict", "total_loss_dict", "learning_rate", "iteration", "loss_scale", "report_memory_flag",
            "skipped_iter", "grad_norm",
        ]  # fmt: skip


CPU_MODE = """
import json, os, sys, types
import torch
from torch.overrides import _get_current_function_mode_stack
from megatron_carve import patches

def torch_cuda():
    places = {"": torch.cuda, "random.": torch.cuda.random, "nvtx.": torch.cuda.nvtx}
    return {p + name: value for p, module in places.items() for name, value in vars(module).items()}

def cuda_tensor():
    try:
        return torch.zeros(1, device="cuda").device.type
    except (RuntimeError, AssertionError):
        return "refused"

facts = {}
here = torch.cuda.is_available()
before, modes = torch_cuda(), len(_get_current_function_mode_stack())

# Refused where a library that Megatron would use is loaded already; nothing has happened then.
sys.modules["transformer_engine"] = loaded = types.ModuleType("transformer_engine")
try:
    patches.cpu_mode.apply()
except RuntimeError as error:
    facts["refused"] = str(error)
facts["kept_library"] = sys.modules.pop("transformer_engine") is loaded
facts["refused_changes"] = [n for n, v in torch_cuda().items() if before.get(n) is not v]
facts["refused_modes"] = len(_get_current_function_mode_stack()) - modes

sys.modules["apex"] = types.ModuleType("apex")
try:
    patches.cpu_mode.apply()
except RuntimeError as error:
    facts["refused_apex"] = str(error)
del sys.modules["apex"]
facts["left_by_apex"] = "transformer_engine" in sys.modules
sys.modules.pop("transformer_engine", None)

patches.cpu_mode.apply()
x = torch.ones(2)
facts["devices"] = {
    "zeros": str(torch.zeros(1, device="cuda").device),
    "numbered": str(torch.zeros(1, device="cuda:3").device),
    "device object": str(torch.ones(1, device=torch.device("cuda", 0)).device),
    "index": str(torch.full((2,), 1.0, device=0).device),
    "current": str(torch.empty(2, device=torch.cuda.current_device()).device),
    "from data": str(torch.tensor([1.0], device="cuda").device),
    "like": str(torch.zeros_like(x, device="cuda").device),
    "to": str(x.to("cuda").device),
    "to by keyword": str(x.to(device="cuda", dtype=torch.float64).device),
    "cuda": str(x.cuda().device),
    "pinned": str(torch.empty(2, pin_memory=True).device),
    "pin_memory": str(x.pin_memory().device),
    "none": str(torch.zeros(1).device),
    "meta": str(torch.zeros(1, device="meta").device),
    "module": str(torch.nn.Linear(2, 2, device="cuda").cuda().weight.device),
}
double = torch.zeros(1, dtype=torch.float64)
facts["values"] = [
    x.cuda() is x, x.to("cuda", torch.float64).dtype == torch.float64, x.to(torch.int32).dtype == torch.int32,
    x.to(double).dtype == torch.float64, torch.full((2,), 7, device="cuda").tolist() == [7, 7],
]
facts["type"] = [x.type(), x.bfloat16().type(), x.type(torch.float64).dtype == torch.float64]
c = torch.cuda
facts["answers"] = [
    c.is_available(), c.device_count(), c.get_device_properties(0).major, list(c.get_device_capability()),
    c.get_device_name(), c.memory_allocated(), c.max_memory_reserved(), list(c.mem_get_info()),
    c.memory_stats()["anything"], c.synchronize(), c.set_device(0), c.empty_cache(), c.is_current_stream_capturing(),
    c.current_stream().query(), c.Event(enable_timing=True).elapsed_time(c.Event()), c.nvtx.range_push("x"),
    c.nvtx.range_pop(),
]
with c.stream(c.Stream()), c.device(0), c.Stream() as stream:
    stream.wait_stream(c.current_stream())
    stream.record_event().wait()

torch.manual_seed(5)
expected = torch.rand(3)
draws = []
for seed in (c.manual_seed, c.manual_seed_all):
    seed(5)
    draws.append(torch.equal(torch.rand(3), expected))
state = c.get_rng_state()
drawn = torch.rand(3)
c.set_rng_state(state)
draws.append(torch.equal(torch.rand(3), drawn))
from megatron.core.tensor_parallel import random
random._set_cuda_rng_state(state)
draws.append(torch.equal(torch.rand(3), drawn))
c.set_rng_state(state)
draws.append(torch.equal(random._get_cuda_rng_state(), state))
facts["draws"] = draws

for library in ("transformer_engine", "apex"):
    try:
        __import__(library)
        facts[library] = "imported"
    except ImportError:
        facts[library] = "refused"
from megatron.training import training
facts["initialize"] = training.initialize_megatron.keywords
patched = training.initialize_megatron
patches.cpu_mode.apply()
facts["once"] = training.initialize_megatron is patched

patches.cpu_mode.revert()
facts["left"] = [n for n, v in before.items() if torch_cuda().get(n) is not v]
facts["added"] = [n for n, v in torch_cuda().items() if n not in before and not isinstance(v, types.ModuleType)]
facts["available_again"] = torch.cuda.is_available() == here
facts["modes"] = len(_get_current_function_mode_stack()) - modes
facts["libraries"] = [name in sys.modules for name in ("transformer_engine", "apex")]
facts["cuda_again"] = cuda_tensor() == ("cuda" if here else "refused")
facts["type_again"] = x.type()
facts["initialize_again"] = training.initialize_megatron.__name__
print(json.dumps(facts))
"""


class TestCpuMode:
    @pytest.fixture(scope="class")
    def facts(self):
        """What a process of its own saw before, under and after the CPU mode."""
        run = subprocess.run(
            [sys.executable, "-c", CPU_MODE], capture_output=True, text=True, timeout=300,
            env={**os.environ, "LOCAL_WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        return json.loads(run.stdout.splitlines()[-1])

    def test_tensors_land_on_the_cpu(self, facts):
        elsewhere = {name: device for name, device in facts["devices"].items() if device != "cpu"}
        assert elsewhere == {"meta": "meta"}
        assert len(facts["devices"]) == 15
        assert facts["values"] == [True] * 5

    def test_types_are_named_as_megatrons_optimizers_expect(self, facts):
        assert facts["type"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", True]

    def test_torch_cuda_answers(self, facts):
        assert facts["answers"] == [
            False, 3, 0, [0, 0], "cpu", 0, 0, [0, 0], 0, None, None, None, False, True, 0.0, 0, 0
        ]  # fmt: skip

    def test_there_is_one_random_state(self, facts):
        assert facts["draws"] == [True] * 5

    def test_megatron_starts_without_a_gpu_and_without_gpu_libraries(self, facts):
        assert facts["initialize"] == {"allow_no_cuda": True}
        assert (facts["transformer_engine"], facts["apex"]) == ("refused", "refused")
        assert facts["once"]

    def test_comes_off_without_a_trace(self, facts):
        assert facts["left"] == []
        assert facts["added"] == []
        assert facts["available_again"]
        assert facts["modes"] == 0
        assert facts["libraries"] == [False, False]
        assert facts["cuda_again"]
        assert facts["type_again"] == "torch.FloatTensor"
        assert facts["initialize_again"] == "initialize_megatron"

    def test_too_late_after_transformer_engine(self, facts):
        assert facts["refused"] == "patch cpu_mode: must be applied before transformer_engine is imported"
        assert facts["kept_library"]
        assert facts["refused_changes"] == []
        assert facts["refused_modes"] == 0

    def test_too_late_after_apex(self, facts):
        assert facts["refused_apex"] == "patch cpu_mode: must be applied before apex is imported"

    def test_a_refusal_blocks_no_library(self, facts):
        assert facts["left_by_apex"] is False
