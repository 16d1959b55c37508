"""From what happened in an episode to the signal GRPO learns from (paper section 5).

Array -> array functions for one schedule; batch them with `jax.vmap`.  A schedule's signal is
`X_t = R_t - sum of the budget penalties`: `returns` less the sum of `budget_penalty`.
"""

from typing import Literal

import jax
import jax.numpy as jnp


def task_reward(logp_label, kl, kl_weight):
    """The reward of a step, `r_t = (1 - w) log p_sparse(label) - w KL(p_dense || p_sparse)`.

    Elementwise.  `kl_weight` is the paper's w (0: the dense model is not needed, pass `kl` = 0).
    """
    return (1.0 - kl_weight) * logp_label - kl_weight * kl


def returns(
    reward_T: jax.Array,
    gamma: float,
    how: Literal["sum", "max", "none"] = "sum",
    level: Literal["process", "outcome"] = "process",
) -> jax.Array:
    """The return `R_t` of every step of an episode, `return_T`.

    `how` (the authors' `reward_agg`): "sum", `R_t = r_t + gamma R_{t+1}`; "max",
    `R_t = max(r_t, gamma R_{t+1})`; "none", `R_t = r_t`.  `gamma` is the paper's discount (0.85).
    `level`: with "outcome" every step of an episode gets its first return `R_0` ("none" stays as it is: the
    sum over steps that `grpo.group_advantage` then takes is the undiscounted return).
    """
    _check_rank(1, reward_T=reward_T)
    if level not in ("process", "outcome"):
        raise ValueError(f'level must be "process" or "outcome", not {level!r}')
    if how == "none":
        return reward_T
    if how not in ("sum", "max"):
        raise ValueError(f'how must be "sum", "max" or "none", not {how!r}')

    def backward(return_tp1, reward_t):
        future = gamma * return_tp1
        return_t = reward_t + future if how == "sum" else jnp.maximum(reward_t, future)
        return return_t, return_t

    # The last return is its reward under either rule, so no neutral element is needed (-inf times gamma = 0).
    last = reward_T[-1]
    _, return_Tm1 = jax.lax.scan(backward, last, reward_T[:-1], reverse=True)
    return_T = jnp.append(return_Tm1, last)
    return return_T if level == "process" else jnp.full_like(return_T, return_T[0])


def axis_costs(cost_TxX: jax.Array, controllable_T: jax.Array) -> jax.Array:
    """`mean_cost_X`, each axis' cost averaged over the controllable steps (the paper's m).

    An episode without a controllable step costs 0, as in the authors' code; the schedules of a group share
    their controllable steps, so the constant penalty this brings leaves their advantages alone.
    """
    _check_rank(2, cost_TxX=cost_TxX)
    _check_rank(1, controllable_T=controllable_T)
    # Multiplied rather than selected: a NaN cost shows even where it does not count.
    counted_T = controllable_T.astype(cost_TxX.dtype)
    return (counted_T[:, None] * cost_TxX).sum(axis=0) / jnp.maximum(counted_T.sum(), 1.0)


def budget_penalty(
    mean_cost_X: jax.Array, budget_X: jax.Array, weight_X: jax.Array, dead_zone: float = 0.02
) -> jax.Array:
    """`penalty_X = alpha max(|m - C| - dead_zone, 0)^2`, to be summed over the axes.

    `mean_cost_X` is the paper's m (see `axis_costs`), `budget_X` the targets C, `weight_X` the weights alpha
    (100, 100, 200; 0 for an axis with a single level).  Being under budget is penalised like being over it.
    """
    _check_rank(1, mean_cost_X=mean_cost_X, budget_X=budget_X, weight_X=weight_X)
    excess_X = jnp.maximum(jnp.abs(mean_cost_X - budget_X) - dead_zone, 0.0)
    return weight_X * jnp.square(excess_X)


def _check_rank(rank: int, **arrays) -> None:
    for name, array in arrays.items():
        if jnp.ndim(array) != rank:
            raise ValueError(f"{name} has shape {jnp.shape(array)}, expected {rank} axes")
