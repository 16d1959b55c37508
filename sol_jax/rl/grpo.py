"""GRPO: group advantages and the clipped loss (paper section 5).

Array -> array functions.  `group_advantage` takes the K schedules of one sequence (batch it with `jax.vmap`),
`whiten` a whole rollout batch, `clipped_loss` the N steps of a minibatch.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

_STD_FLOOR = 1e-6


def group_advantage(
    x_KxT: jax.Array,
    level: Literal["process", "outcome"] = "process",
    norm: Literal["center", "zscore"] = "center",
) -> jax.Array:
    """`advantage_KxT`: how much better a schedule did than its group of K, all on the same sequence.

    `level`: "process" compares the `X_t` of the same step; "outcome" compares their sums over T and gives
    every step of a schedule that one number.  `norm`: "center" subtracts the group's mean, "zscore" also
    divides by its biased standard deviation, at least 1e-6.
    """
    _check_rank(2, x_KxT=x_KxT)
    if level not in ("process", "outcome"):
        raise ValueError(f'level must be "process" or "outcome", not {level!r}')
    if norm not in ("center", "zscore"):
        raise ValueError(f'norm must be "center" or "zscore", not {norm!r}')
    score_KxT = x_KxT if level == "process" else x_KxT.sum(axis=1, keepdims=True)
    advantage_KxT = score_KxT - score_KxT.mean(axis=0)
    if norm == "zscore":
        advantage_KxT = advantage_KxT / _floored_rms(advantage_KxT, axis=0)
    return jnp.broadcast_to(advantage_KxT, x_KxT.shape)


def whiten(advantage: jax.Array) -> jax.Array:
    """Shifts and scales a rollout batch of advantages, of any shape, to mean 0 and standard deviation 1.

    The deviation is biased and at least 1e-6.  Steps that are not controllable count like the others, as in
    the authors' code.
    """
    centred = advantage - advantage.mean()
    return centred / scale(advantage)


def scale(advantage: jax.Array) -> jax.Array:
    """What `whiten` divides by: the biased standard deviation, at least 1e-6."""
    return _floored_rms(advantage - advantage.mean(), axis=None)


def action_logp(logits_A: jax.Array, action: jax.Array) -> jax.Array:
    """Log-probability of one action; NaN for an action that does not exist."""
    _check_rank(1, logits_A=logits_A)
    _check_rank(0, action=action)
    return jax.nn.log_softmax(logits_A).at[action].get(mode="fill", fill_value=jnp.nan)


def axis_logp(logits_A: jax.Array, action: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Log-probability of an action's level of each axis, [X], where axes are drawn independently.

    `sizes` are the axes' numbers of levels; the last axis varies fastest in an action.
    """
    logp = jax.nn.log_softmax(logits_A).reshape(tuple(sizes))
    level_X = jnp.unravel_index(action, tuple(sizes))
    others = [tuple(y for y in range(len(sizes)) if y != x) for x in range(len(sizes))]
    marginals = [jax.nn.logsumexp(logp, axis=rest) for rest in others]
    return jnp.stack([marginal[level] for marginal, level in zip(marginals, level_X, strict=True)])


def stratified_places(key: jax.Array, shape: tuple[int, ...], num_schedules: int) -> jax.Array:
    """Numbers from 0 to 1, [*shape, K]: along K one in each of K equal parts, in random order.

    Each is uniform by itself.
    """

    def one(key: jax.Array) -> jax.Array:
        order_key, within_key = jax.random.split(key)
        part_K = jax.random.permutation(order_key, num_schedules)
        return (part_K + jax.random.uniform(within_key, (num_schedules,))) / num_schedules

    for _ in shape:
        one = jax.vmap(one)
    return one(jax.random.split(key, shape))


def action_at(logits_A: jax.Array, place_X: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """The action at a place of the distribution, int32: uniform places give actions with its probabilities.

    The level of each axis is where its cumulative probability, given the levels of the axes before, passes
    the axis' place.
    """
    left, action = jax.nn.softmax(logits_A).reshape(tuple(sizes)), jnp.int32(0)
    for x, size in enumerate(sizes):
        below_n = jnp.cumsum(left.reshape(size, -1).sum(-1))
        level = jnp.sum(below_n <= place_X[x] * below_n[-1], dtype=jnp.int32)
        level = jnp.minimum(level, size - 1)
        left, action = left[level], action * size + level
    return action


def axis_advantage(advantage_K: jax.Array, cost_KxX: jax.Array) -> jax.Array:
    """An advantage for each axis, [K, X]: less what the other axes' costs explain of it.

    A linear fit of the advantages on the costs, for each schedule over the others, is an axis' baseline as
    far as the other axes go.  It does not depend on the axis' own level, so nothing is biased (Wu et al.
    2018, arXiv 1803.07246), and what the other axes happened to draw is not taken for this one's doing.
    """
    K, X = cost_KxX.shape
    # Of few schedules little is known: a ridge keeps the fit from running after noise.
    ridge = 1e-3 * jnp.eye(X)

    def of_others(k: jax.Array) -> jax.Array:
        weight_K = (jnp.arange(K) != k) / (K - 1)
        mean_X, mean = weight_K @ cost_KxX, weight_K @ advantage_K
        centred_KxX = cost_KxX - mean_X
        gram = (centred_KxX * weight_K[:, None]).T @ centred_KxX
        slope_X = jnp.linalg.solve(gram + ridge, (centred_KxX * weight_K[:, None]).T @ (advantage_K - mean))
        explained_X = slope_X * centred_KxX[k]
        return advantage_K[k] - (explained_X.sum() - explained_X)

    return jax.vmap(of_others)(jnp.arange(K))


def entropy(logits_A: jax.Array) -> jax.Array:
    """Entropy of the action distribution, in nats."""
    _check_rank(1, logits_A=logits_A)
    logp_A = jax.nn.log_softmax(logits_A)
    return -(jnp.exp(logp_A) * logp_A).sum()


def kl_divergence(logits_A: jax.Array, reference_logits_A: jax.Array) -> jax.Array:
    """KL(policy || reference), exact over the actions."""
    _check_rank(1, logits_A=logits_A, reference_logits_A=reference_logits_A)
    logp_A = jax.nn.log_softmax(logits_A)
    return (jnp.exp(logp_A) * (logp_A - jax.nn.log_softmax(reference_logits_A))).sum()


def clipped_loss(
    logits_NxA: jax.Array,
    actions_N: jax.Array,
    logp_old_N: jax.Array,
    adv_N: jax.Array,
    *,
    clip: float,
    entropy_coef: float,
    reference_logits_NxA: jax.Array | None = None,
    reference_kl_coef: float = 0.0,
    weight_N: jax.Array | None = None,
    cost_AxX: jax.Array | None = None,
    price_NxX: jax.Array | None = None,
    axis_sizes: Sequence[int] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of N steps, and what to log about them.

    `-mean(min(rho A, clip(rho, 1 - eps, 1 + eps) A)) - c_H mean(H) + c_KL mean(KL(pi || pi_ref))` with
    `rho = pi(a) / pi_old(a)`.  `clip` is eps (0.2), `entropy_coef` c_H (0.05), `reference_kl_coef` c_KL (0,
    off).  All logits are already divided by the temperature.  `weight_N` weighs the means (0 for padding);
    without it every step counts, controllable or not.  `actions_N` are the sampled actions.

    Not the paper's: with `price_NxX`, what a unit of each axis' cost is worth at each step, the mean over
    steps of the price of the action's *expected* cost is added (`cost_AxX`: cost of each action).  With
    `axis_sizes`, the axes' numbers of levels, `logp_old_N` and `adv_N` are [N, X], of each axis' level by
    itself, and the first term is a sum over the axes.
    """
    _check_rank(2, logits_NxA=logits_NxA)
    _check_rank(1, actions_N=actions_N)
    _check_rank(2 if axis_sizes else 1, logp_old_N=logp_old_N, adv_N=adv_N)
    if not logits_NxA.shape[0] == actions_N.size == len(logp_old_N) == len(adv_N):
        raise ValueError("logits_NxA, actions_N, logp_old_N and adv_N differ in N")
    weight_N = jnp.ones(len(adv_N)) if weight_N is None else weight_N
    share_N = jax.lax.stop_gradient(weight_N / weight_N.sum())
    adv_N, logp_old_N = jax.lax.stop_gradient((adv_N, logp_old_N))

    def mean(value_N):
        # Not a dot product: those lose digits on accelerators.
        return (share_N * value_N).sum()

    if axis_sizes:
        logp_N = jax.vmap(lambda logits_A, a: axis_logp(logits_A, a, axis_sizes))(logits_NxA, actions_N)
    else:
        logp_N = jax.vmap(action_logp)(logits_NxA, actions_N)
    # Cannot overflow for a sampled action: rho <= 1 / pi_old(a).
    ratio_N = jnp.exp(logp_N - logp_old_N)
    clipped_N = jnp.clip(ratio_N, 1.0 - clip, 1.0 + clip)
    surrogate_N = jnp.minimum(ratio_N * adv_N, clipped_N * adv_N)
    if axis_sizes:
        surrogate_N = surrogate_N.sum(-1)
        # What is logged is of whole actions.
        logp_N, logp_old_N, adv_N = logp_N.sum(-1), logp_old_N.sum(-1), adv_N.sum(-1)
        ratio_N = jnp.exp(logp_N - logp_old_N)
    policy_loss = -mean(surrogate_N)
    mean_entropy = mean(jax.vmap(entropy)(logits_NxA))
    kl = mean(_reference_kl(logits_NxA, reference_logits_NxA, reference_kl_coef))
    budget_loss = mean(_priced(logits_NxA, cost_AxX, price_NxX))
    loss = policy_loss - entropy_coef * mean_entropy + reference_kl_coef * kl + budget_loss
    metrics = {
        "loss": loss,
        "budget_loss": budget_loss,
        "policy_loss": policy_loss,
        "entropy": mean_entropy,
        "kl": kl,
        "kl_old": mean(logp_old_N - logp_N),
        "clip_share": mean(jnp.abs(ratio_N - 1.0) > clip),
        "nonzero_adv_share": mean(adv_N != 0.0),
        **_ratio_quantiles(ratio_N, share_N),
    }
    return loss, metrics


def _reference_kl(logits_NxA, reference_logits_NxA, reference_kl_coef):
    if reference_logits_NxA is None:
        if reference_kl_coef != 0.0:
            raise ValueError("reference_kl_coef is set, but there are no reference_logits_NxA")
        return jnp.zeros(logits_NxA.shape[0])
    if reference_logits_NxA.shape != logits_NxA.shape:
        raise ValueError("reference_logits_NxA and logits_NxA differ in shape")
    return jax.vmap(kl_divergence)(logits_NxA, jax.lax.stop_gradient(reference_logits_NxA))


def _priced(logits_NxA, cost_AxX, price_NxX):
    if price_NxX is None:
        return jnp.zeros(logits_NxA.shape[0])
    if cost_AxX is None or price_NxX.shape[1:] != cost_AxX.shape[1:]:
        raise ValueError("price_NxX needs cost_AxX with as many axes")
    expected_NxX = jax.vmap(lambda logits_A: (jax.nn.softmax(logits_A)[:, None] * cost_AxX).sum(0))(
        logits_NxA
    )
    return (jax.lax.stop_gradient(price_NxX) * expected_NxX).sum(-1)


def _ratio_quantiles(ratio_N, share_N) -> dict[str, jax.Array]:
    """Weighted quantiles: the smallest ratio with at least that share of the weight at or below it."""
    counted_N = share_N > 0
    order_N = jnp.lexsort((ratio_N, ~counted_N))  # padding last, whatever its ratio
    below_N = jnp.cumsum(share_N[order_N])
    quantile = {q: ratio_N[order_N[jnp.searchsorted(below_N, q / 100)]] for q in (5, 50, 95)}
    return {
        "ratio_min": jnp.where(counted_N, ratio_N, jnp.inf).min(),
        **{f"ratio_p{q:02d}": value for q, value in quantile.items()},
        "ratio_max": jnp.where(counted_N, ratio_N, -jnp.inf).max(),
    }


def _floored_rms(centred, axis):
    # The floor is inside the root, whose derivative at 0 is infinite.
    variance = jnp.square(centred).mean(axis=axis)
    return jnp.sqrt(jnp.maximum(variance, _STD_FLOOR**2))


def _check_rank(rank: int, **arrays) -> None:
    for name, array in arrays.items():
        if jnp.ndim(array) != rank:
            raise ValueError(f"{name} has shape {jnp.shape(array)}, expected {rank} axes")
