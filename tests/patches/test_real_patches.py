"""What every patch of Megatron-Core keeps, and what the short ones do."""

import importlib.metadata
import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.patches import real_patches, refusal

from megatron_carve import patches


class TestRealPatches:
    def test_all_are_here(self):
        functions = {"applied_patches", "cpu_mode_in_this_thread", "read_index"}
        exported = {name for name in patches.__all__ if name.islower()} - functions
        assert set(real_patches()) == exported

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

    @pytest.mark.parametrize("patched", [False, True])
    def test_the_precision_aware_optimizer_saves_what_it_trained(self, applied, patched):
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        if patched:
            applied(patches.mixed_precision_groups)
        parameters = [torch.nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
        copies = {p: {"master_param": torch.full((2,), 3.0), "exp_avg": torch.zeros(2)} for p in parameters}
        optimizer = object.__new__(DistributedOptimizer)
        optimizer.optimizer = SimpleNamespace(
            param_groups=[{"params": parameters}], state=copies, get_unscaled_state=lambda p, name: copies[p][name]
        )
        optimizer.model_param_group_index_map = {p: (0, i) for i, p in enumerate(parameters)}
        optimizer.config = SimpleNamespace(
            use_precision_aware_optimizer_no_fp8_or_ds_fp8=True, optimizer_cpu_offload=False
        )
        found = [optimizer._get_main_param_and_optimizer_states(p)["param"].tolist() for p in parameters]
        # Transformer Engine's Adam leaves the copy of a float32 parameter as it began.
        assert found == [[1.0, 1.0] if patched else [3.0, 3.0], [3.0, 3.0]]
