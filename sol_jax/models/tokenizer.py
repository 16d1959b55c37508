"""Text <-> token ids, through the `tokenizers` library: from a folder's tokenizer.json or GGUF metadata.

Special tokens are added where asked for only, but one that a text spells out (`<|im_start|>`) is one id.
A byte-level vocabulary need not have all 256 bytes (SmolLM2 lacks six control characters, and planes of
Unicode that nobody assigned); the library drops what it cannot spell, and so do we.

Sources: the splitting rules of SmolLM2's, Llama 3's and GPT-2's own tokenizer.json.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from sol_jax.errors import UserError
from sol_jax.files import read_json
from sol_jax.models.config_fields import Fields
from sol_jax.models.gguf_file import read_gguf
from sol_jax.models.llama import LlamaConfig
from sol_jax.models.weights import resolve

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GGUF's types of the tokens that a text spells as they are: control and user-defined.
_WHOLE = (3, 4)
_GGML = "tokenizer.ggml."  # GGUF's prefix of all that decides how text is split
# fmt: off
_GGML_READ = frozenset(_GGML + name for name in (
    "model", "pre", "tokens", "merges", "token_type", "bos_token_id", "eos_token_id", "eot_token_id",
    "eom_token_id",
))
# What byte-level BPE has no use for, and names of tokens that nothing here puts into a text.
_GGML_HARMLESS = frozenset(_GGML + name for name in (
    "scores", "token_type_count", "unknown_token_id", "padding_token_id", "seperator_token_id",
    "separator_token_id", "mask_token_id", "cls_token_id", "prefix_token_id", "suffix_token_id",
    "middle_token_id", "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id",
    "fim_rep_token_id", "fim_sep_token_id",
))
# fmt: on
# How many embeddings may be there that the tokenizer has no ids for: models fill up their table to a round
# number of rows, by a few hundred at the most, or by some per cent of a large one (DeepSeek LLM's 102400 rows
# by 2385).  The tokenizers of two families are many thousands of ids apart.
_SPARE, _SPARE_SHARE = 512, 1 / 16


class Tokenizer:
    """A `tokenizers.Tokenizer` and what a language model's loop needs to know about it.

    `eos_id` comes between documents and is what chat templates call eos_token; a text that is generated ends
    at any of `end_ids`, which has it and the model's others.  `model_eos_ids` are those that a folder's
    config.json and generation_config.json name; `eos_id` may be none of them, by mistake.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_id: int,
        bos_id: int | None = None,
        chat_template: str | None = None,
        end_ids: Iterable[int] = (),
        model_eos_ids: Iterable[int] = (),
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

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides how text is split: equal for equal tokenizers."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens come around it only where asked for, as tokenizer.json says.

        Raises UserError for half of a surrogate pair: a byte of the command line that is no UTF-8, or JSON's.
        """
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            wrong = ascii(text[fault.start])
            raise UserError(f"the text is not UTF-8: its character {fault.start + 1} is {wrong}") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def token(self, index: int) -> str:
        """The vocabulary's spelling of one id.  Raises UserError if there is no such id."""
        token = self._backend.id_to_token(index)
        if token is None:
            raise UserError(f"the tokenizer has no id {index}; its vocabulary ends at {self.vocab_size - 1}")
        return token


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of the model at `path` (see `sol_jax.models.weights.resolve`).

    Raises UserError if the files are unreadable, of an unknown kind or name no end-of-sequence token.
    """
    path = resolve(path)
    return _from_folder(path) if path.is_dir() else _from_gguf(path)


def check_vocabulary(tokenizer: Tokenizer, cfg: LlamaConfig) -> None:
    """Raise UserError if the tokenizer shows that it belongs to another model."""
    size = tokenizer.vocab_size
    spare = max(_SPARE, int(_SPARE_SHARE * cfg.vocab_size))
    if not cfg.vocab_size - spare <= size <= cfg.vocab_size:
        raise UserError(
            f"the tokenizer has {size} ids but the model embeds {cfg.vocab_size}: it belongs to another model"
        )
    if tokenizer.model_eos_ids and tokenizer.eos_id not in tokenizer.model_eos_ids:
        raise UserError(
            f"the tokenizer's eos_token has id {tokenizer.eos_id} but the model's eos_token_id is "
            f"{' or '.join(map(str, sorted(tokenizer.model_eos_ids)))}: it belongs to another model"
        )


def _from_folder(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder} has no tokenizer.json; other kinds of tokenizer are not read")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as fault:  # the library raises nothing narrower
        raise UserError(f"{file} is damaged, or unknown to this version of tokenizers: {fault}") from None
    settings = _read_optional(folder / "tokenizer_config.json")

    def special(name: str) -> int | None:
        token = settings.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None:
            if backend.token_to_id(token) is None:
                raise UserError(f"{folder}: {name}_token is {token!r}, which is not in tokenizer.json")
            return backend.token_to_id(token)
        return next(iter(_model_ids(folder, name)), None)

    eos_id = special("eos")
    if eos_id is None:
        raise UserError(f"{folder} names no end-of-sequence token; set eos_token in tokenizer_config.json")
    template = _folder_chat_template(folder, settings)
    of_model = [_ids(folder / name, "eos") for name in _MODEL_FILES]
    return Tokenizer(
        backend, eos_id, special("bos"), template, _model_ids(folder, "eos"), itertools.chain(*of_model)
    )


# With the ids of special tokens, the first one that has any going first.
_MODEL_FILES = ("generation_config.json", "config.json")


def _model_ids(folder: Path, name: str) -> list[int]:
    """What the model's files have as `name`_token_id."""
    return next(filter(None, (_ids(folder / file, name) for file in _MODEL_FILES)), [])


def _ids(file: Path, name: str) -> list[int]:
    """`name`_token_id of a file, one id or a list; empty without the field or the file."""
    given = _read_optional(file).get(f"{name}_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(number) is int for number in ids):
        raise UserError(f"{file}: {name}_token_id is {given!r}; it must be an id or a list of ids")
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
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _from_gguf(path: Path) -> Tokenizer:
    metadata = read_gguf(path).metadata

    def field(name: str, default: Any = None) -> Any:
        value = metadata.get(_GGML + name, default)
        if value is None:
            raise UserError(f"{path} has no field tokenizer.ggml.{name}")
        return value

    kind, words = field("model"), field("pre")
    if kind != "gpt2":
        raise UserError(
            f"{path}: tokenizer.ggml.model is {kind!r}, but only 'gpt2' (byte-level BPE) is supported; "
            "use the model's folder with its tokenizer.json"
        )
    tokens, token_types = field("tokens"), field("token_type")
    if len(tokens) != len(token_types):
        raise UserError(
            f"{path}: tokenizer.ggml.token_type has {len(token_types)} entries for {len(tokens)} tokens"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ", 1)) for pair in field("merges")]
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=words == "llama-bpe")
    except Exception as fault:  # the library raises nothing narrower
        raise UserError(f"{path}: tokenizer.ggml.merges do not fit the vocabulary: {fault}") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(path, words)
    backend.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, token_types, strict=True):
        if token_type in _WHOLE:
            backend.add_tokens([AddedToken(token, special=True, normalized=False)])
    template, bos_id = (metadata.get(f"tokenizer.{name}") for name in ("chat_template", "ggml.bos_token_id"))
    backend.post_processor = _gguf_frame(path, metadata)
    # The ends of a turn and of a tool's message end texts as well, as in llama.cpp.
    others = [metadata.get(f"{_GGML}{name}_token_id") for name in ("eot", "eom")]
    return Tokenizer(backend, field("eos_token_id"), bos_id, template, (n for n in others if n is not None))


def _gguf_frame(path: Path, metadata: dict[str, Any]) -> processors.TemplateProcessing | None:
    """The special tokens around a text, where they are asked for; refuses settings that nobody reads."""
    given = {key: value for key, value in metadata.items() if key.startswith(_GGML)}
    settings = Fields(str(path), {key: value for key, value in given.items() if key not in _GGML_READ})
    for name in ("add_space_prefix", "add_sep_token", "remove_extra_whitespaces"):
        settings.only(_GGML + name, False)
    # A file of Llama 3's rule that does not say puts it there, as in llama.cpp.
    unsaid = given[f"{_GGML}pre"] == "llama-bpe" and f"{_GGML}bos_token_id" in given
    begins = settings.take(f"{_GGML}add_bos_token", bool, unsaid)
    ends = settings.take(f"{_GGML}add_eos_token", bool, False)
    settings.close(_GGML_HARMLESS)
    special = []
    for name in [*("bos",) * begins, *("eos",) * ends]:
        if f"{_GGML}{name}_token_id" not in given:
            raise UserError(f"{path}: {_GGML}add_{name}_token is set, but there is no {_GGML}{name}_token_id")
        special.append({"id": name, "ids": [given[f"{_GGML}{name}_token_id"]], "tokens": [name]})
    text = [*("bos",) * begins, "$A", *("eos",) * ends]
    return processors.TemplateProcessing(single=text, special_tokens=special) if special else None


def _pre_tokenizer(path: Path, name: str) -> pre_tokenizers.PreTokenizer:
    """How a text is cut into words before the merges, by llama.cpp's name for the rule."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "default"):
        return gpt2
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name == "llama-bpe":
        words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, spell])
    raise UserError(
        f"{path}: tokenizer.ggml.pre is {name!r}, but only 'smollm', 'llama-bpe' or 'gpt-2' is supported; "
        "use the model's folder with its tokenizer.json"
    )
