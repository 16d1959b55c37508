"""Text <-> token ids, through the `tokenizers` library: from a folder's tokenizer.json or GGUF metadata.

Special tokens are added where asked for only, but one that a text spells out (`<|im_start|>`) is one id.
A byte-level vocabulary need not have all 256 bytes (SmolLM2 lacks six control characters, and planes of
Unicode that nobody assigned); the library drops what it cannot spell, and so do we.
"""

import contextlib
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from absl import logging

from sol_jax.errors import UserError
from sol_jax.files import read_json, shown
from sol_jax.models.folder_tokenizer import read_folder_tokenizer
from sol_jax.models.gguf_file import read_gguf
from sol_jax.models.gguf_tokenizer import GgufVocabulary, gguf_backend
from sol_jax.models.llama import LlamaConfig
from sol_jax.models.long_text import PIECE, encode_long
from sol_jax.models.weights import resolve

# How many embeddings may be there that the tokenizer has no ids for: models fill up their table to a round
# number of rows, by a few hundred at the most, or by some per cent of a large one (DeepSeek LLM's 102400 rows
# by 2385).  The tokenizers of two families are many thousands of ids apart.
_SPARE, _SPARE_SHARE = 512, 1 / 16
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte, in the vocabularies of SentencePiece


class Tokenizer:
    """A `tokenizers.Tokenizer` and what a language model's loop needs to know about it.

    `eos_id` comes between documents and is what chat templates call eos_token; a text that is generated ends
    at any of `end_ids`, which has it and the model's others.  `model_eos_ids` are those that a folder's
    config.json and generation_config.json name; `eos_id` may be none of them, by mistake.  `special` are the
    spellings of special tokens, as chat templates get them.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_id: int,
        bos_id: int | None = None,
        chat_template: str | None = None,
        end_ids: Iterable[int] = (),
        model_eos_ids: Iterable[int] = (),
        special: Mapping[str, Any] | None = None,
        earlier_fingerprint: str = "",
    ):
        # A tokenizer.json may carry training-time settings that cut or fill texts.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_id = eos_id
        self.end_ids = frozenset({eos_id, *end_ids})
        self.model_eos_ids = frozenset(model_eos_ids)
        self.bos_id = bos_id
        self.chat_template = chat_template
        self.special = dict(special or {})
        # Of runs from before tokenizer_config.json was read in full: that of tokenizer.json alone.
        self.earlier_fingerprint = earlier_fingerprint
        # Once it is known (`check_vocabulary`), how many ids the model has embeddings for.
        self.num_embeddings: int | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that the model knows."""
        return min(self._size, self.num_embeddings or self._size)

    @functools.cached_property
    def _size(self) -> int:
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        framed = self._backend.encode("a", add_special_tokens=True)
        inside = [i for i, special in enumerate(framed.special_tokens_mask) if not special]
        return framed.ids[: inside[0]], framed.ids[inside[-1] + 1 :]

    @functools.cached_property
    def _has_bytes(self) -> bool:
        """Whether characters that the vocabulary lacks are spelled as bytes, a token each."""
        return self._backend.decoder is not None and b"ByteFallback" in self._backend.decoder.__getstate__()

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides how text is split: equal for equal tokenizers."""
        text = self._backend.to_str()
        # The library does not write this one.
        return hashlib.sha256((text + "+split" * self._backend.encode_special_tokens).encode()).hexdigest()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens come around it only where asked for, as the files say.

        Raises UserError for half of a surrogate pair (a byte of the command line that is no UTF-8, or
        JSON's), and for a token that the text spells and the model has no embedding for.
        """
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            wrong = ascii(text[fault.start])
            raise UserError(f"the text is not UTF-8: its character {fault.start + 1} is {wrong}") from None
        with _told("encode this text"):
            if len(text) > PIECE:
                ids = encode_long(lambda part: self._backend.encode(part, add_special_tokens=False), text)
                if add_special_tokens:
                    before, after = self._frame
                    ids = [*before, *ids, *after]
            else:
                ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if self._size > self.vocab_size and (beyond := max(ids, default=0)) >= self.vocab_size:
            raise UserError(
                f"the text spells {self.token(beyond)!r}, which has id {beyond}, but the model embeds "
                f"{self.vocab_size} ids; take it out of the text"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included; bytes that are no UTF-8 become U+FFFD.

        The library makes every byte of a run of byte tokens U+FFFD if one of them is broken; here whole
        characters among them stay.
        """
        with _told("decode these tokens"):
            if not self._has_bytes:
                return self._backend.decode(ids, skip_special_tokens=False)
            tokens = [token for token in map(self._backend.id_to_token, ids) if token is not None]
            runs = itertools.groupby(tokens, key=lambda token: bool(_BYTE.fullmatch(token)))
            return self._backend.decoder.decode(
                [token for of_bytes, run in runs for token in (_mended(run) if of_bytes else run)]
            )

    def token(self, index: int) -> str:
        """The vocabulary's spelling of one id.  Raises UserError if there is no such id."""
        token = self._backend.id_to_token(index)
        if token is None:
            raise UserError(f"the tokenizer has no id {index}; its vocabulary ends at {self._size - 1}")
        return token


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Of what the library cannot do with the rules of a file: it raises bare exceptions, and panics."""
    try:
        yield
    except BaseException as fault:
        if type(fault) is not Exception and type(fault).__name__ != "PanicException":
            raise
        raise UserError(
            f"the tokenizer's own rules cannot {what} ({fault}); its tokenizer.json is damaged, or new to "
            "this version of tokenizers"
        ) from None


def _mended(run: Iterable[str]) -> list[str]:
    """A run of byte tokens, with U+FFFD for each byte that is part of no character."""
    spelled = bytes(int(token[3:5], 16) for token in run)
    mended: list[str] = []
    for character in spelled.decode("utf-8", "surrogateescape"):
        broken = "\udc80" <= character <= "\udcff"
        mended += ["\ufffd"] if broken else [f"<0x{byte:02X}>" for byte in character.encode()]
    return mended


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of the model at `path` (see `sol_jax.models.weights.resolve`).

    Raises UserError if the files are unreadable, of an unknown kind or name no end-of-sequence token.
    """
    path = resolve(path)
    return _from_folder(path) if path.is_dir() else _from_gguf(path)


def check_vocabulary(tokenizer: Tokenizer, cfg: LlamaConfig) -> None:
    """Raise UserError if the tokenizer shows that it belongs to another model; else it learns its size.

    A token to fill up batches with may be one more than the model embeds, for no text needs it.
    """
    tokenizer.num_embeddings = None
    size = tokenizer.vocab_size
    beyond = {tokenizer.token(index) for index in range(cfg.vocab_size, min(size, cfg.vocab_size + 2))}
    if beyond and beyond == {tokenizer.special.get("pad_token")}:
        logging.warning("the model has no embedding for %r; it cannot be part of a text", *beyond)
        size = cfg.vocab_size
    spare = max(_SPARE, int(_SPARE_SHARE * cfg.vocab_size))
    if not cfg.vocab_size - spare <= size <= cfg.vocab_size:
        raise UserError(
            f"the tokenizer has {size} ids but the model embeds {cfg.vocab_size}: it belongs to another model"
        )
    for name, index in (("eos", tokenizer.eos_id), ("bos", tokenizer.bos_id)):
        if index is not None and not 0 <= index < size:
            raise UserError(
                f"{name}_token_id is {index}, but the tokenizer's ids end at {size - 1}; correct it"
            )
    if tokenizer.model_eos_ids and tokenizer.eos_id not in tokenizer.model_eos_ids:
        raise UserError(
            f"the tokenizer's eos_token has id {tokenizer.eos_id} but the model's eos_token_id is "
            f"{' or '.join(map(str, sorted(tokenizer.model_eos_ids)))}: it belongs to another model"
        )
    tokenizer.num_embeddings = cfg.vocab_size


def _from_folder(folder: Path) -> Tokenizer:
    backend, special, settings, earlier = read_folder_tokenizer(folder)

    def index(name: str) -> int | None:
        token = special.get(f"{name}_token")
        return next(iter(_model_ids(folder, name)), None) if token is None else backend.token_to_id(token)

    eos_id = index("eos")
    if eos_id is None:
        raise UserError(f"{folder} names no end-of-sequence token; set eos_token in tokenizer_config.json")
    template = _folder_chat_template(folder, settings)
    ends, of_model = _model_ids(folder, "eos"), _model_eos_ids(folder)
    return Tokenizer(backend, eos_id, index("bos"), template, ends, of_model, special, earlier)


# With the ids of special tokens, the first one that has any going first.
_MODEL_FILES = ("generation_config.json", "config.json")


def _model_ids(folder: Path, name: str) -> list[int]:
    """What the model's files have as `name`_token_id."""
    return next(filter(None, (_ids(folder / file, name) for file in _MODEL_FILES)), [])


def _model_eos_ids(folder: Path) -> list[int]:
    """All that the model's files call the end; generation_config.json makes up for an old config.json."""
    newer, config = (folder / name for name in _MODEL_FILES)
    ids = _ids(newer, "eos")
    try:
        return ids + _ids(config, "eos")
    except UserError as fault:
        if not ids:
            raise
        logging.warning("%s; what %s says is used", fault, newer.name)
        return ids


def _ids(file: Path, name: str) -> list[int]:
    """`name`_token_id of a file, one id or a list; empty without the field or the file."""
    given = _read_optional(file).get(f"{name}_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(number) is int for number in ids):
        raise UserError(f"{file}: {name}_token_id is {shown(given)}; it must be an id or a list of ids")
    return ids


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _folder_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise UserError(f"{file} is not readable as UTF-8: {fault}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    if not isinstance(template, str | None):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: chat_template is no text, nor a list with names"
        )
    return template


def _from_gguf(path: Path) -> Tokenizer:
    vocabulary = GgufVocabulary(path, read_gguf(path).metadata)
    backend = gguf_backend(vocabulary)
    eos_id = vocabulary.token_id("eos")
    if eos_id is None:
        raise UserError(f"{path} has no field tokenizer.ggml.eos_token_id")
    # The ends of a turn and of a tool's message end texts as well, as in llama.cpp.
    others = [index for index in map(vocabulary.token_id, ("eot", "eom")) if index is not None]
    template, special = vocabulary.chat_template(), vocabulary.special()
    return Tokenizer(backend, eos_id, vocabulary.token_id("bos"), template, others, special=special)
