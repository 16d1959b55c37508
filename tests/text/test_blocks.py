"""Blocks by hand numbers, the cache against faults, and the iterator against its uninterrupted self."""

import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sol_jax.errors import UserError
from sol_jax.text import blocks as data
from sol_jax.text import tfds_builder as token_blocks
from sol_jax.text.blocks import BlockIterator, Blocks, evaluation_batches, prepare
from sol_jax.text.documents import Document, document_hashes, read_documents, split_documents
from sol_jax.text.tfds_builder import cut_blocks


class ByteTokenizer:
    """One id a byte, and 256 for EOS."""

    eos_id = 256
    vocab_size = 257
    fingerprint = "b17e"

    def encode(self, text):
        return list(text.encode())


class MustNotTokenize(ByteTokenizer):
    def encode(self, text):
        raise AssertionError("tokenised a second time")


TEXTS = [f"Document {number}: " + "lorem ipsum " * (3 + number % 5) for number in range(20)]


@pytest.fixture
def source(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    return f"{tmp_path}/*.txt"


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def tokens_of(blocks):
    return blocks.read(range(len(blocks))).tokens_BxN


def datasets(cache):
    return sorted(os.listdir(f"{cache}/token_blocks"))


# ----------------------------------------------------------------------------------------------------- blocks


def test_blocks_by_hand():
    documents = [Document("abc", ""), Document("de", ""), Document("", ""), Document("fghi", "")]
    tokens_BxN, document_B = cut_blocks(documents, ByteTokenizer(), 3, "train")
    a, eos = ord("a"), 256  # the stream is a b c . d e . . f g h i . and its last token fills no block
    np.testing.assert_array_equal(
        tokens_BxN, [[a, a + 1, a + 2], [eos, a + 3, a + 4], [eos, eos, a + 5], [a + 6, a + 7, a + 8]]
    )
    np.testing.assert_array_equal(document_B, [0, 1, 3, 3])
    assert tokens_BxN.dtype == document_B.dtype == np.int32


@given(st.lists(st.text("abé", max_size=9), min_size=1), st.integers(1, 7))
def test_blocks_join_to_the_stream(texts, length):
    stream = [(token, index) for index, text in enumerate(texts) for token in [*text.encode(), 256]]
    if len(stream) < length:
        return
    tokens_BxN, document_B = cut_blocks(
        [Document(text, "") for text in texts], ByteTokenizer(), length, "test"
    )
    assert tokens_BxN.shape == (len(stream) // length, length)
    assert tokens_BxN.ravel().tolist() == [token for token, _ in stream][: tokens_BxN.size]
    assert document_B.tolist() == [stream[last][1] for last in range(length - 1, len(stream), length)]


def test_a_split_shorter_than_a_block_is_an_error(source, cache):
    with pytest.raises(
        UserError, match=r"the validation split has \d+ tokens in 1 documents, less than one block of 99"
    ):
        prepare(source, ByteTokenizer(), block_length=99, cache_dir=cache)
    prepare(source, ByteTokenizer(), block_length=40, cache_dir=cache)  # nothing is left in the way


@pytest.mark.parametrize("token", [257, -1])
def test_an_id_outside_the_vocabulary_is_an_error(token):
    tokenizer = ByteTokenizer()
    tokenizer.encode = lambda text: [1, token]
    with pytest.raises(UserError, match=rf"id {token} in document 'Title', outside its vocabulary of 257"):
        cut_blocks([Document("text", "Title")], tokenizer, 2, "train")


def test_a_block_needs_two_tokens(source):
    with pytest.raises(UserError, match="block_length is 1"):
        prepare(source, ByteTokenizer(), block_length=1)


# ------------------------------------------------------------------------------------------------- the cache


def test_prepared_blocks_are_the_split_documents(source, cache):
    splits = prepare(source, ByteTokenizer(), block_length=16, test_fraction=0.2, cache_dir=cache)
    expected = split_documents(read_documents(source), 0.05, 0.2)
    assert list(splits) == ["train", "validation", "test"]
    for name, blocks in splits.items():
        tokens_BxN, document_B = cut_blocks(expected[name], ByteTokenizer(), 16, name)
        np.testing.assert_array_equal(tokens_of(blocks), tokens_BxN)
        np.testing.assert_array_equal(blocks.read(range(len(blocks))).document_B, document_B)
        assert list(blocks.documents) == document_hashes(expected[name])
    assert [len(blocks.documents) for blocks in splits.values()] == [15, 1, 4]
    assert blocks.read([2, 0]).tokens_BxN.dtype == np.int32


def test_the_second_call_does_not_tokenise(source, cache, tmp_path):
    first = prepare(source, ByteTokenizer(), block_length=16, cache_dir=cache)
    for number in range(len(TEXTS)):  # neither names nor order of files count
        (tmp_path / f"{number}.txt").rename(tmp_path / f"{99 - number}.txt")
    second = prepare(source, MustNotTokenize(), block_length=16, cache_dir=cache)
    np.testing.assert_array_equal(tokens_of(first["train"]), tokens_of(second["train"]))
    assert first["train"].fingerprint == second["train"].fingerprint


def test_one_split_of_everything(source, cache):
    splits = prepare(
        source, ByteTokenizer(), block_length=16, validation_fraction=0, test_fraction=1, cache_dir=cache
    )
    assert list(splits) == ["test"]
    assert len(splits["test"].documents) == len(TEXTS)


@pytest.mark.parametrize(
    "change",
    [
        {"block_length": 17},
        {"validation_fraction": 0.1},
        {"test_fraction": 0.1},
        {"document_start": "^Doc"},
        {"tokenizer": type("Other", (ByteTokenizer,), {"fingerprint": "07e2"})()},
    ],
)
def test_every_argument_names_another_dataset(source, cache, change):
    arguments = {"source": source, "tokenizer": ByteTokenizer(), "block_length": 16, "cache_dir": cache}
    prepare(**arguments)
    prepare(**arguments | change)
    assert len(datasets(cache)) == 2


def test_edited_text_and_new_code_name_another_dataset(source, cache, tmp_path, monkeypatch):
    prepare(source, ByteTokenizer(), block_length=16, cache_dir=cache)
    (tmp_path / "3.txt").write_text("Another text, as long as a block.")
    prepare(source, ByteTokenizer(), block_length=16, cache_dir=cache)
    monkeypatch.setattr(token_blocks, "VERSION", "1.0.1")
    monkeypatch.setattr(token_blocks.TokenBlocks, "VERSION", "1.0.1")
    prepare(source, ByteTokenizer(), block_length=16, cache_dir=cache)
    assert len(datasets(cache)) == 3


@pytest.mark.parametrize("fault", ["cut short", "missing", "metadata", "emptied"])
def test_a_damaged_dataset_is_reported(source, cache, fault):
    prepare(source, ByteTokenizer(), block_length=16, cache_dir=cache)
    folder = f"{cache}/token_blocks/{datasets(cache)[0]}/{token_blocks.VERSION}"
    records = f"{folder}/token_blocks-train.array_record-00000-of-00001"
    if fault == "cut short":
        os.truncate(records, 1000)
    elif fault == "missing":
        os.remove(records)
    elif fault == "metadata":
        os.remove(f"{folder}/metadata.json")
    else:
        shutil.rmtree(folder)
        os.mkdir(folder)
    with pytest.raises(UserError, match=r"the prepared blocks in .* are damaged .*delete the folder"):
        prepare(source, ByteTokenizer(), block_length=16, cache_dir=cache)


def run_python(code, *arguments):
    code = "from test_blocks import *\n" + textwrap.dedent(code)
    path = os.pathsep.join([os.path.dirname(__file__), str(pathlib.Path(data.__file__).parents[2])])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )


def test_a_killed_preparation_is_not_taken_for_whole(source, cache):
    killed = run_python(
        """
        def generate(self, tokens_BxN, document_B):
            for index in range(3):
                yield index, {"tokens": tokens_BxN[index], "document": 0}
            os.rename = os.unlink = shutil.rmtree = None  # no clean-up
            os._exit(9)

        token_blocks.TokenBlocks._generate_examples = generate
        prepare(sys.argv[1], ByteTokenizer(), block_length=16, cache_dir=sys.argv[2])
        """,
        source,
        cache,
    )
    assert killed.returncode == 9, killed.stderr
    [dataset] = datasets(cache)
    [remains] = os.listdir(f"{cache}/token_blocks/{dataset}")
    assert "incomplete" in remains
    splits = prepare(source, ByteTokenizer(), block_length=16, cache_dir=cache)
    expected = split_documents(read_documents(source), 0.05, 0.05)["train"]
    np.testing.assert_array_equal(
        tokens_of(splits["train"]), cut_blocks(expected, ByteTokenizer(), 16, "")[0]
    )


def test_a_full_disk_is_one_clear_error(source, cache):
    full = run_python(
        """
        import resource, signal
        import tensorflow_datasets
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # writes beyond fail, as on a full disk
        try:
            prepare(sys.argv[1], ByteTokenizer(), block_length=16, cache_dir=sys.argv[2])
        except UserError as error:
            sys.exit(f"UserError {error}")
        """,
        source,
        cache,
    )
    assert "UserError cannot write blocks under data.cache_dir=" in full.stderr
    assert "File too large" in full.stderr
    assert not os.path.exists(f"{cache}/token_blocks/{datasets(cache)[0]}/{token_blocks.VERSION}")
    prepare(source, ByteTokenizer(), block_length=16, cache_dir=cache)


def test_a_cache_dir_that_cannot_be_one_is_an_error(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write blocks under data.cache_dir=.*file/x"):
        prepare(source, ByteTokenizer(), block_length=16, cache_dir=f"{tmp_path}/file/x")


def test_another_process_may_be_faster(source, cache, monkeypatch):
    download_and_prepare = token_blocks.TokenBlocks.download_and_prepare

    def overtaken(self, **kwargs):
        download_and_prepare(self, **kwargs)
        raise OSError("Directory not empty")  # what the rename of the slower process meets

    monkeypatch.setattr(token_blocks.TokenBlocks, "download_and_prepare", overtaken)
    assert len(prepare(source, ByteTokenizer(), block_length=16, cache_dir=cache)["train"]) > 0


def test_errors_that_are_not_the_disks_keep_their_traceback(source, cache, monkeypatch):
    def fail(self, text):
        raise RuntimeError("a bug")

    monkeypatch.setattr(ByteTokenizer, "encode", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        prepare(source, ByteTokenizer(), block_length=16, cache_dir=cache)


def test_neither_import_nor_use_needs_more_than_it_should(source, cache):
    done = run_python(
        """
        heavy = {"tensorflow", "tensorflow_datasets", "jax", "gensim"}
        import subprocess
        code = f"import sys, sol_jax.text.blocks; assert not {heavy} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)
        prepare(sys.argv[1], ByteTokenizer(), block_length=16, cache_dir=sys.argv[2])
        assert not {"tensorflow", "jax", "gensim"} & set(sys.modules)
        """,
        source,
        cache,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # TFDS prints; stdout is for results


# ---------------------------------------------------------------------------------------------- the iterator


def numbered(count, fingerprint="0123456789abcdef"):
    """Blocks whose tokens are their index."""
    return Blocks(
        [{"tokens": np.full(2, i, np.int32), "document": i // 3} for i in range(count)], [], fingerprint
    )


def take(iterator, batches):
    return [next(iterator).tokens_BxN[:, 0].tolist() for _ in range(batches)]


SIZES = {"count": st.integers(1, 30), "batch_size": st.integers(1, 12), "seed": st.integers(0, 2**40)}


@given(**SIZES, before=st.integers(0, 9))
def test_restored_equals_uninterrupted(count, batch_size, seed, before):
    uninterrupted = BlockIterator(numbered(count), batch_size=batch_size, seed=seed)
    expected = take(uninterrupted, before + 6)[before:]
    saved = BlockIterator(numbered(count), batch_size=batch_size, seed=seed)
    take(saved, before)
    state = saved.state()
    assert all(type(value) is int and value < 2**63 for value in state.values())
    restored = BlockIterator(numbered(count), batch_size=batch_size, seed=seed)
    take(restored, 3)  # where it stood does not matter
    restored.restore(state)
    assert take(restored, 6) == expected


@given(count=st.integers(1, 30), shares=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_parts_of_a_batch_join_to_the_whole(count, shares):
    """What several processes read of a batch, each its own part, in whatever order, is the batch."""
    blocks, cuts = numbered(count), np.cumsum(shares)[:-1]
    whole, apart = (BlockIterator(blocks, batch_size=sum(shares), seed=1) for _ in range(2))
    for _ in range(5):
        tokens_BxN, document_B = next(whole)
        parts = [blocks.read(indices) for indices in np.split(apart.take(), cuts)]
        np.testing.assert_array_equal(np.concatenate([part.tokens_BxN for part in parts]), tokens_BxN)
        np.testing.assert_array_equal(np.concatenate([part.document_B for part in parts]), document_B)
        np.testing.assert_array_equal(document_B, tokens_BxN[:, 0] // 3)
    assert apart.state() == whole.state()


@given(**SIZES)
def test_each_epoch_is_a_permutation(count, batch_size, seed):
    batches = take(
        BlockIterator(numbered(count), batch_size=batch_size, seed=seed), -(-3 * count // batch_size)
    )
    seen = [*itertools.chain(*batches)]
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(take(BlockIterator(numbered(50), batch_size=50, seed=seed), 2)[i])
        for seed in (0, 1)
        for i in (0, 1)
    }
    assert len(orders) == 4
    assert tuple(range(50)) not in orders


def test_the_order_is_the_same_for_ever():
    iterator = BlockIterator(numbered(8), batch_size=8, seed=0)
    assert take(iterator, 2) == GOLDEN_ORDER, (
        "the order of the training text has changed, so no saved run resumes exactly: undo that, or say so in"
        " the notes of the release and put the new order here"
    )


GOLDEN_ORDER = [[1, 4, 5, 6, 2, 0, 3, 7], [7, 6, 2, 3, 1, 0, 4, 5]]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "has seed 0, this one 1; resume with the same data"),
        ({"blocks": numbered(7)}, "has num_blocks 8, this one 7"),
        ({"blocks": numbered(8, "f123456789abcdef")}, "has fingerprint"),
    ],
)
def test_a_state_of_other_data_is_refused(other, message):
    state = BlockIterator(numbered(8), batch_size=4, seed=0).state()
    arguments = {"blocks": numbered(8), "batch_size": 4, "seed": 0} | other
    with pytest.raises(UserError, match=message):
        BlockIterator(arguments.pop("blocks"), **arguments).restore(state)
    with pytest.raises(UserError, match="has position None"):
        BlockIterator(numbered(8), batch_size=4, seed=0).restore({})


def test_a_resumed_run_may_change_its_batch():
    iterator = BlockIterator(numbered(9), batch_size=6, seed=0)
    expected = [*itertools.chain(*take(iterator, 3))]
    resumed = BlockIterator(numbered(9), batch_size=2, seed=0)
    resumed.restore(BlockIterator(numbered(9), batch_size=6, seed=0).state() | {"position": 6})
    assert [*itertools.chain(*take(resumed, 6))] == expected[6:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "a batch of 0 blocks is none"),
        ({"seed": -1}, "the seed of the data is -1"),
    ],
)
def test_impossible_iterators(arguments, message):
    with pytest.raises(UserError, match=message):
        BlockIterator(numbered(8), **{"batch_size": 4, "seed": 0} | arguments)


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_order_by_hand():
    def read(**kwargs):
        return [batch.tokens_BxN[:, 0].tolist() for batch in evaluation_batches(numbered(10), **kwargs)]

    assert read(batch_size=4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert read(batch_size=3, limit=4) == [[1, 3, 6], [8]]  # the middles 1.25, 3.75, 6.25, 8.75 of four parts
    assert read(batch_size=1, limit=1) == [[5]]
    assert read(batch_size=10, limit=99) == [list(range(10))]


@given(st.integers(1, 60), st.integers(1, 60))
def test_a_limited_evaluation_is_spread_evenly(count, limit):
    batches = evaluation_batches(numbered(count), batch_size=7, limit=limit)
    chosen = np.concatenate([batch.tokens_BxN[:, 0] for batch in batches])
    assert len(chosen) == min(count, limit)
    gaps = np.diff([-1, *chosen, count])
    assert gaps.min() >= 1
    assert gaps[1:-1].size == 0 or gaps[1:-1].max() - gaps[1:-1].min() <= 1


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 4, "limit": 0}])
def test_an_evaluation_of_nothing_is_an_error(arguments):
    with pytest.raises(UserError, match="a batch and a limit of 1 or more"):
        next(evaluation_batches(numbered(8), **arguments))
