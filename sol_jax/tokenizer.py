"""Text <-> token ids, through the `tokenizers` library: from a folder's tokenizer.json or GGUF metadata.

Special tokens are added where asked for only, but one that a text spells out (`<|im_start|>`) is one id.
A byte-level vocabulary need not have all 256 bytes (SmolLM2 lacks six control characters, and planes of
Unicode that nobody assigned); the library drops what it cannot spell, and so do we.

Sources: the splitting rules of SmolLM2's, Llama 3's and GPT-2's own tokenizer.json.
"""

import hashlib
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from sol_jax.errors import UserError
from sol_jax.llama import LlamaConfig
from sol_jax.load import resolve
from sol_jax.model_files import read_gguf, read_json

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GGUF's types of the tokens that a text spells as they are: control and user-defined.
_WHOLE = (3, 4)


class Tokenizer:
    """A `tokenizers.Tokenizer` and what a language model's loop needs to know about it."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_id: int,
        bos_id: int | None = None,
        chat_template: str | None = None,
    ):
        # A tokenizer.json may carry training-time settings that cut or fill texts.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_id = eos_id
        self.bos_id = bos_id
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides how text is split: equal for equal tokenizers."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens come around it only where asked for, as tokenizer.json says."""
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
    """The tokenizer of the model at `path` (see `sol_jax.load.resolve`).

    Raises UserError if the files are unreadable, of an unknown kind or name no end-of-sequence token.
    """
    path = resolve(path)
    return _from_folder(path) if path.is_dir() else _from_gguf(path)


def check_vocabulary(tokenizer: Tokenizer, cfg: LlamaConfig) -> None:
    """Raise UserError if the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model embeds {cfg.vocab_size}: "
            "it belongs to another model"
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
    ids = _read_optional(folder / "config.json") | _read_optional(folder / "generation_config.json")

    def special(name: str) -> int | None:
        token = settings.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None:
            if backend.token_to_id(token) is None:
                raise UserError(f"{folder}: {name}_token is {token!r}, which is not in tokenizer.json")
            return backend.token_to_id(token)
        number = ids.get(f"{name}_token_id")
        return number[0] if isinstance(number, list) else number

    eos_id = special("eos")
    if eos_id is None:
        raise UserError(f"{folder} names no end-of-sequence token; set eos_token in tokenizer_config.json")
    return Tokenizer(backend, eos_id, special("bos"), _folder_chat_template(folder, settings))


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _folder_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _from_gguf(path: Path) -> Tokenizer:
    metadata = read_gguf(path).metadata

    def field(name: str, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        if value is None:
            raise UserError(f"{path} has no field tokenizer.ggml.{name}")
        return value

    kind, words = field("model"), field("pre")
    if kind != "gpt2":
        raise UserError(
            f"{path}: tokenizer.ggml.model is {kind!r}, but only 'gpt2' (byte-level BPE) is supported; "
            "use the model's folder with its tokenizer.json"
        )
    if field("add_space_prefix", False):
        raise UserError(f"{path}: tokenizer.ggml.add_space_prefix is set, but only false is supported")
    tokens = field("tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ", 1)) for pair in field("merges")]
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=words == "llama-bpe")
    except Exception as fault:  # the library raises nothing narrower
        raise UserError(f"{path}: tokenizer.ggml.merges do not fit the vocabulary: {fault}") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(path, words)
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, field("token_type"), strict=True):
        if kind in _WHOLE:
            backend.add_tokens([AddedToken(token, special=True, normalized=False)])
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, field("eos_token_id"), metadata.get("tokenizer.ggml.bos_token_id"), template)


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
