"""Texts of tokens: pieces add up to the text, which ends where decoding token by token would end it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sol_jax.generation.transcript import Transcript
from sol_jax.models.tokenizer import load_tokenizer

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


@settings(max_examples=300, deadline=None)
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
