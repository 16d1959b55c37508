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
