"""Models and files are known by what they hold; what was hashed once is remembered, as far as it can be."""

import hashlib
import json
import os
import shutil

import pytest
import tiny

from sol_jax import digests
from sol_jax.models.identity import differences, model_identity
from sol_jax.models.tokenizer import load_tokenizer
from sol_jax.models.weights import load_config


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder that remembers digests; not there yet."""
    monkeypatch.setattr(digests, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were really read."""
    names, plain = [], hashlib.file_digest

    def counting(content, kind):
        names.append(os.path.basename(content.name))
        return plain(content, kind)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return names


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_file_is_read_once_until_it_changes(cache, hashed, tmp_path):
    file = tmp_path / "weights"
    file.write_text("one")
    for _ in range(2):
        assert digests.file_digest(file) == sha256("one")
    assert hashed == ["weights"]
    stamp = file.stat()
    file.write_text("two")  # as long; its time is set, for a clock may be too coarse to tell
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert digests.file_digest(file) == sha256("two")
    file.write_text("three")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert digests.file_digest(file) == sha256("three")
    assert hashed == ["weights"] * 3


def test_a_file_that_is_replaced_is_another_whatever_its_time_says(cache, hashed, tmp_path):
    """As of archives that are unpacked with fixed times."""
    file, other = tmp_path / "weights", tmp_path / "other"
    for path, text in ((file, "one"), (other, "two")):
        path.write_text(text)
        os.utime(path, ns=(10**18, 10**18))
    assert digests.file_digest(file) == sha256("one")
    other.replace(file)
    assert digests.file_digest(file) == sha256("two")
    with open(file, "r+") as same:  # in its place
        same.write("six")
    os.utime(file, ns=(10**18, 10**18))
    assert digests.file_digest(file) == sha256("six")


def test_files_are_known_by_where_they_really_are(cache, hashed, tmp_path):
    """A link that is turned to another file is that file."""
    (tmp_path / "old").write_text("one")
    (tmp_path / "new").write_text("two")
    link = tmp_path / "link"
    for target, text in (("old", "one"), ("new", "two"), ("old", "one")):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / target)
        assert digests.file_digest(link) == sha256(text)
    assert hashed == ["old", "new"]


DAMAGED = ("", "{", "[1, 2]", "3", "\xff", '{"FILE": 3}', '{"FILE": [3]}', '{"FILE": []}')


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_memory_only_costs_time(cache, hashed, tmp_path, content):
    file = tmp_path / "weights"
    file.write_text("one")
    cache.mkdir()
    (cache / "digests.json").write_text(content.replace("FILE", str(file)), encoding="latin-1")
    for _ in range(2):
        assert digests.file_digest(file) == sha256("one")
    assert hashed == ["weights"]  # by then it was written anew
    assert list(json.loads((cache / "digests.json").read_text())) == [str(file)]


def test_a_memory_that_is_cut_short_is_not_believed(cache, hashed, tmp_path):
    file = tmp_path / "weights"
    file.write_text("one")
    stamp = file.stat()
    cache.mkdir()
    (cache / "digests.json").write_text(json.dumps({str(file): [stamp.st_size, stamp.st_mtime_ns]}))
    assert digests.file_digest(file) == sha256("one")
    assert hashed == ["weights"]


@pytest.mark.parametrize("place", ["file/cache", "/proc/self/cache"])
def test_a_cache_folder_that_cannot_be_only_costs_time(monkeypatch, hashed, tmp_path, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(digests, "CACHE_DIR", str(tmp_path / place))
    file = tmp_path / "weights"
    file.write_text("one")
    for _ in range(2):
        assert digests.file_digest(file) == sha256("one")
    assert hashed == ["weights"] * 2


def test_a_cache_folder_that_nobody_may_read_only_costs_time(cache, hashed, tmp_path, monkeypatch):
    """Made up, for root may read everything."""
    file = tmp_path / "weights"
    file.write_text("one")
    digests.file_digest(file)
    read_text, write_bytes = type(file).read_text, type(file).write_bytes

    def denied(plain):
        def deny(path, *args, **kwargs):
            if path.parent == cache:
                raise PermissionError(13, "Permission denied", str(path))
            return plain(path, *args, **kwargs)

        return deny

    monkeypatch.setattr(type(file), "read_text", denied(read_text))
    monkeypatch.setattr(type(file), "write_bytes", denied(write_bytes))
    assert digests.file_digest(file) == sha256("one")
    assert hashed == ["weights"] * 2


# --- models --------------------------------------------------------------------------------------------


def identity_of(folder):
    return model_identity(folder, load_config(folder), load_tokenizer(folder))


def test_a_copy_is_the_same_model_whatever_its_files_are_called(tiny_folder, tiny_session, tmp_path):
    copy = shutil.copytree(tiny_folder / "model", tmp_path / "copy")
    index = {"weight_map": dict.fromkeys(tiny.tensors(tiny.MODEL), "m-1-of-1.safetensors")}
    (copy / "model.safetensors").rename(copy / "m-1-of-1.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "README.md").write_text("a card")
    (copy / "consolidated.safetensors").write_text("not read")
    edit(copy / "config.json", transformers_version="9", _name_or_path="elsewhere", use_cache=False)
    assert identity_of(copy) == tiny_session.identity


def test_a_model_in_another_type_is_the_same(tiny_folder, tiny_session):
    folder = tiny_folder / "model"
    config = load_config(folder, "bfloat16")
    assert model_identity(folder, config, load_tokenizer(folder)) == tiny_session.identity


@pytest.mark.parametrize(
    ("part", "harm"),
    [
        ("weights", lambda folder: flip_last_bit(folder / "model.safetensors")),
        ("weights", lambda folder: edit(folder / "config.json", rms_norm_eps=1e-6)),
        ("tokenizer", lambda folder: tiny.save_tokenizer(folder, extra=1)),
        ("tokenizer", lambda folder: edit(folder / "tokenizer_config.json", eos_token="a")),
        ("tokenizer", lambda folder: edit(folder / "tokenizer_config.json", bos_token="a")),
        ("tokenizer", lambda folder: edit(folder / "tokenizer_config.json", split_special_tokens=True)),
        ("tokenizer", lambda folder: edit(folder / "tokenizer_config.json", pad_token="<pad>")),
        ("tokenizer", lambda folder: edit(folder / "config.json", eos_token_id=[256, 3])),
        ("tokenizer", lambda folder: edit(folder / "tokenizer.json", normalizer={"type": "NFC"})),
    ],
)
def test_what_makes_another_model(tiny_folder, tiny_session, tmp_path, part, harm):
    copy = shutil.copytree(tiny_folder / "model", tmp_path / "copy")
    harm(copy)
    found = identity_of(copy)
    changed = {name for name, digest in found.items() if digest != tiny_session.identity[name]}
    assert changed == {part}
    assert differences(tiny_session.identity, found) == (
        f"the digest of its {part} is {tiny_session.identity[part]}, and here it is {found[part]}"
    )


def test_nothing_differs_from_what_is_not_known(tiny_session):
    assert differences({}, tiny_session.identity) == ""
    assert differences(tiny_session.identity, tiny_session.identity) == ""


def flip_last_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
