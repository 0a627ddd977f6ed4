#!/bin/sh
# tokenizers 0.23.3 writes the scores of a Unigram model as JSON to the last bit and reads some of them back one bit off:
# through to_str and from_str, and so by pickle and by a saved file. Where two ways to divide a word have sums of scores
# that are equal but for rounding, a copy may choose the other one. A second trip changes nothing more in what was seen,
# so it shows where scores were made in Python, as transformers makes T5's of a SentencePiece model.
#
# Expected: -3.9205269813537598, a float32 number, three times.
# Seen:     -3.9205269813537598, then -3.92052698135376 twice
# Takes PYTHON=... for another python3.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
cat > "$folder/scores.py" <<'PY'
import json
import pickle
import sys

import tokenizers
from tokenizers import Tokenizer, models


def score(tokenizer):
    return json.loads(tokenizer.to_str())["model"]["vocab"][1][1]


original = Tokenizer(models.Unigram([("?", 0.0), ("a", -3.9205269813537598)], 0, False))
pickled = pickle.loads(pickle.dumps(original))
found = [score(original), score(pickled), score(Tokenizer.from_str(pickled.to_str()))]
print(f"tokenizers {tokenizers.__version__}: {found}; Python reads {json.loads('-3.9205269813537598')!r}")
sys.exit(found != [-3.9205269813537598, -3.92052698135376, -3.92052698135376])
PY
if "$folder/venv/bin/python" "$folder/scores.py"; then
    echo "as described"
else
    echo "changed: see above"
    exit 1
fi
