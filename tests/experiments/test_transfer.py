"""Measures of freely generated text, and a small run of `experiments.studies.transfer`."""

import csv

import jax
import numpy as np
import pytest

from experiments.studies import transfer
from sol_jax.errors import UserError
from sol_jax.rl.train_step import init_state
from sol_jax.runs import policy_files


def test_repetition_counts_what_was_there_before():
    assert transfer.repetition([1, 2, 3, 4, 5, 6]) == 0
    assert transfer.repetition([1, 2, 1, 2, 1, 2], n=2) == pytest.approx(1 - 2 / 5)
    assert transfer.repetition([7] * 10) == pytest.approx(6 / 7)
    assert transfer.repetition([1, 2]) == 0


def test_divergence_is_the_first_token_that_differs():
    assert transfer.divergence([1, 2, 3], [1, 2, 4]) == 2
    assert transfer.divergence([5, 2], [1, 2]) == 0
    assert transfer.divergence([1, 2], [1, 2, 3]) == 2


@pytest.fixture(scope="module")
def policy_folder(tiny_session, tmp_path_factory):
    state = init_state(jax.random.key(0), tiny_session.setup)
    folder = tmp_path_factory.mktemp("policy")
    about = {"title": "tiny", "model": "model", "command": "-", "updates": 0, "seed": 0, "commit": "-",
             "results": [], "documents": []}  # fmt: skip
    policy_files.save_policy(folder, state.params, tiny_session.config, about)
    return folder


def test_the_program(tiny_folder, policy_folder, tmp_path):
    """Rows for dense and for policy and fixed in each mode; the fixed schedules cost what the policy did."""
    output = tmp_path / "transfer.csv"
    arguments = {
        "--policies": policy_folder, "--model": tiny_folder / "model", "--output": output,
        "--source": tiny_folder / "corpus.jsonl", "--budgets": "0.6,0.7,0.6", "--dtype": "float32",
        "--num_prompts": 3, "--prompt_length": 12, "--max_tokens": 9, "--batch_size": 4,
    }  # fmt: skip
    modes = ("refresh", "lossless")
    transfer.main([str(part) for pair in arguments.items() for part in pair] + ["--modes", *modes])
    with output.open() as file:
        rows = {(row["mode"], row["controller"]): row for row in csv.DictReader(file)}
    assert set(rows) == {("plain", "dense"), *((m, c) for m in modes for c in ("policy", "fixed"))}
    dense, lossless = rows["plain", "dense"], rows["lossless", "policy"]
    assert float(dense["drift"]) == pytest.approx(0, abs=1e-6)
    assert float(dense["divergence"]) == float(lossless["divergence"]) == 9
    assert float(lossless["logp"]) == pytest.approx(float(dense["logp"]), abs=1e-5)
    assert 0 <= float(lossless["kept"]) <= 1
    assert float(rows["refresh", "policy"]["kept"]) == 1
    assert float(dense["bytes"]) == pytest.approx(1)
    assert float(dense["flops"]) == pytest.approx(1)
    # The check reads all weights once more for an episode, and refused steps are paid for.
    assert float(lossless["flops"]) > float(rows["refresh", "policy"]["flops"])
    ours, theirs = rows["refresh", "policy"], rows["refresh", "fixed"]
    assert float(theirs["net"]) == pytest.approx(float(ours["net"]), abs=0.1)
    gain = float(ours["logp"]) - float(theirs["logp"])
    assert float(theirs["gain"]) == pytest.approx(gain, abs=1e-5)
    assert float(ours["drift"]) > 0

    prompts = list(csv.DictReader((tmp_path / "transfer-prompts.csv").open()))
    logp = [float(p["logp"]) for p in prompts if (p["mode"], p["controller"]) == ("lossless", "policy")]
    assert len(logp) == 3
    assert np.mean(logp) == pytest.approx(float(lossless["logp"]), abs=1e-5)

    before = output.read_text()
    again = [str(part) for pair in arguments.items() for part in pair]
    transfer.main(again)  # nothing is left to do
    assert output.read_text() == before
    with pytest.raises(SystemExit):
        transfer.main([*again, "--max_tokens", "8"])


def test_too_few_long_documents(tiny_folder, policy_folder, tmp_path):
    engine = transfer.open_engine(str(tiny_folder / "model"))
    with pytest.raises(UserError, match=r"documents of more than 4000 tokens; --num_prompts=3"):
        transfer.prompts_of(engine, str(tiny_folder / "corpus.jsonl"), "", 3, 4000)


def test_a_summary_pairs_by_prompt():
    ours = {"logp": np.array([-1.0, -2.0]), "net": np.array([0.5, 0.5])}
    theirs = {"logp": np.array([-1.5, -2.5]), "net": np.array([0.5, 0.5])}
    row = transfer.summarise(theirs, ours)
    assert (row["gain"], row["gain_low"], row["gain_high"]) == (0.5, 0.5, 0.5)
    assert row["logp"] == -2.0
