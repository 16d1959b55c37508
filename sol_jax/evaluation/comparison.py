"""The policy at requested budgets, beside controllers that need no training at the costs it realised.

Every comparison is paired: all controllers decode the same tokens after the same prefill, and intervals
are bootstrapped over documents.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sol_jax.axes.base import ActionSpace
from sol_jax.baselines import schedules
from sol_jax.evaluation.budget_grid import Budgets
from sol_jax.evaluation.scoring import HEURISTICS, POLICY, ControllerSpec, EntryScores
from sol_jax.evaluation.statistics import document_bootstrap
from sol_jax.evaluation.sweep import EntryGroup, Sweep
from sol_jax.rl import loss_head
from sol_jax.rl.setup import Setup

# Besides `dense`, which is always there.  Two show what a policy makes of the text: `clock` has its mean
# costs at each step of the episode, `swapped` plays its own schedules, each to another text.  `best_fixed`
# may split one budget for all axes too: it is `fixed` at the split that loses least on training text.
BASELINES = ("fixed", "best_fixed", "fixed_official", "front", "clock", "swapped", "random", *HEURISTICS)


@dataclasses.dataclass(frozen=True)
class ComparisonPlan:
    """What is compared.

    For every axis of `hold` the policy also runs with that axis kept dense, and the others are then matched
    to what it realised so.
    """

    budgets: Budgets
    controllers: tuple[str, ...] = ("fixed", "random")
    num_random: int = 16  # schedules per episode and budget
    random_at: tuple[int, ...] | None = None  # which budgets have them; None: all
    hold: tuple[str, ...] = ()
    seed: int = 0
    along: tuple[str, ...] = ()  # the axis swept at each budget, or ""; () if none is at any

    @property
    def holds(self) -> tuple[str, ...]:
        """Nothing held dense, then each axis of `hold`."""
        return ("", *self.hold)

    @property
    def drawn(self) -> Sequence[int]:
        """The budgets, by index, that have random schedules."""
        if "random" not in self.controllers or not self.num_random:
            return ()
        return range(len(self.budgets)) if self.random_at is None else self.random_at


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """One controller at one requested budget.  Costs and `net` are realised; nats are per token.

    `bytes` and `flops` are what the same steps really read and compute, as shares of decoding them densely
    (see `EntryScores.work`; the policy's own are counted where it is in control).

    `gain` is the policy's mean log-probability minus this controller's, on the same tokens, with its 95 %
    interval over documents.  `net` is the mean of the axes' episode-average costs (docs/method.md, "The three
    axes"). `random_best` is the draw that did best on the very text it is scored on, as the paper takes it:
    this favours it.
    """

    controller: str
    held: str  # the axis kept dense, or ""
    along: str  # the axis whose budgets are swept here while the others stay, or ""
    requested: tuple[float, ...]
    cost: tuple[float, ...]
    net: float
    bytes: float
    flops: float
    nats: float
    perplexity: float
    gain: float
    gain_low: float
    gain_high: float
    tokens: int
    documents: int
    levels: tuple[str, ...]  # per axis the share of controllable steps at each level, "0.1:0.25 1:0.75"


@dataclasses.dataclass(frozen=True)
class RandomScheduleRow:
    """One random schedule of a budget, over the whole text."""

    held: str
    requested: tuple[float, ...]
    draw: int
    net: float
    nats: float


# Told how many entries (on a batch of blocks) were done since the last call.
Progress = Callable[[int], None]


def _silent(total: int, done: int, label: str) -> Progress:
    return lambda entries: None


def run(
    sweep: Sweep, plan: ComparisonPlan, progress: Callable[[int, int, str], Progress] = _silent
) -> tuple[list[ComparisonRow], list[RandomScheduleRow]]:
    """Runs a plan: the policy first, then whatever is matched to its costs.

    `progress` gets the number of entries, how many of them are scored already, and a label; it returns what
    is told of entries as they are done.
    """
    setup, batches = sweep.setup, sweep.batches
    document_N = np.concatenate([batch.document_B for batch in batches])

    def scored(groups: Sequence[EntryGroup], label: str) -> Found:
        scores = sweep.run(groups, progress(*sweep.count(groups), label))
        return {
            (group.label, group.controller.held): found for group, found in zip(groups, scores, strict=True)
        }

    asked = _spread(np.array(plan.budgets), len(document_N), setup)
    own = scored(
        [EntryGroup(POLICY, asked, ControllerSpec(POLICY, held), plan.budgets) for held in plan.holds],
        "policy",
    )
    groups = [_dense(len(document_N), setup)]
    for g, held in enumerate(plan.holds):
        seeds = [(plan.seed, g, j) for j in range(len(plan.budgets))]
        groups += _matched(
            plan, held, own[POLICY, held], setup, sweep.params, len(batches[0].tokens_BxN), seeds
        )
    return _rows(plan, own | scored(groups, "baselines"), document_N, setup)


Found = dict[tuple[str, str], EntryScores]  # by label and the axis held dense


def _spread(given_JxX: np.ndarray, N: int, setup: Setup) -> np.ndarray:
    shape = (N, setup.episode.episodes_per_prefix, *given_JxX.shape)
    return np.broadcast_to(given_JxX.astype(np.float32), shape)


def _dense(N: int, setup: Setup) -> EntryGroup:
    W, T = setup.episode.episodes_per_prefix, setup.episode.horizon
    action = schedules.dense(setup.space, N * W, T).reshape(N, W, 1, T)
    return EntryGroup("dense", action, ControllerSpec(with_entropy=True))


def _matched(
    plan: ComparisonPlan,
    held: str,
    policy: EntryScores,
    setup: Setup,
    params: Any,
    batch_size: int,
    seeds: Sequence[tuple[int, ...]],
) -> list[EntryGroup]:
    """Everything that is matched to what the policy spent, budget by budget."""
    shape, space = setup.episode, setup.space
    N, W, _, T = policy.action_NxWxJxT.shape
    may_control = schedules.controllable(shape, N)
    rows, target_JxX = batch_size * W, policy.costs(setup).mean((0, 1))
    static = {
        "fixed": lambda target_X: schedules.fixed(space, target_X, may_control),
        "front": lambda target_X: schedules.front(space, target_X, may_control),
        "best_fixed": lambda target_X: schedules.fixed(
            space, _best_split(target_X, params, setup), may_control
        ),
        "fixed_official": lambda target_X: schedules.fixed_official(space, target_X, may_control, rows),
    }
    groups = []
    for name in plan.controllers:
        if name in static:
            action = np.stack([static[name](target_X) for target_X in target_JxX], 1)
            groups.append(
                EntryGroup(name, action.reshape(N, W, -1, T), ControllerSpec(held=held), plan.budgets)
            )
        elif name == "clock":
            steps_JxTxX = policy.step_costs(setup)
            action = np.stack([schedules.clock(space, target, may_control) for target in steps_JxTxX], 1)
            groups.append(
                EntryGroup(name, action.reshape(N, W, -1, T), ControllerSpec(held=held), plan.budgets)
            )
        elif name == "swapped":
            # From half the text away, since neighbouring blocks are often of one document.
            action = np.roll(policy.action_NxWxJxT, N // 2, 0)
            groups.append(EntryGroup(name, action, ControllerSpec(held=held), plan.budgets))
        elif name == "random":
            for j in plan.drawn:  # a generator for each, so that a budget's draws do not depend on the others
                rng = np.random.default_rng(seeds[j])
                action = schedules.random(space, target_JxX[j], may_control, plan.num_random, rng)
                asked = (plan.budgets[j],) * plan.num_random
                groups.append(
                    EntryGroup(_draws_of(j), action.reshape(N, W, -1, T), ControllerSpec(held=held), asked)
                )
        else:
            groups.append(
                EntryGroup(name, _spread(target_JxX, N, setup), ControllerSpec(name, held), plan.budgets)
            )
    return groups


def _best_split(target_X: np.ndarray, params: Any, setup: Setup) -> np.ndarray:
    """The mean costs of the total of `target_X` that lose least, by the policy's table of mean losses."""
    spec = setup.policy
    ends = np.cumsum(spec.level_counts)[:-1]
    loss_X = np.split(np.asarray(params["prices"]["loss"], np.float64), ends)
    total = float(loss_head.total_cost(jnp.asarray(target_X), jnp.array(spec.axis_shares)))
    return schedules.best_mix(loss_X, [np.array(cost) for cost in spec.level_costs], spec.axis_shares, total)


def _draws_of(budget: int) -> str:
    return f"random{budget}"


def _rows(
    plan: ComparisonPlan, found: Found, document_N: np.ndarray, setup: Setup
) -> tuple[list[ComparisonRow], list[RandomScheduleRow]]:
    rows: list[ComparisonRow] = []
    draws: list[RandomScheduleRow] = []
    for held, (j, requested) in itertools.product(plan.holds, enumerate(plan.budgets)):
        own = _entry(found[POLICY, held], j)
        compared = {POLICY: own}
        for name in plan.controllers:
            if name != "random":
                compared[name] = _entry(found[name, held], j)
        if j in plan.drawn:
            drawn = found[_draws_of(j), held]
            nats_R = -drawn.logp_NxWxJxT.mean((0, 1, 3), dtype=np.float64)
            net_R = drawn.costs(setup).mean((0, 1, 3))
            draws += [
                RandomScheduleRow(held, requested, r, *pair)
                for r, pair in enumerate(zip(net_R, nats_R, strict=True))
            ]
            compared |= {"random": drawn, "random_best": _entry(drawn, int(np.argmin(nats_R)))}
        compared["dense"] = found["dense", ""]
        reference_N = _by_block(own)
        for name, scores in compared.items():
            place = (held, plan.along[j] if plan.along else "", requested)
            rows.append(_row(name, place, scores, reference_N, document_N, setup))
    return rows, draws


def _entry(scores: EntryScores, j: int) -> EntryScores:
    return EntryScores(*(array[:, :, j : j + 1] for array in scores))


def _by_block(scores: EntryScores) -> np.ndarray:
    return scores.logp_NxWxJxT.mean((1, 2, 3), dtype=np.float64)


def _row(
    name: str,
    place: tuple[str, str, tuple[float, ...]],
    scores: EntryScores,
    reference_N: np.ndarray,
    document_N: np.ndarray,
    setup: Setup,
) -> ComparisonRow:
    logp_N = _by_block(scores)
    cost_X = scores.costs(setup).mean((0, 1, 2))
    nats = -float(logp_N.mean())
    N, W, _, T = scores.logp_NxWxJxT.shape
    gain = document_bootstrap(reference_N - logp_N, document_N)
    return ComparisonRow(
        name,
        *place,
        tuple(float(c) for c in cost_X),
        float(cost_X.mean()),
        *scores.work(setup, with_policy=name == POLICY),
        nats,
        float(np.exp(nats)),
        *gain,
        N * W * T,
        len(np.unique(document_N)),
        level_shares(scores, setup),
    )


def level_shares(scores: EntryScores, setup: Setup) -> tuple[str, ...]:
    """Per axis the share of controllable steps at each level; levels never taken are left out."""
    N, W, _, T = scores.action_NxWxJxT.shape
    may_control = schedules.controllable(setup.episode, N).reshape(N, W, 1, T)
    taken = scores.action_NxWxJxT[np.broadcast_to(may_control, scores.action_NxWxJxT.shape)]
    return tuple(_shares(setup.space, x, taken) for x in range(len(setup.space.axes)))


def _shares(space: ActionSpace, x: int, action: np.ndarray) -> str:
    levels, counts = np.unique(space.values_AxX[action][:, x], return_counts=True)
    return " ".join(
        f"{level:g}:{count / len(action):.4g}" for level, count in zip(levels, counts, strict=True)
    )


def summary(rows: Sequence[ComparisonRow], setup: Setup) -> dict[str, float]:
    """Scalars for the training log, averaged over the requested budgets.

    `eval/penalty` is the training penalty of the realised mean costs.  `eval/score`, which the best
    checkpoint has most of, is the gain over the fixed schedule of the same cost less the budgets' misses: of
    each axis beyond the dead zone, a nat per unit of cost.  (Under penalties high enough to be met, the
    reward itself would rank policies by their budgets alone.)
    """
    policy = [row for row in rows if row.controller == POLICY]
    off_JxX = np.array([np.subtract(row.cost, row.requested) for row in policy])
    weight_X = np.array([axis.penalty_weight for axis in setup.space.axes])
    names = [axis.name for axis in setup.space.axes]
    if setup.policy.axis_shares:  # one budget for all
        off_JxX, weight_X = (
            off_JxX @ np.array(setup.policy.axis_shares)[:, None],
            weight_X.mean(keepdims=True),
        )
        names = [setup.policy.config.one_budget]
    miss_JxX = np.abs(off_JxX)
    penalty = np.mean(np.sum(weight_X * np.maximum(miss_JxX - setup.grpo.dead_zone, 0) ** 2, -1))
    scalars = {"eval/nats": np.mean([row.nats for row in policy]), "eval/penalty": penalty}
    scalars |= {f"eval/budget_gap/{name}": gap for name, gap in zip(names, miss_JxX.mean(0), strict=True)}
    for name in (*BASELINES, "random_best", "dense"):
        gains = [row.gain for row in rows if row.controller == name]
        if gains:
            scalars[f"eval/gain_over_{name}"] = np.mean(gains)
    if "eval/gain_over_fixed" in scalars:
        missed = np.maximum(miss_JxX - setup.grpo.dead_zone, 0).sum(-1).mean()
        scalars["eval/score"] = scalars["eval/gain_over_fixed"] - missed
    return {name: float(value) for name, value in scalars.items()}
