"""The environment of a program's processes."""

import os

import pytest

from megatron_carve.recipe import load_recipe
from megatron_carve.run.launch import set_connections

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["parallel.tensor=2"], "1"),
        (["parallel.context=2"], "1"),
        (["parallel.tensor=2", "megatron.use_megatron_fsdp=true"], None),
        (["megatron.use_torch_fsdp2=true"], None),
    ],
    ids=str,
)
def test_one_queue_to_the_gpu_where_megatron_insists(monkeypatch, words, expected):
    monkeypatch.setenv(VARIABLE, "to be restored")
    monkeypatch.delenv(VARIABLE)
    set_connections(load_recipe("debug", words))
    assert os.environ.get(VARIABLE) == expected


def test_what_the_user_says_stays(monkeypatch):
    monkeypatch.setenv(VARIABLE, "8")
    set_connections(load_recipe("debug", ["parallel.tensor=2"]))
    assert os.environ[VARIABLE] == "8"
