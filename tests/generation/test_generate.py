"""The generation engine against a naive reference, row by row: tokens, actions, ends of texts, mistakes."""

import copy
import dataclasses
import functools

import jax
import naive_generation as naive
import numpy as np
import pytest
from absl import logging

from pallas_kernels import native
from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.errors import UserError
from sol_jax.generation import episodes
from sol_jax.generation.engine import (
    Engine,
    Request,
    batch_bucket,
    dense_logp,
    generate,
    input_drift,
    length_bucket,
    plan,
    stream,
)
from sol_jax.generation.episodes import Decoder
from sol_jax.generation.lean_policy import by_kernels, with_dtype
from sol_jax.generation.sampling import GREEDY, Sampling
from sol_jax.models import llama
from sol_jax.models.tokenizer import load_tokenizer
from sol_jax.models.weights import load_model
from sol_jax.rl.config import EpisodeConfig, PolicyConfig
from sol_jax.rl.policy import Policy, PolicySpec, example_observation, initial_carry
from sol_jax.rl.rollout import EpisodeRules, policy_controller

SPACE = ActionSpace(
    (
        Quest((0.2, 0.5, 1.0), (0.2, 1.0), 100.0, page_size=4),
        ChannelPruning((0.3, 1.0), (0.3, 1.0), 100.0),
        OutputQuantization((3.0, 16.0), (0.1875, 1.0), 200.0),
    )
)
T = 5
BUDGET = (0.6, 0.7, 0.6)
PROMPTS = ("birds", "c", "seven grey birds saw the mat and fly over", "the cat sat")
SAMPLED = Sampling(0.8, top_k=40, top_p=0.95)


@dataclasses.dataclass(frozen=True)
class Tiny:
    weights: dict
    tokenizer: object
    decoder: Decoder
    params: object
    policy: PolicySpec

    def engine(self, controller="fixed", **options):
        policy, params = (self.policy, self.params) if controller == "policy" else (None, None)
        cfg = dataclasses.replace(self.decoder, policy=policy, **options)
        return Engine(self.weights, self.tokenizer, cfg, controller, params)

    def requests(self, prompts=PROMPTS, **options):
        return [
            Request(self.tokenizer.encode(text), BUDGET, seed=n, **options) for n, text in enumerate(prompts)
        ]


def ended_by(tokenizer, eos_id):
    """The tokenizer with another end token; -1 is none, which texts as random as these need."""
    changed = copy.copy(tokenizer)
    changed.eos_id, changed.end_ids = eos_id, frozenset({eos_id})
    return changed


@pytest.fixture(scope="module")
def tiny_model(tiny_folder):
    model, weights = load_model(tiny_folder / "model")
    policy = PolicySpec(model.hidden_size, SPACE.num_actions, T, config=PolicyConfig(d_model=16))
    example = example_observation(policy), initial_carry(policy)
    params = jax.jit(functools.partial(Policy(policy).init, method="step"))(jax.random.key(3), *example)
    params = jax.tree.map(lambda x: 8 * x, params)  # or no observation would move it
    endless = ended_by(load_tokenizer(tiny_folder / "model"), -1)
    decoder = Decoder(EpisodeRules(model, SPACE, EpisodeConfig(horizon=T)))
    return Tiny(weights, endless, decoder, params, policy)


def reference(engine, request):
    """What the naive loop makes of a request."""
    schedule = plan(engine, request)
    return naive.generate(
        engine.weights,
        engine.cfg,
        request.prompt,
        request.max_tokens,
        request.seed,
        np.array(request.budget, np.float32),
        engine.params,
        lambda episode, t: int(schedule[episode, t]),
    )


@pytest.mark.parametrize(
    ("controller", "options"),
    [
        ("policy", {"sampling": SAMPLED}),
        ("policy", {"refresh": False, "sampling": SAMPLED}),
        ("fixed", {"refresh": False}),
        ("fixed", {"refresh_every": 2}),
    ],
)
def test_a_batch_equals_the_naive_reference_row_by_row(tiny_model, controller, options):
    """Prompts of 5 and 41 tokens, filled up to one length and to 4 rows; 14 tokens end in a third episode."""
    engine, count = tiny_model.engine(controller, **options), 14 if "refresh_every" in options else 9
    requests = tiny_model.requests(PROMPTS[:3], max_tokens=count)
    used = set()
    for output, request in [*zip(generate(engine, requests), requests, strict=True)][::2]:
        tokens, actions = reference(engine, request)
        assert output.transcript.ids == tokens
        taken, chosen = output.token_actions(SPACE.dense)
        np.testing.assert_array_equal(taken[1:], actions)
        np.testing.assert_array_equal(chosen[1:], len(request.prompt) + 1 + np.arange(count - 1) > 7)
        used |= set(actions)
    assert len(used) > 2
    assert any(action != SPACE.dense for action in used)


def test_the_dense_action_is_the_model_itself(tiny_model):
    """Greedy, against a forward pass over the whole text per token; with refresh and without."""
    requests = tiny_model.requests(max_tokens=18)
    wanted = [
        naive.greedy_by_full_forward(tiny_model.weights, tiny_model.decoder.model, r.prompt, 18)
        for r in requests
    ]
    for refresh in (True, False):
        engine = tiny_model.engine("dense", refresh=refresh)
        assert [output.transcript.ids for output in generate(engine, requests)] == wanted


def test_what_axes_keep_of_the_cache_is_what_they_would_make_of_it_anew(tiny_model):
    """After episodes that begin and end anywhere in a page, kept or refreshed, one or two at a time."""
    for options in ({}, {"refresh": False}, {"refresh_every": 2}):
        cfg = tiny_model.engine("fixed", **options).cfg
        tokens, key = np.full((2, 9), 5), jax.random.split(jax.random.key(0), 2)
        text = episodes.start(tiny_model.weights, tokens, np.array([9, 6]), key, 32, cfg)
        plan = np.zeros((2, T), np.int32)
        consumed = []
        for _ in range(3):
            first = text.token[:, None]
            text, played = episodes.play(tiny_model.weights, None, text, np.ones((2, 3)), plan, cfg)
            consumed = [*consumed, np.concatenate([first, played.token[:, :-1]], 1)][-2:]
        if "refresh_every" in options:
            text = episodes.renew(tiny_model.weights, text, np.concatenate(consumed, 1), cfg)
        for row in range(2):
            cache = jax.tree.map(lambda x, row=row: x[row], text.cache)
            anew = llama.index_cache(cache, cfg.space.axes).axis_index
            np.testing.assert_array_equal(text.axis_index[0][row], anew[0])


@pytest.mark.parametrize("kernels", ["native", "auto"])
def test_a_policy_by_kernels_is_the_policy(tiny_model, kernels):
    """Its network's products differ by rounding, and so do weights in bfloat16, by more."""
    if native.problem():
        pytest.skip(native.problem())
    greedy = policy_controller(Policy(tiny_model.policy), tiny_model.params, temperature=1.0)
    seen = example_observation(tiny_model.policy)
    seen = seen._replace(hidden=jax.random.normal(jax.random.key(1), seen.hidden.shape))
    args = jax.random.key(2), seen, initial_carry(tiny_model.policy)
    _, plain, _ = greedy.act(*args)
    text = jax.jit(by_kernels(greedy, kernels).act).lower(*args).as_text()
    assert "sol_project" in text
    np.testing.assert_allclose(by_kernels(greedy, kernels).act(*args)[1], plain, rtol=1e-4)
    half = with_dtype(tiny_model.params, "bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(half)} == {"bfloat16", "float32"}
    rough = policy_controller(Policy(tiny_model.policy), half, temperature=1.0)
    got = by_kernels(rough, kernels).act(*args)[1]
    np.testing.assert_allclose(got, plain, atol=0.2)
    assert got != plain


def test_refresh_matters(tiny_model):
    """Else the tests of it would show nothing."""
    requests = tiny_model.requests(max_tokens=18)
    texts = [
        [o.transcript.ids for o in generate(tiny_model.engine("fixed", refresh=refresh), requests)]
        for refresh in (True, False)
    ]
    assert texts[0] != texts[1]


def test_neither_batch_nor_padding_changes_a_text(tiny_model):
    engine = tiny_model.engine("policy", sampling=SAMPLED)
    requests = tiny_model.requests(max_tokens=11)
    together = generate(engine, requests)
    assert len({tuple(output.transcript.ids) for output in together}) == len(requests)
    for output, request in [*zip(together, requests, strict=True)][:2]:
        alone = generate(engine, [request])[0]
        assert alone.transcript.ids == output.transcript.ids
        for ours, theirs in zip(alone.token_actions(0), output.token_actions(0), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    # Another bucket of batch and of length, and the rows in another order.
    longer = dataclasses.replace(requests[0], prompt=tiny_model.tokenizer.encode(40 * "fly "), max_tokens=40)
    for output, request in zip(generate(engine, [longer, *requests[::-1]])[1:], requests[::-1], strict=True):
        assert output.transcript.ids == together[requests.index(request)].transcript.ids


def test_the_seed_alone_decides_what_is_drawn(tiny_model):
    request = tiny_model.requests(max_tokens=18)[1]
    requests = [dataclasses.replace(request, seed=seed) for seed in (1, 1, 2, 3)]
    first, again, *others = (
        output.transcript.ids for output in generate(tiny_model.engine("fixed", sampling=SAMPLED), requests)
    )
    assert first == again
    assert first not in others


def test_each_row_ends_where_it_ends(tiny_model):
    """Lengths, the end token and stop strings of their own; a row that ended does not count any more."""
    engine = tiny_model.engine("fixed", sampling=SAMPLED)
    free = generate(engine, tiny_model.requests(max_tokens=18))
    stop = free[1].transcript.text[9:11]
    requests = [
        dataclasses.replace(request, max_tokens=limit, stops=stops)
        for request, limit, stops in zip(
            tiny_model.requests(), (3, 18, 18, 14), ((), (stop,), ("no such",), ()), strict=True
        )
    ]
    outputs = generate(engine, requests)
    assert [len(outputs[row].transcript.ids) for row in (0, 3)] == [3, 14]
    assert [output.transcript.finish for output in outputs] == ["length", "stop", "length", "length"]
    for output, whole in zip(outputs, free, strict=True):
        assert output.transcript.ids == whole.transcript.ids[: len(output.transcript.ids)]
        assert sum(episode.tokens for episode in output.episodes) == len(output.transcript.ids) - 1
        action, keys, _ = output.steps()
        assert len(action) == len(output.transcript.ids) - 1
        np.testing.assert_array_equal(keys, len(output.request.prompt) + 1 + np.arange(len(action)))
    assert outputs[1].transcript.text == free[1].transcript.text.split(stop)[0]


def test_the_end_token_ends_a_text(tiny_model):
    """The token that this model happens to draw third plays the end token."""
    engine = tiny_model.engine("fixed", sampling=SAMPLED)
    requests = tiny_model.requests(max_tokens=9)
    free = generate(engine, requests)
    tokenizer = ended_by(tiny_model.tokenizer, free[0].transcript.ids[2])
    output = generate(dataclasses.replace(engine, tokenizer=tokenizer), requests)[0]
    first = free[0].transcript.ids.index(tokenizer.eos_id)
    assert output.transcript.finish == "eos"
    assert output.transcript.ids == free[0].transcript.ids[: first + 1]
    assert output.transcript.text == tiny_model.tokenizer.decode(output.transcript.ids[:first])


def test_any_of_several_end_tokens_ends_a_text(tiny_model):
    """The one that is drawn first, though the tokenizer's own comes later."""
    engine = tiny_model.engine("fixed", sampling=SAMPLED)
    requests = tiny_model.requests(max_tokens=9)
    ids = generate(engine, requests)[0].transcript.ids
    _, earlier, later, *_ = dict.fromkeys(ids)
    tokenizer = ended_by(tiny_model.tokenizer, later)
    tokenizer.end_ids |= {earlier}
    transcript = generate(dataclasses.replace(engine, tokenizer=tokenizer), requests)[0].transcript
    assert (transcript.finish, transcript.ids) == ("eos", ids[: ids.index(earlier) + 1])


def test_texts_grow_while_they_are_streamed(tiny_model):
    engine = tiny_model.engine("dense", sampling=SAMPLED)
    lengths = [
        len(outputs[0].transcript.ids) for outputs in stream(engine, tiny_model.requests(max_tokens=13))
    ]
    assert lengths == [1, 1 + T, 1 + 2 * T, 13]


def test_schedules_meet_their_budgets(tiny_model):
    """Over a text of 46 tokens, to half a step of each episode; the dense controller spends everything."""
    request = Request(tiny_model.tokenizer.encode("seven birds"), BUDGET, max_tokens=46)
    requests = [dataclasses.replace(request, seed=seed) for seed in range(4)]
    for controller, within in (("fixed", 0.02), ("random", 0.08)):
        for output in generate(tiny_model.engine(controller), requests):
            np.testing.assert_allclose(output.mean_cost(SPACE.costs_AxX), BUDGET, atol=within)
    output = generate(tiny_model.engine("dense"), requests)[0]
    np.testing.assert_array_equal(output.mean_cost(SPACE.costs_AxX), 1.0)


def test_dense_log_probabilities_are_the_model_s(tiny_model):
    output = generate(tiny_model.engine("fixed"), tiny_model.requests(max_tokens=9))[2]
    tokens = np.array([*output.request.prompt, *output.transcript.ids])
    hidden_SxD, _ = naive.prefill(tiny_model.weights, tokens[:-1], tiny_model.decoder.model)
    logp_SxV = jax.nn.log_softmax(naive.llama.logits(tiny_model.weights, hidden_SxD))
    wanted = np.asarray(logp_SxV)[np.arange(len(tokens) - 1), tokens[1:]][-9:]
    np.testing.assert_allclose(
        dense_logp(tiny_model.weights, output, tiny_model.decoder.model), wanted, atol=1e-4
    )


def test_drift_is_how_far_what_a_controller_sees_is_from_the_dense_model(tiny_model):
    """None without compression; with it, none where a refresh has just been, and some at every later step."""
    model = tiny_model.decoder.model
    requests = tiny_model.requests(PROMPTS[2:3], max_tokens=2 * T + 2)
    drift = {}
    for controller, refresh in (("dense", True), ("fixed", True), ("fixed", False)):
        engine = tiny_model.engine(controller, refresh=refresh)
        output = generate(engine, [dataclasses.replace(requests[0], budget=(0.3, 0.5, 0.4))])[0]
        drift[controller, refresh] = input_drift(engine.weights, output, model)
    assert all(len(of) == 2 * T + 1 for of in drift.values())
    np.testing.assert_allclose(drift["dense", True], 0, atol=1e-6)
    np.testing.assert_allclose(drift["fixed", True][::T], 0, atol=1e-6)
    assert (np.delete(drift["fixed", True], np.s_[::T]) > 1e-5).all()
    assert (drift["fixed", False][1:] > 1e-5).all()


@pytest.mark.parametrize(
    ("length", "parts", "bucket"),
    [
        (0, 4, 32), (1, 4, 32), (32, 4, 32), (33, 4, 64), (257, 4, 320), (1500, 4, 1536), (2000, 4, 2048),
        (2049, 4, 2560), (257, 8, 288), (512, 8, 512), (513, 8, 576), (1025, 8, 1152), (2192, 8, 2304),
    ],
)  # fmt: skip
def test_length_buckets(length, parts, bucket):
    assert length_bucket(length, parts) == bucket


@pytest.mark.parametrize("parts", [4, 8])
def test_how_much_of_a_bucket_can_be_room(parts):
    lengths = np.arange(256, 9000)
    buckets = np.array([length_bucket(int(n), parts) for n in lengths])
    assert (buckets >= lengths).all()
    assert (buckets - lengths < lengths / parts).all()
    assert (np.diff(buckets) >= 0).all()


def test_batch_buckets():
    assert [batch_bucket(n) for n in (1, 2, 3, 5, 8, 32)] == [1, 2, 4, 8, 8, 32]


def test_a_bucket_compiles_once_and_says_so(tiny_model, monkeypatch):
    """New texts of the same bucket, its shortest and its longest, compile nothing."""
    from sol_jax.generation import episodes as decoding

    told = []
    monkeypatch.setattr(logging, "info", lambda message, *values: told.append(message % values))
    engine = tiny_model.engine("policy", sampling=SAMPLED)
    generate(engine, tiny_model.requests(PROMPTS[:3], max_tokens=8))
    sizes = decoding.start._cache_size(), decoding.play._cache_size()
    assert told == ["bucket: batch 4, prompts up to 64, texts up to 96 tokens"]
    generate(engine, tiny_model.requests(PROMPTS[::-1], max_tokens=9))
    assert (decoding.start._cache_size(), decoding.play._cache_size()) == sizes
    assert len(told) == 1
    shortest, longest = ([1] * length for length in (33, 64))
    requests = tiny_model.requests(PROMPTS[:3], max_tokens=8)
    generate(engine, [dataclasses.replace(requests[0], prompt=shortest)] * 4)
    generate(engine, [dataclasses.replace(requests[0], prompt=longest)] * 3)
    assert (decoding.start._cache_size(), decoding.play._cache_size()) == sizes
    generate(engine, tiny_model.requests(PROMPTS[:1], max_tokens=8))
    assert told[1:] == ["bucket: batch 1, prompts up to 32, texts up to 64 tokens"]
    greedy = dataclasses.replace(engine, cfg=dataclasses.replace(engine.cfg, sampling=GREEDY))
    before = decoding.start._cache_size()
    generate(greedy, tiny_model.requests(PROMPTS[:1], max_tokens=1))  # another decoder has its own programs
    assert decoding.start._cache_size() == before + 1
    assert told[2:] == told[1:2]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1] * 250}, "250 tokens, which with 20 to generate exceed the model's context of 256"),
        ({"budget": (0.1, 0.7, 0.6)}, "budget: kappa = 0.1 cannot be met; the axis' levels cost 0.2 to 1"),
        ({"budget": (0.5, 0.7, float("nan"))}, "budget: eta = nan cannot be met"),
        ({"budget": (0.5, 0.7)}, "budget: 2 numbers were given; the axes are kappa, rho, eta"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"stops": ("a", "")}, "a stop string is empty"),
        ({"seed": -1}, "seed is -1; it must be from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296; it must be from 0 to 4294967295"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(tiny_model, change, sentence):
    request = dataclasses.replace(tiny_model.requests(max_tokens=20)[1], **change)
    with pytest.raises(UserError, match=sentence) as mistake:
        stream(tiny_model.engine("fixed"), [request])
    assert "\n" not in str(mistake.value)


def test_impossible_decoders_are_refused(tiny_model):
    longer = tiny_model.decoder.with_rules(episode=EpisodeConfig(horizon=T + 1))
    with pytest.raises(ValueError, match="has positions for 5 steps"):
        dataclasses.replace(longer, policy=PolicySpec(32, 18, T))
    with pytest.raises(ValueError, match="refresh_every must be 1"):
        dataclasses.replace(tiny_model.decoder, lossless=True, refresh_every=2)
    with pytest.raises(ValueError, match="refresh_every is 0; it must be at least 1"):
        dataclasses.replace(tiny_model.decoder, refresh_every=0)
    with pytest.raises(ValueError, match="refresh cannot be off"):
        dataclasses.replace(tiny_model.decoder, lossless=True, refresh=False)


@pytest.mark.parametrize(("controller", "policy"), [("policy", False), ("dense", True), ("best", False)])
def test_impossible_engines_are_refused(tiny_model, controller, policy):
    cfg = dataclasses.replace(tiny_model.decoder, policy=tiny_model.policy if policy else None)
    with pytest.raises(ValueError, match=r"controller"):
        Engine(tiny_model.weights, tiny_model.tokenizer, cfg, controller)
