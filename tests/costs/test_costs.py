"""Costs of decode steps, worked out by hand for a model of a few numbers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import AXES, TOP
from small_models import COUNTED as MODEL

from sol_jax.axes.base import ActionSpace, Axis, StepShape, Work
from sol_jax.axes.kappa import Quest, Recency, Relevancy
from sol_jax.costs.decode_step import (
    NONE,
    StepCost,
    action_costs,
    dense_pass,
    dense_step,
    policy_step,
    step_cost,
)
from sol_jax.generation.engine import EpisodeRecord, Output, Request
from sol_jax.generation.episodes import Decoder
from sol_jax.generation.output_cost import dense_text_cost, text_cost
from sol_jax.rl.config import EpisodeConfig, PolicyConfig
from sol_jax.rl.policy import PolicySpec
from sol_jax.rl.rollout import EpisodeRules

DENSE = StepCost(
    attention=Work(384, 192),  # of each layer: q 4*4, k 4*2, v 4*2, o 4*4: 48 weights; 96 in all
    gate_up=Work(512, 256),  # 2 * 4*8 a layer
    down=Work(256, 128),  # 8*4
    head=Work(160, 80),  # 4*10
    cache=Work(320, 320),  # 10 keys and values of 2, 40 numbers a layer; each of 4 heads: 10 * 2*2 * 2
    mlp_output=Work(32, 0),  # 4 a layer
)


def test_a_dense_step():
    assert dense_step(10, MODEL) == DENSE
    assert DENSE.total == Work(1664, 976)
    assert step_cost(TOP, 10, MODEL, AXES) == DENSE


def test_bfloat16_halves_the_bytes():
    total = dense_step(10, dataclasses.replace(MODEL, dtype="bfloat16")).total
    assert total == Work(832, 976)


def test_quest_reads_pages_and_their_bounds():
    """0.2 of 10 keys is a page of 4; two heads may want two of them, and compare three pages' bounds."""
    cost = step_cost((0.2, 1.0, 16.0), 10, MODEL, AXES)
    assert cost.cache == pytest.approx(Work(0.8 * 320, 0.4 * 320))
    # Bounds are 4 numbers a page: 3 * 4 a layer in float32; 2 heads * 3 pages * 4 multiply-adds a layer.
    assert cost.index == pytest.approx(Work(2 * 12 * 4, 2 * 24 * 2))
    assert dataclasses.replace(cost, cache=DENSE.cache, index=NONE) == DENSE


def test_quest_never_reads_more_than_there_is():
    shape = StepShape(kv_len=9, group_size=4, hidden_size=4, dtype_bits=32)
    assert AXES[0].shares(0.5, shape)["cache"] == Work(
        1.0, 8 / 9
    )  # 5 tokens: 2 pages of 4, for each of 4 heads
    together = dataclasses.replace(AXES[0], heads="group")  # the 4 heads read the same 8
    assert together.shares(0.5, shape)["cache"] == Work(8 / 9, 8 / 9)
    protecting = dataclasses.replace(AXES[0], protect=True)
    assert protecting.shares(0.2, shape)["cache"] == Work(1.0, 1.0)  # 4 and the 7 protected ones
    assert protecting.shares(1.0, shape) == {}


def test_pruning_leaves_rows_of_gate_and_up():
    """0.3 of 4 channels are 2."""
    cost = step_cost((1.0, 0.3, 16.0), 10, MODEL, AXES)
    assert cost.gate_up == Work(256, 128)
    assert dataclasses.replace(cost, gate_up=DENSE.gate_up) == DENSE


def test_quantisation_saves_nothing_on_one_device():
    """What is rounded is the output, in registers: no byte less is moved."""
    assert step_cost((1.0, 1.0, 8.0), 10, MODEL, AXES) == DENSE


def test_recency_and_relevancy():
    shape = StepShape(kv_len=27, group_size=2, hidden_size=4, dtype_bits=32)
    # 7 fixed keys and 0.1 of 20, which is a little more than 2 in float32, hence 3.
    recency = Recency((0.1, 1.0), (0.1, 1.0), 100.0)
    assert recency.shares(0.1, shape)["cache"] == Work(10 / 27, 10 / 27)
    assert recency.shares(1.0, shape)["cache"] == Work(1.0, 1.0)
    assert recency.shares(0.1, shape._replace(kv_len=7))["cache"] == Work(1.0, 1.0)
    # 8 fixed keys and 0.5 of 19: 18 values for each of two heads, but all keys.
    relevancy = Relevancy((0.5, 1.0), (0.5, 1.0), 100.0)
    assert relevancy.shares(0.5, shape)["cache"] == pytest.approx(Work(1.0, (1 + 18 / 27) / 2))
    assert relevancy.shares(0.5, shape._replace(kv_len=8))["cache"] == Work(1.0, 1.0)


def test_the_policy_reads_its_matrices():
    """E 4, one head, MLP of 8, D 4, 3 axes, 6 actions; sizes of the embeddings 2 and 3."""
    spec = PolicySpec(
        hidden_size=4,
        num_actions=6,
        horizon=5,
        num_axes=3,
        config=PolicyConfig(d_model=4, num_heads=1, num_layers=1, mlp_ratio=2.0),
        action_embed_size=2,
        scalar_embed_size=3,
        budget_embed_size=5,
    )
    numbers = 8 * 3 + (4 + 4 + 3 + 2) * 4 + 4 * 4 * 4 + 2 * 4 * 8 + 4 * 6 + 3 * 5 + 5 * 6
    assert policy_step(spec) == Work(4 * numbers, 2 * numbers)
    by_axis = dataclasses.replace(spec.config, factored_head=True)
    factored = dataclasses.replace(spec, config=by_axis, level_costs=((0.1, 0.5, 1.0), (0.4, 1.0)))
    assert policy_step(factored) == Work(4 * (numbers - 4 - 5), 2 * (numbers - 4 - 5))
    # Two steps between three levels, one between two, and a rest; no direct head.
    by_loss = dataclasses.replace(spec.config, predict_losses=True)
    costs = ((0.1, 0.5, 1.0), (0.4, 1.0), (1.0,))
    predicting = dataclasses.replace(spec, config=by_loss, level_costs=costs)
    fewer = numbers - 4 * 6 - 3 * 5 - 5 * 6 + 4 * 4
    assert policy_step(predicting) == Work(4 * fewer, 2 * fewer)
    assert step_cost(TOP, 10, MODEL, AXES, spec).policy == policy_step(spec)


def test_a_dense_pass():
    """3 tokens after 7: weights once; caches of 10; the tokens see 8, 9 and 10 keys."""
    weights = 384 + 512 + 256
    operations = 3 * (192 + 256 + 128) + 32 * (8 + 9 + 10)
    assert dense_pass(3, 7, MODEL) == Work(weights + 320, operations)
    assert dense_pass(3, 7, MODEL, with_head=True) == Work(weights + 320 + 160, operations + 3 * 80)


def test_the_refresh_is_spread_over_the_episode():
    steps = [step_cost(TOP, 8 + t, MODEL, AXES, horizon=3, step=t) for t in range(3)]
    together = sum(steps, StepCost()).refresh
    assert together == pytest.approx(dense_pass(3, 7, MODEL))


@dataclasses.dataclass(frozen=True)
class FewerBits(Axis):
    """An axis that costs.py has never heard of: some weights in fewer bits."""

    name: str = dataclasses.field(default="bits", init=False)
    part: str = "down"

    def shares(self, level, shape):
        return {self.part: Work(level, 1.0)}


def test_an_axis_of_one_s_own_says_what_it_saves():
    own = FewerBits((0.25, 1.0), (0.25, 1.0), 1.0)
    assert step_cost((*TOP, 0.25), 10, MODEL, (*AXES, own)).down == Work(64, 128)
    # On a part that another axis saves on too, savings multiply.
    same = dataclasses.replace(own, part="gate_up")
    assert step_cost((1.0, 0.3, 16.0, 0.25), 10, MODEL, (*AXES, same)).gate_up == Work(64, 128)
    silent = Axis((0.5, 1.0), (0.5, 1.0), 1.0)
    assert step_cost((*TOP, 0.5), 10, MODEL, (*AXES, silent)) == DENSE
    with pytest.raises(ValueError, match=r"axis 'bits' names a part 'downs'; parts are attention, gate_up"):
        step_cost((*TOP, 0.25), 10, MODEL, (*AXES, dataclasses.replace(own, part="downs")))


@pytest.mark.parametrize("kv_len", [3, 10, 27])
def test_all_actions_at_once(kv_len):
    """The totals of `step_cost`, action by action; an axis of one's own saves on a part of another's."""
    own = FewerBits((0.25, 0.5, 1.0), (0.25, 1.0), 1.0, part="gate_up")
    space = ActionSpace((*AXES, own, Recency((0.1, 1.0), (0.1, 1.0), 1.0)))
    totals = [step_cost(level_X, kv_len, MODEL, space.axes).total for level_X in space.values_AxX]
    np.testing.assert_allclose(np.stack(action_costs(space, kv_len, MODEL), -1), totals, rtol=1e-6)
    assert action_costs(ActionSpace(()), 10, MODEL) == tuple(DENSE.total)


class Ended:
    """A transcript of so many tokens."""

    def __init__(self, tokens, finish):
        self.ids, self.finish = list(range(tokens)), finish


def test_a_text():
    """Two episodes of 3 steps after a prompt of 7 tokens; the text ends after 2 steps of the second."""
    space = ActionSpace(AXES)
    cfg = Decoder(EpisodeRules(MODEL, space, EpisodeConfig(horizon=3)))
    cheap, free, seen = np.array([0, space.dense, 0]), np.ones(3, bool), np.zeros((3, 4))
    episodes = [EpisodeRecord(7, cheap, free, 3, 3, seen), EpisodeRecord(10, cheap, free, 2, 2, seen)]
    output = Output(Request([0] * 7), Ended(6, "stop"), episodes)
    steps = [((0.2, 0.3, 8.0), 8), (TOP, 9), ((0.2, 0.3, 8.0), 10), ((0.2, 0.3, 8.0), 11), (TOP, 12)]
    played = sum((step_cost(levels, kv_len, MODEL, AXES) for levels, kv_len in steps), StepCost())
    cost = text_cost(output, cfg)
    assert cost == dataclasses.replace(played, refresh=dense_pass(3, 7, MODEL))
    assert text_cost(output, dataclasses.replace(cfg, refresh=False)) == played
    going_on = dataclasses.replace(output, transcript=Ended(6, None))
    assert (
        text_cost(going_on, cfg).refresh.bytes
        == dense_pass(3, 7, MODEL).bytes + dense_pass(3, 10, MODEL).bytes
    )
    dense = sum((dense_step(kv_len, MODEL) for kv_len in range(8, 13)), StepCost())
    assert dense_text_cost(output, MODEL) == dense


def test_a_long_text_at_the_lowest_level_costs_no_less_than_it():
    """255 float32 costs of 0.45, summed in float32, average to 0.449999; no schedule could meet that."""
    actions, free = np.zeros(255, int), np.ones(255, bool)
    episode = EpisodeRecord(7, actions, free, 255, 255, np.zeros((255, 4)))
    output = Output(Request([0] * 7), Ended(256, "length"), [episode])
    costs_AxX = np.array([[0.45], [1.0]], np.float32)
    assert output.mean_cost(costs_AxX)[0] == pytest.approx(np.float32(0.45), rel=1e-12)


def test_a_lossless_text_pays_for_what_it_takes_back():
    """An episode of 3 steps that added one token, and the dense pass over all 4 with their logits."""
    space = ActionSpace(AXES)
    cfg = Decoder(EpisodeRules(MODEL, space, EpisodeConfig(horizon=3)), lossless=True)
    episode = EpisodeRecord(7, np.zeros(3, int), np.ones(3, bool), 1, 3, np.zeros((3, 4)))
    output = Output(Request([0] * 7), Ended(2, "length"), [episode])
    cost = text_cost(output, cfg)
    assert cost.refresh == dense_pass(4, 7, MODEL, with_head=True)
    steps = (step_cost((0.2, 0.3, 8.0), kv_len, MODEL, AXES) for kv_len in (8, 9, 10))
    assert dataclasses.replace(cost, refresh=NONE) == sum(steps, StepCost())


def test_shares_agree_with_what_a_step_attends_to():
    """The count of keys behind the shares, against the masks of the axes themselves."""
    from attended import attended

    rng = np.random.default_rng(0)
    for axis, level in ((AXES[0], 0.2), (Recency((0.1, 1.0), (0.1, 1.0), 1.0), 0.1)):
        for kv_len in (9, 10, 27, 32):
            k_HxNxd, q_HxGxd = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 32, 4), (1, 2, 4)))
            mask = attended(axis, level, q_HxGxd, k_HxNxd, kv_len, 8)
            most = np.asarray(mask).sum(-1).max()
            share = axis.shares(level, StepShape(kv_len, 2, 4, 32))["cache"].flops
            slack = axis.page_size - 1 if isinstance(axis, Quest) else 0  # the last page may be partial
            assert share * kv_len - slack <= most <= share * kv_len + 1e-6
