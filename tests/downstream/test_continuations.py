"""Scoring of forced tokens under a controller, against a naive loop over the tokens of one text."""

import dataclasses
import functools
import types

import jax
import naive_generation as naive
import numpy as np
import pytest
from absl import logging

from sol_jax.axes.base import ActionSpace, Work
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.costs import decode_step as costs
from sol_jax.downstream import teacher_forced as forced
from sol_jax.downstream.continuations import (
    Continuation,
    ContinuationScore,
    batches,
    mean_cost,
    plans,
    score,
    shares,
    steps_bucket,
    truncated,
    work,
)
from sol_jax.errors import UserError
from sol_jax.generation.engine import Engine
from sol_jax.generation.episodes import Decoder
from sol_jax.models import llama
from sol_jax.models.tokenizer import load_tokenizer
from sol_jax.models.weights import load_model
from sol_jax.rl.config import EpisodeConfig, PolicyConfig
from sol_jax.rl.policy import (
    Observation,
    Policy,
    PolicySpec,
    budget_gap,
    example_observation,
    initial_carry,
    progress,
)
from sol_jax.rl.rollout import EpisodeRules

SPACE = ActionSpace(
    (
        Quest((0.2, 0.5, 1.0), (0.2, 1.0), 100.0, page_size=4),
        ChannelPruning((0.3, 1.0), (0.3, 1.0), 100.0),
        OutputQuantization((3.0, 16.0), (0.1875, 1.0), 200.0),
    )
)
T = 5
BUDGET = (0.6, 0.7, 0.6)
CONTEXTS = ("seven grey birds saw the", "c", "the cat sat on a mat and saw the walls over")
ENDINGS = (" cat", " walls and seven birds", " mat")


@pytest.fixture(scope="module")
def tiny_model(tiny_folder):
    """Engines by controller, and texts as requests: one context has three endings, one has a single token."""
    model, weights = load_model(tiny_folder / "model")
    policy = PolicySpec(model.hidden_size, SPACE.num_actions, T, config=PolicyConfig(d_model=16))
    example = example_observation(policy), initial_carry(policy)
    init = jax.jit(lambda key: Policy(policy).init(key, *example, method="step"))
    params = jax.tree.map(lambda x: 8 * np.asarray(x), init(jax.random.key(3)))  # or none would move it
    tokenizer = load_tokenizer(tiny_folder / "model")
    decoder = Decoder(EpisodeRules(model, SPACE, EpisodeConfig(horizon=T)))
    engines = {name: Engine(weights, tokenizer, decoder, name) for name in ("fixed", "random", "dense")}
    engines["policy"] = Engine(
        weights, tokenizer, dataclasses.replace(decoder, policy=policy), "policy", params
    )
    pairs = [(CONTEXTS[0], end) for end in ENDINGS] + [(CONTEXTS[1], ENDINGS[1]), (CONTEXTS[2], ENDINGS[0])]
    requests = [Continuation(*(tuple(tokenizer.encode(text)) for text in pair)) for pair in pairs]
    return types.SimpleNamespace(engines=engines, requests=requests, weights=weights, model=model)


@functools.partial(jax.jit, static_argnames="cfg")
def begin_episode(cache, length, cfg):
    prefix = llama.index_cache(cache, cfg.space.axes).prefix(length)
    return prefix, llama.empty_suffix(prefix, cfg.horizon, cfg.space.axes)


@jax.jit
def all_logp(weights, hidden):
    return jax.nn.log_softmax(llama.logits(weights, hidden))


def naively(engine, request, plan=None):
    """Token by token; at every episode's start the cache is computed anew."""
    cfg, text = engine.cfg, [*request.context, *request.tokens]
    begin, logp, actions = len(request.context) - 1, [], []
    for n in range(len(request.tokens)):
        t = n % cfg.horizon
        if t == 0:
            # What lies behind the episode's start is never seen: other tokens, so that one program does.
            padded = np.full(64, 7)
            padded[: begin + n] = text[: begin + n]
            hidden_SxD, cache = naive.prefill(engine.weights, padded, cfg.model)
            hidden_D = np.asarray(hidden_SxD)[begin + n - 1] * (begin + n > 0)
            prefix, suffix = begin_episode(cache, begin + n, cfg)
            seen, spent, chosen = [], [], cfg.space.num_actions
        controllable = begin + n + 1 > cfg.rules.episode.uncontrolled
        total = np.sum(spent, 0) if spent else np.zeros(3)
        seen.append(
            Observation(
                hidden=hidden_D,
                embed=np.asarray(engine.weights["embed"])[text[begin + n]],
                progress=np.asarray(progress(t, cfg.horizon)),
                controllable=np.float32(controllable),
                target=np.array(BUDGET, np.float32),
                gap=np.asarray(budget_gap(total, len(spent), np.array(BUDGET, np.float32))),
                prev_action=np.int32(chosen),
                num_keys=np.int32(begin + n + 1),
                logit=np.asarray(engine.weights["embed"])[text[begin + n]] @ hidden_D,
            )
        )
        chosen = int(naive.choose(engine.params, seen, cfg.policy)) if plan is None else int(plan[n])
        action = chosen if controllable else cfg.space.dense
        spent += [cfg.space.costs_AxX[action]] if controllable else []
        values_X = cfg.space.values_AxX[action]
        token = np.int32(text[begin + n])
        hidden_D, suffix = naive.decode(
            engine.weights, prefix, suffix, token, np.int32(t), values_X, cfg.space.axes, cfg.model
        )
        logp_V = np.asarray(all_logp(engine.weights, hidden_D))
        logp.append((logp_V[request.tokens[n]], logp_V.argmax() == request.tokens[n]))
        actions.append(action)
    return logp, actions


def test_the_policy_scores_as_the_naive_loop_does(tiny_model):
    """Steps of 4 to 23 tokens, ended and whole episodes, a context of one token; all in one batch."""
    engine = tiny_model.engines["policy"]
    found = score(engine, tiny_model.requests, BUDGET)
    used = set()
    for request, mine in [*zip(tiny_model.requests, found, strict=True)][1:4:2]:
        wanted, actions = naively(engine, request)
        np.testing.assert_allclose(mine.logp_N, [x for x, _ in wanted], atol=2e-4)
        assert mine.greedy_N.tolist() == [x for _, x in wanted]
        assert mine.action_N.tolist() == actions
        assert mine.controllable_N.tolist() == (request.keys > 7).tolist()
        used |= set(actions)
    assert len(used) > 2


@pytest.mark.parametrize("controller", ["fixed", "random"])
def test_schedules_score_as_the_naive_loop_does(tiny_model, controller):
    engine, requests = tiny_model.engines[controller], tiny_model.requests
    plan_RxM = plans(SPACE, controller, requests, BUDGET, 7)[0]
    found = score(engine, requests, plan_RxM=plan_RxM)
    wanted, actions = naively(engine, requests[1], plan_RxM[1])
    np.testing.assert_allclose(found[1].logp_N, [x for x, _ in wanted], atol=2e-4)
    assert found[1].action_N.tolist() == actions
    realised = mean_cost(found, SPACE.costs_AxX)
    np.testing.assert_allclose(realised, BUDGET, atol=0.02 if controller == "fixed" else 0.15)


def test_dense_is_the_model_itself(tiny_model):
    """One forward pass over the text; and so is a schedule of dense actions."""
    found = score(tiny_model.engines["dense"], tiny_model.requests)
    plan_RxM = plans(SPACE, "dense", tiny_model.requests, BUDGET, 7)[0]
    replayed = score(tiny_model.engines["fixed"], tiny_model.requests, plan_RxM=plan_RxM)
    for request, mine, other in zip(tiny_model.requests, found, replayed, strict=True):
        text = [*request.context, *request.tokens]
        padded = np.pad(text, (0, 64 - len(text)))
        hidden_SxD, _ = naive.prefill(tiny_model.weights, padded, tiny_model.model)
        logp = np.asarray(all_logp(tiny_model.weights, hidden_SxD))
        places = np.arange(len(request.context) - 1, len(text) - 1)
        wanted = logp[places, request.tokens]
        np.testing.assert_allclose(mine.logp_N, wanted, atol=1e-5)
        np.testing.assert_allclose(other.logp_N, wanted, atol=2e-4)
        assert mine.greedy_N.tolist() == (logp.argmax(-1)[places] == request.tokens).tolist()
        assert not mine.controllable_N.any()
        assert (mine.action_N == SPACE.dense).all()


def test_the_order_does_not_matter(tiny_model):
    """Nor do the others of a batch, or the naive loop, which is alone, would score otherwise."""
    engine, requests = tiny_model.engines["policy"], tiny_model.requests
    whole, done = score(engine, requests, BUDGET), []
    backwards = score(engine, requests[::-1], BUDGET, progress=done.append)[::-1]
    assert done == [5]
    for mine, other in zip(whole, backwards, strict=True):
        np.testing.assert_array_equal(mine.logp_N, other.logp_N)
    assert score(engine, [], BUDGET) == []


def test_refresh_cannot_be_off(tiny_model):
    engine = tiny_model.engines["fixed"]
    engine = dataclasses.replace(engine, cfg=dataclasses.replace(engine.cfg, refresh=False))
    with pytest.raises(ValueError, match="the decoder's refresh is off"):
        score(engine, tiny_model.requests, BUDGET)


def test_batches_share_contexts():
    """Contexts of 40 tokens before those of 3, each with its endings; 5 steps are 8, 20 of T = 16 are 32."""
    short, long = tuple(range(3)), tuple(range(40))
    requests = [Continuation(c, (1,) * n) for n in (5, 20) for c in (short, long, short[1:])]
    found = list(batches(requests, 16, batch_size=4))
    assert [sorted(batch) for batch, _ in found] == [[1, 2, 4, 5], [0, 3]]
    assert found[0][1] == (4, 2, 64, 32)
    assert found[1][1] == (2, 1, 32, 32)
    assert [steps_bucket(n, 16) for n in (1, 5, 16, 17, 33, 65)] == [4, 8, 16, 32, 48, 96]
    assert [steps_bucket(n, 5) for n in (1, 5, 6)] == [4, 5, 10]
    lengths = [len(batch) for batch, _ in batches([Continuation((1,) * 2000, (1,))] * 20, 16, batch_size=32)]
    assert lengths == [7, 7, 6]  # of 2,048 + 4 entries each


def test_what_is_cut():
    assert truncated((1, 2, 3), (4, 5), 4) == Continuation((1, 2, 3), (4, 5))
    assert truncated((1, 2, 3), (4, 5), 3) == Continuation((2, 3), (4, 5))  # the last token is not consumed
    assert truncated((1, 2, 3), (4, 5), 2) == Continuation((3,), (4, 5))
    with pytest.raises(UserError, match="2 tokens, more than the model's context of 1"):
        truncated((1,), (4, 5), 1)
    with pytest.raises(UserError, match="no tokens"):
        truncated((1,), (), 5)


def test_plans_count_the_steps_that_are_there():
    """Two texts of 9 and 2 steps; the first 4 steps of the first have at most 7 keys."""
    requests = [Continuation((0,) * 4, (0,) * 9), Continuation((0,) * 10, (0,) * 2)]
    fixed = plans(SPACE, "fixed", requests, (0.6, 0.65, 0.59375), 7)
    assert fixed.shape == (1, 2, 9)
    counted = np.concatenate([fixed[0, 0, 4:], fixed[0, 1, :2]])
    assert (fixed[0, 0, :4] == SPACE.dense).all()
    # Seven steps: 0.65 is half-way between 0.3 and 1, so 3 or 4 of them are dense on that axis.
    assert round(float((SPACE.values_AxX[counted, 1] == 1).sum())) in (3, 4)
    drawn = plans(SPACE, "random", requests, (0.6, 0.65, 0.59375), 7, num_draws=6, seed=1)
    assert drawn.shape == (6, 2, 9)
    assert len({draw.tobytes() for draw in drawn}) > 1
    np.testing.assert_allclose(SPACE.costs_AxX[drawn[:, 0, 4:]].mean((0, 1)), [0.6, 0.65, 0.59375], atol=0.1)


def test_work_by_hand(tiny_model):
    """Six steps at T = 5 over keys 8 .. 13: one refresh, after the first; none without controller."""
    cfg = tiny_model.engines["policy"].cfg
    request = Continuation((0,) * 8, (0,) * 6)
    action = 0
    mine = ContinuationScore(np.zeros(6), np.zeros(6, bool), np.full(6, action), np.ones(6, bool))
    spent, dense = work([request] * 2, [mine] * 2, cfg)
    steps = [
        costs.step_cost(SPACE.values_AxX[action], keys, cfg.model, SPACE.axes, cfg.policy)
        for keys in range(8, 14)
    ]
    refresh = costs.dense_pass(5, 7, cfg.model)
    assert spent.bytes == pytest.approx(2 * (sum(s.total.bytes for s in steps) + refresh.bytes))
    assert spent.flops == pytest.approx(2 * (sum(s.total.flops for s in steps) + refresh.flops))
    assert dense.bytes == pytest.approx(
        2 * sum(costs.dense_step(k, cfg.model).total.bytes for k in range(8, 14))
    )
    plain = dataclasses.replace(cfg, policy=None, refresh=False)
    full = mine._replace(action_N=np.full(6, SPACE.dense))
    assert work([request], [full], plain)[0] == pytest.approx(work([request], [full], plain)[1])


def test_shares_of_dense_work():
    assert shares(Work(3.0, 1.0), Work(4.0, 8.0)) == {"bytes": 0.75, "flops": 0.125}
    decoder = Decoder(EpisodeRules(None, SPACE, EpisodeConfig()))
    assert shares(*work([], [], decoder)) == {"bytes": 1.0, "flops": 1.0}  # nothing was spent


def test_compiled_shapes_are_reused(tiny_model, monkeypatch):
    told = []
    monkeypatch.setattr(logging, "info", lambda message, *values: told.append(message % values))
    engine = dataclasses.replace(tiny_model.engines["policy"], compiled=set())
    score(engine, tiny_model.requests, BUDGET)
    before = forced.prefill_contexts._cache_size(), forced.score_controlled._cache_size()
    assert told == ["bucket: rows 8, contexts 4, prefix 64, steps 30"]
    score(engine, [*tiny_model.requests[1:], tiny_model.requests[1]], (0.5, 0.5, 0.5))
    assert (forced.prefill_contexts._cache_size(), forced.score_controlled._cache_size()) == before
    assert len(told) == 1
    dense = dataclasses.replace(tiny_model.engines["dense"], compiled=engine.compiled)
    score(dense, tiny_model.requests)  # another decoder has its own programs
    assert told[1:] == told[:1]
