"""Batches of prompts through `decoding`: padding to few shapes, schedules to replay, and where texts end.

    engine = Engine(weights, tokenizer, Decoder(EpisodeRules(model, space, EpisodeConfig())))
    for outputs in stream(engine, [Request(tokenizer.encode("Once"), budget=(1.0, 1.0, 1.0))]):
        ...  # after the prefill and after each episode: the texts so far

A decoder compiles once per (batch bucket, prompt bucket, text bucket) and says so in the log.  Prompts and
whole texts have buckets of their own because the prefill runs over the prompt alone, while the cache, whose
size is part of every program, must hold the prompt and all that may follow it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from sol_jax.axes.base import check_budgets
from sol_jax.baselines import schedules
from sol_jax.errors import UserError
from sol_jax.generation import episodes as decoding
from sol_jax.generation.episodes import Decoder
from sol_jax.generation.sampling import NO_TOKEN
from sol_jax.generation.transcript import Transcript
from sol_jax.models.finite import finite, no_numbers
from sol_jax.models.llama import LlamaConfig, Weights
from sol_jax.models.sharding import fetch, num_rows
from sol_jax.models.tokenizer import Tokenizer

CONTROLLERS = ("policy", "dense", "fixed", "random")
SMALLEST_LENGTH = 32


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to be continued."""

    prompt: Sequence[int]  # token ids
    # Mean cost per axis, requested of the policy or met by a schedule; dense decoding does not look at it.
    budget: tuple[float, ...] = ()
    max_tokens: int = 128
    stops: tuple[str, ...] = ()
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model, who picks its actions, and how."""

    weights: Weights
    tokenizer: Tokenizer
    cfg: Decoder
    controller: str = "dense"
    params: Any = None  # of the policy, for the controller "policy"
    identity: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)  # of the model
    # Decoders and shapes so far, to log new ones; engines that `dataclasses.replace` makes of one share it.
    compiled: set = dataclasses.field(default_factory=set, compare=False)

    def __post_init__(self):
        if self.controller not in CONTROLLERS:
            raise ValueError(f"controller is {self.controller!r}; it must be one of {', '.join(CONTROLLERS)}")
        if (self.controller == "policy") != (self.cfg.policy is not None):
            raise ValueError(
                "the controller 'policy' needs a policy's config in the decoder, others need none"
            )


class EpisodeRecord(NamedTuple):
    """What one episode did to one text."""

    start: int  # keys before its first step
    action_T: np.ndarray  # taken
    controllable_T: np.ndarray
    tokens: int  # that it added to the text
    steps: int  # that count: to the end of the text, or, in lossless mode, all (it takes some back)
    seen_TxD: np.ndarray  # the hidden state that each step's controller saw
    replaced: bool = False  # the last token is that of the dense check (lossless mode), not of a step


@dataclasses.dataclass
class Output:
    """One text, growing."""

    request: Request
    transcript: Transcript
    episodes: list[EpisodeRecord]

    def token_actions(self, dense: int) -> tuple[np.ndarray, np.ndarray]:
        """For each token the action of the step that drew it, and whether that was the controller's choice.

        The first token comes of the dense prefill, and the last of a lossless episode of the dense check.
        """
        action, chosen = [dense], [False]
        for episode in self.episodes:
            drafted = episode.tokens - episode.replaced
            action += [*episode.action_T[:drafted].tolist(), *[dense] * episode.replaced]
            chosen += [*episode.controllable_T[:drafted].tolist(), *[False] * episode.replaced]
        return np.array(action), np.array(chosen, bool)

    def steps(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every step that counts: its action, the keys in its reach, and whether it was controllable."""
        action = [e.action_T[: e.steps] for e in self.episodes]
        keys = [e.start + 1 + np.arange(e.steps) for e in self.episodes]
        controllable = [e.controllable_T[: e.steps] for e in self.episodes]
        none = np.zeros(0, int)
        return (
            np.concatenate([none, *action]),
            np.concatenate([none, *keys]),
            np.concatenate([none, *controllable]),
        )

    def mean_cost(self, costs_AxX: np.ndarray) -> np.ndarray:
        """Realised budget per axis: the mean cost of the controllable steps; of none, that of dense ones."""
        action, _, controllable = self.steps()
        chosen = action[controllable.astype(bool)]
        # In float64: a long text at the lowest level must not come out below it.
        return costs_AxX[chosen].mean(0, dtype=np.float64) if len(chosen) else costs_AxX[-1]


def length_bucket(length: int, parts: int = 4) -> int:
    """The smallest multiple of 1 / `parts` of a power of two, below its double, that is at least `length`.

    It is a multiple of `SMALLEST_LENGTH` too, and at least that.
    """
    length = max(length, SMALLEST_LENGTH)
    power = 1 << (length - 1).bit_length()
    step = max(power // (2 * parts), SMALLEST_LENGTH)
    return -(-length // step) * step


def batch_bucket(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def check_request(request: Request, cfg: Decoder, controller: str) -> None:
    """Raises `UserError` for a request that cannot be answered."""
    axes, context = cfg.space.axes, cfg.model.max_position
    if not len(request.prompt):
        raise UserError("the prompt is empty; it must have at least one token")
    if request.max_tokens < 1:
        raise UserError(f"max_tokens is {request.max_tokens}; it must be at least 1")
    if "" in request.stops:
        raise UserError("a stop string is empty; it would end every text before it begins")
    if not 0 <= request.seed < 1 << 32:
        raise UserError(f"seed is {request.seed}; it must be from 0 to {(1 << 32) - 1}")
    if len(request.prompt) + request.max_tokens > context:
        raise UserError(
            f"the prompt has {len(request.prompt)} tokens, which with {request.max_tokens} to generate "
            f"exceed the model's context of {context}"
        )
    if controller == "dense":
        return
    if len(request.budget) != len(axes):
        names = ", ".join(axis.name for axis in axes)
        raise UserError(f"budget: {len(request.budget)} numbers were given; the axes are {names}")
    for axis, cost in zip(axes, request.budget, strict=True):
        check_budgets(axis, (cost,), "budget")


def plan(engine: Engine, request: Request) -> np.ndarray:
    """The schedule to replay, episode by episode [E, T]: at the requested costs, or dense."""
    cfg, T = engine.cfg, engine.cfg.horizon
    # A lossless episode may add a single token.
    episodes = request.max_tokens if cfg.lossless else -(-request.max_tokens // T)
    keys = len(request.prompt) + 1 + np.arange(episodes * T).reshape(episodes, T)
    target, may_control = np.array(request.budget), keys > cfg.rules.episode.uncontrolled
    if engine.controller == "fixed":
        return schedules.fixed(cfg.space, target, may_control)
    if engine.controller == "random":
        rng = np.random.default_rng(request.seed)
        return schedules.random(cfg.space, target, may_control, 1, rng)[:, 0]
    return schedules.dense(cfg.space, episodes, T)


def stream(engine: Engine, requests: Sequence[Request]) -> Iterator[list[Output]]:
    """Answers requests in one batch; yields the same growing outputs after the prefill and each episode.

    Raises `UserError` before anything runs if one of the requests cannot be answered.
    """
    for request in requests:
        check_request(request, engine.cfg, engine.controller)
    outputs = [
        Output(request, Transcript(engine.tokenizer, request.max_tokens, request.stops, request.prompt), [])
        for request in requests
    ]
    return _stream(engine, outputs)


def _stream(engine: Engine, outputs: list[Output]) -> Iterator[list[Output]]:
    cfg, T = engine.cfg, engine.cfg.horizon
    shares = num_rows(engine.weights)
    B = -(-batch_bucket(len(outputs)) // shares) * shares
    requests = [outputs[b % len(outputs)].request for b in range(B)]  # filled up with repetitions
    lengths = [len(request.prompt) for request in requests]
    S = length_bucket(max(lengths))
    # The last episode of a row may begin one token before its end.  Rows that have ended go on writing, past
    # the end of the cache in the end, where XLA moves the write back into their own cache: nobody reads it.
    # Of the prompts' bucket, not of the prompts: one program for all of them.  In finer steps, since
    # every decode step reads the whole cache, room or not.
    capacity = length_bucket(S + max(request.max_tokens for request in requests) + T, parts=8)
    if (cfg, B, S, capacity) not in engine.compiled:
        logging.info("bucket: batch %d, prompts up to %d, texts up to %d tokens", B, S, capacity)
        engine.compiled.add((cfg, B, S, capacity))
    tokens_BxS = np.zeros((B, S), np.int32)
    for tokens_S, request in zip(tokens_BxS, requests, strict=True):
        tokens_S[: len(request.prompt)] = request.prompt
    key_B = jax.vmap(jax.random.key)(np.array([request.seed for request in requests], np.uint32))
    dense = (1.0,) * len(cfg.space.axes)
    budget = [dense if engine.controller == "dense" else request.budget for request in requests]
    budget_BxX = jnp.array(budget, jnp.float32)
    plan_BxE = [plan(engine, request) for request in requests]
    text_B = decoding.start(engine.weights, tokens_BxS, jnp.array(lengths, jnp.int32), key_B, capacity, cfg)
    for output, token in zip(outputs, fetch(text_B.token), strict=False):
        _add(output, int(token))
    yield outputs
    stale: list[jax.Array] = []  # tokens [B, T] whose entries are still those of compressed steps
    for e in range(max(map(len, plan_BxE))):
        if all(output.transcript.finish for output in outputs):
            return
        plan_BxT = jnp.asarray(np.stack([plan[e % len(plan)] for plan in plan_BxE]))
        begin_B = fetch(text_B.length)
        first_Bx1 = text_B.token[:, None]
        text_B, played = decoding.play(engine.weights, engine.params, text_B, budget_BxX, plan_BxT, cfg)
        if cfg.refresh and cfg.refresh_every > 1:
            stale.append(jnp.concatenate([first_Bx1, played.token[:, :-1]], 1))
            if len(stale) == cfg.refresh_every:
                text_B = decoding.renew(engine.weights, text_B, jnp.concatenate(stale, 1), cfg)
                stale = []
        played = fetch(played)
        for b, output in enumerate(outputs):
            if not output.transcript.finish:
                _take(output, int(begin_B[b]), jax.tree.map(lambda x, b=b: x[b], played), cfg)
        yield outputs


def _add(output: Output, token: int) -> None:
    """Adds one token to a text.  Raises `UserError` if there is none, as the logits were no numbers."""
    if token == NO_TOKEN:
        raise no_numbers(f"token {len(output.transcript.ids) + 1} of the text")
    output.transcript.add(token)


def _take(output: Output, begin: int, played: decoding.Played, cfg: Decoder) -> None:
    """Adds one episode's tokens to a text, up to its end."""
    before = len(output.transcript.ids)
    for token in played.token[: played.num_new]:
        _add(output, int(token))
        if output.transcript.finish:
            break
    tokens = len(output.transcript.ids) - before
    steps = cfg.horizon if cfg.lossless else tokens
    replaced = cfg.lossless and tokens == int(played.num_new)  # unless the text ended before
    actions = np.asarray(played.action), np.asarray(played.controllable)
    output.episodes.append(EpisodeRecord(begin, *actions, tokens, steps, np.asarray(played.seen), replaced))


def generate(engine: Engine, requests: Sequence[Request]) -> list[Output]:
    """The finished answers to `requests`."""
    *_, outputs = stream(engine, requests)
    return outputs


def dense_logp(weights: Weights, output: Output, cfg: LlamaConfig) -> np.ndarray:
    """The dense model's log-probability of each generated token, given all before it."""
    padded, length = _padded(output)
    logp_N = np.asarray(decoding.text_logp(weights, padded, cfg))
    return finite("the text", logp_N[len(output.request.prompt) - 1 : length - 1])


def input_drift(weights: Weights, output: Output, cfg: LlamaConfig) -> np.ndarray:
    """How far what the controller saw before each step is from the dense model's, on the same text.

    One minus the cosine of the two hidden states, of the steps that gave a token of the text.
    """
    dense_NxD = np.asarray(decoding.text_hidden(weights, _padded(output)[0], cfg))
    drift: list[np.ndarray] = []
    for episode in output.episodes:
        seen_TxD = episode.seen_TxD[: min(episode.tokens, len(episode.seen_TxD))]
        truth_TxD = dense_NxD[episode.start - 1 :][: len(seen_TxD)]
        lengths_T = np.linalg.norm(seen_TxD, axis=-1) * np.linalg.norm(truth_TxD, axis=-1)
        drift.append(1 - (seen_TxD * truth_TxD).sum(-1) / lengths_T)
    return np.concatenate([np.zeros(0), *drift])


def _padded(output: Output) -> tuple[np.ndarray, int]:
    """Prompt and text, filled up to a bucket, and their length."""
    tokens = [*output.request.prompt, *output.transcript.ids]
    padded = np.zeros(length_bucket(len(tokens)), np.int32)
    padded[: len(tokens)] = tokens
    return padded, len(tokens)
