"""Baselines against the authors' evaluation: fixed, random, entropy- and drift-steered schedules.

Their last case but two lets pruning and quantisation act before attention may be compressed; our rollout
takes the dense action there, so of that case only the rules are compared, not the rollout.
"""

import functools
import json
from typing import Any, NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sol_jax.axes.base import ActionSpace, Axis
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Recency
from sol_jax.axes.rho import ChannelPruning
from sol_jax.baselines import heuristics, schedules
from sol_jax.models import llama
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.rollout import (
    Controller,
    EpisodeRules,
    Rollout,
    group_rollout,
    label_logp,
    prefill_block,
)

# README of the vectors: at these the authors' float32 sums decide between two counts.
TIE = 1e-6


class Case(NamedTuple):
    meta: dict[str, Any]
    space: ActionSpace
    target_X: np.ndarray
    arrays: golden.Vectors

    def levels(self, controller: str) -> np.ndarray:
        """Chosen level of each axis, [batches, T, B, X]."""
        return np.stack([self.arrays[f"{controller}/a_{axis}"] for axis in "kpq"], -1)

    def effective(self, x: int) -> np.ndarray:
        """The steps in which axis `x` may act, [batches, T, B]."""
        mask = self.arrays["fixed/eff"]
        return np.ones_like(mask) if self.meta["struct_on_non_eff"] and x > 0 else mask


@functools.cache
def cases() -> dict[str, Case]:
    vectors = golden.load("g_baselines")
    found = {}
    for name in vectors["cases"]:
        arrays = golden.under(vectors, f"{name}/")
        if arrays:
            meta = json.loads(str(arrays["meta_json"]))
            targets = np.array([meta[f"target_{axis}"] for axis in ("keep", "prune", "qratio")])
            found[str(name)] = Case(meta, _space(meta), targets, arrays)
    return found


def _space(meta: dict[str, Any]) -> ActionSpace:
    def axis(kind: type[Axis], levels: list[float]) -> Axis:
        return kind(levels=tuple(levels), budget=(0.0, 1.0), penalty=1.0)

    prune = [int(level[1:]) / 100 for level in meta["prune"]]
    bits = [float(level[1:]) for level in meta["quant"]]
    return ActionSpace(
        (axis(Recency, meta["keep_fracs"]), axis(ChannelPruning, prune), axis(OutputQuantization, bits))
    )


def _level_counts(space: ActionSpace, x: int, action: np.ndarray) -> np.ndarray:
    """Level index of axis `x` in joint actions."""
    return np.searchsorted(space.axes[x].levels, space.values_AxX[action][..., x].astype(float) - 1e-6)


def _rows(x_nbxTxB: np.ndarray) -> np.ndarray:
    """[batches, T, B] -> [batches * B, T]: ours counts sequences first."""
    return x_nbxTxB.swapaxes(1, 2).reshape(-1, x_nbxTxB.shape[1])


def test_the_nested_rule():
    chosen = golden.under(golden.load("g_baselines"), "choose/")
    cost_L = jnp.asarray(chosen["vals_sorted"])
    due = chosen["target_avg"].astype(np.float32) * (chosen["cum_steps"] + chosen["R"]) - chosen["cum_val"]
    rule = jax.vmap(heuristics.choose_level, (None, 0, 0, 0, 0, None))
    gain = float(chosen["gamma"])
    index = rule(cost_L, chosen["c_req"], due, chosen["R"], chosen["signal01"], gain)
    np.testing.assert_array_equal(index, chosen["idx"])
    assert len(np.unique(index)) > 3


def test_signals():
    vectors = golden.load("g_baselines")
    entropy = jax.vmap(heuristics.normalized_entropy)(vectors["uncert/logits"])
    golden.assert_close(entropy, vectors["uncert/u"], "entropy")
    drift = jax.vmap(heuristics.drift_official)(vectors["drift/a"], vectors["drift/b"])
    golden.assert_close(drift, vectors["drift/d"], "drift")


def test_fixed():
    for name, case in cases().items():
        expected = case.levels("fixed")
        batches, T, B, _ = expected.shape
        for x in range(3):
            effective_NxT = _rows(case.effective(x))
            action = schedules.fixed_official(case.space, case.target_X, effective_NxT, B)
            found = _level_counts(case.space, x, action).reshape(batches, B, T).swapaxes(1, 2)
            if np.array_equal(found, expected[..., x]):
                continue
            _differs_at_a_tie_only(case, x, found, expected[..., x], name)


def _differs_at_a_tie_only(case: Case, x: int, found: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Up to the first batch row in which the authors' own running sum is on half a row, all are equal."""
    axis = case.space.axes[x]
    low, high, _ = schedules.mix(axis, case.target_X[x])
    cost_L = np.array([axis.cost(level) for level in axis.levels])
    spent, steps = 0.0, 0
    for b, t in np.ndindex(expected.shape[:2]):
        n = expected.shape[2]
        required = (case.target_X[x] * (steps + n) - spent) / n
        wanted = (required - cost_L[low]) / (cost_L[high] - cost_L[low]) * n
        on_tie = abs(wanted % 1 - 0.5) < TIE
        count = (expected[b, t] == high).sum()
        if not np.array_equal(found[b, t], expected[b, t]):
            assert on_tie, f"{name}, axis {axis.name}, batch {b}, step {t}: departs from the authors'"
            return
        assert abs(count - np.clip(wanted, 0, n)) <= 0.5 + TIE
        spent += cost_L[expected[b, t]].sum()
        steps += n


def test_random_counts():
    for name, case in cases().items():
        for x, axis in enumerate("kpq"):
            schedule_nbxBxR = case.arrays[f"randomized/schedule_{axis}"]
            batches, B, R = schedule_nbxBxR.shape
            effective = np.ones((batches * B, R), bool)
            rng = np.random.default_rng(0)
            action = schedules.random(case.space, case.target_X, effective, 2, rng, rounded=True)
            found = np.sort(_level_counts(case.space, x, action), -1)
            expected = np.sort(schedule_nbxBxR.reshape(-1, 1, R), -1)
            np.testing.assert_array_equal(
                found, np.broadcast_to(expected, found.shape), err_msg=f"{name}, {axis}"
            )


@pytest.mark.parametrize("controller", ["emc", "drift"])
def test_steering_by_the_recorded_signals(controller):
    """The choices of all axes, given what the authors' heuristic saw."""
    for name, case in cases().items():
        expected = case.levels(controller)
        signal = case.arrays[f"{controller}/signal"]
        for x, axis in enumerate(case.space.axes):
            cost_L = np.array([axis.cost(level) for level in axis.levels], np.float32)
            effective_NxT = _rows(case.effective(x))
            spent_N, counted_N = (np.zeros(len(effective_NxT), np.float32) for _ in range(2))
            for t in range(effective_NxT.shape[1]):
                on_N = effective_NxT[:, t]
                left_N = np.maximum(effective_NxT[:, t:].sum(1), 1).astype(np.float32)
                due_N = np.float32(case.target_X[x]) * (counted_N + left_N) - spent_N
                level_N = jax.vmap(heuristics.choose_level, (None, 0, 0, 0, 0))(
                    jnp.asarray(cost_L), due_N / left_N, due_N, left_N, signal[:, t].reshape(-1)
                )
                level_N = np.where(on_N, level_N, len(cost_L) - 1)
                np.testing.assert_array_equal(
                    level_N, expected[:, t, :, x].reshape(-1), err_msg=f"{name}, {axis.name}, step {t}"
                )
                spent_N += on_N * cost_L[level_N]
                counted_N += on_N


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return golden.language_model(golden.load("g_baselines"), "lm/", tmp_path_factory.mktemp("lm"))


def _steer(model, case: Case, controller: str) -> tuple[Rollout, np.ndarray]:
    """The heuristic's rollouts of all rows, [N, ...], and the label log-probabilities, [N, T]."""
    cfg, weights = model
    T = case.meta["T"]
    shape = EpisodeConfig(case.meta["ctx"], T, sinks=case.meta["Ts"], window=case.meta["Tw"])
    rules = EpisodeRules(cfg, case.space, shape)
    ids_NxM = case.arrays["ids"].reshape(-1, case.arrays["ids"].shape[-1])

    def run(weights, tokens_N):
        block = prefill_block(weights, tokens_N, rules)
        if controller == "emc":
            steered = heuristics.entropy_controller(weights, case.space, T)
        else:
            embed_D = llama.embed(weights, tokens_N[shape.prefix_len - 1])
            steered = heuristics.drift_controller(case.space, T, embed_D, official=True)
        one = Controller(steered.act, jax.tree.map(lambda leaf: leaf[None], steered.memory))

        def group(episode):
            budget_KxX = jnp.asarray(case.target_X, jnp.float32)[None]
            key_K = jax.random.split(jax.random.key(0), 1)
            played = group_rollout(weights, rules, block.cache, episode, key_K, budget_KxX, one)
            logp = jax.vmap(label_logp, (None, 0, 0))(weights, played.hidden[0], episode.label)
            return jax.tree.map(lambda leaf: leaf[0], played), logp

        return jax.tree.map(lambda leaf: leaf[0], jax.vmap(group)(block.episodes))

    played, logp = jax.jit(jax.vmap(run, (None, 0)))(weights, jnp.asarray(ids_NxM, jnp.int32))
    return played, np.asarray(logp)


@pytest.mark.parametrize("controller", ["emc", "drift"])
def test_heuristics_in_the_rollout(controller, model):
    """Model, signals, choices and scores together; a row counts up to where it first differs."""
    same, total = 0, 0
    for name, case in cases().items():
        if case.meta["struct_on_non_eff"]:
            continue
        played, logp_NxT = _steer(model, case, controller)
        expected_NxTxX = (
            case.levels(controller).swapaxes(1, 2).reshape(-1, *case.levels(controller).shape[1::2])
        )
        effective_NxT = _rows(case.effective(0))
        np.testing.assert_array_equal(played.controllable, effective_NxT)
        taken = np.where(effective_NxT, played.action, case.space.dense)
        equal_N = (np.asarray(case.space.join(expected_NxTxX)) == taken).all(1)
        same, total = same + equal_N.sum(), total + len(equal_N)
        recorded = json.loads(str(case.arrays[f"{controller}/result_json"]))
        if equal_N.all():
            # Scores within rounding of a threshold move a step's likelihood; which do differs by machine.
            assert np.exp(-logp_NxT.mean()) == pytest.approx(recorded["ppl"], rel=5e-4), name
            cost = case.space.costs_AxX[taken[effective_NxT]].mean(0)
            names = ("avg_keep_effective", "avg_prune_keep", "avg_quant_ratio")
            np.testing.assert_allclose(cost, [recorded[key] for key in names], rtol=1e-5, err_msg=name)
    assert same / total > 0.9, f"{total - same} of {total} rows were steered differently"
