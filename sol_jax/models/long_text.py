"""Long texts in pieces, with the ids of the whole: a tokenizer takes 150 bytes of memory for each character.

A window of the text is encoded, and another that begins before the first one's end.  Where both agree on
every token of a stretch, far from the ends of either, the rest of the text cannot tell them apart: there they
are joined.  If they do not agree the first window grows, to the end of the text at last.
"""

from collections.abc import Callable

import tokenizers

PIECE = 1 << 17  # characters of a window
OVERLAP = 1 << 12  # that two windows share


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
            follower = encode(text[begin + next_begin : begin + next_begin + piece])
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


def _joint(
    window: tokenizers.Encoding, follower: tokenizers.Encoding, shift: int, size: int, overlap: int
) -> tuple[int, int] | None:
    """Where the windows are joined: the index of one token in both; None if they do not agree."""
    low, high = size - overlap + overlap // 4, size - overlap // 4
    ours = [(start, token) for (start, _), token in zip(window.offsets, window.ids, strict=True)]
    theirs = [
        (start + shift, token) for (start, _), token in zip(follower.offsets, follower.ids, strict=True)
    ]
    of_ours = [i for i, (start, _) in enumerate(ours) if low <= start < high]
    of_theirs = [i for i, (start, _) in enumerate(theirs) if low <= start < high]
    if not of_ours or [ours[i] for i in of_ours] != [theirs[i] for i in of_theirs]:
        return None
    middle = len(of_ours) // 2
    for i, j in zip(of_ours[middle:], of_theirs[middle:], strict=True):
        if _clean(window.offsets, i) and _clean(follower.offsets, j):
            return i, j
    return None
