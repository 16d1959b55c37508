"""The benchmark of generation: what is counted by hand, that the policy is run, and the smoke form.

All of it is of one shape, so that each program is compiled once.
"""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import COUNTED as MODEL

from experiments.benchmarks import generate as bench_generate
from experiments.benchmarks import timing
from experiments.benchmarks.generate import (
    HORIZON,
    MAX_TOKENS,
    SPACE,
    episodes,
    play_translated,
    random_texts,
)
from experiments.benchmarks.kernel_steps import MODELS
from sol_jax.generation import episodes as decoding
from sol_jax.generation.engine import length_bucket

BATCH, PROMPT = 8, 40


@pytest.fixture(scope="module")
def bench():
    model = dataclasses.replace(MODELS["tiny"], dtype="float32")
    return bench_generate.make_bench(model, rounds=1, smoke=True)


def played_by(bench, name):
    """The first episode of fresh texts."""
    text_B, played = episodes(bench, BATCH, PROMPT, (name,))[name]()
    np.testing.assert_array_equal(text_B.length, PROMPT + HORIZON)
    return played


@pytest.fixture(scope="module")
def dense(bench):
    return played_by(bench, "dense")


@pytest.mark.parametrize("name", ["policy", "masks", "refresh"])
def test_everybody_writes_the_dense_text(name, bench, dense):
    """By dense actions of their own space: the last one of each."""
    played, space = played_by(bench, name), bench.decoders[name].space
    np.testing.assert_array_equal(played.token, dense.token)
    np.testing.assert_array_equal(played.action, space.dense)
    assert space.num_actions == (SPACE.num_actions if name == "masks" else 1)
    assert played.controllable.all()


def test_runs_begin_where_the_first_began(bench):
    run = episodes(bench, BATCH, PROMPT, ("dense",))["dense"]
    for _ in range(3):
        text_B, _ = run()
        np.testing.assert_array_equal(text_B.length, PROMPT + HORIZON)


@pytest.mark.parametrize("name", ["policy", "masks"])
def test_the_policy_is_run_and_told_of_its_choices(name, bench):
    """The programs that are timed, with the table that lets choices be: what the policy does by itself.

    So they hold the policy, whatever the table says.  With axes held full it still chooses among all actions.
    """
    cfg, identity_A = bench.decoders[name], jnp.arange(SPACE.num_actions)
    budget_BxX, plan_BxT = jnp.full((BATCH, 3), 0.5), jnp.zeros((BATCH, HORIZON), jnp.int32)
    text_B = random_texts(BATCH, PROMPT, bench.model, cfg.space.axes)
    _, played = play_translated(bench.weights, bench.params, text_B, budget_BxX, identity_A, cfg)
    assert len(np.unique(played.action)) > 2
    if name == "masks":
        text_B = random_texts(BATCH, PROMPT, bench.model, cfg.space.axes)
        _, own = decoding.play(bench.weights, bench.params, text_B, budget_BxX, plan_BxT, cfg)
        np.testing.assert_array_equal(played.action, own.action)
        np.testing.assert_array_equal(played.token, own.token)


def test_limits_by_hand():
    """Two texts after 7 tokens: steps of 8 to 23 keys, 15.5 in the mean, of the model of test_costs.

    A token takes 656 operations and 32 a key.  A step reads 1,312 bytes of weights for both texts, and for
    each 32 a key and 32 for the MLP's output.
    """
    found = bench_generate.limits(2, 7, MODEL, timing.DeviceRates(copy=1184e3, matmul=1152e6))
    assert found["gflop_per_token"] == pytest.approx(1152e-9)
    assert found["mb_per_token"] == pytest.approx((656 + 496 + 32) * 1e-6)
    assert found["matmul_limit"] == pytest.approx(1e6)
    assert found["bandwidth_limit"] == pytest.approx(1e3)


def test_caches_are_as_long_as_the_engines():
    for prompt in (*range(1, 3000, 7), 256, 2000):
        tokens = length_bucket(prompt) + MAX_TOKENS + HORIZON
        assert bench_generate.room(prompt) == length_bucket(tokens, parts=8)


def test_verdicts_by_hand():
    """The worst case of each target; batch 1 has no target of throughput."""

    def dense(batch, rate, matmul, bandwidth):
        shares = {"share_of_matmul_limit": rate / matmul, "share_of_bandwidth_limit": rate / bandwidth}
        row = {"what": "dense", "batch_size": batch, "prompt": 256, "tokens_per_second": rate}
        return row | {"matmul_limit": matmul, "bandwidth_limit": bandwidth} | shares

    place = {"batch_size": 8, "prompt": 1}
    first = {"what": "first token", **place, "seconds": 0.5, "first_seconds": 4.5, "buckets": 1}
    rows = [
        dense(1, 1.0, 1000.0, 1000.0),
        dense(8, 300.0, 700.0, 310.0),  # of 279 asked for
        dense(8, 300.0, 400.0, 900.0),  # of 200
        {"what": "policy", **place, "overhead": 0.012},
        {"what": "policy", **place, "overhead": -0.02},
        {"what": "masks", **place, "overhead": 0.7},
        first | {"compiled": 1},
        first | {"compiled": 0, "seconds": 0.1},
    ]
    overhead, throughput, tokens = bench_generate.verdicts(rows, 0.05)
    assert overhead == "policy overhead: at most +1.2% (batch 8, prompt 1); the target is at most 5%: met"
    assert throughput.startswith("throughput: 300 tokens/s (batch 8, prompt 256) are 43% of the matmul limit")
    assert throughput.endswith("97% of the bandwidth limit; the target is the lower of 50% of one and 90% of "
                               "the other: met")  # fmt: skip
    assert tokens.startswith(
        "first token: at most 0.50 s warm (batch 8, prompt 1), 4.4 s more with compilation"
    )
    assert tokens.endswith("1 programs a bucket, the target is at most one: met")
    missed = [dense(8, 300.0, 700.0, 340.0), rows[3] | {"overhead": 0.06}, first | {"compiled": 2}]
    assert all(line.endswith("MISSED") for line in bench_generate.verdicts(missed, 0.05))
    assert bench_generate.verdicts([], 0.05) == []


def test_smoke_writes_a_table(tmp_path, capsys):
    path = tmp_path / "here.csv"
    sizes = ("--batch_sizes", "8", "--prompts", "40", "--first_batches", "2", "--rounds", "1")
    bench_generate.main(["--smoke", *sizes, "--csv", str(path)])
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == ["dense", "policy", "masks", "refresh", "first token"]
    assert all(float(row["seconds"]) > 0 and row["prompt"] == "40" for row in rows)
    shares = [float(rows[0][f"share_of_{kind}_limit"]) for kind in ("matmul", "bandwidth", "lower")]
    assert max(shares[:2]) == shares[2] > 0
    assert (rows[4]["buckets"], rows[4]["compiled"]) == ("1", "1")
    assert len([line for line in capsys.readouterr().out.splitlines() if "target" in line]) == 3
    bench_generate.main(["--smoke", *sizes, "--minutes", "0"])
    assert "left out, no time: first token, batch 2, prompt 40" in capsys.readouterr().out


def test_a_gpu_is_measured_in_bfloat16(monkeypatch):
    monkeypatch.setattr(bench_generate, "current_platform", lambda: "gpu")
    assert bench_generate.parse([]).dtype == "bfloat16"
    with pytest.raises(SystemExit):
        bench_generate.parse(["--dtype", "float32"])


def test_rates_are_of_this_machine():
    rates = bench_generate.measure_rates("float32", smoke=True)
    assert jax.default_backend() == "gpu" or 1e6 < min(rates) < max(rates) < 1e14
