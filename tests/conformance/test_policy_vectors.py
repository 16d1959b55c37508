"""The policy network against the authors' (`predictor.RecurrentActorCriticPolicy`)."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sol_jax.rl.policy import Observation, Policy, example_observation, initial_carry


@pytest.fixture(scope="module")
def vectors():
    return golden.load("e_policy")


@pytest.fixture(scope="module")
def policy(vectors):
    config = golden.policy_config(vectors, "w/", golden.config_of(vectors)["n_heads"])
    return Policy(config), golden.policy_params(vectors, "w/")


def _observations(vectors) -> Observation:
    """[B, T, ...] from the authors' time-major arrays."""
    fields = (vectors[name] for name in ("h", "e", "scalars", "prev_actions"))
    given = [jnp.asarray(np.swapaxes(field, 0, 1)) for field in fields]
    return Observation(*given, num_keys=jnp.zeros_like(given[-1]))  # which the authors' policy does not see


def _temperatures(vectors):
    return [
        float(name.removeprefix("seq_logits_temp")) for name in vectors if name.startswith("seq_logits_temp")
    ]


def test_config_is_the_authors(vectors, policy):
    config, theirs = policy[0].config, golden.config_of(vectors)
    assert config.d_model == theirs["d_model"]
    assert config.num_layers == theirs["n_layers"]
    assert config.mlp_ratio == theirs["mlp_ratio"]
    assert config.horizon == theirs["max_len"]
    assert config.num_scalars == theirs["scalar_dim"]
    assert (config.hidden_size, config.embed_size) == (theirs["h_dim"], theirs["e_dim"])
    assert config.num_actions == theirs["n_actions"]
    # None of the scalars is dropped on the way in.
    np.testing.assert_array_equal(vectors["scalar_keep_idx"], np.arange(config.num_scalars))


def test_every_parameter_has_a_place(policy):
    model, params = policy
    config = model.config
    ours = jax.eval_shape(
        lambda key: model.init(key, example_observation(config), initial_carry(config), method="step"),
        jax.random.key(0),
    )
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, ours)


def test_first_previous_action_means_none_yet(vectors, policy):
    assert (vectors["prev_actions"][0] == policy[0].config.num_actions).all()


def test_whole_episode(vectors, policy):
    model, params = policy
    logits_BxTxA = jax.jit(jax.vmap(model.apply, (None, 0)))(params, _observations(vectors))
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

        return jax.lax.scan(step, initial_carry(model.config), obs_T)[1]

    logits_BxTxA = jax.jit(jax.vmap(episode))(_observations(vectors))
    for temperature in _temperatures(vectors):
        expected_TxBxA = vectors[f"step_logits_temp{temperature}"]
        golden.assert_close(
            logits_BxTxA.swapaxes(0, 1) / temperature, expected_TxBxA, f"logits at {temperature}"
        )


def test_features_carry_the_value_head(vectors, policy):
    """Ours has no value head, GRPO needs none; theirs on our features must give their values."""
    model, params = policy
    features_BxTxE = jax.vmap(lambda obs_T: model.apply(params, obs_T, method="features"))(
        _observations(vectors)
    )
    values_BxT = features_BxTxE @ vectors["w/v.weight"][0] + vectors["w/v.bias"][0]
    golden.assert_close(values_BxT.T, vectors["seq_values"], "values of a whole episode")
    golden.assert_close(values_BxT.T, vectors["step_values"], "values step by step")
