#!/bin/sh
# megatron-core 0.19.2: of the questions is_..._min_version in megatron.core.utils, those for Transformer Engine and
# FlashInfer say False where the package is not installed, those for flash-attn, mamba-ssm and causal-conv1d raise
# ModuleNotFoundError. All the packages are optional. Code that asks one of the latter to choose a kernel ends, where it
# would fall back if it asked one of the former.
#
# Expected: False for what is not installed, from all of them.
# Seen:     False, False, ModuleNotFoundError, ModuleNotFoundError, ModuleNotFoundError
# Takes a Python of 3.12 or later (PYTHON=...) and some GB, of torch.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet megatron-core==0.19.2 torch==2.14.1 numpy==2.5.5
if "$folder/venv/bin/python" - 2>"$folder/errors" <<'PY'
import sys
from importlib.metadata import version

from megatron.core import utils

found = {}
for package in ("te", "flashinfer", "fa", "mamba", "causal_conv1d"):
    try:
        found[package] = str(getattr(utils, f"is_{package}_min_version")("1.0"))
    except ImportError as error:
        found[package] = type(error).__name__
print(f"megatron-core {version('megatron-core')}: {found}")
sys.exit(list(found.values()) != ["False"] * 2 + ["ModuleNotFoundError"] * 3)
PY
then
    echo "as described"
else
    cat "$folder/errors"
    echo "changed: see above"
    exit 1
fi
