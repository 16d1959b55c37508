"""Tokenizers of folders: what changes ids is honoured as transformers does, or refused by name."""

import json

import pytest
import tokenizer_folders
from small_models import llama_config
from tokenizer_folders import CASES, GENERAL, LLAMA, Case, token

from sol_jax.errors import UserError
from sol_jax.models.tokenizer import check_vocabulary, load_tokenizer


@pytest.mark.parametrize("name", CASES)
def test_settings_that_change_ids(name, tmp_path):
    case = CASES[name]
    tokenizer = load_tokenizer(tokenizer_folders.write(tmp_path, case))
    assert tokenizer.encode(case.text) == case.ids
    assert tokenizer.encode(case.text, add_special_tokens=True) == case.framed


def test_tokenizers_that_encode_otherwise_have_other_fingerprints(tmp_path):
    ids, prints = {}, {}
    for n, case in enumerate(case for case in CASES.values() if case.kind == "bytes"):
        tokenizer = load_tokenizer(tokenizer_folders.write(tmp_path / str(n), case))
        ids[n] = (tokenizer.encode(tokenizer_folders.TEXT), tokenizer.encode("a", add_special_tokens=True))
        prints[n] = tokenizer.fingerprint
    for n in ids:
        for m in ids:
            assert ids[n] == ids[m] or prints[n] != prints[m]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"added_tokens_decoder": {"300": token("<|chat|>")}}, r"'<\|chat\|>' as 300, but .* it is 258"),
        ({"added_tokens_decoder": {"3": token("<|end|>")}}, r"'<\|end\|>' as 3, but .* it is 256"),
        ({"added_tokens_decoder": {"x": token("a")}}, "for 'x', not a token for an id"),
        ({"added_tokens_decoder": {"258": "a"}}, "has 'a' for '258', not a token"),
        ({"added_tokens_decoder": {"258": {"content": 3}}}, "token 258 is {'content': 3}, not a token's"),
        ({"added_tokens_decoder": [1]}, r"added_tokens_decoder is \[1\]"),
        ({"added_tokens_decoder": {"258": token("a") | {"lstrip": "yes"}}}, "neither true nor false"),
        ({"split_special_tokens": "no"}, "split_special_tokens is 'no', not true or false"),
        ({"additional_special_tokens": 3}, "additional_special_tokens is 3, not a list"),
        ({"pad_token": 3}, "pad_token is 3, not a token's spelling"),
        ({"pad_token": "a\ud83d"}, "pad_token is .*, which has half of a surrogate pair"),
        ({"eos_token": "</s>"}, "eos_token is '</s>', which is not in"),
        ({**LLAMA, "bos_token": None}, "add_bos_token is true, but there is no bos_token"),
        ({**LLAMA, "add_bos_token": "x"}, "add_bos_token is 'x', not true or false"),
        ({**LLAMA, "add_prefix_space": True}, "add_prefix_space is True, and tokenizer.json does otherwise"),
        ({"chat_template": 3}, "chat_template is no text"),
        ({"chat_template": {"default": 3}}, "chat_template is no text"),
    ],
)
def test_settings_that_cannot_be(settings, message, tmp_path):
    folder = tokenizer_folders.write(tmp_path, Case(GENERAL | settings, [], []))
    with pytest.raises(UserError, match=message) as fault:
        load_tokenizer(folder)
    assert str(tmp_path) in str(fault.value)


@pytest.mark.parametrize("dropout", [0.1, 1.0])
def test_ids_are_never_random(dropout, tmp_path):
    folder = tokenizer_folders.write(tmp_path, CASES["nothing special"])
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    for harmless in (None, 0.0):
        described["model"]["dropout"] = harmless
        file.write_text(json.dumps(described))
        load_tokenizer(folder)
    described["model"]["dropout"] = dropout
    file.write_text(json.dumps(described))
    with pytest.raises(
        UserError, match=r"tokenizer\.json: dropout of the model is .*, so ids would be random"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize("index", [10**6, 2**31, 2**32 - 1])
def test_ids_far_beyond_the_vocabulary(index, tmp_path):
    """The library would count up to them, in gigabytes."""
    folder = tokenizer_folders.write(tmp_path, CASES["nothing special"])
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["vocab"]["a"] = index
    file.write_text(json.dumps(described))
    with pytest.raises(UserError, match=f"a token has the id {index}, and there are"):
        load_tokenizer(folder)


def test_a_token_to_fill_up_with_may_be_one_too_many(tmp_path):
    """transformers has a row less too; only a text that spells it cannot be read."""
    tokenizer = load_tokenizer(tokenizer_folders.write(tmp_path / "pad", CASES["a token to fill up with"]))
    check_vocabulary(tokenizer, llama_config(vocab_size=258))
    assert tokenizer.vocab_size == 258
    assert tokenizer.encode("a b") == [64, 220, 65]
    with pytest.raises(
        UserError, match=r"the text spells '<\|chat\|>', which has id 258, but the model embeds 258"
    ):
        tokenizer.encode("a<|chat|>")
    check_vocabulary(tokenizer, llama_config(vocab_size=259))  # of a model that has the row
    assert tokenizer.encode("a<|chat|>") == [64, 258]
    for vocab_size in (257, 256):  # not two of them
        with pytest.raises(UserError, match=f"has 259 ids but the model embeds {vocab_size}"):
            check_vocabulary(tokenizer, llama_config(vocab_size=vocab_size))
    other = load_tokenizer(tokenizer_folders.write(tmp_path / "chat", CASES["a further special token"]))
    with pytest.raises(UserError, match="has 259 ids but the model embeds 258"):
        check_vocabulary(other, llama_config(vocab_size=258))


@pytest.mark.parametrize("stale", [2, [2, 3], 10**6, "</s>", [], None, {"a": 1}])
def test_an_old_eos_of_config_json_stops_nothing(stale, tmp_path):
    files = {"config": {"eos_token_id": stale}, "generation_config": {"eos_token_id": [256, 7]}}
    for settings in (GENERAL, {"tokenizer_class": "PreTrainedTokenizerFast"}):
        case = Case(settings, [], [], files=files)
        tokenizer = load_tokenizer(tokenizer_folders.write(tmp_path, case))
        check_vocabulary(tokenizer, llama_config(vocab_size=258))
        assert (tokenizer.eos_id, tokenizer.end_ids) == (256, {256, 7})


@pytest.mark.parametrize("name", ["bos", "eos"])
@pytest.mark.parametrize("index", [258, -1, 2**32 - 1])
def test_ids_that_the_vocabulary_does_not_have(name, index, tmp_path):
    settings = GENERAL if name == "bos" else {"tokenizer_class": "PreTrainedTokenizerFast"}
    case = Case(settings, [], [], files={"config": {f"{name}_token_id": index}})
    tokenizer = load_tokenizer(tokenizer_folders.write(tmp_path, case))
    with pytest.raises(UserError, match=f"{name}_token_id is {index}, but the tokenizer's ids end at 257"):
        check_vocabulary(tokenizer, llama_config(vocab_size=258))
