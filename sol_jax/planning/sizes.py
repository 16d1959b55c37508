"""Memory of an update by arithmetic: what each part holds on the device that holds most, in bytes.

An update is two programs (`sol_jax.rl.sharded_update`): each row of the mesh plays chunks of blocks, and the
first device of each process learns from what all rows played.  Shapes of caches and of what is played are
those of the functions themselves.  Temporaries are estimated, by the largest arrays of each stage.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from sol_jax.models.llama import ParamSpec, abstract_weights, weight_specs
from sol_jax.models.sharding import MODEL, RULES
from sol_jax.rl.collect import prefill_blocks
from sol_jax.rl.config import MemoryConfig, OptimConfig
from sol_jax.rl.learn import TrainState
from sol_jax.rl.rollout import PrefilledBlock
from sol_jax.rl.setup import Setup
from sol_jax.rl.train_step import draw, init_state, play


@dataclasses.dataclass(frozen=True)
class Shares:
    """How an update is shared out: rows of the mesh, devices of a row, blocks that a row plays at a time."""

    setup: Setup
    rows: int
    model: int
    chunk: int

    @property
    def calls(self) -> int:
        """How often every row plays a chunk in an update."""
        return -(-self.setup.grpo.batch_size // (self.rows * self.chunk))

    @property
    def busy_rows(self) -> int:
        """Rows that play blocks of the batch, not copies that fill a call up."""
        return min(self.rows, -(-self.setup.grpo.batch_size // self.chunk))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes by part; `played` is what is learned from, `state` policy, optimizer and tokens."""

    weights: float
    state: float
    caches: float
    played: float
    play_temporaries: float
    learn_temporaries: float

    @property
    def playing(self) -> float:
        """While blocks are played: the first device of a process keeps what the calls before gave."""
        return self.weights + self.state + self.played + self.caches + self.play_temporaries

    @property
    def learning(self) -> float:
        return self.weights + self.state + self.played + self.learn_temporaries

    @property
    def total(self) -> float:
        return max(self.playing, self.learning)


def size_of(tree: Any) -> float:
    """Bytes of arrays, abstract or not."""
    return float(sum(math.prod(leaf.shape) * _itemsize(leaf) for leaf in jax.tree.leaves(tree)))


def _itemsize(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8
    return leaf.dtype.itemsize


def sizes(shares: Shares, platform: str) -> Sizes:
    """What an update holds on a "tpu", "gpu" or "cpu"."""
    setup, m = shares.setup, shares.model
    state = abstract_state(setup)
    batch = setup.grpo.batch_size
    tokens = 4.0 * shares.chunk * setup.episode.block_length
    played_block = played_bytes(setup) / batch
    filled = shares.calls * shares.rows * shares.chunk
    played = played_block * (filled if shares.rows > 1 else batch)
    return Sizes(
        weights=weight_bytes(setup, m),
        state=size_of(state) + tokens,
        caches=shares.chunk * cache_bytes(setup) / m,
        played=played,
        play_temporaries=_play_temporaries(shares, platform),
        learn_temporaries=_learn_temporaries(shares, played_block * batch, size_of(state.params)),
    )


def abstract_state(setup: Setup) -> TrainState:
    """Policy and optimizer of a run, without arrays."""
    return _state(_as_traced(setup, setup.optim, setup.model.dtype))


# Tracing takes seconds, and most of what plans vary does not change what it gives: one setup stands for many.


def _as_traced(setup: Setup, optim: OptimConfig, dtype: str) -> Setup:
    grpo = dataclasses.replace(setup.grpo, batch_size=1)
    model = dataclasses.replace(setup.model, dtype=dtype, kernels="xla")
    return dataclasses.replace(setup, grpo=grpo, optim=optim, memory=MemoryConfig()).with_rules(model=model)


@functools.cache
def _state(setup: Setup) -> TrainState:
    return jax.eval_shape(lambda: init_state(jax.random.key(0), setup))


def weight_bytes(setup: Setup, model: int) -> float:
    """Of the weights on each device of a row of `model`."""
    specs = jax.tree.leaves(weight_specs(setup.model), is_leaf=lambda node: isinstance(node, ParamSpec))
    item = jnp.dtype(setup.model.dtype).itemsize

    def cut(spec: ParamSpec) -> int:
        return model if any(RULES.get(name or "") == MODEL for name in spec.axes) else 1

    return float(sum(item * math.prod(spec.shape) / cut(spec) for spec in specs))


def prefilled(setup: Setup) -> PrefilledBlock:
    """A block after its prefill, without arrays."""
    return _prefilled(_as_traced(setup, OptimConfig(), setup.model.dtype))


@functools.cache
def _prefilled(setup: Setup) -> PrefilledBlock:
    tokens = jax.ShapeDtypeStruct((1, setup.episode.block_length), jnp.int32)
    return jax.eval_shape(
        lambda weights, tokens: prefill_blocks(weights, tokens, setup, setup.needs_dense),
        abstract_weights(setup.model),
        tokens,
    )


def cache_bytes(setup: Setup) -> float:
    """Of one block: the prefix' cache and what axes keep about it, and what its schedules write."""
    cfg, shape = setup.model, setup.episode
    item = jnp.dtype(cfg.dtype).itemsize
    entries = shape.episodes_per_prefix * setup.grpo.num_schedules * shape.horizon
    own = 2.0 * cfg.num_layers * cfg.num_kv_heads * cfg.head_size * item * entries
    return size_of(prefilled(setup).cache) + own


@functools.cache
def _played(setup: Setup) -> Any:
    """What a block gives, without arrays."""

    def of_block(weights: Any, tokens_BxN: jax.Array) -> Any:
        state = init_state(jax.random.key(0), setup)
        drawn = draw(state.key, state.step, 1, setup)
        return play(state.params, weights, tokens_BxN, drawn, setup)

    tokens = jax.ShapeDtypeStruct((1, setup.episode.block_length), jnp.int32)
    return jax.eval_shape(of_block, abstract_weights(setup.model), tokens)


def played_bytes(setup: Setup) -> float:
    """Of all that is learned from in an update."""
    # Whatever the model computes in, observations are float32.
    return setup.grpo.batch_size * size_of(_played(_as_traced(setup, OptimConfig(), "float32")))


def prefilled_tokens(setup: Setup) -> int:
    """Of a block, the tokens that are prefilled."""
    shape = setup.episode
    return shape.prefix_len + (shape.episodes_per_prefix - 1 + setup.needs_dense) * shape.horizon


def rows_of_chunk(shares: Shares) -> int:
    """Schedules that a row of the mesh decodes at once."""
    return shares.chunk * shares.setup.episode.episodes_per_prefix * shares.setup.grpo.num_schedules


def _play_temporaries(shares: Shares, platform: str) -> float:
    """Besides caches, by the stage that takes most: prefill, decode steps, or vocabulary logits."""
    setup, m = shares.setup, shares.model
    cfg, memory, N = setup.model, setup.memory, prefilled_tokens(setup)
    D, F, V, H = cfg.hidden_size, cfg.ffn_size / m, cfg.vocab_size / m, cfg.num_heads / m
    item = jnp.dtype(cfg.dtype).itemsize
    at_once = min(memory.prefill_batch, shares.chunk)
    # Scores of all heads in float32, and as weights; a CPU takes them block by block.
    scores = 0.0 if platform == "cpu" else H * N * N * (4 + 4 + item)
    prefill = at_once * (scores + N * (2 * F * 4 + 3 * D * 4))
    # The cache of the blocks prefilled so far, and that of those at hand.
    prefill += at_once * size_of(prefilled(setup).cache) / m
    R, T = rows_of_chunk(shares), setup.episode.horizon
    decode = R * (H * (N + T) * (4 + 4 + item) + 3 * F * 4)
    hidden = R * T * D * 4.0  # of every step, which the head reads when all are done
    observed = played_bytes(setup) / setup.grpo.batch_size * shares.chunk
    # Logits are there once, beside hidden states and labels in order; caches no longer.
    head = min(memory.head_rows, R * T) * V * 4 + 2 * hidden + observed
    head -= shares.chunk * cache_bytes(setup) / m
    return max(prefill, decode + hidden + observed, head)


def _learn_temporaries(shares: Shares, played: float, params: float) -> float:
    """All that was played once more, put together; gradients and updates; a minibatch in the policy."""
    setup = shares.setup
    steps = min(setup.optim.minibatch_steps, rows_of_chunk(shares) * setup.episode.horizon)
    policy = setup.policy
    width = policy.config.d_model * (8 + 2 * policy.config.mlp_ratio)
    inputs = 2 * policy.hidden_size + 2 * policy.embed_size
    return played + 3 * params + steps * 4.0 * (2 * width + inputs + 4 * policy.num_scores)
