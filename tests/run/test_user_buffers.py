"""Transformer Engine's user buffers for tp_comm_overlap: what Megatron makes them of, who takes them, when they go."""

import argparse
import contextlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.training import initialize
from megatron.training.arguments import add_megatron_arguments
from support.models import config, groups, one_process

from megatron_carve.model.mixers.base import MixerSubmodules
from megatron_carve.recipe import load_recipe
from megatron_carve.recipe.arguments import default_settings, megatron_argv, owned_settings
from megatron_carve.run import pretraining
from megatron_carve.specs import MIXERS

OVERLAPPED = ("parallel.tensor=2", "training.precision=bf16", "megatron.tp_comm_overlap=true")


@pytest.fixture
def events(monkeypatch):
    """What was asked of a stand-in for Transformer Engine, in order."""
    asked = []
    base = SimpleNamespace(
        initialize_ub=lambda **options: asked.append(options), UserBufferQuantizationMode=SimpleNamespace(FP8=8, NONE=0)
    )
    engine, of_torch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    of_torch.module = SimpleNamespace(base=base)
    of_torch.destroy_ub = lambda: asked.append("freed")
    monkeypatch.setitem(sys.modules, "transformer_engine", engine)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", of_torch)
    return asked


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"shape": [4 * 128, 128], "tp_size": 2, "bootstrap_backend": "nccl"}),
        (["parallel.context=2"], {"shape": [2 * 128, 128], "tp_size": 2, "bootstrap_backend": "nccl"}),
        (
            ["parallel.tensor=4", "megatron.tp_comm_bootstrap_backend=gloo"],
            {"shape": [4 * 128, 128], "tp_size": 4, "bootstrap_backend": "gloo"},
        ),
    ],
    ids=str,
)
def test_megatron_makes_them_of_a_micro_batch_of_hidden_states(events, monkeypatch, words, expected):
    recipe = load_recipe("debug", [*OVERLAPPED, "training.micro_batch_size=4", *words])
    where = {"layers": "transformer_engine", "device": "cuda"}
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    owned, defaults = owned_settings(recipe, vocab_size=64, **where), default_settings(recipe, **where)
    args = parser.parse_args(megatron_argv(parser, owned, defaults, recipe.megatron))
    assert args.tp_comm_overlap
    monkeypatch.setattr(initialize, "get_args", lambda: args)
    monkeypatch.setattr(initialize, "is_te_min_version", lambda _: True)
    initialize._initialize_tp_communicators()
    assert events == [{**expected, "quantization_modes": [0], "ub_cfgs": {}}]


@pytest.mark.parametrize("kind", MIXERS)
def test_projections_of_a_mixer_take_those_of_an_mlp(kind):
    """Which carry hidden states: what is gathered for the first projection, and what comes of the last."""
    made = {}

    class Column(ColumnParallelLinear):
        def __init__(self, inputs, outputs, *, tp_comm_buffer_name, **options):
            made[tp_comm_buffer_name] = inputs
            super().__init__(inputs, outputs, **options)

    class Row(RowParallelLinear):
        def __init__(self, inputs, outputs, *, tp_comm_buffer_name, **options):
            made[tp_comm_buffer_name] = outputs
            super().__init__(inputs, outputs, **options)

    with one_process():
        of_mixer = config(mixer={"erase": "delta"} if kind == "carve" else {})
        MIXERS[kind](of_mixer, MixerSubmodules(in_proj=Column, out_proj=Row), 1, pg_collection=groups())
    assert made == {"fc1": 32, "fc2": 32}


def failing(error):
    def query():
        raise error

    return query


@pytest.mark.parametrize(
    ("end", "query", "expected"),
    [
        (None, failing(AssertionError("not asked")), ["trained", "freed"]),
        (SystemExit(), failing(AssertionError("not asked")), ["trained", "freed"]),  # it was asked to stop
        (FloatingPointError(), lambda: True, ["trained", "recorded", "freed"]),
        (FloatingPointError(), lambda: False, ["trained", "recorded"]),
        (OSError(), failing(torch.AcceleratorError("an illegal memory access")), ["trained", "recorded"]),
    ],
    ids=["finished", "stopped", "failed", "failed while the GPU works", "CUDA is broken"],
)
def test_they_go_when_training_ends_and_wait_for_nobody_if_it_fails(monkeypatch, events, end, query, expected):
    def train(*_):
        events.append("trained")
        if end is not None:
            raise end

    plan = SimpleNamespace(recipe=load_recipe("debug", [*OVERLAPPED, "run.megatron_output=console"]), rank=0)
    errors = SimpleNamespace(initialize=lambda: None, record_exception=lambda _: events.append("recorded"))
    monkeypatch.setattr(pretraining, "_pretrain", train)
    monkeypatch.setattr(pretraining, "get_error_handler", lambda: errors)
    monkeypatch.setattr(pretraining, "_ends_itself", lambda: False)
    monkeypatch.setattr(pretraining, "_where_it_stands", lambda *_: "stopped")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(query=query))
    with contextlib.nullcontext() if end is None else pytest.raises(type(end)):
        pretraining.pretrain(plan, None)
    assert events == expected
