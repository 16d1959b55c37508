"""The tokenizer in a GGUF file's metadata, by llama.cpp's rules.

Sources: the splitting rules of SmolLM2's, Llama 3's and GPT-2's own tokenizer.json, and llama.cpp's names for
them; of llama.cpp itself, the rule `default`.
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from sol_jax.errors import UserError
from sol_jax.files import shown
from sol_jax.models.config_fields import Fields

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What llama.cpp does where a file does not say how its model cuts text: each rule cuts what the last left.
_DEFAULT_WORDS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
# GGUF's types of the tokens that a text spells as they are: control and user-defined.
_WHOLE = (3, 4)
_TYPES = range(7)
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


class GgufVocabulary:
    """The vocabulary fields of a GGUF file, checked as they are asked for."""

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self.path, self._metadata = path, metadata
        self.tokens: list[str] = self.listed("tokens", str)

    def field(self, name: str, kind: type) -> Any:
        """A field that must be there, of a type."""
        value = self._metadata.get(_GGML + name)
        if value is None:
            raise UserError(f"{self.path} has no field {_GGML}{name}")
        if type(value) is not kind:
            raise UserError(
                f"{self.path}: {_GGML}{name} is of type {type(value).__name__}, not {kind.__name__}"
            )
        return value

    def listed(self, name: str, kind: type) -> list[Any]:
        """A field that must be a list of one type."""
        values = self.field(name, list)
        if not all(type(value) is kind for value in values):
            raise UserError(f"{self.path}: {_GGML}{name} is not a list of {kind.__name__} alone")
        return values

    def token_id(self, name: str) -> int | None:
        """The id that `name`_token_id gives; None without the field.  One that no token has is refused."""
        if f"{_GGML}{name}_token_id" not in self._metadata:
            return None
        value = self.field(f"{name}_token_id", int)
        if not 0 <= value < len(self.tokens):
            last = len(self.tokens) - 1
            raise UserError(
                f"{self.path}: {_GGML}{name}_token_id is {value}, but the vocabulary ends at {last}; "
                "correct it with gguf-set-metadata"
            )
        return value

    def special(self) -> dict[str, str]:
        """The special tokens by the names that chat templates use."""
        named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {short: self._metadata.get(f"{_GGML}{name}_token_id") for short, name in named.items()}
        known = {name: x for name, x in ids.items() if type(x) is int and 0 <= x < len(self.tokens)}
        return {f"{name}_token": self.tokens[x] for name, x in known.items()}

    def chat_template(self) -> str | None:
        """The model's chat template, if it has one."""
        template = self._metadata.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise UserError(f"{self.path}: tokenizer.chat_template is {shown(template)}, not a template")
        return template

    def frame(self) -> processors.TemplateProcessing | None:
        """The special tokens around a text, where they are asked for; refuses settings that nobody reads."""
        given = {key: value for key, value in self._metadata.items() if key.startswith(_GGML)}
        settings = Fields(
            str(self.path), {key: value for key, value in given.items() if key not in _GGML_READ}
        )
        for name in ("add_space_prefix", "add_sep_token", "remove_extra_whitespaces"):
            settings.only(_GGML + name, False)
        # A file of Llama 3's rule that does not say puts it there, as in llama.cpp.
        unsaid = given[f"{_GGML}pre"] == "llama-bpe" and f"{_GGML}bos_token_id" in given
        begins = settings.take(f"{_GGML}add_bos_token", bool, unsaid)
        ends = settings.take(f"{_GGML}add_eos_token", bool, False)
        settings.close(_GGML_HARMLESS)
        special = []
        for name in [*("bos",) * begins, *("eos",) * ends]:
            index = self.token_id(name)
            if index is None:
                raise UserError(
                    f"{self.path}: {_GGML}add_{name}_token is set, but there is no {_GGML}{name}_token_id"
                )
            special.append({"id": name, "ids": [index], "tokens": [name]})
        text = [*("bos",) * begins, "$A", *("eos",) * ends]
        return processors.TemplateProcessing(single=text, special_tokens=special) if special else None


def gguf_backend(vocabulary: GgufVocabulary) -> tokenizers.Tokenizer:
    """What splits text into ids.  Raises `UserError` for fields that are damaged or of another kind."""
    path, tokens = vocabulary.path, vocabulary.tokens
    kind, words = vocabulary.field("model", str), vocabulary.field("pre", str)
    if kind != "gpt2":
        raise UserError(
            f"{path}: tokenizer.ggml.model is {kind!r}, but only 'gpt2' (byte-level BPE) is supported; "
            "use the model's folder with its tokenizer.json"
        )
    token_types = vocabulary.listed("token_type", int)
    if len(tokens) != len(token_types):
        raise UserError(
            f"{path}: tokenizer.ggml.token_type has {len(token_types)} entries for {len(tokens)} tokens"
        )
    if unknown := sorted({kind for kind in token_types if kind not in _TYPES}):
        raise UserError(f"{path}: tokenizer.ggml.token_type has {unknown[0]}, and types go from 0 to 6")
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.tokens has {len(tokens) - len(ids)} tokens twice")
    merges = [tuple(pair.split(" ", 1)) for pair in vocabulary.listed("merges", str)]
    try:
        model = models.BPE(ids, merges, ignore_merges=words == "llama-bpe")
    except Exception as fault:  # the library raises nothing narrower
        raise UserError(f"{path}: tokenizer.ggml.merges do not fit the vocabulary: {fault}") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(path, words)
    backend.decoder = decoders.ByteLevel()
    whole = [token for token, kind in zip(tokens, token_types, strict=True) if kind in _WHOLE]
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in whole])
    backend.post_processor = vocabulary.frame()
    return backend


def _pre_tokenizer(path: Path, name: str) -> pre_tokenizers.PreTokenizer:
    """How a text is cut into words before the merges, by llama.cpp's name for the rule."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return gpt2
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    rules = {"llama-bpe": (_LLAMA3_WORDS,), "default": _DEFAULT_WORDS}.get(name)
    if rules is None:
        raise UserError(
            f"{path}: tokenizer.ggml.pre is {name!r}, but only 'smollm', 'llama-bpe', 'gpt-2' or 'default' "
            "is supported; use the model's folder with its tokenizer.json"
        )
    cuts = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in rules]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, spell])
