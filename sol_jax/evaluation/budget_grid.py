"""Which budgets a policy is asked for in an evaluation."""

from collections.abc import Iterable, Sequence

import numpy as np

from sol_jax.axes.base import ActionSpace, check_budgets
from sol_jax.errors import UserError

Budgets = tuple[tuple[float, ...], ...]


def diagonal(space: ActionSpace, count: int) -> Budgets:
    """`count` budgets between the cheapest and the dearest, all axes the same part of their range up.

    The ends are left out: there nothing is to be decided.
    """
    low_X, high_X = (np.array([axis.budget[end] for axis in space.axes]) for end in (0, 1))
    shares = np.arange(1, count + 1) / (count + 1)
    return _tuples(low_X + share * (high_X - low_X) for share in shares)


def axis_sweeps(space: ActionSpace, count: int) -> tuple[Budgets, tuple[str, ...]]:
    """For each axis with a choice, `count` budgets over its whole range, the others in the middle.

    Also returns the name of the swept axis of each budget.
    """
    middle_X = np.array([sum(axis.budget) / 2 for axis in space.axes])
    swept, names = [], []
    for x, axis in enumerate(space.axes):
        if len(axis.levels) > 1:
            for cost in np.linspace(*axis.budget, count):
                swept.append(np.where(np.arange(len(space.axes)) == x, cost, middle_X))
                names.append(axis.name)
    return _tuples(swept), tuple(names)


def _tuples(budgets: Iterable[np.ndarray]) -> Budgets:
    return tuple(tuple(round(float(cost), 6) for cost in budget_X) for budget_X in budgets)


def parse(text: str, space: ActionSpace, flag: str, share_X: Sequence[float] = ()) -> Budgets:
    """Budgets from `0.4,0.6,0.5;0.6,0.75,0.7`: costs of the axes in order, budgets apart by semicolons.

    With `share_X` (see `PolicySpec.axis_shares`) also from `0.7;0.8`: what a whole step may cost.

    Raises `UserError` if it is not that, or if the levels of an axis cannot meet a budget.
    """
    names = ", ".join(axis.name for axis in space.axes)
    try:
        budgets = tuple(tuple(float(cost) for cost in part.split(",")) for part in text.split(";"))
    except ValueError:
        budgets = ()
    if share_X and budgets and all(len(budget) == 1 for budget in budgets):
        return tuple(split_evenly(budget[0], space, share_X, flag) for budget in budgets)
    if not budgets or any(len(budget) != len(space.axes) for budget in budgets):
        raise UserError(f"{flag}={text!r} must be costs of {names}, budgets apart by semicolons")
    for budget in budgets:
        for axis, cost in zip(space.axes, budget, strict=True):
            check_budgets(axis, (cost,), flag)
    return budgets


def split_evenly(total: float, space: ActionSpace, share_X: Sequence[float], flag: str) -> tuple[float, ...]:
    """Costs of the axes that together make a step cost `total`, all the same part of their range down.

    Raises `UserError`, naming `flag`, for a total that the levels cannot meet.
    """
    low_X, top_X = (np.array([axis.cost(axis.levels[end]) for axis in space.axes]) for end in (0, -1))
    shares = np.array(share_X)
    least, most = (1.0 - float(shares @ (1.0 - cost_X)) for cost_X in (low_X, top_X))
    if not least <= total <= most:
        raise UserError(
            f"{flag}: no price makes a step cost {total:g}; with these levels it costs {least:.4g} to "
            f"{most:.4g} of a dense one"
        )
    part = (most - total) / (most - least) if most > least else 0.0
    return tuple(float(cost) for cost in top_X - part * (top_X - low_X))


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of the numbers below `total`, evenly spread; all of them if there are fewer, or for 0."""
    if count == 0 or count >= total:
        return tuple(range(total))
    return tuple(int(i) for i in (2 * np.arange(count) + 1) * total // (2 * count))
