"""Lossless generation: greedy texts are the dense model's own, sampled ones are distributed as its own."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_models import llama_config

from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.generation import episodes as decoding
from sol_jax.generation.engine import Engine, Request, generate
from sol_jax.generation.episodes import Decoder
from sol_jax.generation.lossless import accept, residual
from sol_jax.generation.sampling import GREEDY, Sampling, token_logp
from sol_jax.models import llama
from sol_jax.models.tokenizer import load_tokenizer
from sol_jax.models.weights import load_model
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.rollout import EpisodeRules

SPACE = ActionSpace(
    (
        Quest((0.2, 0.5, 1.0), (0.2, 1.0), 100.0, page_size=4),
        ChannelPruning((0.3, 1.0), (0.3, 1.0), 100.0),
        OutputQuantization((3.0, 16.0), (0.1875, 1.0), 200.0),
    )
)


# --- the rule ----------------------------------------------------------------------------------------


def certain(tokens, size=4):
    """Log-probabilities of a model that is sure of `tokens`."""
    return jnp.where(jnp.arange(size) == jnp.array(tokens)[:, None], 0.0, -jnp.inf)


@pytest.mark.parametrize(
    ("drafted", "dense", "agreed", "token"),
    [
        ([1, 2, 3], [1, 2, 3, 0], 3, 0),
        ([1, 2, 3], [1, 2, 0, 3], 2, 0),
        ([1, 2, 3], [1, 3, 3, 0], 1, 3),
        ([1, 2, 3], [2, 2, 3, 0], 0, 2),
    ],
)
def test_greedy_drafts_stay_while_the_dense_model_agrees(drafted, dense, agreed, token):
    keys = jax.random.split(jax.random.key(0), 4)
    result = accept(keys, keys, jnp.array(drafted), certain(drafted), certain(dense), GREEDY)
    assert [int(x) for x in result] == [agreed, token]


def test_the_residual_is_what_the_draft_lacks():
    p, q = jnp.array([0.5, 0.3, 0.2, 0.0]), jnp.array([0.1, 0.6, 0.2, 0.1])
    np.testing.assert_allclose(jnp.exp(residual(jnp.log(p), jnp.log(q))), [0.4, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(jnp.exp(residual(jnp.log(p), jnp.log(p))), p, atol=1e-6)


def test_sequences_have_the_dense_distribution():
    """Markov chains over four tokens; what a refusal leaves to be drawn of three comes from the dense one."""
    V, T, N = 4, 3, 40_000
    dense_VxV, draft_VxV = (
        jax.nn.log_softmax(1.5 * jax.random.normal(jax.random.key(k), (V, V))) for k in (1, 2)
    )

    def one(key):
        keys = jax.random.split(key, 4)

        def follow(token, key, table):
            return jax.random.categorical(key, table[token]).astype(jnp.int32)

        drafted, token = [], jnp.int32(0)
        for key in jax.random.split(keys[0], T):
            token = follow(token, key, draft_VxV)
            drafted.append(token)
        before_N = jnp.stack([jnp.int32(0), *drafted])
        rule = Sampling(1.0)
        agreed, token = accept(
            jax.random.split(keys[1], T + 1),
            jax.random.split(keys[2], T + 1),
            jnp.stack(drafted),
            draft_VxV[before_N[:-1]],
            dense_VxV[before_N],
            rule,
        )
        text, last = [], jnp.int32(0)
        for t, key in enumerate(jax.random.split(keys[3], T)):
            own = follow(last, key, dense_VxV)
            last = jnp.where(t < agreed, drafted[t], jnp.where(t == agreed, token, own))
            text.append(last)
        return agreed, jnp.stack(text)

    agreed, text = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), N))
    p, q = (np.exp(np.asarray(table, np.float64)) for table in (dense_VxV, draft_VxV))
    expected = np.einsum("a,ab,bc->abc", p[0], p, p)
    count = np.zeros_like(expected)
    np.add.at(count, tuple(np.asarray(text).T), 1)
    assert stats.chisquare(count.ravel(), N * (expected / expected.sum()).ravel()).pvalue > 1e-3
    np.testing.assert_allclose(np.mean(agreed > 0), np.minimum(p[0], q[0]).sum(), atol=0.01)


# --- with a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", ["fixed", "random"])
def test_greedy_texts_are_the_dense_model_s_own(tiny_folder, controller):
    """Rows that advance at different rates, drafts good and bad; the last row ends at a stop string."""
    model, weights = load_model(tiny_folder / "model")
    tokenizer = load_tokenizer(tiny_folder / "model")
    rules = EpisodeRules(model, SPACE, EpisodeConfig(horizon=6))
    dense = Engine(weights, tokenizer, Decoder(rules))
    lossless = Engine(weights, tokenizer, Decoder(rules, lossless=True), controller)
    requests = [
        Request(tokenizer.encode(text), (0.4, 0.5, 0.5), max_tokens=30, seed=n)
        for n, text in enumerate(["c", "the cat sat on", "seven grey birds saw the", "fly"])
    ]
    wanted = generate(dense, requests)
    requests[3] = dataclasses.replace(requests[3], stops=(wanted[3].transcript.text[8:10],))
    wanted[3] = generate(dense, requests)[3]
    outputs = generate(lossless, requests)
    assert [o.transcript.text for o in outputs] == [o.transcript.text for o in wanted]
    assert [o.transcript.ids for o in outputs] == [o.transcript.ids for o in wanted]
    # Without the last episodes, which the ends of the texts cut.
    added = [episode.tokens for output in outputs for episode in output.episodes[:-1]]
    assert min(added) < 6
    assert max(added) > 1
    assert sum(added) / len(added) > 1.5
    # Where the dense check has replaced a draft, it spent everything on the token.
    assert any(output.token_actions(SPACE.dense)[1].any() for output in outputs)
    for output in outputs:
        taken, chosen = output.token_actions(SPACE.dense)
        last = np.cumsum([1, *(episode.tokens for episode in output.episodes)])[1:-1] - 1
        assert (taken[last] == SPACE.dense).all()
        assert not chosen[last].any()
    for output in outputs:
        starts = [episode.start for episode in output.episodes]
        prompt = len(output.request.prompt)
        np.testing.assert_array_equal(np.diff(starts), [episode.tokens for episode in output.episodes[:-1]])
        assert starts[0] == prompt
        assert len(output.steps()[0]) == 6 * len(output.episodes)  # refused steps count too


SMALL = llama_config(vocab_size=5, hidden_size=8, ffn_size=16, num_heads=2, num_kv_heads=1, max_position=64)
PROMPT = (3, 1, 4, 1, 0, 2, 2, 0)
ROWS = 4096


def drawn(weights, cfg, lossless):
    """The first three tokens after the prompt in many texts, [ROWS, 3]."""
    tokens_BxS = jnp.tile(jnp.array(PROMPT), (ROWS, 1))
    key_B = jax.random.split(jax.random.key(5), ROWS)
    text_B = decoding.start(weights, tokens_BxS, jnp.full(ROWS, len(PROMPT)), key_B, 32, cfg)
    texts = [[token] for token in np.asarray(text_B.token)]
    cfg = dataclasses.replace(cfg, lossless=lossless)  # the prefill, compiled once, is the same for both
    cheapest = jnp.zeros((ROWS, cfg.horizon), jnp.int32)
    for _ in range(2):  # each episode adds a token at least
        text_B, played = decoding.play(weights, None, text_B, jnp.ones((ROWS, 3)), cheapest, cfg)
        for text, token_N, new in zip(
            texts, np.asarray(played.token), np.asarray(played.num_new), strict=True
        ):
            text.extend(token_N[:new])
    return np.array([text[:3] for text in texts])


def test_sampled_texts_are_distributed_as_the_dense_model_s():
    """All 125 continuations of three tokens, by a full forward pass each; drafts alone fail the same test."""
    rule = Sampling(1.2, top_k=4, top_p=0.95)
    weights = llama.init_weights(jax.random.key(8), SMALL)
    weights["embed"] = 3 * weights["embed"]  # predictions that differ from token to token
    texts = np.array(list(itertools.product(range(5), repeat=3)))

    @jax.vmap
    def text_logp(text):
        tokens = jnp.concatenate([jnp.array(PROMPT), text])
        hidden_SxD, _ = llama.prefill(weights, tokens, SMALL)
        logits_3xV = llama.logits(weights, hidden_SxD[len(PROMPT) - 1 : -1])
        logp_3xV = jax.vmap(lambda logits_V: token_logp(logits_V, rule))(logits_3xV)
        return logp_3xV[jnp.arange(3), text].sum()

    expected = np.exp(np.asarray(text_logp(texts), np.float64)).reshape(5, 5, 5)
    assert expected.sum() == pytest.approx(1, abs=1e-4)
    rules = EpisodeRules(SMALL, SPACE, EpisodeConfig(horizon=2))
    cfg = Decoder(rules, sampling=rule, prefill_batch=ROWS)
    seen = [drawn(weights, cfg, lossless) for lossless in (True, False)]
    assert p_value(seen[0], expected) > 1e-3
    assert p_value(seen[1], expected) < 1e-6


def p_value(texts, expected):
    """Of a chi-square test; cells too rare for the statistic are taken together."""
    count = np.zeros(expected.shape)
    np.add.at(count, tuple(texts.T), 1)
    if count[expected == 0].any():
        return 0.0
    common = len(texts) * expected > 5
    cells = [np.append(x[common], x[~common].sum()) for x in (count, len(texts) * expected / expected.sum())]
    return stats.chisquare(*(x[cells[1] > 0] for x in cells)).pvalue
