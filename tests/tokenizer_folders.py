"""Folders of tokenizers with settings that change ids, and the ids that transformers 4.57.3 gives.

`tests/parity` compares with transformers itself; `tests/models/test_folder_tokenizer.py` with what is here.
"""

import json
import pathlib
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

END, START, CHAT = 256, 257, 258  # ids of <|end|>, <|start|>, and of the first one that a file adds
TEXT = "a<|chat|> b<|end|>"
A, SPACE, B = 64, 220, 65  # ids of "a", " " and "b" among the bytes


class Case(NamedTuple):
    """A folder, a text, and the ids of that with and without what goes around it."""

    settings: dict[str, Any]  # of tokenizer_config.json
    ids: list[int]
    framed: list[int]
    text: str = TEXT
    files: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    kind: str = "bytes"


def byte_ids(text: str) -> list[int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [letters.index(letter) for word, _ in spelled for letter in word]


def token(content: str, **flags: bool) -> dict[str, Any]:
    usual = dict.fromkeys(("lstrip", "rstrip", "single_word"), False) | {"normalized": False, "special": True}
    return {"content": content, **usual, **flags}


CHAT_IDS = [A, CHAT, SPACE, B, END]
PLAIN_IDS = [*byte_ids("a<|chat|> b"), END]
GENERAL = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
LLAMA = {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|end|>", "bos_token": "<|start|>"}
NEOX = {**LLAMA, "tokenizer_class": "GPTNeoXTokenizerFast"}
ADDED = {"added_tokens_decoder": {"258": token("<|chat|>")}}

CASES = {
    "nothing special": Case(GENERAL, PLAIN_IDS, [START, *PLAIN_IDS]),
    "a token that tokenizer.json lacks": Case({**GENERAL, **ADDED}, CHAT_IDS, [START, *CHAT_IDS]),
    "a token that takes the space after it": Case(
        {**GENERAL, "added_tokens_decoder": {"258": token("<|chat|>", rstrip=True)}},
        [A, CHAT, B, END],
        [START, A, CHAT, B, END],
    ),
    "a token of the vocabulary that becomes whole": Case(
        {**GENERAL, "added_tokens_decoder": {"66": token("c", lstrip=True)}},
        [A, 66, B],
        [START, A, 66, B],
        text="a cb",
    ),
    "a further special token": Case(
        {**GENERAL, "additional_special_tokens": ["<|chat|>"]}, CHAT_IDS, [START, *CHAT_IDS]
    ),
    "a named special token": Case(
        {**GENERAL, "extra_special_tokens": {"chat_token": "<|chat|>"}}, CHAT_IDS, [START, *CHAT_IDS]
    ),
    "a token to fill up with": Case({**GENERAL, "pad_token": "<|chat|>"}, CHAT_IDS, [START, *CHAT_IDS]),
    "special_tokens_map.json": Case(
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        CHAT_IDS,
        [START, *CHAT_IDS],
        files={"special_tokens_map": {"eos_token": "<|end|>", "pad_token": "<|chat|>"}},
    ),
    "special_tokens_map.json is older": Case(
        {**GENERAL, "added_tokens_decoder": {}},
        PLAIN_IDS,
        [START, *PLAIN_IDS],
        files={"special_tokens_map": {"eos_token": "<|start|>", "pad_token": "<|chat|>"}},
    ),
    "added_tokens.json": Case(
        GENERAL, CHAT_IDS, [START, *CHAT_IDS], files={"added_tokens": {"<|chat|>": CHAT}}
    ),
    "special tokens are split": Case(
        {**GENERAL, "split_special_tokens": True},
        byte_ids(TEXT),
        [START, *byte_ids(TEXT)],
    ),
    "general: whether it begins is tokenizer.json's": Case(
        {**GENERAL, "bos_token": "<|start|>", "add_bos_token": False}, PLAIN_IDS, [START, *PLAIN_IDS]
    ),
    "llama: begins": Case({**LLAMA, "add_bos_token": True}, PLAIN_IDS, [START, *PLAIN_IDS]),
    "llama: begins unsaid": Case(LLAMA, PLAIN_IDS, [START, *PLAIN_IDS]),
    "llama: does not begin": Case({**LLAMA, "add_bos_token": False}, PLAIN_IDS, PLAIN_IDS),
    "llama: ends": Case({**LLAMA, "add_eos_token": True}, PLAIN_IDS, [START, *PLAIN_IDS, END]),
    "gpt-neox: begins": Case({**NEOX, "add_bos_token": True}, PLAIN_IDS, [START, *PLAIN_IDS]),
    "gpt-neox: does not begin, unsaid": Case(NEOX, PLAIN_IDS, PLAIN_IDS),
    "gpt-neox: ends": Case({**NEOX, "add_eos_token": True}, PLAIN_IDS, [*PLAIN_IDS, END]),
    "cohere: begins unsaid": Case(
        {**LLAMA, "tokenizer_class": "CohereTokenizerFast"}, PLAIN_IDS, [START, *PLAIN_IDS]
    ),
    "cohere: does not begin": Case(
        {**LLAMA, "tokenizer_class": "CohereTokenizerFast", "add_bos_token": False}, PLAIN_IDS, PLAIN_IDS
    ),
    "a space before": Case(
        {**GENERAL, "add_prefix_space": True},
        [SPACE, A, END, SPACE, B],
        [START, SPACE, A, END, SPACE, B],
        text="a<|end|>b",
    ),
    "no space before, unsaid": Case(GENERAL, [A], [START, A], text="a", kind="bytes, prefixed"),
    "sentencepiece": Case(LLAMA, [264, 265], [2, 264, 265], text="a b", kind="sentencepiece"),
}


def backend(kind: str) -> tokenizers.Tokenizer:
    """Bytes as GPT-2 spells them, then <|end|> and <|start|>; or SentencePiece's way."""
    if kind == "sentencepiece":
        return sentencepiece()
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "<|start|>"]
    built = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes, prefixed")
    built.decoder = decoders.ByteLevel()
    return framed(built)


def framed(built: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    built.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("<|end|>", "<|start|>")])
    built.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", built.token_to_id("<|start|>"))]
    )
    return built


def sentencepiece() -> tokenizers.Tokenizer:
    """A tiny vocabulary as Llama 2's converter writes it: ▁ for spaces, bytes for what it lacks."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    names = ["<unk>", "<|end|>", "<|start|>", *bytes_, "▁", "a", "b", "c", ".", "▁a", "▁b", "ab"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    ids = {name: i for i, name in enumerate(names)}
    built = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return framed(built)


def write(folder: pathlib.Path, case: Case) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend(case.kind).save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config": case.settings, **case.files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
