"""Paths on object stores: which are opened, and what is read, written and copied there."""

import gzip
import importlib.util
import json
import os
import pathlib
import shutil
import time

import numpy as np
import pytest
import tiny
from fake_bucket import FakeBuckets, fake_buckets
from safetensors.numpy import load_file, save

from sol_jax import copies, digests, files
from sol_jax.errors import UserError
from sol_jax.evaluation import results_csv
from sol_jax.files import LineFile, path_of, write_whole
from sol_jax.models.model import open_model
from sol_jax.models.weights import resolve
from sol_jax.runs.session import open_session
from sol_jax.text import tfds_builder
from sol_jax.text.documents import read_documents, source_fingerprint


@pytest.fixture
def buckets(tmp_path, monkeypatch):
    """The folder in which the objects lie; what is copied from them goes to an empty cache."""
    monkeypatch.setattr(digests, "CACHE_DIR", str(tmp_path / "cache"))
    with fake_buckets(tmp_path / "buckets"):
        yield tmp_path / "buckets"


def put(source: pathlib.Path, target: str) -> None:
    """A folder or file, as `gsutil cp -r` copies it."""
    for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if file.is_file():
            name = f"/{file.relative_to(source)}" if source.is_dir() else ""
            path_of(target + name, "target").write_bytes(file.read_bytes())


# --- which are opened ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "package"), files.PACKAGES.items())
def test_a_package_that_is_missing_is_named(scheme, package):
    if importlib.util.find_spec(package) or importlib.util.find_spec("tensorflow"):
        pytest.skip(f"{scheme}:// can be opened here")
    with pytest.raises(
        UserError, match=f"--workdir is '{scheme}://b/run', which needs .*: pip install {package} "
    ):
        path_of(f"{scheme}://b/run", "--workdir")


@pytest.mark.parametrize("url", ["gs://no-entry/run", "s3://no-entry"])
def test_a_bucket_that_does_not_answer_is_one_sentence(buckets, url):
    for _ in range(2):  # it is not taken for reached the second time
        with pytest.raises(UserError, match=r"--workdir is .*, which cannot be reached .*Anonymous caller"):
            path_of(url, "--workdir")


@pytest.mark.parametrize(
    "url", ["gs://a/b", "s3://a/b", " gs://a/b/", "az://a/b", "hf://datasets/a/b", "x,gs://a/b"]
)
def test_schemes_that_epath_knows(url):
    assert files.is_remote(url)
    assert files.all_known(url)


def test_schemes_that_others_have_registered(monkeypatch):
    """`epath.register_path_cls` is how other packages add theirs."""
    from etils import epath
    from etils.epath import register

    monkeypatch.setattr(register, "_URI_PREFIXES_TO_CLS", dict(register._URI_PREFIXES_TO_CLS))
    monkeypatch.setattr(register, "_PATHLIKE_CLS", register._PATHLIKE_CLS)
    assert not files.all_known("store://a/b")

    @epath.register_path_cls("store://")
    class StorePath(pathlib.PurePosixPath):
        def stat(self):
            raise FileNotFoundError(self)

    assert files.all_known("store://a/b")
    assert isinstance(path_of("store://a/b", "--workdir"), StorePath)


# --- what is written -------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(buckets, tmp_path, monkeypatch):
    for path in (tmp_path / "new" / "file", path_of("gs://b/new/file", "x")):
        write_whole(path, "first")
        write_whole(path, b"second")
        assert path.read_text() == "second"
        assert [other.name for other in path.parent.iterdir()] == ["file"]
    assert FakeBuckets.writes

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "new" / "file", b"third")
    assert (tmp_path / "new" / "file").read_text() == "second"


def test_what_a_store_raises_becomes_an_os_error(buckets):
    path = path_of("gs://b/x", "x").parent.parent / "no-entry" / "x"
    with pytest.raises(OSError, match="RuntimeError: Anonymous caller"):
        write_whole(path, "text")
    with pytest.raises(UserError, match=r"no-entry/x.csv cannot be written: .*anonymous caller"):
        results_csv.write(path.with_name("x.csv"), [{"nats": "1"}])


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_that_grows(buckets, tmp_path, remote):
    path = path_of("gs://b/log" if remote else tmp_path / "log", "x")
    file = LineFile(path)
    file.add("one")
    assert path.exists() != remote  # an object is written now and then only
    file.flush()
    assert path.read_text() == "one\n"
    file.add("two")
    file.close()
    file = LineFile(path)  # goes on where it was
    file.add("three")
    file.close()
    assert path.read_text() == "one\ntwo\nthree\n"


def test_an_object_that_grows_is_written_now_and_then(buckets, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    path, before = path_of("gs://b/log", "x"), FakeBuckets.writes
    file = LineFile(path)
    for second in range(100):
        now[0] = second
        file.add(str(second))
    assert FakeBuckets.writes - before == 99 // files.REWRITE_SECONDS
    assert path.read_text().count("\n") > 100 - files.REWRITE_SECONDS
    file.close()
    file.close()
    assert FakeBuckets.writes - before == 99 // files.REWRITE_SECONDS + 1  # nothing new, nothing written
    assert path.read_text().split() == [str(second) for second in range(100)]


# --- text ------------------------------------------------------------------------------------------------


def test_documents_of_a_bucket(buckets, tmp_path):
    lines = [json.dumps({"text": f"text {n}"}) for n in range(4)]
    (tmp_path / "here.jsonl").write_text(lines[0])
    path_of("gs://b/books/a.jsonl", "x").write_text(lines[1])
    path_of("gs://b/books/b.jsonl.gz", "x").write_bytes(gzip.compress(lines[2].encode()))
    path_of("gs://b/books/c[1].txt", "x").write_text("text 4")  # its own name, and no pattern
    path_of("gs://b/books/deep/d.jsonl", "x").write_text(lines[3])

    def texts(source):
        return sorted(document.text for document in read_documents(source))

    assert texts("gs://b/books/*.jsonl*") == ["text 1", "text 2"]
    assert texts("gs://b/books/*.jsonl") == ["text 1"]
    assert texts("gs://b/books/c[1].txt") == ["text 4"]
    assert texts("gs://b/*/*/d.jsonl") == ["text 3"]
    assert texts(f"{tmp_path}/here.jsonl, gs://b/books/a.jsonl") == ["text 0", "text 1"]
    before = source_fingerprint("gs://b/books/*.jsonl*")
    path_of("gs://b/books/a.jsonl", "x").write_text(lines[3])
    assert source_fingerprint("gs://b/books/*.jsonl*") != before


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("gs://b/none.txt", "no file matches 'gs://b/none.txt'; give a glob"),
        ("gs://b/none/*.txt", "no file matches"),
        ("gs://b/books", "no file matches 'gs://b/books', which is a folder"),
        ("gs://b/**/*.txt", "has \\*\\*, for which an object store would list everything; name folders"),
        ("gs://b/books/a.pdf", "is neither .txt nor .jsonl"),
        ("gs://b/books/a.txt.gz", "is not a whole gzip file"),
        ("foo://b/books", "must be a path on this machine, or a URL that etils.epath opens"),
    ],
)
def test_text_that_is_not_there(buckets, source, sentence):
    for name in ("a.pdf", "a.txt.gz"):
        path_of(f"gs://b/books/{name}", "x").write_text("text")
    with pytest.raises(UserError, match=sentence):
        read_documents(source)


# --- models ----------------------------------------------------------------------------------------------


def test_a_model_is_copied_once_and_again_when_it_was_replaced(buckets, tiny_folder, tmp_path, capsys):
    put(tiny_folder / "model", "gs://b/models/tiny")
    path_of("gs://b/models/tiny/pytorch_model.bin", "x").write_bytes(b"what is not read")
    model, here = open_model("gs://b/models/tiny"), open_model(str(tiny_folder / "model"))
    assert model.identity == here.identity
    assert model.path.is_relative_to(tmp_path / "cache" / "models")
    assert sorted(file.name for file in model.path.iterdir()) == sorted(os.listdir(tiny_folder / "model"))
    np.testing.assert_array_equal(model.weights["embed"], here.weights["embed"])
    assert "copying" in capsys.readouterr().err
    assert open_model("gs://b/models/tiny").path == model.path
    assert "copying" not in capsys.readouterr().err

    tensors = load_file(tiny_folder / "model" / "model.safetensors")
    tensors["model.norm.weight"] += 1  # of the same size, in the same second
    path_of("gs://b/models/tiny/model.safetensors", "x").write_bytes(save(tensors))
    replaced = open_model("gs://b/models/tiny")
    assert replaced.path != model.path
    assert replaced.identity["weights"] != model.identity["weights"]


def test_a_gguf_file_is_copied(buckets):
    path_of("gs://b/models/m.gguf", "x").write_bytes(b"GGUF")
    found = resolve("gs://b/models/m.gguf")
    assert found.name == "m.gguf"
    assert found.read_bytes() == b"GGUF"
    with pytest.raises(UserError, match="no model at 'gs://b/models/none'; give a folder"):
        resolve("gs://b/models/none")


def test_a_disk_without_room_is_one_sentence(buckets, tiny_folder, tmp_path, monkeypatch):
    put(tiny_folder / "model", "gs://b/tiny")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        with pytest.raises(
            UserError, match=r"model.path: copies take 0.00 GB, and .* has room for 0.00 GB; free some"
        ):
            resolve("gs://b/tiny")

    def full(source, target, piece):
        target.write(source.read(10))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(
            UserError, match=r"could not be copied .*\(No space left on device\); free some space"
        ):
            resolve("gs://b/tiny")
    assert not [*(tmp_path / "cache").rglob("*.tmp")]  # nor anything that looks like a model
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]
    assert resolve("gs://b/tiny").is_dir()


def test_what_killed_copies_have_left_goes_in_a_day(buckets, tmp_path):
    path_of("gs://b/file", "x").write_text("text")
    old, new = (tmp_path / "models" / f"{age}.1.tmp" for age in ("old", "new"))
    for folder in (old, new):
        (folder / "part").mkdir(parents=True)
    os.utime(old, (time.time() - 2 * copies.ABANDONED,) * 2)
    copies.fetch([path_of("gs://b/file", "x")], tmp_path / "models" / "m", "model.path")
    assert sorted(os.listdir(tmp_path / "models")) == ["m", "new.1.tmp"]


# --- prepared blocks -------------------------------------------------------------------------------------


def test_blocks_that_one_host_has_cut_are_copied_by_the_next(buckets, tiny_folder, tmp_path, monkeypatch):
    config = tiny.config_for(tiny_folder, **{"data.cache_dir": "gs://b/blocks"})
    first = open_session(config).blocks["train"]
    monkeypatch.setattr(digests, "CACHE_DIR", str(tmp_path / "other host"))
    with monkeypatch.context() as patch:
        patch.setattr(tfds_builder, "read_documents", lambda *args: pytest.fail("it was cut again"))
        second = open_session(config).blocks["train"]
    assert second.documents == first.documents
    np.testing.assert_array_equal(second.read(range(len(second)))[0], first.read(range(len(first)))[0])

    # A host that dies while it sends leaves what nobody takes for whole.
    (last,) = buckets.glob("*dataset_info.json")
    last.unlink()
    monkeypatch.setattr(digests, "CACHE_DIR", str(tmp_path / "third host"))
    third = open_session(config).blocks["train"]
    assert third.documents == first.documents
    assert last.exists()


def test_blocks_that_cannot_be_sent(buckets, tiny_folder):
    config = tiny.config_for(tiny_folder, **{"data.cache_dir": "gs://no-entry/blocks"})
    with pytest.raises(UserError, match=r"data.cache_dir is 'gs://no-entry/blocks', which cannot be reached"):
        open_session(config)
