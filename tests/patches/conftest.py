"""Patches for one test, and versions of Megatron-Core that are pretended."""

import importlib.metadata

import pytest
from support.patches import real_patches


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
