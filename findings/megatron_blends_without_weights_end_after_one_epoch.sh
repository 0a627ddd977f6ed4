#!/bin/sh
# megatron-core 0.19.2: a blend of several datasets without weights is as long as one epoch of them, however many samples
# BlendedMegatronDatasetBuilder is asked for; one dataset alone, or the same blend with weights, is repeated until they are
# enough. Without a word: a training run of more steps finds the end of its data in the middle (--data-path a b, which
# gives a blend without weights, where --data-path 1 a 1 b gives one with).
#
# Expected: 1000 samples or more of each, as were asked for.
# Seen:     one dataset gives 1099, two with weights 1000, the same two without weights 198
# Takes a Python of 3.12 or later (PYTHON=...) and some GB, of torch.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet megatron-core==0.19.2 torch==2.14.1 numpy==2.5.5
cat > "$folder/try.py" <<'PY'
import os
import sys
import tempfile
from importlib.metadata import version
from types import SimpleNamespace

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

folder = tempfile.mkdtemp()
prefixes = [os.path.join(folder, name) for name in ("one", "two")]
for prefix in prefixes:
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.int32)
    for _ in range(10):
        builder.add_document(torch.arange(80), [80])
    builder.finalize(prefix + ".idx")
tokenizer = SimpleNamespace(eod=99, pad=-1, vocab_size=100, unique_identifiers={"class": "none"})


def samples(prefixes, weights):
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=8, blend=(prefixes, weights), split="1,0,0", tokenizer=tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )
    return len(BlendedMegatronDatasetBuilder(GPTDataset, [1000, 0, 0], lambda: True, config).build()[0])


found = [samples(prefixes[:1], None), samples(prefixes, [1.0, 1.0]), samples(prefixes, None)]
print(f"megatron-core {version('megatron-core')}: of 1000 samples asked for, one dataset gives {found[0]}, two with "
      f"weights {found[1]}, the same two without weights {found[2]}")
sys.exit(not (found[0] >= 1000 and found[1] >= 1000 and found[2] < 250))
PY
if "$folder/venv/bin/python" "$folder/try.py" 2>"$folder/errors"; then
    echo "as described"
else
    cat "$folder/errors"
    echo "changed: see above"
    exit 1
fi
