"""Prices of this machine: a fit that finds what made the times, and a run on a tiny model."""

import dataclasses

import numpy as np
import pytest

from experiments.benchmarks import clock, prices
from experiments.benchmarks.prices import Timing
from pallas_kernels.cost_model import load
from sol_jax.models.model import Model
from sol_jax.models.weights import load_model

LAYERS = 30


def made_up(noise: float = 0.0) -> list[Timing]:
    """Steps of a machine that reads 10 GB and computes 100 GFLOP a second, and takes 20 us for a layer."""
    rng = np.random.default_rng(0)
    found = []
    for context in (256, 1024, 4096):
        for action in prices.ACTIONS:
            bytes, flops = rng.uniform(1e8, 9e8), rng.uniform(1e8, 4e8)
            seconds = (bytes / 1e10 + flops / 1e11 + LAYERS * 2e-5) * np.exp(noise * rng.normal())
            found.append(Timing(context, action, bytes, flops, float(seconds)))
    return found


def test_the_fit_finds_the_prices():
    model = prices.fit(made_up(), "a machine", LAYERS)
    assert model.seconds_per_byte == pytest.approx(1e-10)
    assert model.seconds_per_flop == pytest.approx(1e-11)
    assert model.seconds_per_launch == pytest.approx(2e-5)
    assert prices.misses(model, made_up(), LAYERS) == pytest.approx(0, abs=1e-9)


def test_the_report_says_how_far_it_is_off(tiny_folder):
    cfg = dataclasses.replace(load_model(tiny_folder / "model")[0], num_layers=LAYERS)
    exact, noisy = made_up(), made_up(0.3)
    model = prices.fit(exact, "a machine", LAYERS)
    assert prices.report(model, exact, cfg).splitlines()[-2:] == [
        "median error: 0.0%",
        "of contexts that were left out of the fit: 0.0%",
    ]
    off = prices.misses(model, noisy, LAYERS)
    assert 0.1 < off < 0.4
    assert f"median error: {off:.1%}" in prices.report(model, noisy, cfg)
    # Of one context there is none to leave out.
    assert prices.report(model, exact[:7], cfg).splitlines()[-1].startswith("median error")


def test_a_run(tiny_folder, tmp_path, monkeypatch, capsys):
    cfg, weights = load_model(tiny_folder / "model")
    model = Model("tiny", tiny_folder / "model", cfg, None, {})
    model.__dict__["weights"] = weights
    monkeypatch.setattr(prices, "open_model", lambda path, dtype: model)
    texts = np.random.default_rng(0).integers(cfg.vocab_size, size=(1, 200)).astype(np.int32)
    monkeypatch.setattr(clock, "articles", lambda model, need, count: iter(texts[:, :need]))
    path = tmp_path / "new" / "prices.json"
    given = ["--contexts", "24", "40", "--episodes", "2", "--output", str(path), "--rule", "paper"]
    prices.main([*given, "--dtype", "float32"])
    said = capsys.readouterr().out
    assert said.count("by its prices") == 2 * len(prices.ACTIONS)
    assert load(path).launches_per_layer == 1
    with pytest.raises(SystemExit) as stop:
        prices.main([*given, "--episodes", "0"])
    assert stop.value.code == 2
    assert "--episodes is 0 and must be at least 1" in capsys.readouterr().err
