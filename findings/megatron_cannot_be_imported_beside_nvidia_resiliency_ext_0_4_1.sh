#!/bin/sh
# megatron-core 0.19.2 with nvidia-resiliency-ext 0.4.1, an optional package of its checkpoints: importing
# megatron.core.dist_checkpointing ends in AttributeError, since that release of the other has no __version__, which is
# asked for as soon as the package can be imported. pip takes 0.4.1, the newest one built for manylinux_2_31, by itself
# where the C library is older than 2.39 (Debian 12, Ubuntu 22.04): whatever depends on it, as Megatron-Bridge does, then
# breaks Megatron. With 0.3.0 it works.
#
# Expected: the import succeeds, or says that the version is not one that it takes.
# Seen:     module 'nvidia_resiliency_ext' has no attribute '__version__'
# Takes a Python of 3.12 or later (PYTHON=...) and some GB, of torch.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
cat > "$folder/try.py" <<'PY'
import sys
from importlib.metadata import version

try:
    import megatron.core.dist_checkpointing  # noqa: F401

    seen = "imported"
except AttributeError as error:
    seen = str(error)
print(f"megatron-core {version('megatron-core')}, nvidia-resiliency-ext {version('nvidia-resiliency-ext')}: {seen}")
expected = {"0.3.0": "imported", "0.4.1": "module 'nvidia_resiliency_ext' has no attribute '__version__'"}
sys.exit(seen != expected[version("nvidia-resiliency-ext")])
PY
for version in 0.3.0 0.4.1; do
    "$folder/venv/bin/pip" install --quiet megatron-core==0.19.2 torch==2.14.1 numpy==2.5.5 \
        "nvidia-resiliency-ext==$version"
    if ! "$folder/venv/bin/python" "$folder/try.py" 2>"$folder/errors"; then
        cat "$folder/errors"
        echo "changed: see above"
        exit 1
    fi
done
echo "as described"
