#!/bin/sh
# transformers 5.24.0: AutoTokenizer.from_pretrained of a folder whose tokenizer is one of transformers' own
# (tokenizer.json, and a tokenizer_config.json that names TokenizersBackend) asks on the terminal whether to run the
# folder's custom code, because config.json maps AutoConfig to a module there. The tokenizer needs none of that code:
# where nobody can answer, or the answer is no, the same call returns it, and so does PreTrainedTokenizerFast.
#
# Expected: no question, since nothing that is loaded is custom code.
# Seen:     asked 1 time(s); declined: TokenizersBackend [0, 1]; without Auto: asked 0 time(s), TokenizersBackend [0, 1]
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==5.24.0" "tokenizers==0.23.1"
cat > "$folder/try.py" <<'PY'
import builtins, json, pathlib, sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

folder = pathlib.Path(sys.argv[1])
folder.mkdir()
tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
(folder / "model_code.py").write_text(
    "from transformers import PretrainedConfig\nclass Config(PretrainedConfig):\n    model_type = 'of_my_own'\n"
)
(folder / "config.json").write_text(
    json.dumps({"model_type": "of_my_own", "auto_map": {"AutoConfig": "model_code.Config"}})
)
questions = []
builtins.input = lambda question="": questions.append(question) or "n"


def load(cls):
    questions.clear()
    found = cls.from_pretrained(folder)
    return f"asked {len(questions)} time(s)", f"{type(found).__name__} {found('a b').input_ids}"


asked, found = load(AutoTokenizer)
plain, same = load(PreTrainedTokenizerFast)
print(f"{asked}; declined: {found}; without Auto: {plain}, {same}")
PY
seen=$("$folder/venv/bin/python" "$folder/try.py" "$folder/model" 2>/dev/null | tail -n 1)
echo "$seen"
expected='asked 1 time(s); declined: TokenizersBackend [0, 1]; without Auto: asked 0 time(s), TokenizersBackend [0, 1]'
[ "$seen" = "$expected" ] || { echo "changed: expected '$expected'" >&2; exit 1; }
