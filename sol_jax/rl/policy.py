"""The policy: a small causal transformer over the steps of one episode (paper section 4, appendix B).

Before each decode step it reads what the frozen LLM knows so far and scores the joint actions.  It is
written for one schedule, without batch axes, and has two faces over the same weights: `Policy.step` with a
K/V cache for rollouts, and `Policy.__call__` on a whole episode for gradients.  Batch either with `jax.vmap`;
divide the logits by the sampling temperature yourself.

Here `T` counts the positions of the cache, `L` the policy's layers and `H`, `d` the policy's heads.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from sol_jax.rl import loss_head
from sol_jax.rl.config import PolicyConfig

# Rollouts and gradients must see the same log-probabilities (their ratio is the loss), and the network is
# tiny, so matrix products stay in true float32 on every device.
_PRECISION = jax.lax.Precision.HIGHEST
_LAYER_NORM_EPS = 1e-5
_LOGIT_SCALE = 0.1  # logits of the tokens of a text are some tens


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """Everything static about a policy: its config, and the model, actions and episodes that it fits."""

    hidden_size: int  # of the LLM (D)
    num_actions: int  # A
    horizon: int  # learned positions: the longest episode
    num_axes: int = 3  # X
    config: PolicyConfig = PolicyConfig()
    level_costs: tuple[tuple[float, ...], ...] = ()  # of each axis; needed by a head that scores levels
    page_size: int = 0  # keys of a page; needed where the policy is shown the newest one
    # What a unit of each axis' cost is of a whole step, where one budget is for all; else empty.
    axis_shares: tuple[float, ...] = ()
    action_embed_size: int = 32
    scalar_embed_size: int = 64
    budget_embed_size: int = 32
    token_embed_size: int | None = None  # of the LLM's input embeddings; None: hidden_size

    def __post_init__(self):
        by_level = self.config.factored_head or self.config.predict_losses
        if by_level and math.prod(self.level_counts) != self.num_actions:
            raise ValueError(
                f"level_counts {self.level_counts} do not multiply to num_actions {self.num_actions}"
            )
        if self.config.predict_losses and len(self.level_costs) != self.num_axes:
            raise ValueError(
                f"there are the costs of {len(self.level_costs)} axes, not of num_axes = {self.num_axes}"
            )
        if self.config.page_input and self.page_size < 1:
            raise ValueError("a policy that is shown the newest page needs the page_size")
        if len(self.axis_shares) != (self.num_axes if self.config.one_budget else 0):
            raise ValueError(
                f"there are axis_shares of {len(self.axis_shares)} axes, and one_budget is "
                f"{self.config.one_budget!r}"
            )

    @property
    def level_counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.level_costs))

    @property
    def num_scores(self) -> int:
        """What the head scores: joint actions, the levels of every axis, or what `loss_head` wants."""
        if self.config.predict_losses:
            return loss_head.num_scores(self.level_counts)
        return sum(self.level_counts) if self.config.factored_head else self.num_actions

    @property
    def num_scalars(self) -> int:
        """Numbers of an observation: progress, the controllable flag, and a target and a gap per axis."""
        return 2 + 2 * self.num_axes

    @property
    def embed_size(self) -> int:
        return self.hidden_size if self.token_embed_size is None else self.token_embed_size


class Observation(NamedTuple):
    """What the policy sees before one step; of a whole episode, every field has a leading T."""

    hidden: jax.Array  # [D], the LLM's final-norm hidden state of the previous token
    embed: jax.Array  # [D], the LLM's embedding of the current token
    progress: jax.Array  # (t + 1) / T
    controllable: jax.Array  # 1 where the step may be controlled, else 0
    target: jax.Array  # [X], requested mean costs
    gap: jax.Array  # [X], mean costs so far less the targets; 0 before the first controllable step
    prev_action: jax.Array  # int32; num_actions where there is none yet
    # The paper's policy does not look at these two.
    num_keys: jax.Array  # int32, in the step's reach
    logit: jax.Array  # of the current token, as the hidden state of the previous one predicts it


class PolicyCarry(NamedTuple):
    """Keys and values of the steps taken so far, and their number."""

    key_LxTxHxd: jax.Array
    value_LxTxHxd: jax.Array
    step: jax.Array


def initial_carry(spec: PolicySpec) -> PolicyCarry:
    """The carry before the first step of an episode."""
    return _empty_carry(spec, spec.horizon)


def example_observation(spec: PolicySpec) -> Observation:
    """Zeros of the right shapes, for `Policy(spec).init(key, example, carry, method="step")`."""
    return Observation(
        hidden=jnp.zeros(spec.hidden_size),
        embed=jnp.zeros(spec.embed_size),
        progress=jnp.zeros(()),
        controllable=jnp.zeros(()),
        target=jnp.zeros(spec.num_axes),
        gap=jnp.zeros(spec.num_axes),
        prev_action=jnp.full((), spec.num_actions, jnp.int32),
        num_keys=jnp.zeros((), jnp.int32),
        logit=jnp.zeros(()),
    )


def progress(step: jax.Array, horizon: int) -> jax.Array:
    """`(step + 1) / horizon`, float32; `step` counts from 0."""
    return (jnp.asarray(step, jnp.float32) + 1.0) / horizon


def budget_gap(cost_sum_X: jax.Array, num_counted: jax.Array, target_X: jax.Array) -> jax.Array:
    """`gap_X`: each axis' mean cost so far less its target.

    `cost_sum_X` and `num_counted` run over the *controllable* steps taken so far; before the first of them
    the gaps are 0.
    """
    mean_cost_X = jnp.asarray(cost_sum_X, jnp.float32) / jnp.maximum(num_counted, 1)
    return jnp.where(num_counted > 0, mean_cost_X - jnp.asarray(target_X, jnp.float32), 0.0)


def restated(seen: Observation, horizon: int, over: int = 1) -> Observation:
    """An observation as if the episode began there, to make budgets hold (not the paper's).

    Targets are what is left of the budget per step, and gaps 0.  What was saved or overspent is made up in
    the steps that are left, but as if they were `over` at least: else the last ones would pay for all.
    Steps that may not be controlled count as if they had met the target, which only prompts of a few tokens
    have.
    """
    steps_left = horizon * (1.0 - seen.progress) + 1.0
    spread = jnp.maximum(steps_left, over)
    left_X = spread * seen.target - (horizon - steps_left) * seen.gap
    target_X = jnp.clip(left_X / spread, 0.0, 1.0)
    return seen._replace(target=target_X, gap=jnp.zeros_like(seen.gap))


def spent(seen: Observation, no_action: int) -> Observation:
    """An observation that tells the mean costs so far, whatever was asked for: of a target of 0."""
    begun = seen.prev_action != no_action
    return seen._replace(
        target=jnp.zeros_like(seen.target), gap=jnp.where(begun, seen.gap + seen.target, 0.0)
    )


def pooled(seen: Observation, share_X: Sequence[float]) -> Observation:
    """An observation with one target and one gap, [1]: of a whole step (see `loss_head.total_cost`)."""
    shares = jnp.array(share_X)
    target = loss_head.total_cost(seen.target, shares)
    return seen._replace(target=target[None], gap=(seen.gap @ shares)[None])


class Block(nn.Module):
    """A pre-norm transformer block; attention without biases, MLP with."""

    spec: PolicySpec

    def setup(self):
        width = self.spec.config.d_model
        mlp_width = int(width * self.spec.config.mlp_ratio)
        self.norm_attention = _layer_norm()
        self.query = _linear(width, width, bias=False)
        self.key = _linear(width, width, bias=False)
        self.value = _linear(width, width, bias=False)
        self.out = _linear(width, width, bias=False)
        self.norm_mlp = _layer_norm()
        self.up = _linear(width, mlp_width)
        self.down = _linear(mlp_width, width)

    def __call__(self, x_NxE, key_TxHxd, value_TxHxd, start):
        """Runs N steps from position `start`; returns their outputs and the cache with them written."""
        attention_NxE, key_TxHxd, value_TxHxd = self._attend(
            self.norm_attention(x_NxE), key_TxHxd, value_TxHxd, start
        )
        x_NxE = x_NxE + attention_NxE
        mlp_NxE = self.down(_gelu(self.up(self.norm_mlp(x_NxE))))
        return x_NxE + mlp_NxE, key_TxHxd, value_TxHxd

    def _attend(self, x_NxE, key_TxHxd, value_TxHxd, start):
        head_shape = (x_NxE.shape[0], *key_TxHxd.shape[1:])
        query_NxHxd, key_NxHxd, value_NxHxd = (
            project(x_NxE).reshape(head_shape) for project in (self.query, self.key, self.value)
        )
        key_TxHxd = jax.lax.dynamic_update_slice(key_TxHxd, key_NxHxd, (start, 0, 0))
        value_TxHxd = jax.lax.dynamic_update_slice(value_TxHxd, value_NxHxd, (start, 0, 0))

        score_HxNxT = jnp.einsum("nhd,thd->hnt", query_NxHxd, key_TxHxd, precision=_PRECISION)
        score_HxNxT = score_HxNxT / jnp.sqrt(jnp.float32(head_shape[-1]))
        position_N = start + jnp.arange(head_shape[0])
        causal_NxT = jnp.arange(key_TxHxd.shape[0]) <= position_N[:, None]
        prob_HxNxT = jax.nn.softmax(jnp.where(causal_NxT, score_HxNxT, -jnp.inf))
        mixed_NxHxd = jnp.einsum("hnt,thd->nhd", prob_HxNxT, value_TxHxd, precision=_PRECISION)
        return self.out(mixed_NxHxd.reshape(x_NxE.shape)), key_TxHxd, value_TxHxd


class Policy(nn.Module):
    """Observations -> action logits, for one schedule."""

    spec: PolicySpec

    def setup(self):
        spec, cfg = self.spec, self.spec.config
        self.action_embed = nn.Embed(
            spec.num_actions + 1, spec.action_embed_size, embedding_init=nn.initializers.normal(1.0)
        )
        self.scalar_in = _linear(spec.num_scalars, spec.scalar_embed_size)
        self.scalar_norm = _layer_norm()
        input_size = spec.hidden_size + spec.embed_size + spec.scalar_embed_size + spec.action_embed_size
        self.observation_in = _linear(input_size, cfg.d_model)
        if cfg.normalize_inputs:
            self.hidden_norm, self.embed_norm = _layer_norm(), _layer_norm()
        self.position_TxE = self.param("position", nn.initializers.normal(1.0), (spec.horizon, cfg.d_model))
        if cfg.page_input:
            self.page_embed = nn.Embed(
                spec.page_size, cfg.d_model, embedding_init=nn.initializers.normal(1.0)
            )
        if cfg.logit_input:
            self.logit_in = _linear(1, spec.scalar_embed_size)
            self.logit_out = _linear(spec.scalar_embed_size, cfg.d_model)
        self.blocks = [Block(spec) for _ in range(cfg.num_layers)]
        self.norm_out = _layer_norm()
        # The authors start the action head without a bias; its weights are as in every other layer.
        self.head = _linear(cfg.d_model, spec.num_scores, bias_init=nn.initializers.zeros)
        if cfg.predict_losses:
            first = [loss_head.first_costs(costs) for costs in spec.level_costs]
            self.cost_XxM = self.variable("prices", "cost", lambda: jnp.array(first))
            # Of the levels of all axes in a row, for the best blind choice (`baselines.schedules.best_mix`).
            self.variable("prices", "loss", lambda: jnp.zeros(sum(spec.level_counts)))
            return
        self.budget_in = _linear(spec.num_axes, spec.budget_embed_size)
        self.budget_out = _linear(spec.budget_embed_size, spec.num_scores)

    def __call__(self, obs_T: Observation) -> jax.Array:
        """`logits_TxA` of a whole episode; step t sees the observations up to t."""
        return self._logits(self.features(obs_T), obs_T)

    def features(self, obs_T: Observation) -> jax.Array:
        """`features_TxE`, the output of the final LayerNorm: what the head reads, besides the targets."""
        num_steps = obs_T.prev_action.shape[0]
        if num_steps > self.spec.horizon:
            raise ValueError(f"an episode of {num_steps} steps exceeds the horizon {self.spec.horizon}")
        return self._trunk(obs_T, _empty_carry(self.spec, num_steps))[0]

    def losses(self, obs_T: Observation) -> tuple[jax.Array, list[jax.Array]]:
        """The rest [T] and each axis' losses [T, n] of a whole episode, as `loss_head` defines them."""
        return loss_head.split_losses(self.head(self.features(obs_T)), self.spec.level_counts)

    def step(self, obs: Observation, carry: PolicyCarry) -> tuple[jax.Array, PolicyCarry]:
        """`logits_A` of the next step; past the horizon they are NaN, since there is no such position."""
        obs_1 = Observation(*(jnp.asarray(field)[None] for field in obs))
        features_1xE, carry = self._trunk(obs_1, carry)
        return self._logits(features_1xE, obs_1)[0], carry

    def _trunk(self, obs_N: Observation, carry: PolicyCarry) -> tuple[jax.Array, PolicyCarry]:
        x_NxE = self._embed(obs_N, carry.step)
        keys, values = [], []
        for layer, block in enumerate(self.blocks):
            x_NxE, key_TxHxd, value_TxHxd = block(
                x_NxE, carry.key_LxTxHxd[layer], carry.value_LxTxHxd[layer], carry.step
            )
            keys.append(key_TxHxd)
            values.append(value_TxHxd)
        next_step = carry.step + x_NxE.shape[0]
        return self.norm_out(x_NxE), PolicyCarry(jnp.stack(keys), jnp.stack(values), next_step)

    def _embed(self, obs_N: Observation, start) -> jax.Array:
        _check_observation(self.spec, obs_N)
        # The LLM is frozen: no gradient may run back through the episode that produced these.
        hidden_NxD = jax.lax.stop_gradient(obs_N.hidden).astype(jnp.float32)
        embed_NxD = jax.lax.stop_gradient(obs_N.embed).astype(jnp.float32)
        if self.spec.config.normalize_inputs:
            hidden_NxD, embed_NxD = self.hidden_norm(hidden_NxD), self.embed_norm(embed_NxD)
        scalar_NxF = self.scalar_norm(_gelu(self.scalar_in(jax.vmap(_scalars)(self._asked(obs_N)))))
        action_NxF = self.action_embed(obs_N.prev_action)
        x_NxF = jnp.concatenate([hidden_NxD, embed_NxD, scalar_NxF, action_NxF], axis=-1)
        position_N = start + jnp.arange(x_NxF.shape[0])
        # Clamping would reuse the last position without a word; a step past the horizon must show.
        position_NxE = jnp.take(self.position_TxE, position_N, axis=0, mode="fill", fill_value=jnp.nan)
        if self.spec.config.page_input:
            position_NxE += self.page_embed(obs_N.num_keys % self.spec.page_size)
        if self.spec.config.logit_input:
            logit_Nx1 = jax.lax.stop_gradient(obs_N.logit).astype(jnp.float32)[:, None] * _LOGIT_SCALE
            position_NxE += self.logit_out(_gelu(self.logit_in(logit_Nx1)))
        return self.observation_in(x_NxF) + position_NxE

    def _asked(self, obs_N: Observation) -> Observation:
        """The observations with targets as the network is told them."""
        if self.spec.config.predict_losses:  # what a level loses does not depend on what was asked for
            return jax.vmap(lambda seen: spent(seen, self.spec.num_actions))(obs_N)
        if not self.spec.config.restate:
            return obs_N
        return self._restated(obs_N)

    def _restated(self, obs_N: Observation) -> Observation:
        over = self.spec.config.restate_steps
        return jax.vmap(lambda seen: restated(seen, self.spec.horizon, over))(obs_N)

    def _logits(self, features_NxE: jax.Array, obs_N: Observation) -> jax.Array:
        """The head on the features, plus the direct head on the targets; or what predicted losses say."""
        if self.spec.config.predict_losses:
            return self._priced(features_NxE, obs_N)
        target_NxX = self._asked(obs_N).target.astype(jnp.float32)
        scores = self.head(features_NxE) + self.budget_out(_gelu(self.budget_in(target_NxX)))
        return join_scores(scores, self.spec.level_counts) if self.spec.config.factored_head else scores

    def _priced(self, features_NxE: jax.Array, obs_N: Observation) -> jax.Array:
        """Logits that are highest for the least sum of predicted loss and price times cost."""
        counts, costs, share_X = self.spec.level_counts, self.spec.level_costs, self.spec.axis_shares
        table_XxM = jax.lax.stop_gradient(self.cost_XxM.value)
        if share_X:
            obs_N = jax.vmap(lambda seen: pooled(seen, share_X))(obs_N)
        if self.spec.config.restate:
            obs_N = self._restated(obs_N)
        if share_X:
            of_step = functools.partial(
                loss_head.shared_price, cost_XxM=table_XxM, share_X=jnp.array(share_X)
            )
            price_NxX = jax.vmap(of_step)(obs_N.target[:, 0])[:, None] * jnp.array(share_X)
        else:
            price_NxX = jax.vmap(jax.vmap(loss_head.price_for), (0, None))(obs_N.target, table_XxM)
        _, losses = loss_head.split_losses(self.head(features_NxE), counts)
        value = [loss + price_NxX[:, x, None] * jnp.array(costs[x]) for x, loss in enumerate(losses)]
        return join_scores(-jnp.concatenate(value, -1) / loss_head.SOFTNESS, counts)


def _scalars(seen: Observation) -> jax.Array:
    """The numbers of one observation in the order of the authors' code."""
    parts = jnp.stack([seen.progress, seen.controllable]), seen.target, seen.gap
    return jnp.concatenate(parts).astype(jnp.float32)


def join_scores(scores: jax.Array, factors: tuple[int, ...]) -> jax.Array:
    """Logits of the joint actions [..., A] (the last axis varying fastest) from scores per axis and level."""
    joint = jnp.zeros((*scores.shape[:-1], 1))
    for size, stop in zip(factors, itertools.accumulate(factors), strict=True):
        of_axis = scores[..., stop - size : stop]
        joint = (joint[..., :, None] + of_axis[..., None, :]).reshape(*scores.shape[:-1], -1)
    return joint


def _empty_carry(spec: PolicySpec, num_steps: int) -> PolicyCarry:
    config = spec.config
    head_size = config.d_model // config.num_heads
    zeros_LxTxHxd = jnp.zeros((config.num_layers, num_steps, config.num_heads, head_size))
    return PolicyCarry(zeros_LxTxHxd, zeros_LxTxHxd, jnp.zeros((), jnp.int32))


def _check_observation(spec: PolicySpec, obs_N: Observation) -> None:
    num_steps = obs_N.prev_action.shape[0]
    for name, field, example in zip(Observation._fields, obs_N, example_observation(spec), strict=True):
        shape = (num_steps, *example.shape)
        if field.shape != shape:
            raise ValueError(f"{name} has shape {field.shape}; the spec asks for {shape}")


def _layer_norm() -> nn.LayerNorm:
    # The one-pass variance cancels where activations are large; two passes agree with the authors' code.
    return nn.LayerNorm(epsilon=_LAYER_NORM_EPS, use_fast_variance=False)


def _gelu(x):
    return nn.gelu(x, approximate=False)


def _linear(fan_in: int, size: int, *, bias: bool = True, bias_init=None) -> nn.Dense:
    """A linear layer that starts as the authors' do: weight and bias uniform in ±1/sqrt(fan_in)."""
    bound = fan_in**-0.5

    def uniform(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(
        size,
        use_bias=bias,
        kernel_init=uniform,
        bias_init=bias_init or uniform,
        precision=_PRECISION,
    )
