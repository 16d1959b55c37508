"""Text sources: what comes out of each, the split by document, and every way a source can be wrong."""

import functools
import gzip
import importlib.util
import itertools
import json
import re

import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from sol_jax.errors import UserError
from sol_jax.text.documents import (
    Document,
    document_hashes,
    read_documents,
    source_fingerprint,
    split_documents,
)

packed = functools.partial(gzip.compress, mtime=0)  # the same bytes, and names of tests, at any time
WIKITEXT_START = r"^ = [^=].* = $"
WIKITEXT = (
    " \n = Du Fu = \n \n Du Fu was a poet . \n \n = = Life = = \n \n He sat at x = 3 . \n \n"
    " = Kiss You ( song ) = \n \n A song .\x0c \n"
)


class TinyText(tfds.core.GeneratorBasedBuilder):
    """Two documents of text in `train`, one in `other`; without text where `field` says so."""

    VERSION = tfds.core.Version("1.0.0")
    field = "text"

    def _info(self):
        features = tfds.features.FeaturesDict({self.field: tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("één", "two"), "other": self._generate_examples("three")}

    def _generate_examples(self, *texts):
        yield from ((i, {self.field: text}) for i, text in enumerate(texts))


class TinyLabels(TinyText):
    VERSION = tfds.core.Version("1.0.0")
    field = "label"


class TinyBroken(TinyText):
    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, dl_manager):
        raise ModuleNotFoundError("No module named 'mwxml'")


@pytest.fixture
def tfds_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def wikipedia():
    return {document.title: document.text for document in read_documents("wikipedia")}


def texts(source, document_start=""):
    return [document.text for document in read_documents(str(source), document_start)]


# ------------------------------------------------------------------------------------------------ local files


def test_text_files_are_read_as_they_are(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffzwei\r\n".encode())
    (tmp_path / "a.txt").write_text(" one \n\n")
    (tmp_path / "c.raw.gz").write_bytes(packed(b"three"))
    (tmp_path / "blank.txt").write_text(" \n")
    assert texts(f"{tmp_path}/*.txt, {tmp_path}/c.*,{tmp_path}/a.txt") == [" one \n\n", "zwei\n", "three"]


def test_json_lines_keep_text_and_title(tmp_path):
    lines = [{"text": "a\u2028b", "title": "A"}, {"text": "  "}, {"text": "c", "title": None, "id": 3}]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "x.jsonl").write_text(content)
    (tmp_path / "y.jsonl.gz").write_bytes(packed(content.encode()))
    (tmp_path / "y.jsonl").mkdir()  # folders that match are no files
    for name in ("x.jsonl", "y.jsonl*"):
        documents = read_documents(f"{tmp_path}/{name}")
        assert [document.text for document in documents] == ["a\u2028b", "c"]
        assert documents[0].title == "A"
        assert "line 5" in documents[1].title


def test_document_start_cuts_wikitext_at_its_articles(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(WIKITEXT)
    documents = read_documents(f"{tmp_path}/wiki.test.raw", WIKITEXT_START)
    assert [document.title for document in documents] == ["= Du Fu =", "= Kiss You ( song ) ="]
    assert " \n" + "".join(document.text for document in documents) == WIKITEXT
    assert documents[1].text == " = Kiss You ( song ) = \n \n A song .\x0c \n"


@given(st.lists(st.sampled_from(["#", "# a", "", "b ", "c#", "\x0c#", "\u2028"]), min_size=1))
def test_cut_documents_join_to_the_file(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("cut") / "x.txt"
    path.write_bytes(text := "\n".join(["# first", *lines]).encode())
    documents = read_documents(str(path), "^#")
    assert "".join(document.text for document in documents).encode() == text
    assert len(documents) == 1 + sum(line.startswith("#") for line in lines)


def test_fingerprint_follows_content_not_names(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    before = source_fingerprint(f"{tmp_path}/*.txt")
    (tmp_path / "a.txt").rename(tmp_path / "z.txt")
    assert source_fingerprint(f"{tmp_path}/z.txt,{tmp_path}/b.txt") == before
    (tmp_path / "b.txt").write_text("2")
    assert source_fingerprint(f"{tmp_path}/*.txt") != before
    (tmp_path / "b.txt").rename(tmp_path / "b.jsonl")  # the same bytes are other documents
    (tmp_path / "c.txt").write_text("2")
    assert source_fingerprint(f"{tmp_path}/*.jsonl") != source_fingerprint(f"{tmp_path}/c.txt")


@pytest.mark.parametrize(
    ("name", "content", "start", "message"),
    [
        ("x.txt", None, "", r"no file matches '.*x\.txt'.*'tfds:NAME'"),
        ("x.csv.gz", packed(b"a,b"), "", r"x\.csv\.gz is neither \.txt nor \.jsonl"),
        ("x.json.gz", packed(b'{"text": "a"}\n[]'), "", r"x\.json\.gz, line 2 has no text"),
        ("x.parquet", b"PAR1", "", r"x\.parquet is neither \.txt nor \.jsonl"),
        ("x.txt", b"caf\xe9", "", r"x\.txt is not UTF-8 text \(byte 3\)"),
        ("x.txt.gz", packed(b"text" * 99)[:-9], "", r"x\.txt\.gz is not a whole gzip file"),
        ("x.txt.gz", b"plain", "", r"x\.txt\.gz is not a whole gzip file"),
        ("x.jsonl.gz", packed(b"text")[:12] + b"xxxxxxxx", "", r"x\.jsonl\.gz is not a whole gzip"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": ', "", r"x\.jsonl, line 3 is not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"content": "b"}', "", r"x\.jsonl, line 2 has no text.*field `text`"),
        ("x.jsonl", b'{"text": 5}', "", r"line 1 has no text"),
        ("x.jsonl", b'["text"]', "", r"line 1 has no text"),
        ("x.jsonl", rb'{"text": "a\ud800"}', "", r"line 1 has half of a surrogate pair"),
        ("x.jsonl", b'{"text": "a"}', "^a", r"document_start.*x\.jsonl is JSON lines"),
        ("x.txt", b" \n", "", r"data\.source='.*' holds no text"),
        ("x.txt", b"text", "([", r"data\.document_start='\(\[' is no regular expression"),
        ("x.txt", b"text", "^= ", r"data\.document_start='\^= ' is found in no line of .*x\.txt"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, name, content, start, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_documents(f"{tmp_path}/{name}", start)


# ------------------------------------------------------------------------------------------------------- TFDS


@pytest.mark.usefixtures("tfds_dir")
def test_tfds_text_by_name():
    assert texts("tfds:tiny_text") == ["één", "two"]
    assert texts("tfds:tiny_text:other") == ["three"]
    assert texts("tfds:tiny_text:train[1:]+other") == ["two", "three"]
    prints = {source_fingerprint(f"tfds:tiny_text{split}") for split in ("", ":train", ":other")}
    assert len(prints) == 2


@pytest.mark.usefixtures("tfds_dir")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tfds:no_such_text", "TFDS knows no dataset 'no_such_text'"),
        ("tfds:tiny_text:nowhere", r"cannot read 'tfds:tiny_text:nowhere'.*nowhere"),
        ("tfds:tiny_text/no_config", r"TFDS could not prepare 'tiny_text/no_config'"),
        ("tfds:tiny_labels", "'tiny_labels' has no feature `text`"),
        ("tfds:tiny_broken", "could not prepare 'tiny_broken': ModuleNotFoundError: No module named 'mwxml'"),
    ],
)
def test_tfds_errors(source, message):
    with pytest.raises(UserError, match=message):
        read_documents(source)


@pytest.mark.parametrize("source", ["wikipedia", "tfds:tiny_text"])
def test_document_start_is_for_files_only(source):
    with pytest.raises(UserError, match="document_start cuts text files; leave it empty"):
        read_documents(source, "^= ")


# -------------------------------------------------------------------------------------------------- wikipedia


def test_wikipedia_is_106_articles_of_prose(wikipedia):
    assert len(wikipedia) == 106
    assert 2.80e6 < sum(len(text.encode()) for text in wikipedia.values()) < 2.86e6
    everything = "\n\n".join(wikipedia.values())
    for markup in (
        "{{",
        "}}",
        "[[",
        "]]",
        "<ref",
        "</",
        "{|",
        "|}",
        "||",
        "''",
        "http",
        "style=",
        "==",
        "&nbsp",
    ):
        assert markup not in everything
    assert not re.search(r"[\x00-\x09\x0b-\x1f]|  |\n\n\n|\(\)|\(;|\n[ ,;:)]", everything)
    long = sum(len(line) for line in everything.split("\n\n") if len(line) >= 80)
    assert long > 0.95 * len(everything)  # running text, not lists of names


def test_wikipedia_reads_as_the_page_does(wikipedia):
    assert "At 1,300 miles, Alabama has one of the longest navigable inland waterways" in wikipedia["Alabama"]
    assert wikipedia["Autism"].startswith("Autism is a neurodevelopmental disorder characterized by impaired")
    assert "\n\nEtymology\n\nThe European-American naming of the Alabama River" in wikipedia["Alabama"]
    for title in ("References", "See also", "External links"):
        assert not any(f"\n\n{title}\n\n" in text for text in wikipedia.values())


def test_wikipedia_without_gensim_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps gensim==4\.4\.0"):
        read_documents("wikipedia")


# -------------------------------------------------------------------------------------------------- the split


def documents_of(numbers):
    return [Document(f"text {number}", f"title {number}") for number in numbers]


@given(st.lists(st.integers(0, 200), min_size=3), st.randoms(), st.floats(0, 0.4), st.floats(0, 0.4))
def test_splits_are_disjoint_complete_and_blind_to_order(numbers, random, validation, test):
    numbers = [*numbers, 201, 202, 203]
    shuffled = random.sample(numbers, len(numbers))
    splits = split_documents(documents_of(numbers), validation, test)
    again = split_documents(documents_of(shuffled), validation, test)
    hashes = {name: document_hashes(members) for name, members in splits.items()}
    assert hashes == {name: document_hashes(members) for name, members in again.items()}
    assert hashes == {  # the order within a split is that of the hashes
        name: [document_hashes([member])[0] for member in members] for name, members in again.items()
    }
    assert sorted(itertools.chain(*hashes.values())) == document_hashes(documents_of(numbers))
    assert ("validation" in splits, "test" in splits) == (validation > 0, test > 0)


@pytest.mark.parametrize(
    ("count", "validation", "test", "sizes"),
    [
        (106, 0.05, 0.05, (95, 6, 5)),  # round(5.3) = 5 for test, round(10.6) = 11 for both
        (3, 0.05, 0.05, (1, 1, 1)),
        (10, 0, 0.25, (8, 0, 2)),
        (10, 0, 0, (10, 0, 0)),
        (4, 0, 1, (0, 0, 4)),
        (3, 0.5, 0.5, (0, 1, 2)),
    ],
)
def test_split_sizes_by_hand(count, validation, test, sizes):
    splits = split_documents(documents_of(range(count)), validation, test)
    assert tuple(len(splits.get(name, [])) for name in ("train", "validation", "test")) == sizes


def test_equal_documents_count_once():
    splits = split_documents(documents_of([1, 2, 2, 1, 3]), 0, 0)
    assert len(splits["train"]) == 3


@pytest.mark.parametrize(
    ("count", "validation", "test", "message"),
    [
        (9, -0.1, 0.1, "at least 0 and at most 1 together, not -0.1 and 0.1"),
        (9, 0.6, 0.6, "at most 1 together"),
        (2, 0.05, 0.05, "2 different documents cannot fill every split"),
        (1, 0.5, 0.5, "1 different documents cannot fill every split"),
    ],
)
def test_impossible_splits(count, validation, test, message):
    with pytest.raises(UserError, match=message):
        split_documents(documents_of(range(count)), validation, test)


def test_hash_is_sha256_of_the_text():
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert document_hashes([Document("", "a"), Document("", "b")]) == [empty]


ODD_NAMES = ("a[1].txt", "a,b.txt", "b*.txt", "[x]/c.txt", "d,e/f,g.txt", "h?.txt", "~draft.txt")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_file_that_is_there_is_no_pattern(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in ("a1.txt", "a", "b.txt", "bb.txt", "hh.txt", name):
        file = tmp_path / other
        file.parent.mkdir(exist_ok=True)
        file.write_text(other)
    for source in (name, str(tmp_path / name)):
        assert [document.text for document in read_documents(source)] == [name]
    both = {document.text for document in read_documents(f"{name},b.txt")}
    assert both == {name, "b.txt"}


def test_a_folder_with_a_pattern_for_a_name(tmp_path):
    (tmp_path / "[ab]").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "[ab]" / "x.txt").write_text("in [ab]")
    (tmp_path / "a" / "x.txt").write_text("in a")
    assert [document.text for document in read_documents(f"{tmp_path}/[ab]/*.txt")] == ["in [ab]"]
    (tmp_path / "[ab]" / "x.txt").unlink()
    (tmp_path / "[ab]").rmdir()
    assert [document.text for document in read_documents(f"{tmp_path}/[ab]/*.txt")] == ["in a"]


def test_a_folder_is_no_source(tmp_path):
    with pytest.raises(UserError, match=f"no file matches '{tmp_path}', which is a folder; give a glob"):
        read_documents(str(tmp_path))
