"""The cost model: prices recovered from made-up measurements, non-negative, kept as JSON."""

import numpy as np
import pytest

from pallas_kernels.cost_model import CostModel, fit, load

TRUE = CostModel("made up", 1 / 4e12, 1 / 6e14, 3e-6, 12.0)
RNG = np.random.default_rng(0)
BYTES, FLOPS = 10 ** RNG.uniform(4, 11, 40), 10 ** RNG.uniform(6, 13, 40)
LAUNCHES = RNG.integers(1, 400, 40)


def prices(model: CostModel) -> list[float]:
    return [model.seconds_per_byte, model.seconds_per_flop, model.seconds_per_launch]


def test_seconds_add_up():
    assert CostModel("", 2.0, 3.0, 5.0).seconds(7, 11, 13) == 2 * 7 + 3 * 11 + 5 * 13


def test_exact_measurements_give_the_prices_back():
    seconds = [TRUE.seconds(*work) for work in zip(BYTES, FLOPS, LAUNCHES, strict=True)]
    model = fit("made up", BYTES, FLOPS, LAUNCHES, seconds, 12.0)
    assert prices(model) == pytest.approx(prices(TRUE), rel=1e-9)
    assert (model.device, model.launches_per_layer) == ("made up", 12.0)


def test_errors_count_relative_to_the_time():
    """Two rows of one byte price, 1 s and 1 us a byte apart by a half: the small row weighs as much."""
    model = fit("", [1e6, 1.0], [0, 0], [0, 0], [1e6, 0.5])
    # Least squares of (p - 1)^2 + (2 p - 1)^2.
    assert model.seconds_per_byte == pytest.approx(3 / 5)


def test_no_price_is_negative():
    """Times that fall as launches rise: the launches are free, and the bytes take it all."""
    count = np.arange(1, 11)
    model = fit("", np.full(10, 1e6), np.zeros(10), count, 1e-3 - 1e-5 * count)
    assert model.seconds_per_launch == model.seconds_per_flop == 0
    assert 0.89e-9 < model.seconds_per_byte < 1e-9


def test_the_non_negative_optimum_is_found():
    """Against a fine grid of prices of noisy times."""
    noisy = [
        TRUE.seconds(b, 0, n) * RNG.uniform(0.5, 2) for b, n in zip(BYTES[:12], LAUNCHES[:12], strict=True)
    ]

    def miss(per_byte: float, per_launch: float) -> float:
        return sum(
            ((b * per_byte + n * per_launch) / t - 1) ** 2
            for b, n, t in zip(BYTES, LAUNCHES, noisy, strict=False)
        )

    model = fit("", BYTES[:12], np.zeros(12), LAUNCHES[:12], noisy)
    found = miss(model.seconds_per_byte, model.seconds_per_launch)
    grid = (miss(a / 4e12, b * 3e-6) for a in np.linspace(0, 2, 41) for b in np.linspace(0, 2, 41))
    assert found <= min(grid)


def test_json_keeps_it(tmp_path):
    TRUE.save(tmp_path / "model.json")
    assert load(tmp_path / "model.json") == TRUE


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"missing.json: cannot be read \(No such file.*roofline writes"):
        load(tmp_path / "missing.json")
    for text in ("not json", '{"device": "x"}', '{"speed": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad.json: not a cost model"):
            load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="at least one measurement"):
        fit("", [], [], [], [])
    with pytest.raises(ValueError, match="above 0 seconds"):
        fit("", [1.0], [0], [1], [0.0])
    with pytest.raises(ValueError, match=r"seconds_per_byte is -1\.0; it must be at least 0"):
        CostModel("", -1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="all cost nothing"):
        CostModel("", 0.0, 0.0, 0.0)
