"""The policy network against the authors' (`predictor.RecurrentActorCriticPolicy`)."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sol_jax.rl.policy import Policy, example_observation, initial_carry


@pytest.fixture(scope="module")
def vectors():
    return golden.load("e_policy")


@pytest.fixture(scope="module")
def policy(vectors):
    spec = golden.policy_spec(vectors, "w/", golden.config_of(vectors)["n_heads"])
    return Policy(spec), golden.policy_params(vectors, "w/")


def _temperatures(vectors):
    return [
        float(name.removeprefix("seq_logits_temp")) for name in vectors if name.startswith("seq_logits_temp")
    ]


def test_config_is_the_authors(vectors, policy):
    spec, theirs = policy[0].spec, golden.config_of(vectors)
    assert spec.config.d_model == theirs["d_model"]
    assert spec.config.num_layers == theirs["n_layers"]
    assert spec.config.mlp_ratio == theirs["mlp_ratio"]
    assert spec.horizon == theirs["max_len"]
    assert spec.num_scalars == theirs["scalar_dim"]
    assert (spec.hidden_size, spec.embed_size) == (theirs["h_dim"], theirs["e_dim"])
    assert spec.num_actions == theirs["n_actions"]
    # None of the scalars is dropped on the way in.
    np.testing.assert_array_equal(vectors["scalar_keep_idx"], np.arange(spec.num_scalars))


def test_every_parameter_has_a_place(policy):
    model, params = policy
    spec = model.spec
    ours = jax.eval_shape(
        lambda key: model.init(key, example_observation(spec), initial_carry(spec), method="step"),
        jax.random.key(0),
    )
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, ours)


def test_first_previous_action_means_none_yet(vectors, policy):
    assert (vectors["prev_actions"][0] == policy[0].spec.num_actions).all()


def test_whole_episode(vectors, policy):
    model, params = policy
    logits_BxTxA = jax.jit(jax.vmap(model.apply, (None, 0)))(params, golden.observations(vectors))
    temperatures = _temperatures(vectors)
    assert len(temperatures) > 1
    for temperature in temperatures:
        expected_TxBxA = vectors[f"seq_logits_temp{temperature}"]
        golden.assert_close(
            logits_BxTxA.swapaxes(0, 1) / temperature, expected_TxBxA, f"logits at {temperature}"
        )


def test_step_by_step(vectors, policy):
    model, params = policy

    def episode(obs_T):
        def step(carry, obs):
            logits_A, carry = model.apply(params, obs, carry, method="step")
            return carry, logits_A

        return jax.lax.scan(step, initial_carry(model.spec), obs_T)[1]

    logits_BxTxA = jax.jit(jax.vmap(episode))(golden.observations(vectors))
    for temperature in _temperatures(vectors):
        expected_TxBxA = vectors[f"step_logits_temp{temperature}"]
        golden.assert_close(
            logits_BxTxA.swapaxes(0, 1) / temperature, expected_TxBxA, f"logits at {temperature}"
        )


def test_features_carry_the_value_head(vectors, policy):
    """Ours has no value head, GRPO needs none; theirs on our features must give their values."""
    model, params = policy
    features_BxTxE = jax.vmap(lambda obs_T: model.apply(params, obs_T, method="features"))(
        golden.observations(vectors)
    )
    values_BxT = features_BxTxE @ vectors["w/v.weight"][0] + vectors["w/v.bias"][0]
    golden.assert_close(values_BxT.T, vectors["seq_values"], "values of a whole episode")
    golden.assert_close(values_BxT.T, vectors["step_values"], "values step by step")
