#!/bin/sh
# megatron-core 0.19.2: GPTDataset with inter_document_masking=True (--dataloader-inter-document-masking) says where a
# sample's documents begin, so that attention stays inside each, and counts positions anew; but the last token of a
# document keeps its full weight in the loss, with the first token of the next document as its label, of which a model that
# keeps documents apart can see nothing. In a packed batch of short documents that is one label of each, noise. Without a
# word; eod_mask_loss=True, a flag of its own, takes the weight away.
#
# Expected: no loss for what stands in another document, or a word about the other flag.
# Seen:     labels [41, 42, 9, 30, 31, 32, 9, 10], loss_mask [1, 1, 1, 1, 1, 1, 1, 1], documents begin at 0 and 4
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

END = 9
prefix = os.path.join(tempfile.mkdtemp(), "numbers")
builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.int32)
for first in (10, 20, 30, 40):
    builder.add_document(torch.tensor([first, first + 1, first + 2, END]), [4])
builder.finalize(prefix + ".idx")
tokenizer = SimpleNamespace(eod=END, pad=-1, vocab_size=50, unique_identifiers={"class": "none"})
config = GPTDatasetConfig(
    random_seed=1, sequence_length=8, blend=([prefix], None), split="1,0,0", tokenizer=tokenizer,
    reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    inter_document_masking=True,
)
train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [1, 0, 0], lambda: True, config).build()
sample = train[0]
starts = [int(i) for i in sample["cu_seqlens"] if 0 < i < 8]
print("megatron-core", version("megatron-core"))
for name in ("tokens", "labels", "position_ids", "loss_mask"):
    print(f"{name:12}", [int(x) for x in sample[name]])
print("documents begin at 0 and", starts)
learnt = [(int(sample["tokens"][i - 1]), int(sample["labels"][i - 1]), int(sample["loss_mask"][i - 1])) for i in starts]
print("before each later one: (token, label, weight in the loss)", learnt)
sys.exit(not (learnt and all(token == END and label >= 10 and weight == 1 for token, label, weight in learnt)))
PY
if "$folder/venv/bin/python" "$folder/try.py" 2>"$folder/errors"; then
    echo "as described"
else
    cat "$folder/errors"
    echo "changed: see above"
    exit 1
fi
