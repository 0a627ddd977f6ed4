#!/bin/sh
# tokenizers 0.23.3: encode_special_tokens, which makes the spelling of a special token in a text ordinary tokens, is
# neither pickled, nor copied by copy.deepcopy, nor part of to_str, although truncation and padding are. So processes that
# get a tokenizer by pickle, as multiprocessing sends it, give other ids than the one that sent it, without a word: a
# prepared text depends on the number of workers wherever it spells a special token.
#
# Expected: the ids of the copies are those of the original, [0, 1, 2, 3, 4].
# Seen:     [0, 6], the special token's id; the attribute is False again
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/copies.py" <<'PY'
import copy
import pickle
import sys

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

original = Tokenizer(models.WordLevel({"a": 0, "<": 1, "/": 2, "s": 3, ">": 4, "?": 5}, unk_token="?"))
original.pre_tokenizer = pre_tokenizers.Split("", "isolated")
original.add_special_tokens(["</s>"])
original.encode_special_tokens = True
original.enable_truncation(100)
copies = {
    "pickled": pickle.loads(pickle.dumps(original)),
    "copied": copy.deepcopy(original),
    "by to_str": Tokenizer.from_str(original.to_str()),
}
wanted = original.encode("a</s>").ids
found = {way: other.encode("a</s>").ids for way, other in copies.items()}
print(f"tokenizers {tokenizers.__version__}: original {wanted}, copies {found}")
forgotten = all(ids == [0, 6] and not copies[way].encode_special_tokens for way, ids in found.items())
kept = all(other.truncation["max_length"] == 100 for other in copies.values())
sys.exit(not (wanted == [0, 1, 2, 3, 4] and forgotten and kept))
PY
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
if "$folder/venv/bin/python" "$folder/copies.py"; then
    echo "as described"
else
    echo "changed: see above"
    exit 1
fi
