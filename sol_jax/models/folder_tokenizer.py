"""The tokenizer of a Hugging Face folder: tokenizer.json, changed as tokenizer_config.json says.

`transformers` builds its fast tokenizers from both files, and a setting that is not read gives other ids
without a word.  What it does is done here, in its order, and what cannot be done here is refused by name.

Source: transformers 4.57, `PreTrainedTokenizerFast`, `LlamaTokenizerFast` and `PreTrainedTokenizerBase`.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, pre_tokenizers, processors

from sol_jax.errors import UserError
from sol_jax.files import parse_json, read_json, shown

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Lists of further ones: `extra_special_tokens` is a dictionary by name in transformers 4, a list in 5.
_MORE = ("additional_special_tokens", "extra_special_tokens")
# Classes that set the tokens around a text from add_bos_token and add_eos_token, and what they assume unsaid.
_LLAMA = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_BEGINS = {**dict.fromkeys((*_LLAMA, "CohereTokenizer"), True), "GPTNeoXTokenizer": False}
_LLAMA_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SPARE_IDS = 100_000  # that a vocabulary may leave out
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Where tokenizer.json may say that a space goes before a text.
_PREFIXED = {"always", "first"}


class FolderTokenizer(NamedTuple):
    """The backend, and the special tokens by the names that chat templates use."""

    backend: tokenizers.Tokenizer
    special: dict[str, Any]
    settings: dict[str, Any]
    earlier_fingerprint: str  # of tokenizer.json alone


def read_folder_tokenizer(folder: Path) -> FolderTokenizer:
    """The tokenizer of a folder.  Raises `UserError` for a file or a setting that cannot be honoured."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder} has no tokenizer.json; other kinds of tokenizer are not read")
    described, backend = _backend(file)
    backend.no_truncation()
    backend.no_padding()
    earlier = hashlib.sha256(backend.to_str().encode()).hexdigest()
    config = folder / "tokenizer_config.json"
    settings = _settings(folder, config)
    special = _special(config, backend, settings)
    _add_tokens(config, backend, _declared(folder, config, settings), special)
    backend.encode_special_tokens = _flag(config, settings, "split_special_tokens", False)
    llama, named = _is_llama(settings), settings.get("tokenizer_class") is not None
    if _class(settings) in _BEGINS or (not named and {"add_bos_token", "add_eos_token"} & settings.keys()):
        _frame(config, backend, settings, special)
    _prefix_space(config, backend, described, settings, llama)
    return FolderTokenizer(backend, _spelled(special), settings, earlier)


def _backend(file: Path) -> tuple[Any, tokenizers.Tokenizer]:
    try:
        text = file.read_text(encoding="utf-8")
        described = parse_json(text)
        _check_ids(file, described)
        backend = tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit, MemoryError, UserError):
        raise
    except BaseException as fault:  # the library raises nothing narrower, and its panics are no `Exception`
        raise UserError(f"{file} is damaged, or unknown to this version of tokenizers: {fault}") from None
    for name in ("dropout", "alpha", "nbest_size"):  # of training: ids would be drawn anew each time
        value = described["model"].get(name) or getattr(backend.model, name, None)
        if value:
            raise UserError(f"{file}: {name} of the model is {value}, so ids would be random; set it to null")
    return described, backend


def _check_ids(file: Path, described: Any) -> None:
    """Raises `UserError` for ids far beyond the number of tokens: the library counts up to the largest."""
    vocabulary = described["model"]["vocab"]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token["id"] for token in described.get("added_tokens") or []]
    most = max((index for index in ids if type(index) is int), default=0)
    if most > 2 * (len(vocabulary) + len(ids)) + SPARE_IDS:
        raise UserError(f"{file}: a token has the id {most}, and there are {len(ids)} tokens; correct it")


def _settings(folder: Path, config: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what older versions kept in special_tokens_map.json."""
    settings = read_json(config) if config.is_file() else {}
    older = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in settings and older.is_file():
        settings = {**settings, **read_json(older)}
    return settings


def _class(settings: Mapping[str, Any]) -> str:
    return str(settings.get("tokenizer_class")).removesuffix("Fast")


def _is_llama(settings: Mapping[str, Any]) -> bool:
    return _class(settings) in _LLAMA


def _special(
    config: Path, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]
) -> dict[str, AddedToken | list[AddedToken]]:
    """The special tokens that the settings name, and those that the class assumes and the vocabulary has."""
    found: dict[str, AddedToken | list[AddedToken]] = {}
    for name in SPECIAL:
        given = settings.get(name)
        if name not in settings and _is_llama(settings) and name in _LLAMA_SPECIAL:
            given = _LLAMA_SPECIAL[name] if backend.token_to_id(_LLAMA_SPECIAL[name]) is not None else None
        if given is not None:
            found[name] = _token(config, name, given, special=True)
    for name in _MORE:
        several = settings.get(name) or []
        if isinstance(several, dict):
            found |= {key: _token(config, key, value, special=True) for key, value in several.items()}
        elif isinstance(several, list):
            found[name] = [_token(config, name, value, special=True) for value in several]
        else:
            raise UserError(f"{config}: {name} is {shown(several)}, not a list of tokens")
    return found


def _token(config: Path, name: str, given: Any, special: bool = False) -> AddedToken:
    """A token as a file describes it: its spelling, or an object with that and its flags."""
    fields = {"content": given, "special": special} if isinstance(given, str) else given
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise UserError(f"{config}: {name} is {shown(given)}, not a token's spelling")
    if not fields["content"].isascii() and re.search(r"[\ud800-\udfff]", fields["content"]):
        raise UserError(f"{config}: {name} is {fields['content']!a}, which has half of a surrogate pair")
    flags = {flag: fields[flag] for flag in _FLAGS if flag in fields}
    if not all(isinstance(value, bool) for value in flags.values()):
        raise UserError(f"{config}: {name} has flags that are neither true nor false: {shown(given)}")
    return AddedToken(fields["content"], **{"special": special, **flags})


def _declared(folder: Path, config: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens that files add to the vocabulary, by the id that they are said to have."""
    if "added_tokens_decoder" in settings:
        given, where = settings["added_tokens_decoder"], config
    else:
        where = folder / "added_tokens.json"  # of older versions: spelling -> id
        older = read_json(where) if where.is_file() else {}
        names = {settings.get(name) for name in SPECIAL if isinstance(settings.get(name), str)}
        given = {
            str(index): {"content": token, "special": token in names, "normalized": token not in names}
            for token, index in older.items()
        }
    if not isinstance(given, dict):
        raise UserError(f"{where}: added_tokens_decoder is {shown(given)}, not tokens by their ids")
    found = {}
    for index, described in given.items():
        if not index.isdecimal() or len(index) > 9 or not isinstance(described, dict):
            raise UserError(
                f"{where}: added_tokens_decoder has {shown(described)} for {shown(index)}, "
                "not a token for an id"
            )
        found[int(index)] = _token(where, f"token {index}", described)
    return found


def _add_tokens(
    config: Path,
    backend: tokenizers.Tokenizer,
    declared: Mapping[int, AddedToken],
    special: Mapping[str, AddedToken | list[AddedToken]],
) -> None:
    """Adds what tokenizer.json lacks, or has with other flags."""
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    added = [token for _, token in sorted(declared.items()) if repr(token) not in known]
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    there |= {token.content for token in added}
    names = {token.content for token in _each(special)}
    for token in added:
        token.special = token.special or token.content in names
    for name, given in special.items():
        for token in given if isinstance(given, list) else [given]:
            missing = token.content not in there and backend.token_to_id(token.content) is None
            if missing and name in ("bos_token", "eos_token"):
                raise UserError(
                    f"{config.parent}: {name} is {token.content!r}, which is not in tokenizer.json"
                )
            if token.content not in there:
                added.append(token)
                there.add(token.content)
    backend.add_tokens(added)
    for index, token in declared.items():
        if backend.token_to_id(token.content) != index:
            raise UserError(
                f"{config}: added_tokens_decoder has {token.content!r} as {index}, but after tokenizer.json "
                f"it is {backend.token_to_id(token.content)}; the two files belong to different tokenizers"
            )


def _each(special: Mapping[str, AddedToken | list[AddedToken]]) -> Iterator[AddedToken]:
    for given in special.values():
        yield from given if isinstance(given, list) else [given]


def _spelled(special: Mapping[str, AddedToken | list[AddedToken]]) -> dict[str, Any]:
    """By name, as chat templates get them: what is not there is not named."""
    spelled = {
        name: [token.content for token in given] if isinstance(given, list) else given.content
        for name, given in special.items()
    }
    return {name: given for name, given in spelled.items() if given}


def _flag(config: Path, settings: Mapping[str, Any], name: str, default: bool) -> bool:
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"{config}: {name} is {shown(value)}, not true or false")
    return value


def _frame(
    config: Path,
    backend: tokenizers.Tokenizer,
    settings: Mapping[str, Any],
    special: Mapping[str, AddedToken | list[AddedToken]],
) -> None:
    """The special tokens around a text, as Llama's class sets them whatever tokenizer.json says."""
    asked = {"bos": _flag(config, settings, "add_bos_token", _BEGINS.get(_class(settings), True))}
    asked["eos"] = _flag(config, settings, "add_eos_token", False)
    pieces = {}
    for name in (name for name, wanted in asked.items() if wanted):
        token = special.get(f"{name}_token")
        if not isinstance(token, AddedToken):
            raise UserError(f"{config}: add_{name}_token is true, but there is no {name}_token")
        pieces[name] = (token.content, backend.token_to_id(token.content))
    text = [name for name in ("bos", "$A", "eos") if name == "$A" or name in pieces]
    backend.post_processor = processors.TemplateProcessing(
        single=text,
        special_tokens=[
            {"id": name, "ids": [index], "tokens": [content]} for name, (content, index) in pieces.items()
        ],
    )


def _prefix_space(
    config: Path,
    backend: tokenizers.Tokenizer,
    described: Mapping[str, Any],
    settings: Mapping[str, Any],
    llama: bool,
) -> None:
    """Whether a space goes before a text.

    The general class sets it where the words are cut by one byte-level rule; Llama's would build the
    tokenizer anew from another file, which is not read here.
    """
    asked = settings.get("add_prefix_space")
    if asked is not None:
        asked = _flag(config, settings, "add_prefix_space", False)
    if llama or settings.get("tokenizer_class") is None:
        if asked is not None and asked != _has_prefix_space(described):
            raise UserError(
                f"{config}: add_prefix_space is {asked}, and tokenizer.json does otherwise; let transformers "
                "save the tokenizer anew, or take the setting away"
            )
        return
    rule = described.get("pre_tokenizer") or {}
    if "add_prefix_space" in rule and rule["add_prefix_space"] != bool(asked):
        kind = {key: value for key, value in rule.items() if key != "type"} | {
            "add_prefix_space": bool(asked)
        }
        with contextlib.suppress(TypeError):  # transformers leaves such a rule as it is
            backend.pre_tokenizer = getattr(pre_tokenizers, rule["type"])(**kind)


def _has_prefix_space(described: Mapping[str, Any]) -> bool:
    rules = [described.get(name) or {} for name in ("normalizer", "pre_tokenizer")]
    text = json.dumps(rules)
    return (
        '"type": "Prepend"' in text
        or '"add_prefix_space": true' in text
        or any(f'"prepend_scheme": "{scheme}"' in text for scheme in _PREFIXED)
    )
