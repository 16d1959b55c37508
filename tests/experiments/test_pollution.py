"""The pollution experiment: what is compressed when, its statistics by hand, and the program end to end."""

import numpy as np
import pytest

from experiments.studies import pollution
from sol_jax.errors import UserError

SMALL = pollution.PollutionProtocol(24, 2, 5, kappa=(0.1,), rho=(0.5, 0.9), bits=(4,))


def test_columns_compress_one_axis_for_a_few_steps(tiny_session):
    space = SMALL.setup(tiny_session.setup.model).space
    assert SMALL.columns == [("kappa", 0.1), ("rho", 0.5), ("rho", 0.9), ("eta", 4.0)]
    values = space.values_AxX[SMALL.actions(space)]
    assert values.shape == (5, 7, 3)
    dense = np.array([1.0, 1.0, 16.0], np.float32)
    np.testing.assert_array_equal(values[0], np.tile(dense, (7, 1)))
    np.testing.assert_array_equal(values[:, 2:], np.tile(dense, (5, 5, 1)))
    expected = [(0.1, 1, 16), (1, 0.5, 16), (1, 0.9, 16), (1, 1, 4)]
    np.testing.assert_array_equal(values[1:, 0], np.array(expected, np.float32))
    np.testing.assert_array_equal(values[1:, 0], values[1:, 1])


def test_statistics_by_hand():
    """Eleven windows of two steps: ten lose nothing, one doubles its perplexity in the second step."""
    delta = np.zeros((11, 2))
    delta[3, 1] = np.log(2)
    found = pollution.summarize_tail(delta)
    root = 100 * (np.sqrt(2) - 1)  # the window's mean loss is half of log 2
    assert found["mean_tail_pct"] == pytest.approx(root / 11)
    assert found["worst10_mean_tail_pct"] == pytest.approx(root / 2)  # two windows: ceil(1.1)
    assert found["peak_tail_pct_p90"] == pytest.approx(0.0)
    assert found["peak_tail_pct_p95"] == pytest.approx(50.0)  # half way between the last two
    assert pollution.tail_curves(delta)["curve_median_pct"].tolist() == [0.0, 0.0]


def test_direct_and_tail_rows(tiny_session):
    """Column rho 0.5 loses log 1.5 in its compressed steps and nothing later; the others nothing at all."""
    nll = np.zeros((3, 5, 7))
    nll[:, 2, :2] = np.log(1.5)
    rows, curves = pollution.rows_of(nll, np.arange(3), SMALL)
    shown = [(row["axis"], row["level"], float(row["direct_pct"]), float(row["tail_pct"])) for row in rows]
    assert shown == [
        ("kappa", "0.1", 0, 0), ("rho", "0.5", pytest.approx(50), 0), ("rho", "0.9", 0, 0), ("eta", "4", 0, 0)
    ]  # fmt: skip
    assert float(rows[1]["direct_pct_low"]) == pytest.approx(50)
    assert [row["step"] for row in curves[:5]] == ["1", "2", "3", "4", "5"]
    assert len(curves) == 20


def test_too_short_a_text():
    with pytest.raises(UserError, match="has 31 tokens, not more than one window of 32"):
        pollution.sample_windows(31, SMALL.window, 4, 0)


def test_compression_leaves_its_mark_on_the_tail(tiny_session):
    """And the first step of a window, before any entry is written, loses at full levels nothing."""
    model, weights = tiny_session.setup.model, tiny_session.weights
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (3, SMALL.window))
    nll = pollution.measure(weights, model, tokens, SMALL, batch_size=2)
    assert nll.shape == (3, 5, 7)
    assert np.abs(nll[:, 1:, 2:] - nll[:, :1, 2:]).max() > 1e-3
    top = pollution.PollutionProtocol(24, 2, 5, kappa=(0.9999,), rho=(0.9999,), bits=(15,))
    gentle = pollution.measure(weights, model, tokens, top, batch_size=3)
    np.testing.assert_allclose(gentle[:, 1:], np.repeat(gentle[:, :1], 3, 1), atol=5e-3)
    np.testing.assert_allclose(gentle[:, 0], nll[:, 0], atol=1e-5)


def test_the_program(tiny_folder, tmp_path, capsys):
    output = tmp_path / "pollution.csv"
    args = ("--model", tiny_folder / "model", "--source", tiny_folder / "corpus.jsonl", "--windows", 3)
    pollution.main([*map(str, args), "--prefix", "32", "--tail", "3", "--output", str(output)])
    with open(output) as file:
        head, *lines = file.read().splitlines()
    assert head.startswith("axis,level,direct_pct,direct_pct_low,direct_pct_high,tail_pct,")
    assert len(lines) == 9
    assert len((tmp_path / "pollution-curves.csv").read_text().splitlines()) == 1 + 9 * 3
    assert capsys.readouterr().out.count("axis kappa") == 3
