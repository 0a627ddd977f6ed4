"""Megatron-Bridge in this process, on the CPU, and runs that it has trained."""

from pathlib import Path

import pytest
from support.bridge import INSTALLED, pretrain, recipe_file


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session", autouse=True)
def bridge():
    if not INSTALLED:
        pytest.skip("megatron-bridge is not installed here; make test-bridge makes an environment that has it")
    from megatron_carve.bridge import prepare
    from megatron_carve.run.session import session

    with session():
        prepare("cpu")
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridge")
    recipe_file(folder)
    return folder


@pytest.fixture(scope="session")
def text_run(folder):
    """A run of two steps on a text, that Megatron-Bridge has trained."""
    from megatron_carve.bridge.recipes import pretrain_config

    pretrain(
        pretrain_config(
            str(folder / "tiny.yaml"), "training.steps=2", f"data.text={folder / 'cats.txt'}", "run.name=text",
            f"run.folder={folder / 'runs'}",
        )
    )  # fmt: skip
    return folder / "runs" / "text"
