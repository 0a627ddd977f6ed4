"""Tokenizers named by an explicit spec: raw bytes, SentencePiece, tiktoken and Hugging Face."""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import json
import pickle
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

_END_OF_TEXT = "<|endoftext|>"

# tiktoken's cl100k_base pattern, restated because tiktoken only hands it out together with a download.
_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        spec: what `load_tokenizer` was given.
        source: the path or name that it was read from; empty for bytes.
        fingerprint: changes when the vocabulary changes, also where the spec (a path) stays the same.
        vocab_size: number of ids; every id is in [0, vocab_size).
        eod: id that ends a document; `encode` never yields it and `decode` drops it.
    """

    def __init__(self, spec: str, *, source: str = "", fingerprint: str, vocab_size: int, eod: int) -> None:
        self.spec = spec
        self.source = source
        self.fingerprint = fingerprint
        self.vocab_size = vocab_size
        self.eod = eod

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process, a tokenizer is loaded there by the spec."""
        return _same_tokenizer, (self.where, self.fingerprint)

    @property
    def of_texts(self) -> Tokenizer:
        """What encodes texts as this one does and is quick to send to another process; chats need this one."""
        return self

    @property
    def where(self) -> str:
        """A spec of what was read, which may be a copy of what `spec` names."""
        return f"{self.spec.partition(':')[0]}:{self.source}" if self.source else self.spec

    @abstractmethod
    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids of `text`, int32 [num_tokens]; nothing is added at either end.

        A special token's name inside `text` is ordinary text, so a corpus cannot end a document by spelling it.
        """

    def chat_text(self, messages: Sequence[dict[str, str]], *, asks: bool = False) -> str:
        """Messages, each with a role and a content, as the tokenizer's chat template writes them.

        Args:
            asks: end with what comes before an answer of the assistant.

        Raises:
            ValueError: there is no template, which alone names data.tokenizer, or it refuses the messages.
        """
        raise ValueError(f"data.tokenizer: {self.spec!r} has no chat template, which messages need")

    def encode_template(self, text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Token ids of what `chat_text` gave, in which names of special tokens are those tokens, and the place of the
        character in `text` at which each begins; both [num_tokens]."""
        raise ValueError(f"data.tokenizer: {self.spec!r} has no chat template, which messages need")

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Text of `ids` [num_tokens] without end-of-document ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside [0, vocab_size), as a model with a padded vocabulary may produce.
        """
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise ValueError(f"ids: token id {outside[0]} is outside the vocabulary of {self.vocab_size} ({self.spec})")
        return self._decode(array[array != self.eod])

    def copy_to(self, folder: Path) -> None:
        """Write the files into a folder that `load_tokenizer` takes as `copy`; none of what needs none.

        Encodings that tiktoken has by name are kept by tiktoken.
        """
        if Path(self.source).expanduser().is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(self.source).expanduser(), folder)

    @abstractmethod
    def _decode(self, ids: npt.NDArray[np.int64]) -> str:
        """Text of `ids`, which are within the vocabulary and not end-of-document."""


class _Bytes(Tokenizer):
    """The 256 byte values of UTF-8, and 256 as end of document."""

    def __init__(self) -> None:
        super().__init__("bytes", fingerprint="bytes", vocab_size=257, eod=256)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def _decode(self, ids: npt.NDArray[np.int64]) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class _SentencePiece(Tokenizer):
    """A SentencePiece model file; end of document is its eos piece."""

    def __init__(self, spec: str, value: str) -> None:
        library = _require("sentencepiece")
        path = _existing_file(value, spec)
        try:
            self._model = library.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise _cannot_load(spec, error) from error
        if self._model.eos_id() < 0:
            raise ValueError(f"data.tokenizer: {spec!r} has no eos piece, which ends a document")
        super().__init__(
            spec,
            source=value,
            fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
            vocab_size=self._model.get_piece_size(),
            eod=self._model.eos_id(),
        )

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.array(self._model.encode(text, out_type=int), dtype=np.int32)

    def _decode(self, ids: npt.NDArray[np.int64]) -> str:
        return self._model.decode(ids.tolist())


class _Tiktoken(Tokenizer):
    """A tiktoken encoding by name, or a BPE rank file; end of document is <|endoftext|>."""

    def __init__(self, spec: str, value: str) -> None:
        library = _require("tiktoken")
        if value in library.list_encoding_names():
            fingerprint = spec  # tiktoken itself checks the hash of what it downloads under a name
            try:
                self._encoding = library.get_encoding(value)
            except (OSError, ValueError) as error:
                raise _cannot_load(spec, error) from error
        else:
            known = ", ".join(library.list_encoding_names())
            path = _existing_file(value, spec, note=f"; nor is it one of tiktoken's encodings ({known})")
            fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
            self._encoding = _encoding_from_ranks(library, path)
        if _END_OF_TEXT not in self._encoding.special_tokens_set:
            raise ValueError(f"data.tokenizer: {spec!r} has no {_END_OF_TEXT} token, which ends a document")
        super().__init__(
            spec,
            source=value,
            fingerprint=fingerprint,
            vocab_size=self._encoding.n_vocab,
            eod=self._encoding.eot_token,
        )

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.array(self._encoding.encode_ordinary(text), dtype=np.int32)

    def _decode(self, ids: npt.NDArray[np.int64]) -> str:
        return self._encoding.decode(ids.tolist(), errors="replace")


class _Rust(Tokenizer):
    """The library below a Hugging Face tokenizer, without transformers, which imports torch."""

    def __init__(self, spec: str, fingerprint: str, vocab_size: int, eod: int, backend: Any) -> None:
        super().__init__(spec, fingerprint=fingerprint, vocab_size=vocab_size, eod=eod)
        self._backend = backend

    def __reduce__(self) -> tuple[Any, ...]:
        return _Rust, (self.spec, self.fingerprint, self.vocab_size, self.eod, self._backend)

    def is_sent_whole(self) -> bool:
        """Whether another process gets it to the last bit. It goes there as JSON, which this library reads with scores
        rounded: of those that transformers has made of a SentencePiece model, equal sums may then differ.
        """
        return bool(pickle.loads(pickle.dumps(self._backend)).to_str() == self._backend.to_str())

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        # Without offsets, which cost a third of the time. Truncation, padding and the reading of special tokens are
        # the backend's state, which a call of transformers may have changed.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        return np.array(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.int32)

    def _decode(self, ids: npt.NDArray[np.int64]) -> str:
        text: str = self._backend.decode(ids.tolist(), skip_special_tokens=False)
        return text


class _HuggingFace(Tokenizer):
    """A Hugging Face tokenizer; end of document is its eos token."""

    def __init__(self, spec: str, value: str) -> None:
        library = _require("transformers")
        path = Path(value).expanduser()
        if value.startswith(("/", ".", "~")) and not path.exists():
            raise FileNotFoundError(f"data.tokenizer: {spec!r} names {path}, which does not exist")
        try:
            self._model = library.AutoTokenizer.from_pretrained(str(path))
        # Besides these, a damaged tokenizer.json raises a bare Exception from the Rust library.
        except Exception as error:
            raise _cannot_load(spec, error) from error
        if self._model.eos_token_id is None:
            raise ValueError(f"data.tokenizer: {spec!r} has no eos token, which ends a document")
        vocabulary = self._model.get_vocab()
        # Some models have Python of their own around the Rust library; then transformers is asked.
        plain = type(self._model)._encode_plus is library.PreTrainedTokenizerFast._encode_plus
        backend = self._model.backend_tokenizer if self._model.is_fast and plain else None
        if self._model.is_fast:
            description = self._model.backend_tokenizer.to_str()
        else:
            description = json.dumps(sorted(vocabulary.items()))
        super().__init__(
            spec,
            source=str(path),
            fingerprint=hashlib.sha256(description.encode("utf-8")).hexdigest(),
            # Added tokens may leave gaps in the ids, so neither .vocab_size nor len() bounds them.
            vocab_size=max(vocabulary.values()) + 1,
            eod=self._model.eos_token_id,
        )
        fast = hasattr(backend, "encode_batch_fast")  # tokenizers 0.20.1 on
        self._rust = _Rust(spec, self.fingerprint, self.vocab_size, self.eod, backend) if fast else None

    @cached_property
    def of_texts(self) -> Tokenizer:
        return self if self._rust is None or not self._rust.is_sent_whole() else self._rust

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        if self._rust is not None:
            return self._rust.encode(text)
        encoded = self._model(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return np.array(encoded["input_ids"], dtype=np.int32)

    def chat_text(self, messages: Sequence[dict[str, str]], *, asks: bool = False) -> str:
        if self._model.chat_template is None or not self._model.is_fast:
            return super().chat_text(messages, asks=asks)
        try:
            written = self._model.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks)
        except Exception as error:  # templates are programs, and raise what they like
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(reason) from error
        assert isinstance(written, str)
        return written

    def encode_template(self, text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        encoded = self._model(
            text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        begins = [begin for begin, _ in encoded["offset_mapping"]]
        return np.array(encoded["input_ids"], dtype=np.int32), np.array(begins, dtype=np.int64)

    def copy_to(self, folder: Path) -> None:
        self._model.save_pretrained(folder)

    def _decode(self, ids: npt.NDArray[np.int64]) -> str:
        return self._model.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


_KINDS: dict[str, Callable[[str, str], Tokenizer]] = {
    "sentencepiece": _SentencePiece,
    "tiktoken": _Tiktoken,
    "huggingface": _HuggingFace,
}
_ALLOWED = '"bytes", "sentencepiece:PATH", "tiktoken:NAME_OR_PATH" or "huggingface:NAME_OR_PATH"'


def load_tokenizer(spec: str, copy: Path | None = None) -> Tokenizer:
    """Build the tokenizer that `spec` names.

    Args:
        spec: one of
            "bytes": UTF-8 bytes as ids 0..255, end of document 256, 257 ids in all;
            "sentencepiece:PATH": a SentencePiece model file with an eos piece;
            "tiktoken:NAME_OR_PATH": an encoding name tiktoken lists, or else the path of a .tiktoken BPE rank file
                (base64 token and rank per line), split by the pattern of cl100k_base, with <|endoftext|> as the id
                after the largest rank;
            "huggingface:NAME_OR_PATH": what AutoTokenizer.from_pretrained takes; a value that begins with "/", "."
                or "~" is a path and never a name on the Hub.
        copy: a folder that Tokenizer.copy_to has written, which counts instead of what the spec names, if it is there.

    Raises:
        ValueError: the spec is not of this form, or what it names cannot be loaded or has no end-of-document token.
        FileNotFoundError: the path does not exist.
        ImportError: the library behind the spec is not installed.
    """
    kind, colon, value = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if spec == "bytes":
        return _Bytes()
    if kind in _KINDS and colon and value:
        kept = copy and (copy if kind == "huggingface" else copy / Path(value).name)
        if kept and kept.exists():
            value = str(kept.resolve())
        return _KINDS[kind](spec, value)
    raise ValueError(f"data.tokenizer must be {_ALLOWED}, got {spec!r}")


def _same_tokenizer(spec: str, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(spec)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"data.tokenizer: {spec!r} changed while texts were tokenised; run again")
    return tokenizer


def _require(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'data.tokenizer needs {module} ({error}); run: pip install "megatron-carve[tokenizers]"'
        ) from error


def _existing_file(value: str, spec: str, note: str = "") -> Path:
    path = Path(value).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.tokenizer: {spec!r} names {path}, which is not a file{note}")
    return path


def _cannot_load(spec: str, error: Exception) -> ValueError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return ValueError(f"data.tokenizer: cannot load {spec!r}: {type(error).__name__}: {reason}")


def _encoding_from_ranks(library: ModuleType, path: Path) -> Any:
    ranks = _read_ranks(path)
    return library.Encoding(
        path.stem,
        pat_str=_CL100K_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={_END_OF_TEXT: max(ranks.values()) + 1},
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    # tiktoken.load.load_tiktoken_bpe keeps a copy keyed by path alone and would return it after the file has changed.
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"data.tokenizer: {path} line {number} is not 'BASE64_TOKEN RANK'") from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"data.tokenizer: {path} has no rank for byte 0x{missing[0]:02x}; all 256 bytes need one")
    if len(set(ranks.values())) != len(ranks) or min(ranks.values()) < 0:
        raise ValueError(f"data.tokenizer: {path} has a negative rank or gives two tokens one rank")
    return ranks
