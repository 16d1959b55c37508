"""The pollution experiment against the authors': windows, statistics, and what their model lost where."""

import json

import golden
import numpy as np
import pytest

from experiments.studies import pollution

THEIRS = {"sparsity": "kappa", "prune": "rho", "quant": "eta"}


@pytest.fixture(scope="module")
def vectors():
    return golden.load("h_pollution")


def columns(vectors) -> dict[tuple[str, float], str]:
    """Axis and level -> the end of the vectors' names."""
    names = [name.removeprefix("nll_") for name in vectors if name.startswith("nll_") and name != "nll_dense"]
    return {(THEIRS[name.split("_")[0]], float(name.split("_")[1])): name for name in names}


def test_windows(vectors):
    length, window, count, seed = (int(value) for value in vectors["windows_args"])
    starts = pollution.sample_windows(length, window, count, seed)
    np.testing.assert_array_equal(starts, vectors["windows_start"])


def _assert_summary(delta_NxT, recorded: str, what: str, rtol: float = 1e-4) -> None:
    found = pollution.summarize_tail(delta_NxT) | pollution.tail_curves(delta_NxT)
    expected = json.loads(recorded)
    assert set(found) == set(expected)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=rtol, atol=1e-3, err_msg=f"{what}, {name}")


def test_statistics(vectors):
    _assert_summary(vectors["sum_in"], str(vectors["sum_out"]), "random")
    _, C, _ = (int(value) for value in vectors["P_C_tail"])
    for name in columns(vectors).values():
        delta_NxT = (vectors[f"nll_{name}"] - vectors["nll_dense"]).T
        _assert_summary(delta_NxT[:, C:], str(vectors[f"summary_{name}"]), name)
        direct = 100 * (np.exp(delta_NxT[:, :C].mean(1)) - 1).mean()
        assert direct == pytest.approx(float(vectors[f"direct_mean_pct_{name}"]), rel=1e-4)


def test_losses(vectors, tmp_path):
    """Every step of every column.  Windows in which rounding decides on a page or a step of rounding part."""
    if "lm/model.norm.weight" not in vectors:
        golden.absent("language model of the pollution experiment")
    cfg, weights = golden.language_model(vectors, "lm/", tmp_path / "lm")
    P, C, tail = (int(value) for value in vectors["P_C_tail"])
    by_column = columns(vectors)
    levels = {axis: tuple(level for other, level in by_column if other == axis) for axis in pollution.AXES}
    protocol = pollution.PollutionProtocol(
        P, C, tail, levels["kappa"], levels["rho"], levels["eta"], page_size=8
    )
    nll = pollution.measure(weights, cfg, vectors["ids"], protocol, batch_size=3)
    golden.assert_close(nll[:, 0].T, vectors["nll_dense"], "dense", rtol=1e-4, atol=2e-4)
    steady = 0
    for c, column in enumerate(protocol.columns, start=1):
        expected_NxT = vectors[f"nll_{by_column[column]}"].T
        parted_NxT = np.abs(nll[:, c] - expected_NxT) > 2e-4 + 1e-4 * np.abs(expected_NxT)
        steady += (~parted_NxT.any(1)).sum()
    assert steady >= 0.8 * len(nll) * len(protocol.columns), "more windows part than rounding explains"
