"""Units of budgets, worked out by hand for the model of `test_costs`."""

import dataclasses

import pytest
from small_models import AXES, TOP
from small_models import COUNTED as MODEL

from pallas_kernels.cost_model import CostModel
from sol_jax.costs.decode_step import axis_shares, in_unit, level_costs, step_cost

QUEST, PRUNING, ROUNDING = AXES
# Of 10 keys a dense step reads 1,664 bytes, and has 976 operations (test_costs).
PRICES = CostModel("by hand", 1.0, 2.0, 100.0, launches_per_layer=3.0)
DENSE_SECONDS = 1664 + 2 * 976 + 100 * 3 * 2


def test_nominal_is_the_axis_own():
    assert level_costs(QUEST, "nominal", MODEL, 10) == (0.2, 1.0)
    assert level_costs(ROUNDING, "nominal", MODEL, 10, PRICES) == (0.5, 1.0)


def test_bytes():
    """What each low level leaves out: 0.2 of the cache but for 96 of bounds, 256 of weights, nothing."""
    assert level_costs(QUEST, "bytes", MODEL, 10) == pytest.approx((1 - (64 - 96) / 1664, 1.0))
    assert level_costs(PRUNING, "bytes", MODEL, 10) == pytest.approx((1 - 256 / 1664, 1.0))
    assert level_costs(ROUNDING, "bytes", MODEL, 10, PRICES) == (1.0, 1.0)


def test_time():
    """Pruning saves 256 bytes and 128 operations; every level launches six kernels."""
    saved = 256 + 2 * 128
    assert level_costs(PRUNING, "time", MODEL, 10, PRICES) == pytest.approx((1 - saved / DENSE_SECONDS, 1.0))
    assert level_costs(ROUNDING, "time", MODEL, 10, PRICES) == (1.0, 1.0)
    free = dataclasses.replace(PRICES, seconds_per_byte=0.0, seconds_per_flop=0.0)
    assert level_costs(PRUNING, "time", MODEL, 10, free) == (1.0, 1.0)


def test_what_axes_save_adds_up():
    cheap = step_cost((0.2, 0.3, 8.0), 10, MODEL, AXES).total.bytes
    saved = sum(1 - level_costs(axis, "bytes", MODEL, 10)[0] for axis in AXES)
    assert 1 - saved == pytest.approx(cheap / step_cost(TOP, 10, MODEL, AXES).total.bytes)


def test_operations():
    """Pruning leaves out 128 of 976."""
    assert level_costs(PRUNING, "operations", MODEL, 10) == pytest.approx((1 - 128 / 976, 1.0))


@pytest.mark.parametrize("unit", ["net", "bytes", "operations", "time"])
def test_one_budget_is_a_share_of_a_whole_step(unit):
    share_X = axis_shares(AXES, unit, MODEL, 1000, PRICES)
    cheap, top = ([axis.cost(axis.levels[end]) for axis in AXES] for end in (0, -1))
    total = 1 - sum(share * (1 - cost) for share, cost in zip(share_X, cheap, strict=True))
    if unit == "net":
        assert total == pytest.approx(sum(cheap) / 3)
        return
    assert top == [1.0, 1.0, 1.0]
    levels = tuple(axis.levels[0] for axis in AXES)
    spent, dense = (step_cost(level_X, 1000, MODEL, AXES).total for level_X in (levels, TOP))
    launches = PRICES.launches_per_layer * MODEL.num_layers
    of = {
        "bytes": spent.bytes / dense.bytes,
        "operations": spent.flops / dense.flops,
        "time": PRICES.seconds(*spent, launches=launches) / PRICES.seconds(*dense, launches=launches),
    }
    assert total == pytest.approx(of[unit], rel=1e-6)
    assert share_X[2] == 0.0  # eta saves nothing on one device


def test_an_axis_that_costs_more_than_it_saves_has_no_share():
    """Of 10 keys Quest reads more bounds than it leaves out."""
    assert axis_shares(AXES, "bytes", MODEL, 10)[0] == 0.0
    assert axis_shares(AXES, "", MODEL, 10) == ()


def test_longer_contexts_make_the_cache_matter():
    shares = [level_costs(QUEST, "bytes", MODEL, n)[0] for n in (100, 10_000)]
    assert shares[0] > shares[1]


def test_bad_input():
    with pytest.raises(ValueError, match="costs in time need the prices of a device"):
        level_costs(QUEST, "time", MODEL, 10)
    with pytest.raises(ValueError, match="'euro' and must be one of nominal, bytes"):
        level_costs(QUEST, "euro", MODEL, 10)


def test_an_axis_in_another_unit_keeps_its_ends_and_translates_its_budgets():
    """Three levels of pruning (of 4 channels: 2, 3, 4 read) cost bytes in equal steps; keep rates do not."""
    axis = dataclasses.replace(PRUNING, levels=(0.3, 0.75, 1.0), budget=(0.3, 0.75), budget_choices=(1.0,))
    inside = in_unit(axis, "bytes", MODEL, 10)
    assert [inside.cost(level) for level in axis.levels] == pytest.approx([0.3, 0.65, 1.0])
    assert inside.budget == pytest.approx((0.3, 0.65))
    assert inside.budget_choices == (1.0,)
    assert inside.penalty_weight == axis.penalty_weight > 0


@pytest.mark.parametrize(("axis", "unit"), [(QUEST, "bytes"), (ROUNDING, "bytes"), (ROUNDING, "time")])
def test_an_axis_that_saves_nothing_is_not_budgeted(axis, unit):
    """With 10 keys of 64 bytes reading the bounds costs more than the cache that is left out; eta is free."""
    free = in_unit(axis, unit, MODEL, 10, PRICES)
    assert [free.cost(level) for level in axis.levels] == [1.0, 1.0]
    assert (free.budget, free.penalty_weight) == ((1.0, 1.0), 0.0)


def test_the_nominal_unit_changes_nothing():
    assert in_unit(QUEST, "nominal", MODEL, 10) is QUEST
