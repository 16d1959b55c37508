"""Does text that is scored on share runs of words with text that was trained on?

    python -m experiments.studies.overlap --source wiki.test.raw.gz --document_start '^ = [^=].* = $' \\
        --train_source books.jsonl.gz,paragraphs.jsonl.gz --output overlap.csv

An evaluation refuses documents that a policy was trained on, but knows them as wholes: an article that was
cut or spelled otherwise passes.  Here words are compared, in lower case, without punctuation.  The CSV has a
row for each document of `--source`: its words, the share of them that lie in a run of `--words` words that is
in the training text too, and the longest such run.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any

from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import results_csv as results
from sol_jax.files import path_argument
from sol_jax.text.documents import Document, read_documents


def words_of(text: str) -> list[str]:
    """In lower case, without what is neither letter nor digit."""
    return re.findall(r"[^\W_]+", text.lower())


def _runs(words: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[n:] for n in range(length)), strict=False)


def overlaps(
    documents: Sequence[Document], training: Iterable[Document], length: int
) -> list[dict[str, Any]]:
    """A row for each document; see the head of this module."""
    words = [words_of(document.text) for document in documents]
    wanted = {run for own in words for run in _runs(own, length)}
    found: set[tuple[str, ...]] = set()
    for document in training:
        found.update(wanted.intersection(_runs(words_of(document.text), length)))
    rows = []
    for document, own in zip(documents, words, strict=True):
        shared, longest, start = set[int](), (0, 0), 0
        for n, run in enumerate(_runs(own, length)):
            if run not in found:
                start = n + 1
                continue
            shared.update(range(n, n + length))
            longest = max(longest, (n + length - start, -start))
        size, begin = longest[0], -longest[1]
        row = {"document": document.title.strip() or " ".join(own[:6]), "words": len(own)}
        row |= {"shared": len(shared) / max(len(own), 1), "longest": size}
        rows.append(row | {"run": " ".join(own[begin : begin + size])})
    return rows


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="text to be scored on")
    parser.add_argument("--document_start", default="", help="regular expression that begins its documents")
    parser.add_argument("--train_source", required=True, help="text that was trained on")
    parser.add_argument("--words", type=int, default=8, help="words of a run")
    parser.add_argument("--output", type=path_argument, required=True, help="CSV to write")
    args = parser.parse_args(argv)
    if args.words < 1:
        raise UserError(f"--words={args.words} must be at least 1")
    training = read_documents(args.train_source)
    rows = overlaps(read_documents(args.source, args.document_start), training, args.words)
    results.write(args.output, [results.texts(row) for row in rows])
    words = sum(len(words_of(document.text)) for document in training)
    worst = max(rows, key=lambda row: row["longest"])
    print(
        f"{len(rows)} documents of {sum(row['words'] for row in rows):,} words against {words:,}: "
        f"{sum(row['longest'] > 0 for row in rows)} share a run of {args.words} words; the longest has "
        f"{worst['longest']}: {worst['run']!r}"
    )


if __name__ == "__main__":
    main()
