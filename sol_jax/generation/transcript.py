"""The text of generated tokens, one token at a time: where it ends, and which token gave which characters.

A character may take several tokens; it belongs to the last of them.  The text ends before the first of the
tokenizer's end tokens and before the first stop string, wherever in a token that begins.

The text is what decoding prompt and tokens together adds to the prompt, token by token or all at once: some
tokenizers drop the space at the start of what they decode, and others put one between tokens.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

from sol_jax.models.tokenizer import Tokenizer

UNFINISHED = "�"  # what bytes that are no UTF-8, or not yet, decode to


class Transcript:
    """A growing text.  `finish` says why it ended; `pieces` are the characters of each token."""

    def __init__(
        self, tokenizer: Tokenizer, max_tokens: int, stops: Sequence[str] = (), prompt: Sequence[int] = ()
    ):
        self.ids: list[int] = []  # with the end token, if one came
        self.pieces: list[str] = []
        self.text = ""
        self.finish: Literal["eos", "stop", "length"] | None = None
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._stops = tuple(stops)
        # The tokens, of prompt and text, with which decoding goes on: some that are settled, then those from
        # `_read` on.  The first `_released` characters of them are in the prompt or in `text`.
        self._window = self._context(list(prompt)) or list(prompt)
        self._read, self._released = len(self._window), len(tokenizer.decode(self._window))

    def add(self, token: int) -> None:
        """Takes the next token.  A text that has ended takes no more."""
        if self.finish:
            raise ValueError("the text has ended")
        if token in self._tokenizer.end_ids:
            self._release(final=True)
            self.ids.append(token)
            self.pieces.append("")
            self.finish = "eos"
            return
        self.ids.append(token)
        self._window.append(token)
        self.pieces.append("")
        self._release(final=False)
        self._cut_at_stop()
        if not self.finish and len(self.ids) == self._max_tokens:
            self._release(final=True)
            self.finish = "length"

    def settled(self) -> int:
        """How many pieces will not change any more, whatever comes."""
        if self.finish:
            return len(self.pieces)
        # What may be the beginning of a stop string may yet be cut off.
        longest = max(map(len, self._stops), default=1) - 1
        tails = (self.text[-n:] for n in range(min(longest, len(self.text)), 0, -1))
        open_tail = next((t for t in tails if any(s.startswith(t) for s in self._stops)), "")
        unread = len(self._window) - self._read
        ends = itertools.accumulate(map(len, self.pieces[: len(self.pieces) - unread]))
        return sum(end <= len(self.text) - len(open_tail) for end in ends)

    def written(self) -> int:
        """How many tokens are of the text: not the end token, nor those that a stop string cut off whole."""
        if self.finish == "stop":
            return max((n for n, piece in enumerate(self.pieces, 1) if piece), default=0)
        return len(self.ids) - (self.finish == "eos")

    def _release(self, final: bool) -> None:
        """Adds the characters that are complete, or all of them, to the text and to the last piece."""
        known = self._tokenizer.decode(self._window)
        stable = known if final else known.rstrip(UNFINISHED)
        piece = stable[self._released :]
        self._released += len(piece)
        if piece:
            self.pieces[-1] += piece
            self.text += piece
        if stable == known:
            self._window = self._context(self._window[self._read :]) or self._window
            self._read, self._released = len(self._window), len(self._tokenizer.decode(self._window))

    def _context(self, ids: list[int]) -> list[int]:
        """The last of `ids` that decide how the next token is decoded; empty if all of them say nothing.

        Spaces alone may be dropped, and with them the space of the next token would be.
        """
        count = 1
        while count <= len(ids):
            if self._tokenizer.decode(ids[-count:]).strip(f" {UNFINISHED}"):
                return ids[-count:]
            count *= 2
        return ids if self._tokenizer.decode(ids).strip(f" {UNFINISHED}") else []

    def _cut_at_stop(self) -> None:
        """Ends the text before the first stop string; any that is there ends in the last piece."""
        piece = len(self.pieces[-1])
        found = [self.text.find(stop, max(0, len(self.text) - piece - len(stop))) for stop in self._stops]
        cuts = [at for at in found if at >= 0]
        if not cuts:
            return
        self.text, self.finish = self.text[: min(cuts)], "stop"
        room = min(cuts)
        for i, piece_text in enumerate(self.pieces):
            self.pieces[i] = piece_text[:room]
            room -= len(self.pieces[i])
