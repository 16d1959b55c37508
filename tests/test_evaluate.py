"""The comparison of controllers: each plays what it is given; padding, chunks and files change nothing."""

import csv
import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sol_jax import evaluate, schedules
from sol_jax.config import flatten
from sol_jax.data import evaluation_batches
from sol_jax.state import Checkpoints
from sol_jax.update import init_state

ROOT = pathlib.Path(__file__).parents[1]
BUDGETS = np.array([[0.3, 0.6, 0.5], [0.7, 0.8, 0.75]], np.float32)
NUM_RANDOM = 3
FIELDS = {
    "eval.budgets": tuple(map(tuple, BUDGETS.tolist())),
    "eval.num_random": NUM_RANDOM,
    "eval.batch_size": 2,
    "eval.num_test_blocks": 5,
}


@pytest.fixture(scope="module")
def params(tiny_session):
    return init_state(jax.random.key(0), tiny_session.setup).params


@pytest.fixture(scope="module")
def batches(tiny_session):
    """Five blocks: two batches of 2 and one of 1."""
    return list(evaluation_batches(tiny_session.split("test"), 2, 5))


def run(session, batches, given, params=None, setup=None):
    return evaluate.run_blocks(session.weights, batches, given, setup or session.setup, params)


@pytest.fixture(scope="module")
def policy(tiny_session, batches, params):
    given = np.broadcast_to(BUDGETS, (5, 1, *BUDGETS.shape))
    return run(tiny_session, batches, given, params)


@pytest.fixture(scope="module")
def replayed(tiny_session, batches, policy):
    """The policy's own actions, played as schedules."""
    return run(tiny_session, batches, policy.action_NxWxJxT)


def test_replaying_the_policys_actions_gives_its_scores(policy, replayed):
    np.testing.assert_array_equal(replayed.action_NxWxJxT, policy.action_NxWxJxT)
    np.testing.assert_allclose(replayed.logp_NxWxJ, policy.logp_NxWxJ, atol=1e-5)
    np.testing.assert_allclose(replayed.cost_NxWxJxX, policy.cost_NxWxJxX, atol=1e-6)


def test_costs_are_means_over_the_steps(tiny_session, replayed):
    costs = tiny_session.setup.space.costs_AxX[replayed.action_NxWxJxT]
    np.testing.assert_allclose(replayed.cost_NxWxJxX, costs.mean(-2), atol=1e-6)


def test_padding_of_batches_and_schedules_changes_nothing(tiny_session, batches, policy, replayed):
    """The last batch of 1 block was filled up to 2; here 5 schedules are, to two chunks of 4."""
    odd = np.concatenate([policy.action_NxWxJxT[:, :, [0, 1, 0, 1]], policy.action_NxWxJxT[:, :, :1]], 2)
    scores = run(tiny_session, batches, odd)
    np.testing.assert_allclose(scores.logp_NxWxJ, replayed.logp_NxWxJ[:, :, [0, 1, 0, 1, 0]], atol=1e-5)
    alone = run(tiny_session, batches[2:], policy.action_NxWxJxT[4:])
    np.testing.assert_allclose(alone.logp_NxWxJ, replayed.logp_NxWxJ[4:], atol=1e-5)


def test_the_dense_schedule_is_the_plain_model(tiny_session, batches):
    """Without any of our rollout: the log-probabilities of one forward pass."""
    from sol_jax import llama

    setup = tiny_session.setup
    T, S = setup.episode.horizon, setup.episode.prefix_len
    given = schedules.dense(setup.space, 5, T)[:, None, None]
    scores = run(tiny_session, batches, given)
    tokens_NxM = np.concatenate([batch.tokens_BxN for batch in batches])
    for n, tokens_M in enumerate(tokens_NxM):
        hidden_MxD, _ = llama.prefill(tiny_session.weights, jnp.asarray(tokens_M[:-1]), setup.model)
        logits = np.asarray(jax.vmap(lambda h: llama.logits(tiny_session.weights, h))(hidden_MxD[S:]))
        logp = jax.nn.log_softmax(logits)[np.arange(T), tokens_M[S + 1 :]]
        assert scores.logp_NxWxJ[n, 0, 0] == pytest.approx(float(logp.mean()), abs=1e-4)


def made_up(logp_NxJ, cost=0.5, T=4):
    logp = np.array(logp_NxJ, float)[:, None]
    return evaluate.Scores(logp, np.full((*logp.shape, 3), cost), np.zeros((*logp.shape, T), int))


def test_the_best_random_schedule_is_the_best_in_the_mean():
    """Draw 1 wins in one block by far and draw 2 in both by little; the mean decides."""
    policy = made_up([[-1.0], [-1.0]])
    #                 dense fixed draw0 draw1 draw2
    others = made_up([[-0.5, -2.0, -3.0, -1.0, -1.5], [-0.5, -2.0, -3.0, -9.0, -1.5]])
    rows = {
        row.controller: row for row in evaluate._rows(policy, others, BUDGETS[:1], 3, np.array([0, 1]), 4)
    }
    assert rows["random_best"].nats == pytest.approx(1.5)
    assert rows["random"].nats == pytest.approx((3 + 3 + 1 + 9 + 1.5 + 1.5) / 6)
    assert rows["fixed"].gain == pytest.approx(1.0)
    assert rows["dense"].gain == pytest.approx(-0.5)
    assert rows["policy"].gain == 0.0
    assert rows["policy"].perplexity == pytest.approx(np.e)
    assert rows["policy"].tokens == 8


def test_the_summary_is_what_training_tries_to_raise(tiny_session):
    setup = tiny_session.setup
    row = evaluate.Row("policy", (0.3, 0.6, 0.5), (0.4, 0.6, 0.6), 0.5, 2.0, 7.4, 0.0, 0.0, 0.0, 8)
    dense = dataclasses.replace(row, controller="dense", gain=-0.25)
    scalars = evaluate.summary([row, dense], setup)
    penalty = 100 * 0.08**2 + 200 * 0.08**2
    assert scalars["eval/penalty"] == pytest.approx(penalty)
    assert scalars["eval/score"] == pytest.approx(-2.0 - penalty)
    assert scalars["eval/budget_gap/kappa"] == pytest.approx(0.1)
    assert scalars["eval/gain_over_dense"] == -0.25
    assert "eval/gain_over_random" not in scalars


def test_the_command_reproduces_the_report(tiny_folder, tiny_session, tmp_path, capsys):
    """results.csv of a run, by the program and in the process."""
    config = tiny.config_for(tiny_folder, **FIELDS)
    session = dataclasses.replace(tiny_session, config=config)
    state = init_state(jax.random.key(0), session.setup)
    checkpoints = Checkpoints(tmp_path, flatten(config), keep=1)
    checkpoints.save(1, state, {"position": 0}, 0.0)
    checkpoints.close()
    rows = evaluate.report(session, state.params, tmp_path)
    shown = capsys.readouterr().out
    written = (tmp_path / "results.csv").read_text()
    records = list(csv.DictReader(written.splitlines()))
    assert [record["controller"] for record in records] == [row.controller for row in rows]
    assert [record["controller"] for record in records] == [
        "policy", "fixed", "random", "random_best", "dense"
    ] * 2  # fmt: skip
    axes = ("kappa", "rho", "eta")
    assert list(records[0]) == [
        "controller", "net", "nats", "perplexity", "gain", "gain_low", "gain_high", "tokens",
        *(f"requested_{axis}" for axis in axes), *(f"cost_{axis}" for axis in axes),
        "split", "documents", "blocks", "num_random", "seed", "commit",
    ]  # fmt: skip
    assert {record["blocks"] for record in records} == {"5"}
    for row in rows:
        assert row.nats == pytest.approx(np.log(row.perplexity))
        assert row.controller == "policy" or row.gain_low <= row.gain <= row.gain_high
        assert row.net == pytest.approx(np.mean(row.cost))

    before = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    (tmp_path / "results.csv").unlink()
    command = [sys.executable, "-m", "sol_jax.evaluate", "--workdir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"evaluating the policy of update 1\n{shown}"
    assert (tmp_path / "results.csv").read_text() == written
    assert {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()} == before
