"""Texts of tokens: pieces add up to the text, which ends where decoding token by token would end it."""

import functools

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from sol_jax.generation.transcript import Transcript
from sol_jax.models.tokenizer import Tokenizer, load_tokenizer

# The byte-level alphabet: printable bytes are themselves, the others come after all bytes, in order.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted(set(range(256)) - set(PRINTABLE))
LETTER = {byte: byte for byte in PRINTABLE} | {byte: 256 + n for n, byte in enumerate(OTHERS)}
BYTE_IDS = {byte: sorted(LETTER.values()).index(letter) for byte, letter in LETTER.items()}


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    """One token a byte, then END: characters of several tokens, and bytes that are none; "z" ends it too."""
    tokenizer = load_tokenizer(tiny_folder / "model")
    tokenizer.end_ids |= {BYTE_IDS[ord("z")]}
    return tokenizer


def test_the_alphabet_is_the_tokenizer_s(tokenizer):
    assert tokenizer.encode("a€\n") == [BYTE_IDS[byte] for byte in "a€\n".encode()]


def by_definition(tokenizer, ids, max_tokens, stops):
    """Decodes everything anew after each token: the text, the number of tokens used and why it ended."""
    for n in range(1, len(ids) + 1):
        if ids[n - 1] in tokenizer.end_ids:
            return tokenizer.decode(ids[: n - 1]), n, "eos"
        text = tokenizer.decode(ids[:n])
        cuts = [text.find(stop) for stop in stops if stop in text]
        if cuts:
            return text[: min(cuts)], n, "stop"
        if n == max_tokens:
            return text, n, "length"
    return tokenizer.decode(ids), len(ids), None


def run(tokenizer, ids, max_tokens, stops):
    """The transcript of `ids`, and what it had settled before each of them."""
    transcript = Transcript(tokenizer, max_tokens, stops)
    settled = []
    for token in ids:
        if transcript.finish:
            break
        transcript.add(token)
        settled.append("".join(transcript.pieces[: transcript.settled()]))
    return transcript, settled


TEXTS = st.text(alphabet="abé€🙂�\nz", max_size=12)
BYTES = st.binary(max_size=8).map(list)


@settings(max_examples=300)
@given(
    parts=st.lists(TEXTS | BYTES, max_size=4),
    end=st.booleans(),
    max_tokens=st.integers(1, 40),
    stops=st.lists(st.text(alphabet="abé€🙂\n", min_size=1, max_size=3), max_size=3),
)
@example(
    ["abc"], False, 9, ["abc", "b"]
)  # the one that is complete first counts, not the one that begins first
@example(["a€", [0x80]], True, 40, [])  # a stray byte before the end
@example(["ab", [0xE2]], False, 3, ["bc"])  # ends within a character
@example(["a🙂b"], False, 40, ["🙂b"])
@example(["a🙂zb"], True, 40, [])  # the second end token comes first
def test_against_decoding_token_by_token(tokenizer, parts, end, max_tokens, stops):
    ids = []
    for part in parts:
        ids += [BYTE_IDS[byte] for byte in (part.encode() if isinstance(part, str) else part)]
    ids += [tokenizer.eos_id] * end
    text, used, finish = by_definition(tokenizer, ids, max_tokens, stops)
    transcript, settled = run(tokenizer, ids, max_tokens, stops)
    assert transcript.finish == finish
    assert transcript.ids == ids[:used]
    assert len(transcript.pieces) == used
    if finish:  # else the last character may be pending
        assert transcript.text == text
    assert "".join(transcript.pieces) == transcript.text
    assert all(transcript.text.startswith(shown) for shown in settled)  # nothing shown was taken back
    if finish:
        assert "".join(transcript.pieces[: transcript.settled()]) == text


@pytest.mark.parametrize(
    ("text", "max_tokens", "written", "finish"),
    [
        ("a€bz", 40, 5, "eos"),  # bytes that only begin the € are of the text
        ("z", 40, 0, "eos"),
        ("a€bc€d", 40, 5, "stop"),  # cut: "c" and all bytes of the €
        ("a€b", 3, 3, "length"),
        ("a€b", 40, 5, None),
    ],
)
def test_tokens_that_are_of_the_text(tokenizer, text, max_tokens, written, finish):
    transcript, _ = run(tokenizer, [BYTE_IDS[byte] for byte in text.encode()], max_tokens, ["c€"])
    assert (transcript.written(), transcript.finish) == (written, finish)
    assert "".join(transcript.pieces[written:]) == ""


# --- every kind of tokenizer -----------------------------------------------------------------------------

PLAIN = ["a", "b", "ab", ".", " ", "\n", "é", "\ufffd"]
BROKEN = [f"<0x{byte:02X}>" for byte in (*"🙂€é".encode(), 0x80, 0xFF, 0x41)]
PREFIXED = ["▁", "▁a", "▁ab", "▁▁", "a", "b", ".", "é", "\ufffd", *BROKEN]
SPELLED = ["a", "Ġ", "Ġa", "Ċ", "Ã", "©", "ð", "Ł", "Ļ", "Ĥ", "â", "Ĥ¬", "ï¿½"]
SENTENCEPIECE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
KINDS = {
    "bytes": (SPELLED, decoders.ByteLevel()),
    "sentencepiece": (PREFIXED, decoders.Sequence([*SENTENCEPIECE, decoders.Strip(" ", 1, 0)])),
    "sentencepiece, no space dropped": (PREFIXED, decoders.Sequence(SENTENCEPIECE)),
    "metaspace": (["▁", "▁a", "▁ab", "a", "b", ".", "é"], decoders.Metaspace()),
    "metaspace, bytes": (PREFIXED, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "wordpiece": (["a", "##b", "ab", ".", "'", "##é"], decoders.WordPiece()),
    "ends of words": (["a", "b</w>", "ab</w>", ".</w>"], decoders.BPEDecoder()),
    "none": (PLAIN, None),
    "fused": (PLAIN, decoders.Fuse()),
}


@functools.cache
def of_kind(kind):
    vocabulary, decoder = KINDS[kind]
    ids = {token: i for i, token in enumerate(dict.fromkeys([*vocabulary, "<end>"]))}
    backend = tokenizers.Tokenizer(models.WordLevel(ids, "<end>"))
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend, eos_id=ids["<end>"])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(data=st.data())
def test_token_by_token_is_all_at_once(kind, data):
    tokenizer = of_kind(kind)
    tokens = st.integers(0, tokenizer.eos_id - 1)
    prompt, ids = (
        data.draw(st.lists(tokens, max_size=6)),
        data.draw(st.lists(tokens, min_size=1, max_size=12)),
    )
    before = tokenizer.decode(prompt)
    if before.endswith("\ufffd"):
        prompt, before = [], ""  # a prompt is a text, which does not end within a character
    transcript = Transcript(tokenizer, len(ids), prompt=prompt)
    shown = ""
    for token in ids:
        transcript.add(token)
        assert transcript.text.startswith(shown)  # nothing shown is taken back
        shown = "".join(transcript.pieces[: transcript.settled()])
    assert before + transcript.text == tokenizer.decode([*prompt, *ids])
    assert "".join(transcript.pieces) == transcript.text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(data=st.data())
def test_what_is_whole_is_decoded_as_the_library_does(kind, data):
    tokenizer = of_kind(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.eos_id - 1), max_size=8))
    theirs = tokenizer._backend.decode(ids, skip_special_tokens=False)
    if "\ufffd" not in theirs:
        assert tokenizer.decode(ids) == theirs


@pytest.mark.parametrize(
    ("kind", "prompt", "tokens", "text"),
    [
        # The space before a word that goes on a text.
        ("sentencepiece", ["▁a"], ["▁ab", "b"], " abb"),
        ("sentencepiece", [], ["▁ab", "b"], "abb"),
        ("sentencepiece", ["▁"], ["▁ab"], " ab"),
        ("metaspace", ["▁a"], ["▁ab"], " ab"),
        ("wordpiece", ["a"], ["ab", "##b"], " abb"),
        # A whole character before, between and after bytes that are none.
        ("sentencepiece", ["▁a"], [*BROKEN[:4], "<0xE2>", "<0x82>"], "🙂\ufffd\ufffd"),
        ("sentencepiece", ["▁a"], ["<0xFF>", *BROKEN[:4], "<0x80>", *BROKEN[4:7]], "\ufffd🙂\ufffd€"),
        ("metaspace, bytes", ["▁a"], [*BROKEN[:4], "<0xFF>", "<0xFF>", "▁a"], "🙂\ufffd\ufffd a"),
        ("bytes", ["a"], ["Ã", "©", "Ã", "a"], "é\ufffda"),
    ],
)
def test_what_a_text_is_after_a_prompt(kind, prompt, tokens, text):
    tokenizer = of_kind(kind)
    ids = {token: i for i, token in enumerate(dict.fromkeys(KINDS[kind][0]))}
    transcript = Transcript(tokenizer, len(tokens), prompt=[ids[token] for token in prompt])
    for token in tokens:
        transcript.add(ids[token])
    assert transcript.text == text
