#!/bin/sh
# safetensors 0.8.0: save and save_file write the header's metadata in an order of chance, anew at every call. The same
# tensors with the same metadata of two keys or more ({"format": "pt", "author": ...}) are files of different bytes, so
# that their hashes, and whatever is kept by content, differ from one export of a model to the next. Tensors have an
# order; with one key of metadata, as transformers writes, nothing is seen.
#
# Expected: one file from twenty calls.
# Seen:     two files, {"format":...,"author":...} and {"author":...,"format":...}
# Takes a Python of 3.12 or later (PYTHON=...).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.5.5
if "$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import numpy
from safetensors.numpy import save

tensors = {"b": numpy.ones(2, numpy.float32), "a": numpy.zeros(3, numpy.float32)}
files = {}
for metadata in ({"format": "np"}, {"format": "np", "author": "nobody"}):
    files[len(metadata)] = {save(tensors, metadata) for _ in range(20)}
    print(f"safetensors {version('safetensors')}, {len(metadata)} keys of metadata: {len(files[len(metadata)])} files")
    for content in sorted(files[len(metadata)]):
        print("   ", content[8:64].decode())
sys.exit([len(found) for found in files.values()] != [1, 2])
PY
then
    echo "as described"
else
    echo "changed: see above"
    exit 1
fi
