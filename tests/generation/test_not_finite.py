"""What is no number never becomes a token, a score or an action: it ends with one sentence."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sol_jax.axes.base import ActionSpace
from sol_jax.axes.rho import ChannelPruning
from sol_jax.downstream.continuations import Continuation, score
from sol_jax.errors import UserError
from sol_jax.evaluation.scoring import POLICY, BatchScorer, ControllerSpec
from sol_jax.generation.engine import Engine, Request, dense_logp, generate
from sol_jax.generation.episodes import Decoder
from sol_jax.generation.sampling import NO_TOKEN, Sampling, draw, finite, token_logp
from sol_jax.models import llama
from sol_jax.models.tokenizer import load_tokenizer
from sol_jax.models.weights import load_model
from sol_jax.rl.config import EpisodeConfig, PolicyConfig
from sol_jax.rl.policy import Policy, PolicySpec, example_observation, initial_carry
from sol_jax.rl.rollout import EpisodeRules, label_logp
from sol_jax.rl.train_step import init_state
from sol_jax.runs import policy_files
from sol_jax.text.blocks import evaluation_batches

NAN, INF = math.nan, math.inf
TOLD = "gives a NaN or an infinity for"
LOGITS = jnp.array([3.0, -2.0, 3.5, 0.0, 3.5 - 1e-6])


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-38, 1e-39, 1e-45, 1e-300, 5e-324])
def test_the_smaller_the_temperature_the_greedier(temperature):
    logp_V = token_logp(LOGITS, Sampling(temperature))
    assert not jnp.isnan(logp_V).any()
    keys = jax.random.split(jax.random.key(0), 50)
    drawn = {int(draw(key, logp_V, Sampling(temperature))) for key in keys}
    assert drawn <= {2, 4} if temperature == 1e-6 else drawn == {2}


@pytest.mark.parametrize("temperature", [1e30, 1e38, 1e39, 1e300])
def test_the_larger_the_temperature_the_evener(temperature):
    np.testing.assert_allclose(jnp.exp(token_logp(LOGITS, Sampling(temperature))), 0.2, rtol=1e-6)


@pytest.mark.parametrize("top_p", [1e-3, 1e-37, 1e-39, 1e-300, 5e-324])
def test_of_the_smallest_nucleus_the_likeliest_token_is_left(top_p):
    logp_V = token_logp(LOGITS, Sampling(1.0, top_p=top_p))
    assert jnp.isfinite(logp_V).tolist() == [False, False, True, False, False]


def test_a_temperature_of_one_leaves_the_distribution_as_it_was():
    np.testing.assert_array_equal(token_logp(LOGITS, Sampling(1.0)), jax.nn.log_softmax(LOGITS))


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_numbers_that_are_none(wrong):
    assert finite(jnp.int32(3), LOGITS, jnp.float32(0)) == 3
    assert finite(jnp.int32(3), LOGITS.at[1].set(wrong)) == NO_TOKEN
    assert finite(jnp.int32(3), LOGITS, jnp.float32(wrong)) == NO_TOKEN


def spoilt(weights):
    """Finite, as files hold them, but too large: activations become infinite, and logits no numbers."""
    return {**weights, "final_norm": jnp.full_like(weights["final_norm"], 3e38)}


@pytest.fixture(scope="module")
def engine_for(tiny_folder):
    """Engines by controller, of the tiny model; `spoil` is what is wrong: the model or the policy."""
    model, weights = load_model(tiny_folder / "model")
    tokenizer = load_tokenizer(tiny_folder / "model")
    space = ActionSpace((ChannelPruning((0.3, 1.0), (0.3, 1.0), 100.0),))
    spec = PolicySpec(model.hidden_size, space.num_actions, 4, num_axes=1, config=PolicyConfig(d_model=16))
    example = example_observation(spec), initial_carry(spec)
    params = jax.jit(functools.partial(Policy(spec).init, method="step"))(jax.random.key(0), *example)

    def made(controller, spoil="", **options):
        policy = spec if controller == "policy" else None
        rules = EpisodeRules(model, space, EpisodeConfig(horizon=4, sinks=0, window=0))
        used = spoilt(weights) if spoil == "model" else weights
        own = jax.tree.map(lambda x: x * NAN, params) if spoil == "policy" else params
        decoder = Decoder(rules, policy, **options)
        return Engine(used, tokenizer, decoder, controller, own if policy else None)

    return made


CONTROLLED = [("dense", "model"), ("fixed", "model"), ("policy", "model"), ("policy", "policy")]


@pytest.mark.parametrize(("controller", "spoil"), CONTROLLED)
@pytest.mark.parametrize("options", [{}, {"lossless": True}])
def test_no_text_is_written(engine_for, controller, spoil, options):
    request = Request((65, 66, 67), (0.6,), max_tokens=8)
    if not (controller == "dense" and "lossless" in options):
        with pytest.raises(UserError, match=TOLD):
            generate(engine_for(controller, spoil, **options), [request])


def test_a_text_has_no_likelihood(engine_for):
    engine = engine_for("dense")
    (output,) = generate(engine, [Request((65, 66, 67), max_tokens=4)])
    assert np.isfinite(dense_logp(engine.weights, output, engine.cfg.model)).all()
    with pytest.raises(UserError, match=TOLD):
        dense_logp(spoilt(engine.weights), output, engine.cfg.model)


@pytest.mark.parametrize(("controller", "spoil"), CONTROLLED)
def test_no_continuation_is_scored(engine_for, controller, spoil):
    asked = [Continuation((65, 66, 67), (68, 69)), Continuation((65,), (70,))]
    budget = () if controller == "dense" else (0.6,)
    score(engine_for(controller), asked, budget)
    with pytest.raises(UserError, match=TOLD):
        score(engine_for(controller, spoil), asked, budget)


@pytest.mark.parametrize("spoil", ["model", "policy"])
def test_no_text_is_scored(tiny_session, spoil):
    setup, weights = tiny_session.setup, tiny_session.weights
    params = init_state(jax.random.key(0), setup).params
    (batch,) = list(evaluation_batches(tiny_session.split("test"), 2, 2))
    given = np.full((2, 1, 2, 3), 0.6, np.float32)

    def play(weights, params):
        scorer = BatchScorer(weights, params, batch.tokens_BxN, setup, 2, 2)
        return scorer.play(given, ControllerSpec(POLICY))

    play(weights, params)
    if spoil == "model":
        weights = spoilt(weights)
    else:
        params = jax.tree.map(lambda x: x * NAN, params)
    with pytest.raises(UserError, match=TOLD):
        play(weights, params)


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_a_logit_that_nobody_asked_for_counts_too(monkeypatch, wrong):
    """One token's -inf leaves the others' probabilities as they are, which hides it."""
    monkeypatch.setattr(llama, "logits", lambda weights, hidden: LOGITS.at[1].set(wrong))
    assert jnp.isnan(label_logp({}, jnp.zeros(3), jnp.int32(0)))


def test_a_policy_that_holds_none_is_refused(tiny_session, tmp_path):
    params = init_state(jax.random.key(0), tiny_session.setup).params
    wrong = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(NAN), params)
    about = {
        "title": "x",
        "model": "x",
        "command": "",
        "updates": 1,
        "seed": 0,
        "commit": "",
        "documents": [],
    }
    policy_files.save_policy(tmp_path, wrong, tiny_session.config, about)
    with pytest.raises(UserError, match="holds a NaN or an infinity in"):
        policy_files.load_policy(tmp_path)
