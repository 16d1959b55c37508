"""Long texts in pieces, with the ids of the whole: a tokenizer takes 150 bytes of memory for each character.

A window of the text is encoded, and another that begins before the first one's end.  Where both agree on
every token of a stretch, and on where its words begin, far from the ends of either, the rest of the text
cannot tell them apart: there they are joined.  Two kinds of text could deceive them.  Of rules that look
ahead without end (digits in threes, counted from the right) a first window that ends a character earlier
tells.  In a word that repeats itself for thousands of characters two windows can agree by chance, so
nothing is joined within one.  Without a place to join them the first window grows, to the end of the text
at last.
"""

from collections.abc import Callable

import tokenizers

PIECE = 1 << 17  # characters of a window
OVERLAP = 1 << 12  # that two windows share
DISTINCT = 32  # tokens that a stretch without words must have: one that repeats itself has fewer


def encode_long(
    encode: Callable[[str], tokenizers.Encoding], text: str, piece: int = PIECE, overlap: int = OVERLAP
) -> list[int]:
    """The ids of `encode(text)`."""
    ids: list[int] = []
    begin, first, size = 0, 0, piece  # of the window; its first token that counts
    window = encode(text[:size])
    while begin + size < len(text):
        found = None
        next_begin = _last_start(window, size - overlap)
        if next_begin is not None and next_begin > 0:
            start = begin + next_begin
            probe = encode(text[start : begin + size - 1])
            if _stretch(probe, next_begin, size, overlap)[1] == _stretch(window, 0, size, overlap)[1]:
                follower = encode(text[start : start + piece])
                found = _joint(window, follower, next_begin, size, overlap)
        if found is None or found[0] < first:
            size *= 2
            window = encode(text[begin : begin + size])
            continue
        assert next_begin is not None
        ids += window.ids[first : found[0]]
        begin, first, size, window = begin + next_begin, found[1], piece, follower
    return ids + window.ids[first:]


def _clean(offsets: list[tuple[int, int]], i: int) -> bool:
    """Whether token i begins where the one before it ends, and not within a character that both share."""
    return i > 0 and offsets[i - 1][1] <= offsets[i][0] and offsets[i - 1][0] < offsets[i][0]


def _last_start(window: tokenizers.Encoding, most: int) -> int | None:
    """The last place up to `most` at which a token begins."""
    offsets = window.offsets
    starts = (offsets[i][0] for i in range(len(offsets) - 1, 0, -1) if _clean(offsets, i))
    return next((start for start in starts if start <= most), None)


def _stretch(
    window: tokenizers.Encoding, shift: int, size: int, overlap: int
) -> tuple[list[int], list[tuple[int, int, bool]]]:
    """The tokens in the middle of the overlap: indices; begins, ids, and whether a word begins with them."""
    low, high = size - overlap + overlap // 4 - shift, size - overlap // 4 - shift
    starts, ids, words = [start for start, _ in window.offsets], window.ids, window.word_ids
    inside = [i for i, start in enumerate(starts) if low <= start < high]
    return inside, [
        (starts[i] + shift, ids[i], i == 0 or words[i] is None or words[i] != words[i - 1]) for i in inside
    ]


def _joint(
    window: tokenizers.Encoding, follower: tokenizers.Encoding, shift: int, size: int, overlap: int
) -> tuple[int, int] | None:
    """Where the windows are joined: the index of one token in both; None if they do not agree."""
    of_ours, ours = _stretch(window, 0, size, overlap)
    of_theirs, theirs = _stretch(follower, shift, size, overlap)
    if not of_ours or ours != theirs:
        return None
    varied = len({token for _, token, _ in ours}) >= DISTINCT
    middle, offsets, their_offsets = len(of_ours) // 2, window.offsets, follower.offsets
    for i, j, (_, _, begins) in list(zip(of_ours, of_theirs, ours, strict=True))[middle:]:
        if (begins or varied) and _clean(offsets, i) and _clean(their_offsets, j):
            return i, j
    return None
