"""Tokens a second against perplexity: what steps that do less win on the clock, and what they lose.

    python -m experiments.benchmarks.clock                   # to experiments/results/clock_cpu.csv
    python -m experiments.benchmarks.clock --contexts 2048 --dtypes bfloat16 --tokens 64 --csv FILE
    python -m experiments.benchmarks.clock --policies smollm2-135m/sol-j-fl-t16
    python -m experiments.benchmarks.clock --rule quest --fixed 0.1,0.8,16 --refreshes never --keep

Text is given, in episodes of 16 tokens after a dense prefill, with the head of the vocabulary, the policy's
network and the cache's refresh, as when it is written; batch 1.  The prefill is not timed.  Controllers play
the same episodes in turns with the dense decoder, and a speedup is the median over episodes of the ratio of
two that were played beside each other: other work on the machine slows both.  The dense decoder has no action
at all and, with `--kernels auto`, the kernels that pay: the strongest that there is here.

    dense           no action, no refresh
    xla             the same through XLA's products alone
    fixed K/R/B     one action: kappa K, rho R, B bits; those of `--fixed` instead, if it names any
    mix K           `schedules.fixed` of kappa K: its two nearest levels, spread evenly
    clock           kappa 1 in the first step of an episode and 0.1 after it
    a policy        greedy, asked for each of `--budgets` (one number for all axes, or one each)

`network_share` is the time of a policy's choices alone over that of dense decoding beside it.
`every 1`, `every 4` and `never` say when the entries of compressed steps are replaced.  With `--rule kept`
kappa always reads the sinks, the window and the newest page, and the first two layers read all (the rule of
Quest's authors, with SOL's protection); with `--rule quest` without that protection, which is of tokens where
all else is of pages, and with `--rule group` the query heads of a group share their pages besides; with
`--rule paper` it is SOL's.  Policies have the rules that they were trained with.
`--keep` leaves the rows of a CSV that are not measured again.
"""

import argparse
import csv
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sol_jax.axes.base import ActionSpace, Axis
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.baselines import schedules
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.generation import episodes as decoding
from sol_jax.generation.episodes import Decoder, Played, Steps, TextState
from sol_jax.generation.lean_policy import with_dtype
from sol_jax.generation.load_engine import open_policy
from sol_jax.models import llama
from sol_jax.models.model import Model, open_model
from sol_jax.models.weights import EMBEDDED
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.policy import Observation, example_observation
from sol_jax.rl.rollout import EpisodeRules, Step, begin, controlled_step
from sol_jax.text.documents import WIKIPEDIA, read_documents

Levels = tuple[float, ...]

HORIZON = 16
KAPPA, RHO, BITS = (0.1, 0.2, 0.4, 1.0), (0.7, 0.9, 1.0), (8, 16)
REFRESHES: dict[str, dict[str, Any]] = {"1": {}, "4": {"refresh_every": 4}, "never": {"refresh": False}}
# What a row is of; the rest is measured.
KEYS = ("dtype", "context", "rule", "controller", "asked", "refresh")
RULES: dict[str, dict[str, Any]] = {
    "paper": {},
    "kept": {"protect": True, "read_newest": True, "dense_layers": 2},
    "quest": {"read_newest": True, "dense_layers": 2, "least_pages": 3},
    "group": {"read_newest": True, "dense_layers": 2, "least_pages": 3, "heads": "group"},
}


@dataclasses.dataclass(frozen=True)
class Player:
    """One who plays the episodes of a text."""

    name: str
    decoder: Decoder
    values: tuple[float, ...] = ()  # of the action that it always takes
    target: tuple[float, ...] = ()  # or of the schedule that it plays
    params: Any = dataclasses.field(default=None, compare=False)  # of its policy
    budget: tuple[float, ...] = ()  # that a policy is asked for, of each axis

    @property
    def refresh(self) -> str:
        if not self.decoder.refresh:
            return "never"
        return f"every {self.decoder.refresh_every}"

    def plan(self, num_keys: int) -> np.ndarray:
        """The actions [1, T] of the episode after `num_keys` tokens."""
        space = self.decoder.space
        if self.values:
            here = np.array(self.values, np.float32)
            return np.full((1, HORIZON), int((space.values_AxX == here).all(1).argmax()), np.int32)
        if self.target:
            may = np.ones((1, HORIZON), bool)
            if self.name == "clock":
                first = np.tile(self.target, (HORIZON, 1))
                first[0] = 1.0
                return schedules.clock(space, first, may)
            return schedules.fixed(space, np.array(self.target), may)
        return schedules.dense(space, 1, HORIZON)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="text_B")
def play_given(
    weights: llama.Weights,
    params: Any,
    text_B: TextState,
    label_BxT: jax.Array,
    plan_BxT: jax.Array,
    budget_BxX: jax.Array,
    cfg: Decoder,
) -> tuple[TextState, Played, jax.Array]:
    """`decoding.play` of tokens that are given; also their log-probabilities [B, T]."""

    def one(text: TextState, label_T: jax.Array, plan_T: jax.Array, budget_X: jax.Array) -> Any:
        controller = decoding.controller_of(cfg, params, plan_T)
        prefix = llama.IndexedCache(text.cache, text.axis_index).prefix(text.length)
        key = text.key

        def step(carry: Any, given: tuple[jax.Array, jax.Array]) -> Any:
            (state, token), (t, label) = carry, given
            state, did = controlled_step(
                weights, cfg.rules, prefix, controller.act, budget_X, state, Step(t, token, key)
            )
            logits_V = llama.logits(weights, state.hidden, cfg.model.kernels)
            logp = logits_V[label] - jax.nn.logsumexp(logits_V)
            return (state, label), (logp, Steps(label, did.action, did.controllable, logp, state.hidden))

        start = begin(prefix, text.hidden, controller, HORIZON, cfg.space), text.token
        (state, _), (logp_T, steps) = lax.scan(step, start, (jnp.arange(HORIZON), label_T))
        return *decoding.keep_all(weights, text, steps, state.suffix, state.hidden, cfg), logp_T

    return jax.vmap(one)(text_B, label_BxT, plan_BxT, budget_BxX)


def network_seconds(player: Player, repeats: int = 30) -> float:
    """Seconds of the choices of one episode alone, the best of `repeats`."""
    cfg = player.decoder
    assert cfg.policy is not None

    @jax.jit
    def choose(params: Any, seen_T: Observation, memory: Any, key: jax.Array) -> jax.Array:
        controller = decoding.controller_of(cfg, params, jnp.zeros(HORIZON, jnp.int32))

        def step(carry: Any, seen: Observation) -> Any:
            previous, memory = carry
            action, _, memory = controller.act(key, seen._replace(prev_action=previous), memory)
            return (action, memory), action

        return lax.scan(step, (seen_T.prev_action[0], memory), seen_T)[1]

    memory = decoding.controller_of(cfg, player.params, jnp.zeros(HORIZON, jnp.int32)).memory
    # Of each step its own, or what is made of them would be made once.
    seen_T = jax.tree.map(lambda x: jnp.repeat(x[None], HORIZON, 0), example_observation(cfg.policy))
    given = player.params, seen_T, memory, jax.random.key(0)
    jax.block_until_ready(choose(*given))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(choose(*given))
        taken.append(time.perf_counter() - start)
    return min(taken)


class Text:
    """One text under one player, episode by episode."""

    def __init__(
        self, player: Player, weights: llama.Weights, cache: llama.KVCache, ids: np.ndarray, context: int
    ):
        cfg = player.decoder
        indexed = jax.jit(llama.index_cache, static_argnums=1)(cache, cfg.space.axes)
        blank, here = jnp.zeros(cfg.model.hidden_size), jnp.int32(context - 1)
        state = TextState(
            indexed.cache, indexed.axis_index, here, blank, jnp.int32(ids[context - 1]), jax.random.key(0)
        )
        # A copy of its own: an episode writes into the caches that it is given.
        self.state = jax.tree.map(lambda x: jnp.array(x)[None], state)
        self.player, self.weights, self.ids, self.at = player, weights, ids, context
        self.stale: list[jax.Array] = []
        self.budget = jnp.asarray([player.budget or (1.0,) * len(cfg.space.axes)], jnp.float32)

    def play(self) -> tuple[float, np.ndarray]:
        """The next episode: its seconds, its share of a later refresh included, and log-probabilities [T]."""
        cfg, label = self.player.decoder, self.ids[None, self.at : self.at + HORIZON]
        plan = self.player.plan(self.at)
        start = time.perf_counter()
        self.stale.append(jnp.asarray(self.ids[None, self.at - 1 : self.at + HORIZON - 1]))
        self.state, _, logp = play_given(
            self.weights, self.player.params, self.state, label, plan, self.budget, cfg
        )
        if cfg.refresh and len(self.stale) == cfg.refresh_every:
            if cfg.refresh_every > 1:
                self.state = decoding.renew(self.weights, self.state, jnp.concatenate(self.stale, 1), cfg)
            self.stale = []
        jax.block_until_ready(self.state)
        self.at += HORIZON
        return time.perf_counter() - start, np.asarray(logp[0])


def players(model: Model, args: argparse.Namespace) -> Iterator[Player]:
    """All of them, the dense one first; those that act on the same axes share their programs."""
    cfg = dataclasses.replace(model.config, kernels=args.kernels)
    refreshes = [REFRESHES[name] for name in args.refreshes]

    def decoder(cfg: llama.LlamaConfig, kappa: Levels, rho: Levels, bits: Levels, **fields: Any) -> Decoder:
        axes: tuple[Axis, ...] = (
            Quest(kappa, (0.1, 1.0), 100.0, kernels=cfg.kernels, **RULES[args.rule]),
            ChannelPruning(rho, (0.4, 1.0), 100.0, kernels=cfg.kernels),
            OutputQuantization(bits, (0.3125, 1.0), 200.0, kernels=cfg.kernels),
        )
        return Decoder(EpisodeRules(cfg, ActionSpace(axes), EpisodeConfig(horizon=HORIZON)), **fields)

    yield Player("dense", decoder(cfg, (1.0,), (1.0,), (16,), refresh=False))
    by_xla = dataclasses.replace(cfg, kernels="xla")
    yield Player("xla", decoder(by_xla, (1.0,), (1.0,), (16,), refresh=False))
    for fields in refreshes:
        if args.fixed:
            for action in args.fixed:
                # What an action leaves alone is no axis of its program.
                levels = (
                    tuple(dict.fromkeys((x, top))) for x, top in zip(action, (1.0, 1.0, 16), strict=True)
                )
                yield Player(_fixed(action), decoder(cfg, *levels, **fields), action)
            continue
        of_kappa = decoder(cfg, KAPPA, (1.0,), (16,), **fields)
        for kappa in KAPPA[:-1]:
            yield Player(_fixed((kappa, 1.0, 16)), of_kappa, (kappa, 1.0, 16))
        if fields == REFRESHES["1"]:
            ends = decoder(cfg, (KAPPA[0], 1.0), (1.0,), (16,), **fields)
            yield Player("mix 0.3", ends, target=(0.3, 1.0, 1.0))
            yield Player("clock", ends, target=(KAPPA[0], 1.0, 1.0))
        of_rho = decoder(cfg, (1.0,), RHO, (16,), **fields)
        for rho in RHO[:-1]:
            yield Player(_fixed((1.0, rho, 16)), of_rho, (1.0, rho, 16))
        yield Player(_fixed((0.2, 0.7, 8)), decoder(cfg, KAPPA, RHO, BITS, **fields), (0.2, 0.7, 8))
    for name in args.policies:
        params, setup = open_policy(name, model, cfg)
        axes = tuple(dataclasses.replace(axis, kernels=args.kernels) for axis in setup.space.axes)
        rules = dataclasses.replace(
            setup.rules, model=cfg, space=ActionSpace(axes), episode=EpisodeConfig(horizon=HORIZON)
        )
        params = with_dtype(params, "bfloat16")
        for budget in args.budgets:
            asked = budget * len(axes) if len(budget) == 1 else budget
            if len(asked) != len(axes):
                raise UserError(
                    f"--budgets: {name} has {len(axes)} axes, and {budget} is not a number for each"
                )
            for fields in refreshes:
                yield Player(name, Decoder(rules, setup.policy, **fields), params=params, budget=asked)


def _fixed(action: tuple[float, ...]) -> str:
    return "fixed " + "/".join(f"{x:g}" for x in action)


@dataclasses.dataclass
class Timed:
    """What one player did: a number per episode."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    beside: list[float] = dataclasses.field(default_factory=list)  # of the dense one in the same turn
    logp: list[np.ndarray] = dataclasses.field(default_factory=list)  # [T] each

    def row(self, player: Player, dense: "Timed") -> dict[str, Any]:
        # Groups of episodes that end with a refresh: it is the last one's time, and belongs to all.
        every = player.decoder.refresh_every if player.decoder.refresh else 1
        taken, beside = (np.reshape(x, (-1, every)).mean(1) for x in (self.seconds, self.beside))
        logp_N = np.concatenate(self.logp)
        loss_E = np.mean(np.stack(dense.logp) - np.stack(self.logp), 1)
        return {
            "controller": player.name,
            "asked": " ".join(f"{x:g}" for x in player.budget),
            "refresh": player.refresh,
            "tokens": logp_N.size,
            "tokens_per_second": HORIZON / float(np.median(taken)),
            "speedup": float(np.median(beside / taken)),
            "speedup_low": float(np.quantile(beside / taken, 0.25)),
            "speedup_high": float(np.quantile(beside / taken, 0.75)),
            "speedup_of_fastest": float(beside.min() / taken.min()),
            "perplexity": float(np.exp(-logp_N.mean())),
            "loss": float(loss_E.mean()),
            "loss_error": float(loss_E.std() / max(len(loss_E) - 1, 1) ** 0.5),
        }


def measure(args: argparse.Namespace, dtype: str, context: int) -> list[dict[str, Any]]:
    """The rows of one context."""
    model = open_model(EMBEDDED, dtype)
    found = list(players(model, args))
    if args.only is not None:
        chosen = (*args.only, *args.policies)
        found = found[:1] + [p for p in found[1:] if p.name.startswith(chosen)]
    timed = side_by_side(model, found, context, args.texts, -(-args.tokens // (4 * HORIZON)) * 4)
    about = {"dtype": dtype, "context": context, "rule": args.rule}
    rows = []
    for player, taken in zip(found, timed, strict=True):
        share = network_seconds(player) / float(np.median(taken.beside)) if player.budget else ""
        rows.append(about | taken.row(player, timed[0]) | {"network_share": share})
    return rows


def side_by_side(
    model: Model, found: Sequence[Player], context: int, texts: int, episodes: int
) -> list[Timed]:
    """So many episodes of each text under each player, in turns with the first of them."""
    need = context + episodes * HORIZON + 1
    prefill = jax.jit(llama.prefill, static_argnums=2)
    timed = [Timed() for _ in found]
    for ids in articles(model, need, texts):
        _, cache = prefill(model.weights, ids[:context], model.config)
        room = ((0, 0), (0, 0), (0, -(-need // 64) * 64 - context), (0, 0))
        cache = llama.KVCache(*(jnp.pad(part, room) for part in cache))

        def text(player: Player, cache: llama.KVCache = cache, ids: np.ndarray = ids) -> Text:
            return Text(player, model.weights, cache, ids, context)

        for i, player in enumerate(found):
            spare = text(player)
            for _ in range(player.decoder.refresh_every):  # compiles, and warms
                spare.play()
            both, order = (text(found[0]), text(player)), (0, 1)
            for _ in range(episodes):
                played = {which: both[which].play() for which in order}
                order = order[::-1]
                timed[i].seconds.append(played[1][0])
                timed[i].beside.append(played[0][0])
                timed[i].logp.append(played[1][1])
    return timed


def articles(model: Model, length: int, count: int) -> Iterator[np.ndarray]:
    """Articles one after another, cut to `length` tokens each."""
    ids: list[int] = []
    documents = iter(read_documents(WIKIPEDIA))
    for _ in range(count):
        while len(ids) < length:
            ids += model.tokenizer.encode(next(documents).text)
        yield np.array(ids[:length], np.int32)
        ids = ids[length:]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _action(text: str) -> tuple[float, ...]:
    """Kappa, rho and bits."""
    action = _numbers(text)
    if len(action) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be kappa, rho and bits, such as 0.1,0.8,16")
    return action


def kept_rows(path: pathlib.Path, measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a CSV that are of something else than those measured."""
    if not path.exists():
        return []
    again = {tuple(str(row[key]) for key in KEYS) for row in measured}
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if tuple(row[key] for key in KEYS) not in again]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 7680])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--rule", choices=tuple(RULES), default="kept")
    parser.add_argument("--policies", nargs="*", default=[])
    parser.add_argument("--budgets", type=_numbers, nargs="+", default=[(0.5,)])
    parser.add_argument("--only", nargs="*", help="controllers whose names start so, beside the policies")
    parser.add_argument("--fixed", type=_action, nargs="*", help="actions, such as 0.1,0.8,16")
    parser.add_argument("--refreshes", nargs="+", choices=tuple(REFRESHES), default=list(REFRESHES))
    parser.add_argument("--keep", action="store_true", help="rows of the CSV that are not measured again")
    parser.add_argument("--csv", type=pathlib.Path, default=pathlib.Path("experiments/results/clock_cpu.csv"))
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        for context in args.contexts:
            for row in measure(args, dtype, context):
                rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
                print("  ".join(str(value) for value in rows[-1].values()), flush=True)
            whole = [*(kept_rows(args.csv, rows) if args.keep else ()), *rows]
            with args.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(whole)


if __name__ == "__main__":
    main()
