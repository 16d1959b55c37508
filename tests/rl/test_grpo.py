"""Advantages and loss: numbers worked out by hand, properties, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from sol_jax.rl import grpo

clipped_loss = jax.jit(grpo.clipped_loss, static_argnames=("clip", "entropy_coef", "reference_kl_coef"))
group_advantage = jax.jit(grpo.group_advantage, static_argnames=("level", "norm"))
LESS = settings(max_examples=25)
groups = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.floats(-50, 50, width=32)
)
LOG2 = np.log(2.0)


@pytest.mark.parametrize(
    ("level", "norm", "expected"),
    [
        ("process", "center", [[-1.0, 2.0], [1.0, -2.0]]),
        ("process", "zscore", [[-1.0, 1.0], [1.0, -1.0]]),
        # Sums 5 and 3, mean 4, biased deviation 1.
        ("outcome", "center", [[1.0, 1.0], [-1.0, -1.0]]),
        ("outcome", "zscore", [[1.0, 1.0], [-1.0, -1.0]]),
    ],
)
def test_advantage_by_hand(level, norm, expected):
    x_KxT = jnp.array([[1.0, 4.0], [3.0, 0.0]])
    np.testing.assert_allclose(group_advantage(x_KxT, level, norm), expected, rtol=1e-6)


@LESS
@given(groups, st.sampled_from(["process", "outcome"]), st.sampled_from(["center", "zscore"]))
def test_advantages_sum_to_zero_over_the_group(x_KxT, level, norm):
    adv_KxT = group_advantage(x_KxT, level, norm)
    assert adv_KxT.shape == x_KxT.shape
    # A group whose members differ by rounding alone has nothing to compare; its z-scores are rounding too.
    scale = 1e-4 if norm == "center" or np.ptp(x_KxT) > 1 else 10.0
    np.testing.assert_allclose(adv_KxT.sum(axis=0), 0.0, atol=scale * x_KxT.shape[0])


@pytest.mark.parametrize("norm", ["center", "zscore"])
def test_equal_schedules_have_no_advantage(norm):
    x_KxT = jnp.full((4, 3), -7.5)
    np.testing.assert_array_equal(group_advantage(x_KxT, norm=norm), 0.0)
    np.testing.assert_array_equal(group_advantage(x_KxT[:1], norm=norm), 0.0)
    jacobian = jax.jacobian(lambda x: group_advantage(x, norm=norm))(x_KxT)
    assert jnp.isfinite(jacobian).all()


def test_a_constant_for_the_whole_group_does_not_matter():
    x_KxT = jnp.array([[1.0, 4.0], [3.0, 0.5]])
    np.testing.assert_allclose(group_advantage(x_KxT - 3.0), group_advantage(x_KxT), atol=1e-6)


def test_whiten_by_hand():
    # Mean 2, biased variance (4 + 0 + 0 + 4) / 4 = 2.
    np.testing.assert_allclose(
        grpo.whiten(jnp.array([[0.0, 2.0], [2.0, 4.0]])), [[-(2**0.5), 0], [0, 2**0.5]]
    )
    np.testing.assert_array_equal(grpo.whiten(jnp.full((2, 3, 4), 5.0)), 0.0)


@LESS
@given(hnp.arrays(np.float32, (3, 2, 4), elements=st.floats(-100, 100, width=32)))
def test_whitened_batches_have_mean_0_and_deviation_1(adv_BxKxT):
    if adv_BxKxT.std() < 1e-2:
        return
    white_BxKxT = grpo.whiten(adv_BxKxT)
    np.testing.assert_allclose(white_BxKxT.mean(), 0.0, atol=1e-3)
    np.testing.assert_allclose(white_BxKxT.std(), 1.0, atol=1e-3)


def test_categorical_by_hand():
    # Probabilities 1/2, 1/4, 1/4.
    logits_A = jnp.array([LOG2, 0.0, 0.0]) + 30.0
    np.testing.assert_allclose(grpo.action_logp(logits_A, jnp.int32(1)), -2 * LOG2, rtol=1e-5)
    np.testing.assert_allclose(grpo.entropy(logits_A), 1.5 * LOG2, rtol=1e-5)
    # Against uniform: sum p log(3 p) = log 3 - entropy.
    np.testing.assert_allclose(grpo.kl_divergence(logits_A, jnp.zeros(3)), np.log(3) - 1.5 * LOG2, rtol=1e-4)
    # Uniform against it: sum log(1 / (3 p)) / 3.
    backward = (np.log(2 / 3) + 2 * np.log(4 / 3)) / 3
    np.testing.assert_allclose(grpo.kl_divergence(jnp.zeros(3), logits_A), backward, rtol=1e-4)


def test_extreme_logits_stay_finite():
    logits_A = jnp.array([1e4, 0.0, -1e4])
    np.testing.assert_allclose(grpo.entropy(logits_A), 0.0, atol=1e-6)
    assert jnp.isfinite(jax.grad(grpo.entropy)(logits_A)).all()
    assert grpo.action_logp(logits_A, jnp.int32(2)) == -2e4


def test_a_missing_action_is_nan():
    assert jnp.isnan(grpo.action_logp(jnp.zeros(3), jnp.int32(3)))


def _steps():
    """Four steps of two even actions; the old probabilities make the ratios 1, 2, 2 and 1/2."""
    logits_NxA = jnp.zeros((4, 2))
    ratio_N = jnp.array([1.0, 2.0, 2.0, 0.5])
    logp_old_N = jnp.log(0.5 / ratio_N)
    return logits_NxA, jnp.array([0, 1, 0, 1]), logp_old_N, jnp.array([1.0, 1.0, -1.0, 0.0])


def test_loss_by_hand():
    loss, metrics = clipped_loss(*_steps(), clip=0.2, entropy_coef=0.05)
    # Surrogates: 1; 2 clipped to 1.2; -2, where clipping would help the schedule and is not allowed; 0.
    np.testing.assert_allclose(metrics["policy_loss"], -(1.0 + 1.2 - 2.0 + 0.0) / 4, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], LOG2, rtol=1e-6)
    np.testing.assert_allclose(loss, -0.05 - 0.05 * LOG2, rtol=1e-5)
    assert metrics["loss"] == loss
    np.testing.assert_allclose(metrics["clip_share"], 0.75, rtol=1e-6)
    np.testing.assert_allclose(metrics["nonzero_adv_share"], 0.75, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl_old"], -LOG2 / 4, rtol=1e-5)  # log ratios 0, 1, 1, -1 in bits
    assert metrics["kl"] == 0.0
    quantiles = [metrics[f"ratio_{q}"] for q in ("min", "p05", "p50", "p95", "max")]
    np.testing.assert_allclose(quantiles, [0.5, 0.5, 1.0, 2.0, 2.0], rtol=1e-5)


def test_every_coefficient_is_read():
    args, settings_ = _steps(), {"clip": 0.2, "entropy_coef": 0.05}
    reference_NxA = jnp.tile(jnp.array([LOG2, 0.0]), (4, 1))  # probabilities 2/3 and 1/3
    base, _ = clipped_loss(*args, **settings_)
    tight, _ = clipped_loss(*args, **{**settings_, "clip": 0.1})
    np.testing.assert_allclose(tight - base, 0.1 / 4, rtol=1e-4)  # only the second step is clipped
    calm, _ = clipped_loss(*args, **{**settings_, "entropy_coef": 0.0})
    np.testing.assert_allclose(calm - base, 0.05 * LOG2, rtol=1e-4)
    tied, metrics = clipped_loss(
        *args, **settings_, reference_logits_NxA=reference_NxA, reference_kl_coef=2.0
    )
    kl = 0.5 * np.log(0.5 / (2 / 3)) + 0.5 * np.log(0.5 / (1 / 3))
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(tied - base, 2 * kl, rtol=1e-4)


def test_weights_of_zero_are_padding():
    args = _steps()
    settings_ = {"clip": 0.2, "entropy_coef": 0.05, "reference_kl_coef": 0.5}
    padded = [jnp.concatenate([x, 3 * x[:2] - 1]) for x in args]
    padded[1] = padded[1].clip(0, 1)
    weight_N = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    loss, metrics = clipped_loss(*args, **settings_, reference_logits_NxA=args[0] + jnp.arange(2.0))
    padded_loss, padded_metrics = clipped_loss(
        *padded, **settings_, reference_logits_NxA=padded[0] + jnp.arange(2.0), weight_N=weight_N
    )
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-5)
    assert metrics.keys() == padded_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(padded_metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def _random_steps(seed, num_steps=5, num_actions=3):
    keys = jax.random.split(jax.random.key(seed), 4)
    logits_NxA = jax.random.normal(keys[0], (num_steps, num_actions))
    action_N = jax.random.randint(keys[1], (num_steps,), 0, num_actions)
    logp_old_N = jax.nn.log_softmax(logits_NxA)[jnp.arange(num_steps), action_N]
    logp_old_N += 0.5 * jax.random.normal(keys[2], (num_steps,))
    return logits_NxA, action_N, logp_old_N, jax.random.normal(keys[3], (num_steps,))


@LESS
@given(st.integers(0, 2**20), st.floats(0.05, 0.5), st.floats(0, 0.2), st.floats(0, 1))
def test_gradient_matches_finite_differences(seed, clip, entropy_coef, kl_coef):
    logits_NxA, action_N, logp_old_N, adv_N = _random_steps(seed)
    logp_N = jax.nn.log_softmax(logits_NxA)[jnp.arange(len(adv_N)), action_N]
    distance = jnp.abs(jnp.abs(jnp.exp(logp_N - logp_old_N) - 1) - clip).min()
    if distance < 0.02:  # at the kink the two sides differ
        return

    def loss(logits_NxA):
        return grpo.clipped_loss(
            logits_NxA,
            action_N,
            logp_old_N,
            adv_N,
            clip=clip,
            entropy_coef=entropy_coef,
            reference_logits_NxA=jnp.ones_like(logits_NxA).at[:, 0].set(0.0),
            reference_kl_coef=kl_coef,
        )[0]

    check_grads(loss, (logits_NxA,), order=1, modes=["rev"], rtol=2e-2, atol=2e-3, eps=1e-3)


def test_first_gradient_is_plain_policy_gradient():
    """While the policy has not moved the ratio is 1 and the clip inert."""
    logits_NxA, action_N, _, adv_N = _random_steps(0)

    def logp(logits_NxA):
        return jax.vmap(grpo.action_logp)(logits_NxA, action_N)

    def loss(logits_NxA):
        args = (logits_NxA, action_N, logp(logits_NxA), adv_N)
        return clipped_loss(*args, clip=0.2, entropy_coef=0.0)[0]

    expected_NxA = jax.grad(lambda x: -(logp(x) * adv_N).mean())(logits_NxA)
    np.testing.assert_allclose(jax.grad(loss)(logits_NxA), expected_NxA, atol=1e-6)


def test_clipped_steps_get_no_gradient():
    grad_NxA = jax.grad(lambda x, *rest: clipped_loss(x, *rest, clip=0.2, entropy_coef=0.0)[0])(*_steps())
    np.testing.assert_array_equal((grad_NxA != 0).any(axis=1), [True, False, True, False])


def test_only_the_logits_get_gradient():
    logits_NxA, action_N, logp_old_N, adv_N = _random_steps(1)

    def loss(logp_old_N, adv_N, reference_NxA):
        return clipped_loss(
            logits_NxA,
            action_N,
            logp_old_N,
            adv_N,
            clip=0.2,
            entropy_coef=0.1,
            reference_logits_NxA=reference_NxA,
            reference_kl_coef=1.0,
        )[0]

    for grad in jax.grad(loss, argnums=(0, 1, 2))(logp_old_N, adv_N, jnp.ones_like(logits_NxA)):
        np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("poisoned", [0, 2, 3])
def test_nan_shows(poisoned):
    args = list(_random_steps(2))
    args[poisoned] = args[poisoned].at[1].set(jnp.nan)
    loss, metrics = clipped_loss(*args, clip=0.2, entropy_coef=0.05)
    assert jnp.isnan(loss)
    if poisoned != 3:
        assert jnp.isnan(metrics["ratio_max"])
    assert jnp.isnan(grpo.whiten(jnp.array([1.0, jnp.nan]))).all()
    assert jnp.isnan(group_advantage(jnp.array([[1.0], [jnp.nan]]), norm="zscore")).all()


def test_wrong_ranks_shapes_and_names_are_refused():
    args = _steps()
    with pytest.raises(ValueError, match="x_KxT"):
        group_advantage(jnp.zeros(3))
    with pytest.raises(ValueError, match="level"):
        group_advantage(jnp.zeros((2, 3)), "both")
    with pytest.raises(ValueError, match="norm"):
        group_advantage(jnp.zeros((2, 3)), norm="rank")
    with pytest.raises(ValueError, match="logits_A"):
        grpo.action_logp(jnp.zeros((2, 3)), jnp.int32(0))
    with pytest.raises(ValueError, match="differ in N"):
        clipped_loss(*args[:3], args[3][:1], clip=0.2, entropy_coef=0.05)
    with pytest.raises(ValueError, match="reference_logits_NxA"):
        clipped_loss(*args, clip=0.2, entropy_coef=0.05, reference_kl_coef=0.1)
    with pytest.raises(ValueError, match="differ in shape"):
        clipped_loss(*args, clip=0.2, entropy_coef=0.05, reference_logits_NxA=args[0][:1])


def test_priced_costs_are_those_that_the_policy_expects():
    """Two actions of probability 3/4 and 1/4 that cost 1 and 0: an expected cost of 3/4, at a price of 2."""
    logits_NxA = jnp.log(jnp.array([[0.75, 0.25], [0.75, 0.25]]))
    cost_AxX, price_NxX = jnp.array([[1.0], [0.0]]), jnp.array([[2.0], [0.0]])
    steps = (jnp.zeros(2, jnp.int32), jnp.log(jnp.full(2, 0.75)), jnp.zeros(2))

    def loss(logits_NxA):
        return clipped_loss(
            logits_NxA, *steps, clip=0.2, entropy_coef=0.0, cost_AxX=cost_AxX, price_NxX=price_NxX
        )

    value, metrics = loss(logits_NxA)
    np.testing.assert_allclose([value, metrics["budget_loss"]], 0.75, rtol=1e-6)
    slope = jax.grad(lambda x: loss(x)[0])(logits_NxA)
    np.testing.assert_allclose(slope, [[0.75 * 0.25, -0.75 * 0.25], [0.0, 0.0]], rtol=1e-5)
    with pytest.raises(ValueError, match="cost_AxX with as many axes"):
        clipped_loss(logits_NxA, *steps, clip=0.2, entropy_coef=0.0, price_NxX=price_NxX)


# --- with less noise (not the paper's) -----------------------------------------------------------------

SIZES = (2, 3, 2)
place = jax.jit(grpo.stratified_places, static_argnames=("shape", "num_schedules"))
act_at = jax.jit(jax.vmap(grpo.action_at, (None, 0, None)), static_argnums=2)
axis_advantage = jax.jit(grpo.axis_advantage)


def factors(seed):
    """Log-probabilities of independent axes, and the logits of their joint actions."""
    rng = np.random.default_rng(seed)
    logp_X = [np.log(rng.dirichlet(np.ones(size))) for size in SIZES]
    joint = logp_X[0][:, None, None] + logp_X[1][:, None] + logp_X[2]
    return logp_X, jnp.asarray(joint.reshape(-1) + 3.0, jnp.float32)


def test_one_place_lies_in_each_part():
    place_6x4xK = np.asarray(place(jax.random.key(0), (6, 4), 8))
    np.testing.assert_array_equal(np.sort(np.floor(8 * place_6x4xK), -1), np.tile(np.arange(8), (6, 4, 1)))
    assert (
        len({tuple(row) for row in np.floor(8 * place_6x4xK).reshape(-1, 8)}) == 24
    )  # in another order each
    first = np.asarray(place(jax.random.key(1), (4000,), 4))[:, 0]  # and any of them anywhere
    np.testing.assert_allclose(np.quantile(first, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)


def test_uniform_places_give_actions_their_probabilities():
    """Of a joint distribution whose axes depend on each other, over a grid of places."""
    logits_A = jax.random.normal(jax.random.key(2), (12,))
    ticks = (np.arange(40) + 0.5) / 40
    places = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), -1).reshape(-1, 3)
    counts = np.bincount(np.asarray(act_at(logits_A, jnp.asarray(places), SIZES)), minlength=12)
    np.testing.assert_allclose(counts / len(places), jax.nn.softmax(logits_A), atol=0.02)


@LESS
@given(st.integers(0, 2**20), st.integers(2, 16))
def test_a_group_has_each_level_as_often_as_it_is_likely(seed, K):
    """Within one for each end of a level, if all its schedules have one distribution of independent axes."""
    logp_X, logits_A = factors(seed)
    place_XxK = grpo.stratified_places(jax.random.key(seed), (3,), K)
    levels = np.unravel_index(np.asarray(act_at(logits_A, place_XxK.T, SIZES)), SIZES)
    for level_K, logp_n in zip(levels, logp_X, strict=True):
        counts = np.bincount(level_K, minlength=len(logp_n))
        assert np.all(np.abs(counts - K * np.exp(logp_n)) < 2 + 1e-3)
        assert np.all(np.abs(np.cumsum(counts) - K * np.cumsum(np.exp(logp_n))) < 1 + 1e-3)


def test_places_at_the_ends_are_actions():
    logits_A = jnp.array([0.0, -1e9, 0.0, -1e9] * 3)
    ends = jnp.array([[0.0] * 3, [np.nextafter(np.float32(1), np.float32(0))] * 3, [1.0] * 3])
    assert set(np.asarray(act_at(logits_A, ends, SIZES)).tolist()) <= set(range(12))


def test_log_probabilities_of_levels_add_up_to_the_action_s():
    logp_X, logits_A = factors(3)
    for action in range(12):
        levels = np.unravel_index(action, SIZES)
        found = grpo.axis_logp(logits_A, jnp.int32(action), SIZES)
        np.testing.assert_allclose(found, [p[i] for p, i in zip(logp_X, levels, strict=True)], rtol=1e-4)
        assert found.sum() == pytest.approx(float(grpo.action_logp(logits_A, jnp.int32(action))), rel=1e-4)


def test_an_axis_is_not_credited_with_what_others_did():
    """Advantages that are linear in the costs, without noise: each axis keeps its own part."""
    rng = np.random.default_rng(5)
    cost_KxX = rng.uniform(0.1, 1.0, (400, 3))
    part_KxX = (cost_KxX - cost_KxX.mean(0)) * [3.0, 0.0, -2.0]
    found = axis_advantage(jnp.asarray(part_KxX.sum(1)), jnp.asarray(cost_KxX))
    apart = np.abs(found - part_KxX).mean() / np.abs(part_KxX.sum(1, keepdims=True) - part_KxX).mean()
    assert apart < 0.15  # of what they would be credited with as whole actions


@LESS
@given(st.integers(0, 2**20), st.integers(3, 16), st.integers(0, 2), st.floats(-1, 1))
def test_what_is_taken_off_an_axis_does_not_depend_on_its_own_level(seed, K, x, other):
    """Else the gradient would be biased: neither on its cost nor on what came of it."""
    rng = np.random.default_rng(seed)
    cost_KxX, advantage_K = rng.uniform(0, 1, (K, 3)), rng.normal(size=K)
    k = int(rng.integers(K))
    moved_KxX, changed_K = cost_KxX.copy(), advantage_K.copy()
    moved_KxX[k, x], changed_K[k] = other, advantage_K[k] + 1.0
    before, after = (
        a[k] - np.asarray(axis_advantage(jnp.asarray(a), jnp.asarray(c)))[k, x]
        for a, c in ((advantage_K, cost_KxX), (changed_K, moved_KxX))
    )
    assert after == pytest.approx(before, abs=1e-4)


def test_the_loss_of_axes_is_a_policy_gradient_for_each():
    rng = np.random.default_rng(6)
    logits_NxA = jnp.asarray(rng.normal(size=(5, 12)), jnp.float32)
    actions_N = jnp.asarray(rng.integers(0, 12, 5), jnp.int32)
    adv_NxX = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)

    def logp(logits_NxA):
        return jax.vmap(lambda logits_A, a: grpo.axis_logp(logits_A, a, SIZES))(logits_NxA, actions_N)

    def loss(logits_NxA):
        old = logp(jax.lax.stop_gradient(logits_NxA))
        kwargs = {"clip": 0.2, "entropy_coef": 0.0, "axis_sizes": SIZES}
        return grpo.clipped_loss(logits_NxA, actions_N, old, adv_NxX, **kwargs)

    found, metrics = jax.grad(loss, has_aux=True)(logits_NxA)
    wanted = jax.grad(lambda logits: -(adv_NxX * logp(logits)).sum() / 5)(logits_NxA)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert metrics["ratio_max"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="adv_N has shape"):
        grpo.clipped_loss(
            logits_NxA, actions_N, adv_NxX, adv_NxX[:, 0], clip=0.2, entropy_coef=0.0, axis_sizes=SIZES
        )
