"""Runs of words that a text shares with training text, by hand."""

import csv

import pytest

from experiments.studies import overlap
from sol_jax.text.documents import Document

TRAINING = [Document("It was: a dark and stormy night; the rain fell.", ""), Document("in torrents", "")]


def test_words_are_compared_without_case_and_punctuation():
    assert overlap.words_of("It's A_dark, <unk> Über-night!") == [
        "it",
        "s",
        "a",
        "dark",
        "unk",
        "über",
        "night",
    ]


def test_the_longest_run_and_the_share_of_words():
    """Runs of three words: `a dark and`, `dark and stormy`, then a gap, then `night the rain`."""
    texts = ["A DARK, and stormy day. Night, the rain!", "the rain fell in torrents", "no", ""]
    rows = overlap.overlaps([Document(text, f"{n}") for n, text in enumerate(texts)], TRAINING, 3)
    assert [row["words"] for row in rows] == [8, 5, 1, 0]
    assert [row["shared"] for row in rows] == pytest.approx([7 / 8, 3 / 5, 0, 0])
    assert [row["longest"] for row in rows] == [4, 3, 0, 0]
    # Runs end where documents end: `fell in torrents` is in no one document.
    assert [row["run"] for row in rows] == ["a dark and stormy", "the rain fell", "", ""]


def test_the_program_writes_a_row_for_each_document(tmp_path, capsys):
    (tmp_path / "train.txt").write_text("one two three four\n")
    (tmp_path / "test.txt").write_text("# A\none two three\n# B\nfour three\n")
    argv = ["--source", f"{tmp_path}/test.txt", "--document_start", "^# ", "--words", "2"]
    overlap.main([*argv, "--train_source", f"{tmp_path}/train.txt", "--output", f"{tmp_path}/out.csv"])
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["words"], row["longest"], row["run"]) for row in rows] == [
        ("4", "3", "one two three"),
        ("3", "0", ""),
    ]
    assert "2 documents of 7 words against 4: 1 share a run of 2 words" in capsys.readouterr().out
