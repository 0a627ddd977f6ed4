"""Checkpoints between one optimizer and two, with Megatron's own method on optimizers that keep what they are given."""

from types import SimpleNamespace

import pytest

from megatron_carve import patches


class Optimizer:
    """One of a chain, which has parameters or none."""

    is_stub_optimizer = False
    config = None

    def __init__(self, *, experts, parameters=("p",)):
        self.param_groups = [{"is_expert_parallel": experts, "params": list(parameters), "wd_mult": 1.0}]
        self.optimizer = SimpleNamespace(param_groups=self.param_groups)

    def load_state_dict(self, state):
        self.loaded = state

    def sharded_state_dict(self, *_, **__):
        count = {"step": 7} if self.param_groups[0]["params"] else {}
        return {"optimizer": {"param_groups": [{**self.param_groups[0], **count}]}, "param_state": {0: "its tensors"}}


@pytest.fixture
def chain(applied):
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    applied(patches.expert_optimizers)

    def make(*optimizers):
        return ChainedOptimizer(list(optimizers))

    return make


def saved(*, experts, step=5):
    groups = [{"is_expert_parallel": experts, "wd_mult": wd, "step": step} for wd in (0.0, 1.0)]
    return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}


def test_two_of_one(chain):
    rest, experts = Optimizer(experts=False), Optimizer(experts=True)
    chain(rest, experts).load_state_dict(
        {**saved(experts=False), 0: {"param_state": "of the rest"}, 1: {"param_state": "of experts"}}
    )
    assert rest.loaded == {**saved(experts=False), "param_state": "of the rest"}
    assert experts.loaded == {**saved(experts=True), "param_state": "of experts"}
    assert rest.loaded["optimizer"] is not experts.loaded["optimizer"]


def test_two_of_one_where_a_stage_has_no_experts(chain):
    rest, experts = Optimizer(experts=False), Optimizer(experts=True, parameters=())
    chain(rest, experts).load_state_dict({**saved(experts=False), 0: {"param_state": "of the rest"}})
    assert experts.loaded == saved(experts=True)


def test_one_of_two(chain):
    every = Optimizer(experts=False)
    chain(every).load_state_dict({0: saved(experts=False), 1: saved(experts=True), "param_state": "of all"})
    groups = every.loaded["optimizer"]["param_groups"]
    assert [(g["is_expert_parallel"], g["wd_mult"]) for g in groups] == [(False, 0.0), (False, 1.0)] * 2
    assert every.loaded["param_state"] == "of all"
    assert every.loaded["param_state_sharding_type"] == "fully_reshardable"


@pytest.mark.parametrize("experts", [[True], [False, True]])
def test_as_many_as_were_saved_get_what_was_saved(chain, experts):
    optimizers = [Optimizer(experts=e) for e in experts]
    states = {i: saved(experts=e) for i, e in enumerate(experts)}
    chain(*optimizers).load_state_dict(states if len(states) > 1 else states[0])
    assert [o.loaded for o in optimizers] == list(states.values())


def test_a_stage_without_experts_saves_the_steps_of_the_others(chain):
    state = chain(Optimizer(experts=False), Optimizer(experts=True, parameters=())).sharded_state_dict({})
    assert [state[i]["optimizer"]["param_groups"][0]["step"] for i in (0, 1)] == [7, 7]
