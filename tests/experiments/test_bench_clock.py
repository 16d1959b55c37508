"""What the benchmarks on the clock make of their measurements, and a run of them on a tiny model."""

import argparse
import csv
import dataclasses
import types

import jax
import numpy as np
import pytest

from experiments.benchmarks import clock, native
from experiments.benchmarks.clock import HORIZON, Player, Text, Timed, play_given
from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.errors import UserError
from sol_jax.generation.episodes import Decoder
from sol_jax.models import llama
from sol_jax.models.weights import load_model
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.rollout import EpisodeRules


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_model(tiny_folder / "model")


def decoder(cfg, **fields):
    axes = (
        Quest((0.2, 1.0), (0.2, 1.0), 100.0),
        ChannelPruning((0.5, 1.0), (0.5, 1.0), 100.0),
        OutputQuantization((4, 16), (0.25, 1.0), 100.0),
    )
    return Decoder(EpisodeRules(cfg, ActionSpace(axes), EpisodeConfig(horizon=HORIZON)), **fields)


def options(**fields):
    given = {"kernels": "auto", "rule": "kept", "policies": [], "budgets": [], "fixed": None}
    return argparse.Namespace(**given | {"refreshes": list(clock.REFRESHES)} | fields)


def test_a_refresh_is_spread_over_the_episodes_that_it_ends(tiny):
    logp = [np.full(HORIZON, -2.0)] * 4
    dense = Timed([1.0] * 4, [1.0] * 4, [np.full(HORIZON, -1.5)] * 4)
    player = Player("fixed", decoder(tiny[0], refresh_every=4))
    row = Timed([0.5, 0.5, 0.5, 2.5], [1.0, 1.0, 1.0, 1.0], logp).row(player, dense)
    assert row["refresh"] == "every 4"
    assert row["speedup"] == pytest.approx(1.0)
    assert row["tokens_per_second"] == pytest.approx(HORIZON)
    assert row["loss"] == pytest.approx(0.5)
    assert row["perplexity"] == pytest.approx(np.exp(2))
    row = Timed([0.5, 0.5, 0.5, 2.5], [1.0] * 4, logp).row(
        dataclasses.replace(player, decoder=decoder(tiny[0])), dense
    )
    assert row["speedup"] == pytest.approx(2.0)


def test_a_policy_is_asked_for_a_number_or_for_one_of_each_axis(tiny, monkeypatch):
    cfg = decoder(tiny[0])
    setup = types.SimpleNamespace(space=cfg.space, rules=cfg.rules, policy=None)
    monkeypatch.setattr(clock, "open_policy", lambda *_: ({}, setup))
    model = types.SimpleNamespace(config=tiny[0])

    def asked(budget):
        found = clock.players(model, options(policies=["mine"], budgets=[budget]))
        return [player.budget for player in found if player.name == "mine"]

    assert asked((0.5,)) == [(0.5, 0.5, 0.5)] * len(clock.REFRESHES)
    assert asked((0.2, 0.5, 1.0)) == [(0.2, 0.5, 1.0)] * len(clock.REFRESHES)
    with pytest.raises(
        UserError, match=r"--budgets: mine has 3 axes, and \(0.5, 0.5\) is not a number for each"
    ):
        asked((0.5, 0.5))


def test_plans(tiny):
    cfg = decoder(tiny[0])
    space = cfg.space
    (fixed,) = Player("fixed", cfg, (0.2, 1.0, 16)).plan(40)
    np.testing.assert_array_equal(space.values_AxX[fixed], np.tile(np.float32([0.2, 1.0, 16]), (HORIZON, 1)))
    (beat,) = Player("clock", cfg, target=(0.2, 1.0, 1.0)).plan(40)
    assert space.values_AxX[beat][:, 0].tolist() == pytest.approx([1.0] + [0.2] * (HORIZON - 1))
    (mixed,) = Player("mix", cfg, target=(0.6, 1.0, 1.0)).plan(40)
    assert space.costs_AxX[mixed].mean(0)[0] == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("fields", [{}, {"refresh_every": 2}, {"refresh": False}])
def test_given_text_is_scored_as_the_dense_model_does(tiny, fields):
    """Under the dense action, whatever is refreshed when; under another it is not."""
    cfg, weights = tiny
    context, ids = 21, np.arange(21 + 2 * HORIZON + 1, dtype=np.int32) * 37 % 250
    _, cache = llama.prefill(weights, ids[:context], cfg)
    pad = ((0, 0), (0, 0), (0, 64 - context), (0, 0))
    cache = llama.KVCache(*(np.pad(part, pad) for part in cache))
    hidden_SxD, _ = llama.prefill(weights, ids, cfg)
    expected = jax.nn.log_softmax(llama.logits(weights, hidden_SxD))[np.arange(len(ids) - 1), ids[1:]]
    for values, near in (((1.0, 1.0, 16), True), ((0.2, 0.5, 4), False)):
        text = Text(Player("fixed", decoder(cfg, **fields), values), weights, cache, ids, context)
        got = np.concatenate([text.play()[1] for _ in range(2)])
        wanted = np.asarray(expected)[context - 1 : context - 1 + 2 * HORIZON]
        assert (np.abs(got - wanted).max() < 1e-4) == near
    assert play_given._cache_size() >= 1


def test_what_kernels_read():
    """Of 30 layers of SmolLM2-135M in float32, by hand."""
    assert native.bytes_of("gate, up", 0.5, 8192, 4) == 30 * 4 * 576 * 1536
    assert native.bytes_of("attention", 1.0, 8192, 2) == 30 * 2 * 2 * 3 * 8192 * 64
    assert native.bytes_of("head", 1.0, 8192, 4) == 4 * 49152 * 576
    assert native.bytes_of("norm, prune", 0.4, 8192, 4) == 0
    weights = 3 * 576 * 1536 + 2 * 576 * 576 + 2 * 576 * 192
    assert native.bytes_of("refresh", 1.0, 8192, 4) == 30 * 4 * (weights + 2 * 3 * 8192 * 64)


def test_rules_are_fields_of_the_axis():
    for fields in clock.RULES.values():
        Quest((0.1, 1.0), (0.1, 1.0), 100.0, **fields)


def test_named_actions_in_place_of_the_usual_ones(tiny):
    model = types.SimpleNamespace(config=tiny[0])
    wanted = options(fixed=[(0.1, 0.8, 16.0), (1.0, 0.7, 8.0)], refreshes=["never"], rule="quest")
    dense, xla, first, second = clock.players(model, wanted)
    assert (dense.name, xla.name) == ("dense", "xla")
    assert (first.name, second.name) == ("fixed 0.1/0.8/16", "fixed 1/0.7/8")
    for player, values in ((first, [0.1, 0.8, 16]), (second, [1, 0.7, 8])):
        assert player.refresh == "never"
        assert player.decoder.space.values_AxX[player.plan(40)[0][0]].tolist() == pytest.approx(values)
    idle = [[axis.idle for axis in player.decoder.space.axes] for player in (first, second)]
    assert idle == [[False, False, True], [True, False, False]]
    kappa = first.decoder.space.axes[0]
    assert (kappa.read_newest, kappa.dense_layers, kappa.least_pages, kappa.protect) == (True, 2, 3, False)


def test_rows_that_are_not_measured_again_are_kept(tmp_path):
    path = tmp_path / "clock.csv"
    assert clock.kept_rows(path, []) == []
    rows = [dict.fromkeys(clock.KEYS, "x") | {"context": n, "speedup": "1.5"} for n in ("256", "2048")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert clock.kept_rows(path, [rows[0] | {"context": 256, "speedup": 2.0}]) == [rows[1]]
    assert clock.kept_rows(path, [rows[0] | {"asked": "0.5"}]) == rows


@pytest.mark.parametrize("text", ["0.1", "0.1,0.8", "a,b,c"])
def test_an_action_has_a_number_of_each_axis(text, capsys):
    with pytest.raises(SystemExit) as stop:
        clock.main(["--fixed", text])
    assert stop.value.code == 2
    assert "--fixed" in capsys.readouterr().err
