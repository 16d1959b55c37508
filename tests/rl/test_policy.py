"""The policy: two faces of one network, its inputs, its start, and every field of its spec."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sol_jax.axes.base import ActionSpace
from sol_jax.axes.kappa import Recency
from sol_jax.axes.rho import ChannelPruning
from sol_jax.errors import UserError
from sol_jax.rl.config import PolicyConfig
from sol_jax.rl.policy import (
    Observation,
    Policy,
    PolicySpec,
    budget_gap,
    example_observation,
    initial_carry,
    join_scores,
    progress,
    restated,
)

SMALL = PolicySpec(
    hidden_size=6,
    num_actions=5,
    horizon=4,
    config=PolicyConfig(d_model=16, num_heads=2, num_layers=2),
    action_embed_size=4,
    scalar_embed_size=8,
)


def other(spec, config=None, **fields):
    """A spec with some of its own fields changed, and some of its config's."""
    return dataclasses.replace(spec, config=dataclasses.replace(spec.config, **config or {}), **fields)


def costs_of(*counts):
    """Made-up costs of axes with so many levels."""
    return tuple(tuple(np.linspace(0.2, 1.0, count).tolist()) for count in counts)


network_configs = st.builds(
    lambda num_heads, head_size, **rest: PolicyConfig(
        d_model=num_heads * head_size, num_heads=num_heads, **rest
    ),
    num_heads=st.integers(1, 3),
    head_size=st.sampled_from([2, 4]),
    normalize_inputs=st.booleans(),
    num_layers=st.integers(1, 3),
    mlp_ratio=st.sampled_from([0.5, 2.0, 4.0]),
)
specs = st.builds(
    lambda page_size, config, **rest: PolicySpec(
        config=dataclasses.replace(config, page_input=page_size > 0), page_size=page_size, **rest
    ),
    config=network_configs,
    hidden_size=st.integers(1, 9),
    token_embed_size=st.none() | st.integers(1, 9),
    num_actions=st.integers(1, 7),
    page_size=st.sampled_from([0, 1, 3]),
    horizon=st.integers(1, 6),
    num_axes=st.integers(1, 4),
    action_embed_size=st.integers(1, 5),
    scalar_embed_size=st.integers(2, 9),
    budget_embed_size=st.integers(1, 5),
)


def test_a_factored_head_adds_the_scores_of_the_levels_in_the_order_of_the_joint_actions():
    space = ActionSpace((Recency((0.5, 1.0), (0.5, 1), 1.0), ChannelPruning((0.2, 0.5, 1.0), (0.2, 1), 1.0)))
    scores_5 = jnp.array([10.0, 20.0, 1.0, 2.0, 3.0])
    joint_6 = join_scores(scores_5, (2, 3))
    np.testing.assert_array_equal(joint_6, [11, 12, 13, 21, 22, 23])
    for kappa, rho in itertools.product(range(2), range(3)):
        assert joint_6[space.join(np.array([kappa, rho]))] == scores_5[kappa] + scores_5[2 + rho]


def test_a_factored_policy_has_one_output_per_level():
    spec = other(SMALL, {"factored_head": True}, num_actions=6, level_costs=costs_of(2, 3))
    params = _params(spec)
    assert params["params"]["head"]["kernel"].shape == (16, 5)
    logits_A, _ = Policy(spec).apply(params, example_observation(spec), initial_carry(spec), method="step")
    table_2x3 = logits_A.reshape(2, 3)
    gaps = table_2x3[1] - table_2x3[0]  # no interaction between the axes
    np.testing.assert_allclose(gaps, jnp.full(3, gaps[0]), atol=1e-5)


def test_factors_that_do_not_multiply_to_the_actions_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\).*num_actions 5"):
        other(SMALL, {"factored_head": True}, level_costs=costs_of(2, 2))


def test_predicted_losses_need_the_costs_of_every_axis():
    with pytest.raises(ValueError, match="costs of 2 axes, not of num_axes = 3"):
        other(SMALL, {"predict_losses": True}, level_costs=costs_of(1, 5))


def test_a_policy_that_is_shown_pages_must_know_their_size():
    with pytest.raises(ValueError, match="page_size"):
        other(SMALL, {"page_input": True})


def test_normalized_inputs_make_the_policy_blind_to_the_scale_of_the_states():
    spec = other(SMALL, {"normalize_inputs": True})
    params = _params(spec)
    obs = example_observation(spec)._replace(hidden=jnp.arange(6.0), embed=jnp.arange(6.0) ** 2)
    scaled = obs._replace(hidden=1000 * obs.hidden, embed=100 * obs.embed)
    step = functools.partial(Policy(spec).apply, params, method="step")
    ours, theirs = (step(o, initial_carry(spec))[0] for o in (obs, scaled))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def _init(spec, key):
    return Policy(spec).init(key, example_observation(spec), initial_carry(spec), method="step")


def _params(spec, seed=0):
    """Weights of the right shapes, drawn by NumPy: compiling the real start takes longer than the test."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(_init, spec), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


@functools.cache
def _apply(spec):
    return jax.jit(Policy(spec).apply)


def _episode(spec, num_steps, seed=0) -> Observation:
    rng = np.random.default_rng(seed)
    example, action_T = example_observation(spec), rng.integers(0, spec.num_actions, num_steps)
    action_T[0] = spec.num_actions
    whole = {"prev_action": jnp.asarray(action_T, jnp.int32), "num_keys": 100 + jnp.arange(num_steps)}
    drawn = {
        name: jnp.asarray(rng.normal(size=(num_steps, *field.shape)), jnp.float32)
        for name, field in example._asdict().items()
        if name not in whole
    }
    return Observation(**drawn, **whole)


@functools.partial(jax.jit, static_argnums=0)
def _step_through(spec, params, obs_T):
    def step(carry, obs):
        logits_A, carry = Policy(spec).apply(params, obs, carry, method="step")
        return carry, logits_A

    return jax.lax.scan(step, initial_carry(spec), obs_T)


@settings(max_examples=8)
@given(specs, st.integers(0, 1000), st.data())
def test_stepping_equals_the_whole_episode(spec, seed, data):
    num_steps = data.draw(st.integers(1, spec.horizon))
    params, obs_T = _params(spec, seed), _episode(spec, num_steps, seed)
    whole_TxA = _apply(spec)(params, obs_T)
    carry, stepped_TxA = _step_through(spec, params, obs_T)
    assert whole_TxA.shape == (num_steps, spec.num_actions)
    assert whole_TxA.dtype == jnp.float32
    assert carry.step == num_steps
    np.testing.assert_allclose(stepped_TxA, whole_TxA, rtol=1e-5, atol=1e-5)


def test_both_faces_batch_with_vmap():
    params = _params(SMALL)
    episodes = [_episode(SMALL, 4, seed) for seed in range(3)]
    obs_BxT = jax.tree.map(lambda *fields: jnp.stack(fields), *episodes)
    whole_BxTxA = jax.vmap(_apply(SMALL), (None, 0))(params, obs_BxT)
    _, stepped_BxTxA = jax.vmap(functools.partial(_step_through, SMALL, params))(obs_BxT)
    np.testing.assert_allclose(stepped_BxTxA, whole_BxTxA, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole_BxTxA[1], _apply(SMALL)(params, episodes[1]), rtol=1e-5, atol=1e-5)


def test_a_step_sees_no_later_one():
    params, obs_T = _params(SMALL), _episode(SMALL, 4)
    logits_TxA = _apply(SMALL)(params, obs_T)
    changed = obs_T._replace(hidden=obs_T.hidden.at[2].add(1.0))
    changed_TxA = _apply(SMALL)(params, changed)
    np.testing.assert_array_equal((logits_TxA != changed_TxA).any(axis=1), [False, False, True, True])


@pytest.mark.parametrize("field", Observation._fields)
def test_every_input_matters_to_every_later_step(field):
    spec = other(SMALL, {"page_input": True, "logit_input": True}, page_size=3)
    params, obs_T = _params(spec), _episode(spec, 4)
    value_T = getattr(obs_T, field)
    change = (value_T[0] + 1) % SMALL.num_actions if field == "prev_action" else value_T[0] + 1
    changed = obs_T._replace(**{field: value_T.at[0].set(change)})
    difference_TxA = _apply(spec)(params, changed) - _apply(spec)(params, obs_T)
    assert (jnp.abs(difference_TxA).max(axis=1) > 1e-5).all()


def test_of_the_keys_a_policy_sees_how_full_the_newest_page_is_or_nothing():
    spec, obs_T = other(SMALL, {"page_input": True}, page_size=3), _episode(SMALL, 4)
    params = _params(spec)
    logits = [_apply(spec)(params, obs_T._replace(num_keys=obs_T.num_keys + n)) for n in (0, 1, 3)]
    np.testing.assert_array_equal(logits[0], logits[2])
    assert jnp.abs(logits[0] - logits[1]).max() > 1e-3


def test_the_papers_policy_sees_neither_keys_nor_logits():
    blind, obs_T = _params(SMALL), _episode(SMALL, 4)
    other_T = obs_T._replace(num_keys=obs_T.num_keys + 1, logit=obs_T.logit + 1)
    np.testing.assert_array_equal(_apply(SMALL)(blind, obs_T), _apply(SMALL)(blind, other_T))
    assert not {"page_embed", "logit_in", "logit_out"} & set(blind["params"])


def test_past_the_horizon_shows():
    params, obs_T = _params(SMALL), _episode(SMALL, SMALL.horizon + 1)
    _, logits_TxA = _step_through(SMALL, params, obs_T)
    np.testing.assert_array_equal(jnp.isnan(logits_TxA).all(axis=1), [False] * SMALL.horizon + [True])
    with pytest.raises(ValueError, match="exceeds the horizon 4"):
        _apply(SMALL)(params, obs_T)


def test_an_unknown_previous_action_shows():
    obs_T = _episode(SMALL, 3)
    obs_T = obs_T._replace(prev_action=obs_T.prev_action.at[1].set(SMALL.num_actions + 1))
    logits_TxA = _apply(SMALL)(_params(SMALL), obs_T)
    assert jnp.isnan(logits_TxA[1:]).all()


def test_wrong_sizes_are_refused():
    params, obs_T = _params(SMALL), _episode(SMALL, 3)
    for name in ("target", "gap"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(3, 2\).*\(3, 3\)"):
            _apply(SMALL)(params, obs_T._replace(**{name: getattr(obs_T, name)[:, 1:]}))
    for name in ("progress", "controllable"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(3, 1\).*\(3,\)"):
            _apply(SMALL)(params, obs_T._replace(**{name: getattr(obs_T, name)[:, None]}))
    with pytest.raises(ValueError, match="hidden has shape"):
        _apply(SMALL)(params, obs_T._replace(hidden=obs_T.hidden[:2]))
    with pytest.raises(UserError, match=r"config.policy.d_model is 16; it must be a multiple.*num_heads = 3"):
        other(SMALL, {"num_heads": 3})


def test_the_llm_gets_no_gradient_and_float32_throughout():
    params, obs_T = _params(SMALL), _episode(SMALL, 3)

    def total(hidden_TxD, embed_TxD, params):
        return _apply(SMALL)(params, obs_T._replace(hidden=hidden_TxD, embed=embed_TxD)).sum()

    hidden_grad, embed_grad, params_grad = jax.grad(total, argnums=(0, 1, 2))(
        obs_T.hidden, obs_T.embed, params
    )
    assert not hidden_grad.any()
    assert not embed_grad.any()
    used = {jax.tree_util.keystr(path) for path, g in jax.tree.leaves_with_path(params_grad) if g.any()}
    assert used == {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)}
    # The LLM's own precision ends at the door.
    halves = obs_T._replace(hidden=obs_T.hidden.astype(jnp.bfloat16), embed=obs_T.embed.astype(jnp.bfloat16))
    widened = halves._replace(
        hidden=halves.hidden.astype(jnp.float32), embed=halves.embed.astype(jnp.float32)
    )
    logits_TxA = _apply(SMALL)(params, halves)
    assert logits_TxA.dtype == jnp.float32
    np.testing.assert_array_equal(logits_TxA, _apply(SMALL)(params, widened))


def test_gradient_matches_finite_differences():
    spec = dataclasses.replace(SMALL, horizon=3)
    params, obs_T = _params(spec), _episode(spec, 3)
    direction = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params
    )

    @jax.jit
    def along(step):
        moved = jax.tree.map(lambda x, d: x + step * d, params, direction)
        return jnp.sin(_apply(spec)(moved, obs_T)).sum()

    numeric = (along(1e-3) - along(-1e-3)) / 2e-3
    np.testing.assert_allclose(jax.grad(along)(0.0), numeric, rtol=2e-2, atol=2e-2)


def test_targets_reach_the_logits_directly():
    """With the head silenced, only the targets' own head speaks."""
    params, obs_T = _params(SMALL), _episode(SMALL, 3)
    params["params"]["head"] = jax.tree.map(jnp.zeros_like, params["params"]["head"])
    direct_TxA = _apply(SMALL)(params, obs_T)
    others = {name: getattr(obs_T, name) + 1.0 for name in ("hidden", "progress", "controllable")}
    np.testing.assert_array_equal(_apply(SMALL)(params, obs_T._replace(**others)), direct_TxA)
    moved = obs_T._replace(target=obs_T.target.at[1, 0].add(1.0))
    changed_T = (_apply(SMALL)(params, moved) != direct_TxA).any(axis=1)
    np.testing.assert_array_equal(changed_T, [False, True, False])


OTHER = {
    "hidden_size": 7,
    "num_actions": 6,
    "horizon": 5,
    "num_axes": 2,
    "level_costs": costs_of(1, 5),
    "axis_shares": (0.1, 0.9, 0.0),
    "page_size": 3,
    "action_embed_size": 3,
    "scalar_embed_size": 9,
    "budget_embed_size": 7,
    "token_embed_size": 3,
}
OTHER_CONFIG = {
    "d_model": 12,
    "num_heads": 4,
    "num_layers": 1,
    "mlp_ratio": 2.0,
    "factored_head": True,
    "normalize_inputs": True,
    "page_input": True,
    "logit_input": True,
    "restate": True,
    "restate_steps": 2,
    "predict_losses": True,
    "one_budget": "net",
}
# What some fields need beside them before they mean anything.
BESIDE = {
    "level_costs": other(SMALL, {"factored_head": True}, level_costs=costs_of(5, 1)),
    "page_size": other(SMALL, {"page_input": True}, page_size=2),
    "factored_head": other(SMALL, level_costs=costs_of(1, 5)),
    "page_input": other(SMALL, page_size=3),
    "restate_steps": other(SMALL, {"restate": True}),
    "predict_losses": other(SMALL, level_costs=costs_of(1, 5, 1)),
    "one_budget": other(SMALL, {"predict_losses": True}, level_costs=costs_of(1, 5, 1)),
}
BESIDE["axis_shares"] = other(BESIDE["one_budget"], {"one_budget": "net"}, axis_shares=(0.3, 0.3, 0.4))
# What must change with them.
WITH = {"one_budget": {"axis_shares": (0.1, 0.9, 0.0)}}


@pytest.mark.parametrize("field", [*OTHER, *OTHER_CONFIG])
def test_every_field_of_the_spec_is_read(field):
    small = BESIDE.get(field, SMALL)
    if field in OTHER:
        changed_spec = other(small, **{field: OTHER[field]})
    else:
        changed_spec = other(small, {field: OTHER_CONFIG[field]}, **WITH.get(field, {}))
    params, changed = _params(small), _params(changed_spec)
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, changed):
        return
    # The same weights: then the output has to differ.
    logits_TxA, changed_TxA = (_apply(spec)(params, _episode(SMALL, 3)) for spec in (small, changed_spec))
    assert jnp.abs(logits_TxA - changed_TxA).max() > 1e-4


def test_no_field_of_the_spec_is_left_out():
    assert {*OTHER, "config"} == {field.name for field in dataclasses.fields(PolicySpec)}
    assert set(OTHER_CONFIG) == {field.name for field in dataclasses.fields(PolicyConfig)}


def test_start_is_the_authors():
    """Linear layers uniform in ±1/sqrt(fan_in), embeddings N(0, 1), norms neutral, no bias in the head."""
    spec = PolicySpec(hidden_size=96, num_actions=64, horizon=64, config=PolicyConfig(d_model=64))
    params = _init(spec, jax.random.key(0))["params"]
    fan_in = {
        "observation_in": 96 + 96 + 64 + 32,
        "scalar_in": 8,
        "budget_in": 3,
        "budget_out": 32,
        "query": 64,
        "up": 64,
        "down": 256,
        "head": 64,
    }
    layers = {**params, **params["blocks_0"]}
    for name, size in fan_in.items():
        bound = size**-0.5
        for kind, values in layers[name].items():
            if (name, kind) == ("head", "bias"):
                np.testing.assert_array_equal(values, 0.0)
                continue
            assert jnp.abs(values).max() <= bound
            assert jnp.abs(values).max() > 0.85 * bound
            np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.2, err_msg=f"{name} {kind}")
    for embedding in (params["position"], params["action_embed"]["embedding"]):
        np.testing.assert_allclose([embedding.mean(), embedding.std()], [0.0, 1.0], atol=0.1)
    for name in ("scalar_norm", "norm_out"):
        np.testing.assert_array_equal(layers[name]["scale"], 1.0)
        np.testing.assert_array_equal(layers[name]["bias"], 0.0)
    assert all("bias" not in layers[name] for name in ("query", "key", "value", "out"))


def test_size_of_the_papers_policy():
    spec = PolicySpec(hidden_size=2048, num_actions=1560, horizon=16)
    shapes = jax.eval_shape(functools.partial(_init, spec), jax.random.key(0))
    # Inputs 2 * 2048 + 64 + 32 to 512; positions; block 4 + 8 squares; heads; norms and biases.
    expected = (4192 * 512 + 512) + 16 * 512 + (12 * 512**2 + 2048 + 512 + 2 * 1024) + 1024
    expected += (512 * 1560 + 1560) + (3 * 32 + 32) + (32 * 1560 + 1560) + 1561 * 32 + (8 * 64 + 64) + 128
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def _told(step, horizon, target_X, cost_sum_X, counted) -> Observation:
    """What the policy is told of budgets and progress at a step; zeros otherwise."""
    target_X = jnp.asarray(target_X, jnp.float32)
    return example_observation(dataclasses.replace(SMALL, num_axes=len(target_X)))._replace(
        progress=progress(step, horizon),
        controllable=jnp.float32(1.0),
        target=target_X,
        gap=budget_gap(jnp.asarray(cost_sum_X), counted, target_X),
    )


def test_progress_and_gaps_by_hand():
    budget_X, cost_sum_X = jnp.array([0.5, 0.7, 0.4]), jnp.array([0.6, 2.0, 0.9])
    assert float(progress(2, 4)) == 0.75
    gap_X = budget_gap(cost_sum_X, 2, budget_X)
    np.testing.assert_allclose(gap_X, [-0.2, 0.3, 0.05], atol=1e-6)
    assert progress(2, 4).dtype == gap_X.dtype == jnp.float32
    # Nothing counted yet: no difference, rather than minus the target.
    assert float(progress(0, 4)) == 0.25
    np.testing.assert_array_equal(budget_gap(jnp.zeros(3), 0, budget_X), np.zeros(3))


def test_numbers_reach_the_network_in_the_order_of_the_authors():
    """Progress, the flag, targets, gaps: read off the layer that they go through, made the identity."""
    params, seen = _params(SMALL), _told(2, 4, [0.5, 0.7, 0.4], [0.6, 2.0, 0.9], 2)
    params["params"]["scalar_in"] = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
    obs_1 = jax.tree.map(lambda x: x[None], seen)
    _, kept = Policy(SMALL).apply(params, obs_1, capture_intermediates=True, mutable=["intermediates"])
    (numbers_1xN,) = kept["intermediates"]["scalar_in"]["__call__"]
    np.testing.assert_allclose(numbers_1xN[0], [0.75, 1, 0.5, 0.7, 0.4, -0.2, 0.3, 0.05], atol=1e-6)


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(0, 9))
def test_numbers_fill_the_spec(num_axes, step):
    budget_X = jnp.linspace(0.2, 0.8, num_axes)
    seen = _told(step, 10, budget_X, step * budget_X, step)
    numbers = (seen.progress, seen.controllable, seen.target, seen.gap)
    spec = dataclasses.replace(SMALL, num_axes=num_axes)
    assert sum(number.size for number in numbers) == spec.num_scalars
    assert _params(spec)["params"]["scalar_in"]["kernel"].shape == (spec.num_scalars, 8)
    np.testing.assert_allclose(seen.gap, 0.0, atol=1e-6)


def test_a_restated_target_is_what_is_left_per_step():
    """After two steps of four that cost 0.9 and 0.3 on average, 0.5 asked of both axes."""
    seen = _told(2, 4, [0.5, 0.5], [1.8, 0.6], 2)
    asked = restated(seen, 4)
    np.testing.assert_allclose(asked.target, [(2.0 - 1.8) / 2, (2.0 - 0.6) / 2], atol=1e-6)
    np.testing.assert_array_equal(asked.gap, [0, 0])
    kept = asked._replace(target=seen.target, gap=seen.gap)
    jax.tree.map(np.testing.assert_array_equal, kept, seen)
    # Before the first step nothing changes, and no more than all or less than nothing is asked for.
    first = _told(0, 4, [0.5, 0.7], [0.0, 0.0], 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), restated(first, 4), first)
    late = _told(3, 4, [0.2, 0.9], [1.8, 1.2], 3)
    np.testing.assert_allclose(restated(late, 4).target, [0.0, 1.0])


def test_a_policy_is_asked_otherwise():
    plain, over = PolicyConfig(), PolicyConfig(restate=True, restate_steps=8)
    assert plain.asked(None) == plain == over.asked(False)
    assert over.asked(None) == over == plain.asked(True, 8) == over.asked(True)
    assert over.asked(None, 1) == PolicyConfig(restate=True)
    with pytest.raises(UserError, match=r"restate_steps is 8; it must be 1 where policy.restate is false"):
        over.asked(False, 8)


def test_a_miss_is_made_up_over_so_many_steps_at_least():
    """After two steps of four 0.1 above and below 0.5: 0.2 to make up in the two left, or in four."""
    seen = _told(2, 4, [0.5, 0.5], [1.2, 0.8], 2)
    for over, change in [(1, 0.1), (2, 0.1), (4, 0.05), (8, 0.025)]:
        np.testing.assert_allclose(restated(seen, 4, over).target, [0.5 - change, 0.5 + change], atol=1e-6)


def test_the_two_faces_of_a_policy_agree_when_targets_are_restated():
    config = PolicyConfig(d_model=16, num_heads=2)
    spec = PolicySpec(hidden_size=6, num_actions=4, horizon=4, num_axes=2, config=config)
    plain, asked = Policy(spec), Policy(other(spec, {"restate": True}))
    rng = np.random.default_rng(0)
    spent = np.cumsum(rng.uniform(size=(4, 2)), 0) - 0.3
    steps = [_told(t, 4, [0.5, 0.5], spent[t], t) for t in range(4)]
    states, none_T = jnp.asarray(rng.normal(size=(4, 6))), jnp.zeros(4, jnp.int32)

    def seen(steps_T):
        stacked = jax.tree.map(lambda *fields: jnp.stack(fields), *steps_T)
        return stacked._replace(
            hidden=states, embed=states, prev_action=none_T, num_keys=none_T, logit=0.0 * none_T
        )

    episode = seen(steps)
    carry = initial_carry(spec)
    first = jax.tree.map(lambda x: x[0], episode)
    params = plain.init(jax.random.key(0), first, carry, method="step")
    whole_TxA = asked.apply(params, episode)
    for t in range(4):
        step_A, carry = asked.apply(params, jax.tree.map(lambda x, t=t: x[t], episode), carry, method="step")
        np.testing.assert_allclose(step_A, whole_TxA[t], atol=1e-5)
    told = seen([restated(step, 4) for step in steps])
    np.testing.assert_allclose(plain.apply(params, told), whole_TxA, atol=1e-5)
    assert jnp.abs(plain.apply(params, episode) - whole_TxA).max() > 1e-3
