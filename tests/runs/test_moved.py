"""A run's folder that was moved still opens: it is evaluated, generated from and resumed."""

import csv
import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from in_process import run_program

from sol_jax.errors import UserError
from sol_jax.evaluation import provenance
from sol_jax.training.loop import train

FIELDS = {"train.num_updates": 2, "eval.every": 0, "eval.num_test_blocks": 2, "eval.num_random": 0}


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A run of two updates; then it, its model and its text lie elsewhere, and nothing is where it was."""
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there") / "deep er"
    there.mkdir()
    tiny.save_model(here / "model")
    tiny.save_corpus(here / "corpus.jsonl")
    train(tiny.config_for(here, **FIELDS), here / "run")
    for name in ("run", "model", "corpus.jsonl"):
        shutil.move(here / name, there / name)
    shutil.rmtree(here)
    return there


def places(folder):
    return "--model", folder / "model", "--run_text", folder / "corpus.jsonl"


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_it_is_evaluated(moved, tmp_path):
    """On its own text, to the same numbers as at the end of the training."""
    args = ("--workdir", moved / "run", *places(moved), "--controllers", "fixed")
    done = run_program("sol_jax.evaluate", *args, "--output", tmp_path / "again.csv")  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept = ("controller", "requested_kappa", "nats", "cost_kappa", "tokens")
    told = [[row[name] for name in kept] for row in rows(moved / "run" / "results.csv")]
    assert [[row[name] for name in kept] for row in rows(tmp_path / "again.csv")] == told


def test_another_text_needs_no_training_text(moved, tmp_path):
    """The run remembers its documents; one of them is refused, though the corpus is not to be found."""
    other = tiny.save_corpus(tmp_path / "other.jsonl", documents=31)  # the corpus, and one document more
    args = ("--workdir", moved / "run", "--model", moved / "model", "--controllers", "fixed")
    done = run_program("sol_jax.evaluate", *args, "--source", other, "--output", tmp_path / "x.csv")
    assert done.returncode == 2
    assert "was trained on" in done.stderr or "training" in done.stderr
    fresh = tmp_path / "fresh.jsonl"
    fresh.write_text("".join(f'{{"text": "{"a grey cat saw birds " * 20}{n}"}}\n' for n in range(4)))
    done = run_program("sol_jax.evaluate", *args, "--source", fresh, "--output", tmp_path / "x.csv")
    assert done.returncode == 0, done.stderr


def test_it_writes_text(moved):
    args = ("--policy", moved / "run", "--model", moved / "model", "--prompt", "the cat")
    done = run_program("sol_jax.generate", *args, "--budget", "0.5,0.7,0.5", "--max_tokens", 6)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "policy" in done.stderr


def test_it_goes_on(moved, tmp_path_factory):
    """To exactly the parameters of a run that was never moved."""
    more = FIELDS | {"train.num_updates": 4, "eval.num_test_blocks": 0}
    still = tmp_path_factory.mktemp("still")
    tiny.save_model(still / "model")
    tiny.save_corpus(still / "corpus.jsonl")
    whole = train(tiny.config_for(still, **more), still / "run")
    copy = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(moved / "run", copy)
    resumed = train(tiny.config_for(moved, **more), copy)
    for one, other in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_not_where_it_was_is_named(moved):
    done = run_program("sol_jax.evaluate", "--workdir", moved / "run", "--controllers", "fixed")
    assert done.returncode == 2
    assert "model" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-12], lambda text: "", lambda text: text.replace(" ", "  x ")]
)
def test_a_damaged_list_of_documents_is_not_believed(tmp_path, damage):
    """A list cut between two names would let training text pass as new: its count says so."""
    hashes = [f"{n:064x}" for n in range(5)]
    provenance.remember_documents(tmp_path, hashes)
    assert len(provenance.recall_documents(tmp_path)) == 5
    file = tmp_path / provenance.TRAINING_DOCUMENTS
    file.write_text(damage(file.read_text()))
    assert provenance.recall_documents(tmp_path) == []
    assert provenance.recall_documents(tmp_path / "none") == []


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"training-documents\.txt: cannot be written"):
        provenance.remember_documents(tmp_path / "file", ["a" * 64])


def test_a_refused_text_leaves_the_list_of_documents_alone(moved, tmp_path):
    """Resuming on another corpus is refused, and the run still knows what it learned from."""
    copy = shutil.copytree(moved / "run", tmp_path / "run")
    before = provenance.recall_documents(copy)
    other = tiny.save_corpus(tmp_path / "other.jsonl", documents=40)
    with pytest.raises(UserError, match="is of another"):
        train(tiny.config_for(moved, **FIELDS | {"train.num_updates": 4, "data.source": str(other)}), copy)
    assert provenance.recall_documents(copy) == before


def test_a_run_that_told_wandb_is_evaluated_without_it(moved, tmp_path, monkeypatch):
    copy = shutil.copytree(moved / "run", tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"train.wandb": "sol"}))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    args = ("--workdir", copy, *places(moved), "--controllers", "fixed", "--num_blocks", 1)
    done = run_program("sol_jax.evaluate", *args, "--output", tmp_path / "x.csv")
    assert done.returncode == 0, done.stderr
