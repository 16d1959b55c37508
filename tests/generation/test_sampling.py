"""Sampling rules against their definitions, written out with a sort, and the draws against the rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sol_jax.generation.sampling import Sampling, draw, nucleus, token_logp


def by_definition(logits_V, rule):
    """float64 probabilities: the most likely tokens one by one, until each rule has enough."""
    x = np.asarray(logits_V, np.float64) / rule.temperature
    order = np.argsort(-x, kind="stable")
    keep = np.zeros(len(x), bool)
    keep[order[: rule.top_k or len(x)]] = True
    prob = np.where(keep, np.exp(x - x.max()), 0)
    prob /= prob.sum()
    reached = 0.0
    for token in order:
        if reached >= rule.top_p:
            prob[token] = 0
        reached += prob[token]
    return prob / prob.sum()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "rule",
    [
        Sampling(0.7),
        Sampling(1.0, top_k=1),
        Sampling(1.3, top_k=7),
        Sampling(1.0, top_k=1000),
        Sampling(1.0, top_p=0.5),
        Sampling(0.5, top_p=0.95),
        Sampling(2.0, top_k=9, top_p=0.8),
        Sampling(1.0, top_p=1e-6),
    ],
)
def test_rules_are_their_definitions(seed, rule):
    logits_V = 3 * jax.random.normal(jax.random.key(seed), (53,))
    logp_V = token_logp(logits_V, rule)
    np.testing.assert_allclose(np.exp(logp_V), by_definition(logits_V, rule), atol=1e-6)


def test_greedy_is_certain_of_the_first_largest():
    logits_V = jnp.array([0.5, 2.0, -1.0, 2.0])
    np.testing.assert_array_equal(token_logp(logits_V, Sampling()), [-np.inf, 0.0, -np.inf, -np.inf])
    assert draw(jax.random.key(0), token_logp(logits_V, Sampling()), Sampling()) == 1


def test_ties_stay_together():
    """As in the project's other top-k: what equals the last one kept is kept too."""
    logits_V = jnp.log(jnp.array([0.4, 0.2, 0.2, 0.2]))
    np.testing.assert_array_equal(token_logp(logits_V, Sampling(1.0, top_k=2)) > -np.inf, True)
    np.testing.assert_array_equal(nucleus(jnp.exp(logits_V), 0.5), True)
    np.testing.assert_array_equal(nucleus(jnp.exp(logits_V), 0.3), [True, False, False, False])


def test_the_nucleus_of_everything_is_everything():
    """Also where rounding leaves the sum below 1."""
    prob_V = jax.nn.softmax(jax.random.normal(jax.random.key(0), (4099,)) * 20)
    assert nucleus(prob_V, 0.9999999).sum() >= 1
    np.testing.assert_array_equal(nucleus(prob_V * 0.999, 1.0), True)


@pytest.mark.parametrize("rule", [Sampling(1.5), Sampling(1.0, top_k=3), Sampling(0.8, top_p=0.7)])
def test_draws_have_the_rule_s_distribution(rule):
    logits_V = jax.random.normal(jax.random.key(1), (9,))
    logp_V = token_logp(logits_V, rule)
    keys = jax.random.split(jax.random.key(2), 20_000)
    count_V = np.bincount(jax.vmap(lambda key: draw(key, logp_V, rule))(keys), minlength=9)
    possible = np.asarray(logp_V) > -np.inf
    assert count_V[~possible].sum() == 0
    expected = np.exp(np.asarray(logp_V, np.float64)[possible])
    assert stats.chisquare(count_V[possible], 20_000 * expected / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_impossible_values_are_named(values, name):
    with pytest.raises(ValueError, match=f"{name} is .*; it must be"):
        Sampling(**values)
