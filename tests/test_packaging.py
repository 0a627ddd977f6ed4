"""What is shipped, and how a machine without a fitting Python is told."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves its working folders beside the sources.
    subprocess.run(["git", "-C", str(ROOT), "checkout-index", "-a", "-f", f"--prefix={folder}/source/"], check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(folder / "source")],
        check=True, capture_output=True,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_the_packages_under_one_name(wheel):
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    # Never a top-level `kernels`, which another project owns and transformers looks for; no tests.
    assert {top for top in tops if not top.endswith(".dist-info")} == {"megatron_carve"}
    for name in (
        "kernels/torch_backend/reference.py",
        "model/mixers/carve.py",
        "patches/cpu_mode.py",
        "recipes/debug.yaml",
        "serving/page.html",
        "recipes/carve_1p3b_hybrid.yaml",
        "py.typed",
    ):
        assert f"megatron_carve/{name}" in names


def test_every_source_file_is_in_the_wheel(wheel):
    shipped = {"megatron_carve": "megatron_carve", "kernels": "megatron_carve/kernels",
               "patches": "megatron_carve/patches", "recipes": "megatron_carve/recipes"}  # fmt: skip
    names = set(wheel.namelist())
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True)
    for file in map(Path, listed.stdout.splitlines()):
        if file.parts[0] in shipped and file.suffix in (".py", ".yaml"):
            assert str(Path(shipped[file.parts[0]], *file.parts[1:])) in names


def test_wheel_declares_what_it_needs(wheel):
    (metadata,) = (n for n in wheel.namelist() if n.endswith("METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    needs = [line for line in lines if line.startswith("Requires-Dist")]
    assert "Requires-Python: >=3.12" in lines
    assert any(line.startswith("Requires-Dist: megatron-core<0.20,>=0.19") for line in needs)
    assert not any("apex" in line or "transformer-engine" in line for line in needs)


def test_an_old_python_is_named_with_the_remedy(tmp_path):
    for name in ("python3", "python"):
        fake = tmp_path / name
        fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1"\nexit 1\n')
        fake.chmod(0o755)
    run = subprocess.run(
        ["/bin/sh", str(ROOT / ".ci" / "find-python")], capture_output=True, text=True,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 1
    assert "Python 3.12 or newer is needed, found Python 3.9.1" in run.stderr
    assert "make PYTHON=" in run.stderr


def test_a_fitting_python_is_found_by_name(tmp_path):
    run = subprocess.run(
        ["/bin/sh", str(ROOT / ".ci" / "find-python")], capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert run.stdout.strip() == sys.executable
