"""Checkpoints between kinds of Adam, with Megatron's own methods."""

from types import SimpleNamespace

import pytest
import torch

from megatron_carve import patches


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

    def test_one_without_parameters_can_be_described(self, applied, make):
        """As of experts in a pipeline stage that has none."""
        applied(patches.adam_resume)
        distributed = make()
        distributed.optimizer.param_groups[0]["params"] = []
        assert distributed.state_dict()["optimizer"]["param_groups"][0]["step"] == 0
        assert not distributed.optimizer.state

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

    @pytest.mark.parametrize("patched", [False, True])
    def test_so_they_do_where_the_optimizer_is_not_spread(self, applied, patched):
        from megatron.core.optimizer.optimizer import MegatronOptimizer

        saved, current = [{"max_lr": 0.5, "params": [0]}], [{"max_lr": 0.25, "params": [0]}]
        if not patched:
            with pytest.raises(ValueError, match="Could not find parameter group"):
                MegatronOptimizer._filter_and_reorder_param_groups(current, saved)
            return
        applied(patches.adam_resume)
        assert MegatronOptimizer._filter_and_reorder_param_groups(current, saved)[0]["max_lr"] == 0.25

    def test_what_megatron_fsdp_keeps_by_name_goes_on_unchanged(self, applied, make):
        applied(patches.adam_resume)
        saved, loaded = make(), make()
        self.step(saved, 3)
        loaded.ddp_config = SimpleNamespace(use_megatron_fsdp=True)
        loaded.load_state_dict(saved.optimizer.state_dict())
        assert self.steps(loaded) == [3, 3]

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
