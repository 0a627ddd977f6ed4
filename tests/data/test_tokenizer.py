"""Tokenizers: round trips, end of document, and what each refuses."""

import base64
import copy
import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from megatron_carve.data.tokenizer import load_tokenizer
from megatron_carve.serving.choice import TokenTexts
from megatron_carve.use.continuation import Continuation

TEXT = "A naïve café: 42 — 日本語 🙂 and\ttabs\r\n\n  two  spaces\n"
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a second line tells of the quick dog and the lazy fox",
    "numbers such as 1234 and words such as tokenizer",
] * 5


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    library = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")

    def train(name, **options):
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_prefix=str(folder / name),
            vocab_size=295,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            minloglevel=2,
            **options,
        )
        return folder / f"{name}.model"

    return train


@pytest.fixture(scope="session")
def huggingface_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("huggingface")

    def train(name, **special):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(CORPUS, trainer)
        # As Llama's tokenizer does: a special token before the text unless told otherwise.
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / name)
        return folder / name

    return train


def write_ranks(path, merges=()):
    tokens = [bytes([byte]) for byte in range(256)] + list(merges)
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens)))
    return path


def test_bytes_are_the_utf8_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.spec, tokenizer.vocab_size, tokenizer.eod) == ("bytes", 257, 256)
    ids = tokenizer.encode(TEXT)
    assert ids.tolist() == list(TEXT.encode())
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.decode([]) == ""


def test_bytes_decode_drops_eod_and_marks_broken_characters():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode([104, 256, 105, 256]) == "hi"
    assert tokenizer.decode([104, 0xE6, 0x97, 105]) == "h\ufffdi"


@pytest.mark.parametrize("token", [-1, 257, 10_000])
def test_decode_refuses_ids_outside_the_vocabulary(token):
    with pytest.raises(ValueError, match=rf"token id {token} is outside the vocabulary of 257 \(bytes\)"):
        load_tokenizer("bytes").decode([104, token])


def test_sentencepiece_round_trip(sentencepiece_model):
    import sentencepiece

    path = sentencepiece_model("plain")
    tokenizer = load_tokenizer(f"sentencepiece:{path}")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = tokenizer.encode(TEXT)
    assert ids.tolist() == model.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.vocab_size, tokenizer.eod) == (295, model.piece_to_id("</s>"))
    assert tokenizer.eod not in tokenizer.encode("</s>")
    assert tokenizer.decode([*tokenizer.encode("one"), tokenizer.eod, *tokenizer.encode("two")]) == "onetwo"


def test_a_copy_counts_instead_of_the_path(sentencepiece_model, tmp_path):
    path = sentencepiece_model("moves")
    tokenizer = load_tokenizer(f"sentencepiece:{path}")
    tokenizer.copy_to(tmp_path / "copy")
    load_tokenizer("bytes").copy_to(tmp_path / "none")
    path.rename(path.with_name("gone"))
    again = load_tokenizer(f"sentencepiece:{path}", tmp_path / "copy")
    assert (again.spec, again.fingerprint) == (tokenizer.spec, tokenizer.fingerprint)
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match="which is not a file"):
        load_tokenizer(f"sentencepiece:{path}", tmp_path / "none")


def test_sentencepiece_without_eos_is_refused(sentencepiece_model):
    path = sentencepiece_model("no_eos", eos_id=-1)
    with pytest.raises(ValueError, match=r"data\.tokenizer: 'sentencepiece:.*' has no eos piece"):
        load_tokenizer(f"sentencepiece:{path}")


def test_tiktoken_rank_file_round_trip(tmp_path):
    pytest.importorskip("tiktoken")
    path = write_ranks(tmp_path / "tiny.tiktoken", merges=[b"th", b"the", b" t"])
    tokenizer = load_tokenizer(f"tiktoken:{path}")
    assert (tokenizer.vocab_size, tokenizer.eod) == (260, 259)
    # "the" merges fully (th, then the); in " then" the pattern keeps the space with the word, and "th" ranks first.
    assert tokenizer.encode("the then").tolist() == [257, ord(" "), 257, ord("n")]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eod not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode([257, 259, 0xE6]) == "the\ufffd"


def test_tiktoken_name_asks_tiktoken(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)}
    tiny = tiktoken.Encoding("tiny", pat_str=r".+|\s", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": tiny}.__getitem__)
    tokenizer = load_tokenizer("tiktoken:gpt2")
    assert (tokenizer.vocab_size, tokenizer.eod) == (301, 300)
    assert tokenizer.encode("hi").tolist() == [104, 105]

    no_end = tiktoken.Encoding("tiny", pat_str=r".+|\s", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: no_end)
    with pytest.raises(ValueError, match=r"'tiktoken:gpt2' has no <\|endoftext\|> token"):
        load_tokenizer("tiktoken:gpt2")


def test_tiktoken_download_failure_is_one_line(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def fail(name):
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(ValueError, match=r"cannot load 'tiktoken:gpt2': ConnectionError: no route$"):
        load_tokenizer("tiktoken:gpt2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"aGk= 0\nnot a rank line\n", "line 2 is not 'BASE64_TOKEN RANK'"),
        (b"aGk= 0\n", "has no rank for byte 0x00"),
        (b"", "has no rank for byte 0x00"),
    ],
)
def test_tiktoken_bad_rank_file(tmp_path, content, message):
    pytest.importorskip("tiktoken")
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.tokenizer: .*bad\.tiktoken {message}"):
        load_tokenizer(f"tiktoken:{path}")


def test_tiktoken_two_tokens_with_one_rank(tmp_path):
    pytest.importorskip("tiktoken")
    path = write_ranks(tmp_path / "twice.tiktoken")
    path.write_bytes(path.read_bytes() + base64.b64encode(b"hi") + b" 7\n")
    with pytest.raises(ValueError, match="gives two tokens one rank"):
        load_tokenizer(f"tiktoken:{path}")


def test_huggingface_round_trip(huggingface_folder):
    from transformers import AutoTokenizer

    folder = huggingface_folder("plain", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = load_tokenizer(f"huggingface:{folder}")
    model = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(CORPUS[0]).tolist() == model(CORPUS[0], add_special_tokens=False)["input_ids"]
    assert model(CORPUS[0])["input_ids"][0] == model.convert_tokens_to_ids("<s>")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode(tokenizer.encode("a , b ?")) == "a , b ?"
    assert (tokenizer.vocab_size, tokenizer.eod) == (300, model.convert_tokens_to_ids("</s>"))
    assert tokenizer.eod not in tokenizer.encode("one </s> two")
    assert tokenizer.decode(tokenizer.encode("one </s> two")) == "one </s> two"
    assert tokenizer.decode([*tokenizer.encode("one"), tokenizer.eod]) == "one"


def test_huggingface_is_what_transformers_gives(huggingface_folder):
    """Whatever the folder says of truncation and padding, and whatever another call has set meanwhile."""
    folder = huggingface_folder("limited", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(f"huggingface:{folder}")
    assert tokenizer._rust is not None
    text = f"{CORPUS[0]} </s> {TEXT}"
    first = tokenizer.encode(text).tolist()
    tokenizer._model([text, "a"], padding="max_length", truncation=True, max_length=7, split_special_tokens=False)
    assert tokenizer.encode(text).tolist() == first
    theirs = tokenizer._model(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(first) > 30 and first == theirs


def test_huggingface_counts_added_tokens(huggingface_folder):
    from transformers import AutoTokenizer

    folder = huggingface_folder("added", bos_token="<s>", eos_token="</s>")
    model = AutoTokenizer.from_pretrained(folder)
    before = load_tokenizer(f"huggingface:{folder}")
    model.add_tokens(["<tool>", "<call>"])
    model.save_pretrained(folder)
    after = load_tokenizer(f"huggingface:{folder}")
    assert (before.vocab_size, after.vocab_size) == (300, 302)
    assert before.spec == after.spec
    assert before.fingerprint != after.fingerprint


def test_huggingface_texts_need_no_torch_in_another_process(huggingface_folder):
    folder = huggingface_folder("sent", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = load_tokenizer(f"huggingface:{folder}")
    program = (
        "import pickle, sys; tokenizer = pickle.load(sys.stdin.buffer); ids = tokenizer.encode(sys.argv[1]).tolist(); "
        "assert not {'torch', 'transformers'} & set(sys.modules); print([ids, tokenizer.eod, tokenizer.decode(ids)])"
    )
    sent = pickle.dumps(tokenizer.of_texts)
    found = subprocess.run([sys.executable, "-c", program, TEXT], input=sent, capture_output=True, check=True)
    ids = tokenizer.encode(TEXT).tolist()
    assert found.stdout.decode() == f"{[ids, tokenizer.eod, tokenizer.decode(ids)]}\n"


def test_huggingface_scores_that_would_be_rounded_on_the_way_are_not_sent(sentencepiece_model, tmp_path):
    pytest.importorskip("transformers")
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(sentencepiece_model("scores").read_bytes())
    for i, score in enumerate(np.random.default_rng(0).uniform(-20, 0, 1000)):
        model.pieces.add(piece=f"word{i}", score=score)
    (tmp_path / "spiece.model").write_bytes(model.SerializeToString())
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(f"huggingface:{tmp_path}")

    def scores(tokenizer):
        return [score for _, score in json.loads(tokenizer._backend.to_str())["model"]["vocab"]]

    there = pickle.loads(pickle.dumps(tokenizer.of_texts))
    assert scores(getattr(there, "_rust", there)) == scores(tokenizer._rust)
    assert scores(pickle.loads(pickle.dumps(tokenizer._rust))) != scores(tokenizer._rust)


def test_a_tokenizer_that_changed_is_not_sent(tmp_path):
    path = tmp_path / "ranks.tiktoken"
    write_ranks(path)
    tokenizer = load_tokenizer(f"tiktoken:{path}")
    sent = pickle.dumps(tokenizer)
    assert pickle.loads(sent).fingerprint == tokenizer.fingerprint
    write_ranks(path, [b"th"])
    with pytest.raises(ValueError, match=r"data\.tokenizer: 'tiktoken:.*' changed while texts were tokenised"):
        pickle.loads(sent)


def test_huggingface_without_eos_is_refused(huggingface_folder):
    folder = huggingface_folder("no_eos", bos_token="<s>", unk_token="<unk>")
    with pytest.raises(ValueError, match=r"data\.tokenizer: 'huggingface:.*' has no eos token"):
        load_tokenizer(f"huggingface:{folder}")


@pytest.mark.parametrize("content", [None, "{"])
def test_huggingface_folder_that_holds_no_tokenizer(tmp_path, content):
    pytest.importorskip("transformers")
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match=r"data\.tokenizer: cannot load 'huggingface:") as error:
        load_tokenizer(f"huggingface:{tmp_path}")
    assert "\n" not in str(error.value)


def test_sentencepiece_file_that_is_no_model(tmp_path):
    pytest.importorskip("sentencepiece")
    path = tmp_path / "bad.model"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"data\.tokenizer: cannot load 'sentencepiece:") as error:
        load_tokenizer(f"sentencepiece:{path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken", "huggingface"])
def test_missing_file_is_named(tmp_path, kind):
    pytest.importorskip({"huggingface": "transformers"}.get(kind, kind))
    path = tmp_path / "absent"
    with pytest.raises(FileNotFoundError, match=rf"data\.tokenizer: '{kind}:.*absent' names {re.escape(str(path))}"):
        load_tokenizer(f"{kind}:{path}")


def test_unknown_tiktoken_name_lists_the_known_ones():
    pytest.importorskip("tiktoken")
    with pytest.raises(FileNotFoundError, match=r"'tiktoken:gpt22' .* nor is it one of .*gpt2, .*cl100k_base"):
        load_tokenizer("tiktoken:gpt22")


@pytest.mark.parametrize(
    "spec", ["", "byte", "bytes:", "bytes:x", "sentencepiece", "tiktoken:", "gpt2", "BYTES", "llama:x", None, 3]
)
def test_unknown_spec(spec):
    with pytest.raises(ValueError, match=rf'data\.tokenizer must be "bytes", "sentencepiece:PATH".*got {spec!r}$'):
        load_tokenizer(spec)


@pytest.mark.parametrize(
    ("kind", "module"), [("sentencepiece", "sentencepiece"), ("tiktoken", "tiktoken"), ("huggingface", "transformers")]
)
def test_missing_library_names_the_remedy(monkeypatch, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'needs {module} .*pip install "megatron-carve\[tokenizers\]"'):
        load_tokenizer(f"{kind}:x")


def test_fingerprint_follows_the_file_behind_one_path(tmp_path):
    pytest.importorskip("tiktoken")
    path = tmp_path / "tiny.tiktoken"
    first = load_tokenizer(f"tiktoken:{write_ranks(path, merges=[b'th'])}")
    again = load_tokenizer(f"tiktoken:{write_ranks(path, merges=[b'th'])}")
    other = load_tokenizer(f"tiktoken:{write_ranks(path, merges=[b'ht'])}")
    assert first.spec == other.spec
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert other.encode("ht").tolist() == [256]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "tiktoken", "huggingface"])
def test_a_text_comes_token_by_token_and_from_a_copy(kind, sentencepiece_model, huggingface_folder, tmp_path):
    """As a server reads and writes it: whole characters, and spaces where they belong."""
    if kind == "sentencepiece":
        spec = f"sentencepiece:{sentencepiece_model('plain')}"
    elif kind == "tiktoken":
        spec = f"tiktoken:{write_ranks(tmp_path / 'tiny.tiktoken', merges=[b'th', b'the', b' t'])}"
    else:
        spec = (
            kind if kind == "bytes" else f"huggingface:{huggingface_folder('ours', bos_token='<s>', eos_token='</s>')}"
        )
    tokenizer = load_tokenizer(spec)
    ids = copy.deepcopy(tokenizer).encode(TEXT).tolist()
    assert ids == tokenizer.encode(TEXT).tolist()
    continuation, names = Continuation(tokenizer), TokenTexts(tokenizer)
    for token in ids:
        continuation.add(token)
        assert TEXT.startswith(continuation.text)
        text, is_text = names.text(token)
        assert text in TEXT if is_text else text == f"token:{token}"
    assert continuation.finish() == TEXT
    assert any(names.text(token)[0].startswith(" ") for token in ids)
