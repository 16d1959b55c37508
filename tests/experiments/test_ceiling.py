"""The ceiling of an axis: allocation by hand, and the whole tool on a tiny model."""

import csv

import numpy as np
import pytest
import tiny

from experiments.studies import allocation, ceiling
from sol_jax.axes.rho import ChannelPruning
from sol_jax.errors import UserError

AXIS = ChannelPruning((0.4, 0.7, 1.0), (0.4, 1.0), 100.0)
COST_A = np.array([0.4, 0.7, 1.0])


def test_an_allocation_by_hand():
    """One token is worth its compute and one is not; a third is worth the middle level."""
    loss_NxA = np.array([[0.9, 0.5, 0.0], [0.003, 0.002, 0.0], [0.5, 0.01, 0.0]])
    np.testing.assert_array_equal(allocation.allocate(loss_NxA, COST_A, 0.7), [2, 0, 1])
    np.testing.assert_array_equal(allocation.allocate(loss_NxA, COST_A, 1.0), [2, 2, 2])
    np.testing.assert_array_equal(allocation.allocate(loss_NxA, COST_A, 0.4), [0, 0, 0])
    np.testing.assert_allclose(allocation.taken(loss_NxA, np.array([2, 0, 1])), [0, 0.003, 0.01])


def test_an_allocation_spends_what_is_asked():
    rng = np.random.default_rng(0)
    loss_NxA = np.sort(rng.exponential(0.1, (5000, 3)), 1)[:, ::-1]
    for target in (0.45, 0.6, 0.9):
        chosen = allocation.allocate(loss_NxA, COST_A, target)
        assert COST_A[chosen].mean() == pytest.approx(target, abs=1e-3)
        # Of all choices of this cost none loses less: here against exchanging tokens at random.
        shuffled = rng.permutation(chosen)
        assert allocation.taken(loss_NxA, chosen).mean() < allocation.taken(loss_NxA, shuffled).mean()


def test_a_fixed_mix_by_hand():
    value_NxA = np.array([[-2.0, -1.0, 0.0], [-4.0, -2.0, -1.0]])
    np.testing.assert_allclose(allocation.fixed_mix(value_NxA, AXIS, 0.55), [-1.5, -3.0])
    np.testing.assert_allclose(allocation.fixed_mix(value_NxA, AXIS, 1.0), [0.0, -1.0])


def test_additive_means_are_found_and_blind():
    rng = np.random.default_rng(1)
    level = np.stack([rng.integers(0, n, (400, 8)) for n in (3, 1, 2)], -1)
    first, last = np.array([0.5, 0.2, 0.0]), np.array([0.1, 0.0])
    loss = 0.03 + first[level[..., 0]] + last[level[..., 2]]
    np.testing.assert_allclose(allocation.additive_means(loss, level, (3, 1, 2)), loss, atol=1e-5)
    noise = loss + rng.normal(0, 0.1, (400, 1))  # of tokens: the prediction does not see it
    found = allocation.additive_means(noise, level, (3, 1, 2))
    np.testing.assert_allclose(found - found.mean(), loss - loss.mean(), atol=0.02)


def test_the_ridge_predicts_what_is_linear_in_log():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3000, 5)).astype(np.float32)
    loss = np.exp(x @ rng.normal(0, 0.5, (5, 3)) - 2)
    ridge = allocation.Ridge(x[:2000], loss[:2000], strength=1.0, floor=1e-6)
    np.testing.assert_allclose(ridge.predict(x[2000:]), loss[2000:], rtol=0.02)


@pytest.fixture(scope="module")
def arguments(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ceiling")
    config = tiny.config_for(tiny_folder)
    told = ["--model", config.model.path, "--train_source", config.data.source, "--folder", str(folder)]
    return folder, [*told, "--axes", "rho,joint", "--prefixes", "32", "--blocks", "6", "--train_blocks", "4"]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_tool(arguments, capsys, monkeypatch):
    folder, told = arguments
    ceiling.main(told)
    assert "rho after 32 at 0.46: fixed loses" in capsys.readouterr().out
    rows = rows_of(folder / "ceiling.csv")
    assert [(row["axis"], row["prefix"]) for row in rows] == [("rho", "32")] * 8 + [("joint", "32")] * 8
    assert all(row["probe"] for row in rows[:8])
    assert (folder / "ceiling.png").stat().st_size > 5000
    levels = [row for row in rows_of(folder / "levels.csv") if row["axis"] == "rho"]
    assert [float(row["level"]) for row in levels] == pytest.approx(np.arange(40, 101, 5) / 100)
    loss = [float(row["kl"]) for row in levels]
    assert loss[0] > loss[-1]
    before = (folder / "ceiling.csv").read_bytes()

    def never(*args, **kwargs):
        raise AssertionError("scored again")

    monkeypatch.setattr(ceiling, "score", never)
    ceiling.main(told)  # finds all batches
    assert (folder / "ceiling.csv").read_bytes() == before


def test_an_axis_beside_the_shipped_ones_has_the_levels_that_are_given(arguments, tmp_path, monkeypatch):
    """As an axis that somebody added: the shipped config does not know it, and leaves it at one level."""
    monkeypatch.setattr(ceiling.sol_j_fl, "ALONE", {"kappa": (), "eta": ()})
    told = [*arguments[1], "--axes", "rho", "--folder", str(tmp_path), "--train_blocks", "0"]
    ceiling.main([*told, "--levels", "0.3,0.6,1"])
    levels = rows_of(tmp_path / "levels.csv")
    assert [(row["of"], float(row["level"])) for row in levels] == [("rho", 0.3), ("rho", 0.6), ("rho", 1.0)]
    assert float(levels[0]["kl"]) > float(levels[-1]["kl"])
    for given in ("", "0.5", "low,high"):
        with pytest.raises(UserError, match="must be the levels of rho"):
            ceiling.main.__wrapped__([*told, "--levels", given])


def test_other_text_in_the_folder_is_refused(arguments, tmp_path):
    _, told = arguments
    other = tiny.save_corpus(tmp_path / "other.jsonl", words=50)
    with pytest.raises(UserError, match=r"0000\.npz is of another text; give another --folder"):
        ceiling.main.__wrapped__([*told, "--source", str(other)])


def test_other_rules_in_the_folder_are_refused(arguments):
    _, told = arguments
    with pytest.raises(UserError, match="is of another model or other rules; give another --folder"):
        ceiling.main.__wrapped__([*told, "--axes", "joint", "--variants", "quest"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--axes", "tau"], "--axes: there is no 'tau'; there are kappa, rho, eta, joint"),
        (["--prefixes", "many"], "--prefixes='many' must be whole numbers"),
        (["--blocks", "1"], "--blocks must be at least 2"),
    ],
)
def test_mistakes_are_named(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ceiling.main.__wrapped__(["--folder", str(tmp_path), *flags])
