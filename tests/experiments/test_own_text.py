"""`experiments.studies.own_text` writes lines that training can read, and goes on after it was killed."""

import itertools
import json

import pytest
from absl import logging

from experiments.studies import own_text
from sol_jax.text.documents import read_documents


@pytest.fixture(autouse=True)
def log_as_before():
    """The program shows its log; later tests need not."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


def arguments(folder, output, **more):
    given = {
        "model": folder / "model", "source": folder / "corpus.jsonl", "output": output, "dtype": "float32",
        "num_prompts": 5, "prompt_length": 6, "max_tokens": 8, "stride": 8, "batch_size": 2, **more,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in given.items()]


def test_a_run_goes_on_where_it_stopped(tiny_folder, tmp_path):
    whole, halted = tmp_path / "whole.jsonl", tmp_path / "halted.jsonl"
    own_text.main(arguments(tiny_folder, whole))
    own_text.main(arguments(tiny_folder, halted, num_prompts=4))
    own_text.main(arguments(tiny_folder, halted))
    assert whole.read_text() == halted.read_text()
    halted.write_text(whole.read_text()[:-20])  # killed while it wrote the last line
    own_text.main(arguments(tiny_folder, halted))
    assert whole.read_text() == halted.read_text()
    documents = read_documents(str(whole))
    assert len({document.text for document in documents}) == 5
    engine = own_text.open_engine(str(tiny_folder / "model"))
    prompts = own_text.passages(engine, str(tiny_folder / "corpus.jsonl"), 6, 8)
    for line, prompt in zip(whole.read_text().splitlines(), itertools.islice(prompts, 5), strict=True):
        assert json.loads(line)["text"].startswith(engine.tokenizer.decode(prompt))


def test_shapes_that_compile_are_logged(tiny_folder, tmp_path, caplog):
    own_text.main(arguments(tiny_folder, tmp_path / "x.jsonl", num_prompts=2))
    buckets = [message for message in caplog.messages if message.startswith("bucket: ")]
    assert buckets == ["bucket: batch 2, prompts up to 32, texts up to 64 tokens"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("budget", "much", "could not convert"),
        ("temperature", -1, "temperature"),
        ("num_prompts", 100_000, "passages 8 tokens apart; lower --stride"),
    ],
)
def test_slips(tiny_folder, tmp_path, capsys, name, value, said):
    with pytest.raises(SystemExit) as end:
        own_text.main(arguments(tiny_folder, tmp_path / "x.jsonl", **{name: value}))
    assert end.value.code == 2
    assert said in capsys.readouterr().err
