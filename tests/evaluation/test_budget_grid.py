"""Requested budgets: on the diagonal, along each axis, and from the command line."""

import pathlib

import pytest
import tiny

from sol_jax.axes.base import ActionSpace
from sol_jax.errors import UserError
from sol_jax.evaluation import budget_grid as budgets


def test_budgets_by_hand(tiny_session):
    space = tiny_session.setup.space
    assert budgets.diagonal(space, 1) == ((0.55, 0.7, 0.65625),)
    assert budgets.diagonal(space, 2)[0] == (0.4, 0.6, 0.541667)
    swept, names = budgets.axis_sweeps(space, 3)
    assert names == ("kappa",) * 3 + ("rho",) * 3 + ("eta",) * 3
    assert swept[:3] == ((0.1, 0.7, 0.65625), (0.55, 0.7, 0.65625), (1.0, 0.7, 0.65625))
    assert swept[3] == (0.55, 0.4, 0.65625)
    assert len(swept) == 9
    one_level = tiny.config_for(pathlib.Path("."), **{"axes.eta.levels": (16,)})
    axes = one_level.axes.build(one_level.axis_context)
    single, _ = budgets.axis_sweeps(ActionSpace(axes), 2)
    assert single == ((0.1, 0.7, 1.0), (1.0, 0.7, 1.0), (0.55, 0.4, 1.0), (0.55, 1.0, 1.0))


def test_an_even_choice():
    assert budgets.spread(0, 3) == (0, 1, 2)
    assert budgets.spread(7, 3) == (0, 1, 2)
    assert budgets.spread(2, 4) == (1, 3)
    assert budgets.spread(6, 20) == (1, 5, 8, 11, 15, 18)


def test_budgets_on_the_command_line(tiny_session):
    space = tiny_session.setup.space
    assert budgets.parse("0.4,0.6,0.5;1,1,1", space, "--budgets") == ((0.4, 0.6, 0.5), (1.0, 1.0, 1.0))
    for text in ("", "0.5", "0.4,0.6,0.5;", "a,b,c", "0.4 0.6 0.5"):
        with pytest.raises(UserError, match="must be costs of kappa, rho, eta"):
            budgets.parse(text, space, "--budgets")
    with pytest.raises(
        UserError, match=r"--budgets: rho = 0\.3 cannot be met; the axis' levels cost 0\.4 to 1"
    ):
        budgets.parse("0.5,0.3,0.5", space, "--budgets")
