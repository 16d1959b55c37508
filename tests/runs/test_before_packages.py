"""Runs that the code began when it was flat modules: today's code ends them as that code did.

`data/before_packages_run.tar.gz` holds two runs after four of seven updates on `tiny`'s model and corpus,
`_final.npz` their last parameters, the `.jsonl` their later metrics and the `.csv` their results, all of
commit c2180fd on a CPU.  `paper` has the smoke settings of SOL-J-2L, `options` what is not the paper's.
"""

import csv
import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest
import tiny

from sol_jax.runs.config import read_config
from sol_jax.training.loop import train

DATA = pathlib.Path(__file__).parents[1] / "data"
BEGUN, UPDATES = 4, 7
# Columns of a row, without the commit, and the shares of levels, which the costs sum up.
TEXTS = (
    "controller", "held", "along", "run", "updates", "model", "prefix", "horizon", "text", "protect",
    "restate", "blocks", "seed", "config", "run_updates", "stale_prefill", "num_random", "tokens",
    "documents", "note",
)  # fmt: skip
NUMBERS = (
    *(f"{kind}_{axis}" for kind in ("requested", "cost") for axis in ("kappa", "rho", "eta")),
    "net", "bytes", "flops", "nats", "perplexity", "gain", "gain_low", "gain_high",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs beside what they were made on: their configs name model and corpus from here."""
    folder = tmp_path_factory.mktemp("before")
    tiny.save_model(folder / "model")
    tiny.save_corpus(folder / "corpus.jsonl")
    with tarfile.open(DATA / "before_packages_run.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def ended(folder):
    """Run -> the state that it ends with."""
    states = {}

    def end(name):
        if name not in states:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                config = read_config(pathlib.Path(name))
                more = {"train.num_updates": UPDATES, "eval.num_test_blocks": 4}
                states[name] = train(config.with_fields(more), pathlib.Path(name))
        return states[name]

    return end


def lines_of(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line for line in lines if line["step"] > BEGUN}


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


RUNS = pytest.mark.parametrize("name", ["paper", "options"])


@RUNS
def test_the_parameters(name, ended):
    state = ended(name)
    assert int(state.step) == UPDATES
    ours = {
        name + jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    with np.load(DATA / "before_packages_final.npz") as file:
        theirs = {path: file[path] for path in file.files if path.startswith(name)}
    assert set(ours) == set(theirs)
    for path, leaf in theirs.items():
        assert leaf.dtype == ours[path].dtype
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)


@RUNS
def test_the_metrics(name, ended, folder):
    """Those of the updates that were left; values near 0 are what rounding leaves of sums that vanish."""
    ended(name)
    ours, theirs = lines_of(folder / name / "metrics.jsonl"), lines_of(DATA / f"before_packages_{name}.jsonl")
    assert list(ours) == list(theirs) == [5, 6, 7]
    for step, line in theirs.items():
        known = {key: value for key, value in ours[step].items() if key in line}
        assert set(known) == set(line)
        for key, value in line.items():
            np.testing.assert_allclose(
                known[key], value, rtol=1e-4, atol=1e-6, err_msg=f"{key} of update {step}"
            )


@RUNS
def test_the_results(name, ended, folder):
    """Also the digest of the config, by which rows of old and new files are known to belong together."""
    ended(name)
    ours, theirs = rows_of(folder / name / "results.csv"), rows_of(DATA / f"before_packages_{name}.csv")
    for mine, row in zip(ours, theirs, strict=True):
        assert {key: mine[key] for key in TEXTS} == {key: row[key] for key in TEXTS}
        for key in NUMBERS:
            expected = float(row[key])
            np.testing.assert_allclose(float(mine[key]), expected, rtol=1e-5, atol=1e-6, err_msg=key)
