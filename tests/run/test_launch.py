"""The environment of a program's processes."""

import errno
import os
from threading import Thread

import pytest
from torch.distributed import HashStore

from megatron_carve.recipe import load_recipe
from megatron_carve.run import launch
from megatron_carve.run.launch import set_connections

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
USER_BUFFERS = ("UB_SKIPMC", "UB_TIMEOUT")
RECORD = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"


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


@pytest.mark.parametrize(
    ("words", "expected"), [([], (None, None)), (["megatron.tp_comm_overlap=true"], ("1", "86400"))], ids=str
)
def test_user_buffers_are_made_without_multicast_and_wait(monkeypatch, words, expected):
    for name in USER_BUFFERS:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    set_connections(load_recipe("debug", words))
    assert tuple(map(os.environ.get, USER_BUFFERS)) == expected


def test_a_process_whose_peer_is_gone_waits_for_seconds(monkeypatch):
    monkeypatch.setenv(RECORD, "to be restored")
    monkeypatch.delenv(RECORD)
    set_connections(load_recipe("debug", []))
    assert os.environ[RECORD] == "1250"


def test_what_the_user_says_stays(monkeypatch):
    says = {VARIABLE: "8", RECORD: "60000", **dict.fromkeys(USER_BUFFERS, "0")}
    for name, value in says.items():
        monkeypatch.setenv(name, value)
    set_connections(load_recipe("debug", ["parallel.tensor=2", "megatron.tp_comm_overlap=true"]))
    assert {name: os.environ[name] for name in says} == says


def test_a_process_alone_takes_a_free_port_and_keeps_it(monkeypatch):
    asked = []

    class Recorded(launch.TCPStore):
        def __init__(self, host, port, *args, **kwargs):
            asked.append(port)
            super().__init__(host, port, *args, **kwargs)

    monkeypatch.setattr(launch, "TCPStore", Recorded)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    stores = []
    for _ in range(2):
        for name in names:
            monkeypatch.setenv(name, "to be restored")
            monkeypatch.delenv(name)
        store, rank, processes = launch.join_processes()
        assert (rank, processes, os.environ["MASTER_PORT"]) == (0, 1, str(store.port))
        stores.append(store)
    # A number chosen beforehand may be another program's by the time that it is taken.
    assert asked == [0, 0]
    assert stores[0].port != stores[1].port
    assert launch.join_processes()[0].port == stores[1].port  # once more, by the environment


def test_what_one_process_cannot_read_ends_all_of_them_in_one_line():
    """Raised there alone, it would be said by nobody, as only the first process of a node speaks."""
    store, found = HashStore(), []

    def first():
        try:
            launch.on_every_process(store, 0, 2, "name", lambda: None)
        except ValueError as error:
            found.append(str(error))

    def unreadable():
        raise OSError(errno.EIO, "Input/output error", "a")

    thread = Thread(target=first, daemon=True)
    thread.start()
    with pytest.raises(ValueError, match="Input/output error: 'a'"):
        launch.on_every_process(store, 1, 2, "name", unreadable)
    thread.join(10)
    assert found == ["[Errno 5] Input/output error: 'a'"]
