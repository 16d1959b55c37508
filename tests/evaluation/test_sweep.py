"""Running entries: each controller plays what it is given; padding, chunks and files change nothing."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sol_jax.axes.base import ActionSpace
from sol_jax.axes.kappa import Quest
from sol_jax.baselines import schedules
from sol_jax.costs.decode_step import policy_step
from sol_jax.digests import array_digest
from sol_jax.errors import UserError
from sol_jax.evaluation import stale_prefill
from sol_jax.evaluation.comparison import ComparisonPlan, run
from sol_jax.evaluation.score_cache import ScoreCache, read_folder
from sol_jax.evaluation.scoring import POLICY, REPLAY, BatchScorer, ControllerSpec
from sol_jax.evaluation.sweep import EntryGroup, Sweep
from sol_jax.models import llama
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.train_step import init_state
from sol_jax.text.blocks import evaluation_batches

BUDGETS = ((0.3, 0.6, 0.5), (0.7, 0.8, 0.75))
REPLAYED = ControllerSpec(REPLAY)


@pytest.fixture(scope="module")
def params(tiny_session):
    return init_state(jax.random.key(0), tiny_session.setup).params


@pytest.fixture(scope="module")
def batches(tiny_session):
    """Five blocks: two batches of 2 and one of 1."""
    return list(evaluation_batches(tiny_session.split("test"), 2, 5))


@pytest.fixture(scope="module")
def make(tiny_session, params, batches):
    """A sweep over the five blocks; `root` keeps its files."""

    def made(root=None, **fields):
        session = tiny_session
        store = ScoreCache(root, {"model": "tiny"})
        whole = Sweep(session.weights, params, batches, session.setup, store, num_parallel=4)
        return dataclasses.replace(whole, **fields)

    return made


def given(budgets=BUDGETS):
    return np.broadcast_to(np.array(budgets, np.float32), (5, 1, len(budgets), 3))


@pytest.fixture(scope="module")
def policy(make):
    return make().run([EntryGroup("policy", given(), ControllerSpec(POLICY))])[0]


@pytest.fixture(scope="module")
def replayed(make, policy):
    """The policy's own actions, played as schedules."""
    return make().run([EntryGroup("again", policy.action_NxWxJxT, REPLAYED)])[0]


def test_replaying_the_policys_actions_gives_its_scores(policy, replayed):
    np.testing.assert_array_equal(replayed.action_NxWxJxT, policy.action_NxWxJxT)
    np.testing.assert_allclose(replayed.logp_NxWxJxT, policy.logp_NxWxJxT, atol=1e-5)
    assert policy.logp_NxWxJxT.shape == (5, 1, 2, 4)
    assert policy.entropy_NxWxJxT.shape == (5, 1, 2, 0)


def test_padding_of_batches_and_schedules_changes_nothing(make, policy, replayed, batches):
    """The last batch of 1 block was filled up to 2; here 5 schedules are run 3 at a time."""
    odd = policy.action_NxWxJxT[:, :, [0, 1, 0, 1, 0]]
    (scores,) = make(num_parallel=3).run([EntryGroup("odd", odd, REPLAYED)])
    np.testing.assert_allclose(scores.logp_NxWxJxT, replayed.logp_NxWxJxT[:, :, [0, 1, 0, 1, 0]], atol=1e-5)
    (alone,) = make(batches=batches[2:]).run([EntryGroup("alone", policy.action_NxWxJxT[4:], REPLAYED)])
    np.testing.assert_allclose(alone.logp_NxWxJxT, replayed.logp_NxWxJxT[4:], atol=1e-5)


def test_the_dense_schedule_is_the_plain_model(tiny_session, make, batches):
    """Without any of our rollout: log-probabilities and entropies of one forward pass."""
    setup = tiny_session.setup
    T, S = setup.episode.horizon, setup.episode.prefix_len
    dense = schedules.dense(setup.space, 5, T)[:, None, None]
    (scores,) = make().run([EntryGroup("dense", dense, ControllerSpec(with_entropy=True))])
    for n, tokens_M in enumerate(np.concatenate([batch.tokens_BxN for batch in batches])):
        hidden_MxD, _ = llama.prefill(tiny_session.weights, jnp.asarray(tokens_M[:-1]), setup.model)
        logits = np.asarray(jax.vmap(lambda h: llama.logits(tiny_session.weights, h))(hidden_MxD[S:]))
        logp_TxV = np.asarray(jax.nn.log_softmax(logits))
        labels = tokens_M[S + 1 :]
        np.testing.assert_allclose(scores.logp_NxWxJxT[n, 0, 0], logp_TxV[np.arange(T), labels], atol=1e-4)
        entropy_T = -(np.exp(logp_TxV) * logp_TxV).sum(-1)
        np.testing.assert_allclose(scores.entropy_NxWxJxT[n, 0, 0], entropy_T, atol=1e-3)


def test_costs_by_hand(tiny_session, policy):
    """Of two-level axes; steps that may not be controlled do not count."""
    action = np.array([[[[0, 7, 0, 1]]]])  # all low, all high, all low, eta high
    scores = policy._replace(action_NxWxJxT=action)
    setup = tiny_session.setup
    expected = np.array([(3 * 0.1 + 1) / 4, (3 * 0.4 + 1) / 4, (2 * 0.3125 + 2) / 4])
    np.testing.assert_allclose(scores.costs(setup)[0, 0, 0], expected, rtol=1e-6)
    shape = dataclasses.replace(setup.episode, sinks=setup.episode.prefix_len - 1)
    assert shape.uncontrolled == setup.episode.prefix_len + 2
    late = scores.costs(setup.with_rules(episode=shape))[0, 0, 0]
    np.testing.assert_allclose(late, [0.1, 0.4, (0.3125 + 1) / 2], rtol=1e-6)


def test_work_by_hand(tiny_session, policy):
    """Two episodes of two steps after 8 tokens, of two blocks and one schedule, so 9 to 12 keys.

    The model is that of test_costs: a step takes 800 bytes of weights and 400 operations without those of
    gate and up (512, 256), 32 of each per key, and 32 bytes for the MLP's output.
    """
    from small_models import AXES
    from small_models import COUNTED as MODEL

    space = ActionSpace(AXES)
    episode = EpisodeConfig(8, 2, 2, sinks=6, window=2)  # the first step is not controlled
    setup = tiny_session.setup.with_rules(model=MODEL, space=space, episode=episode)
    action = np.full((2, 2, 1, 2), space.dense)
    action[0, 0, 0, 0] = int(space.join(np.array([1, 0, 1])))  # prunes; it counts, controllable or not
    action[1, 1, 0, 1] = 0  # everything at its lowest, 12 keys
    scores = policy._replace(action_NxWxJxT=action)

    # 0.3 of 4 channels are two: half of gate and up.  0.2 of 12 keys are three, a page of 4 for each of two
    # heads, chosen by the bounds of three pages, as long as a key and its value.  Rounding saves nothing.
    dense = sum(2 * (800 + 512 + 32 * keys + 32) for keys in (9, 10, 11, 12))
    saved = 256 + 256 + 32 * (12 - 8 - 3)
    assert scores.work(setup, with_policy=False).bytes == pytest.approx(1 - saved / dense)
    dense = sum(2 * (400 + 256 + 32 * keys) for keys in (9, 10, 11, 12))
    saved = 128 + 128 + 32 * (12 - 4 - 3)
    assert scores.work(setup, with_policy=False).flops == pytest.approx(1 - saved / dense)
    own = policy_step(setup.policy).flops
    assert scores.work(setup, with_policy=True).flops == pytest.approx(1 + (8 * own - saved) / dense)


def test_an_axis_held_dense(tiny_session, make):
    space = tiny_session.setup.space
    for x, axis in enumerate(space.axes):
        (scores,) = make().run([EntryGroup("policy", given(), ControllerSpec(POLICY, axis.name))])
        assert np.all(space.values_AxX[scores.action_NxWxJxT][..., x] == axis.levels[-1])


@pytest.mark.parametrize("name", ["entropy", "drift", "drift_official"])
def test_heuristics_meet_their_budgets(tiny_session, make, name):
    """To half a level in four steps; each schedule by itself."""
    (scores,) = make().run([EntryGroup(name, given(), ControllerSpec(name))])
    span_X = np.array([a.cost(a.levels[-1]) - a.cost(a.levels[0]) for a in tiny_session.setup.space.axes])
    miss = np.abs(scores.costs(tiny_session.setup) - given())
    assert np.all(miss <= span_X / 4 + 1e-6)


# --- files -------------------------------------------------------------------------------------------


def groups_of(policy):
    return [
        EntryGroup("again", policy.action_NxWxJxT, REPLAYED),
        EntryGroup("policy", given(), ControllerSpec(POLICY)),
    ]


def files(root: pathlib.Path) -> dict[str, float]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("batch-*.npz")}


def refuse(*args, **kwargs):
    raise AssertionError("nothing should be run")


def test_scores_on_disk_are_not_run_again(make, policy, tmp_path, monkeypatch):
    """Nor are those of a sweep that asks for more; a lost or damaged file is."""
    groups = groups_of(policy)
    told = []
    first = make(tmp_path).run(groups, told.append)
    assert sum(told) == 12  # two groups, three batches, two entries
    assert make(tmp_path).count(groups) == (12, 12)
    written = files(tmp_path)
    assert len(written) == 6
    with monkeypatch.context() as patch:
        patch.setattr(BatchScorer, "play", refuse)
        again = make(tmp_path).run(groups)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    paths = sorted(tmp_path.rglob("batch-*.npz"))
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    assert make(tmp_path).count(groups) == (12, 8)
    repaired = make(tmp_path).run(groups)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(repaired), strict=True):
        np.testing.assert_array_equal(one, other)
    kept = set(written.items()) & set(files(tmp_path).items())
    assert len(kept) == 4


def test_what_decides_scores_decides_their_folder(make, policy, params, tmp_path):
    group = EntryGroup("policy", given(), ControllerSpec(POLICY))
    other_params = jax.tree.map(lambda leaf: leaf + 1e-3, params)
    make(tmp_path).run([group])
    assert make(tmp_path).count([group])[1] == 6
    assert make(tmp_path, params=other_params).count([group])[1] == 0
    assert make(tmp_path).count([EntryGroup("policy", given(), ControllerSpec(POLICY, "rho"))])[1] == 0
    assert make(tmp_path).count([EntryGroup("policy", given(BUDGETS[::-1]), ControllerSpec(POLICY))])[1] == 0
    replay = EntryGroup("again", policy.action_NxWxJxT, REPLAYED)
    make(tmp_path).run([replay])
    assert make(tmp_path, params=other_params).count([replay])[1] == 6  # the policy has no part in it
    assert ScoreCache(tmp_path, {"model": "other"}).folder != make(tmp_path).store.folder


def test_a_folder_of_another_evaluation_is_refused(make, tmp_path):
    folder = make(tmp_path).store.folder
    (folder / "about.json").write_text(json.dumps({"model": "other"}))
    with pytest.raises(UserError, match="holds scores of another evaluation"):
        make(tmp_path)


def test_scores_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: not a directory"):
        make(tmp_path / "file")


# --- the authors' fault ------------------------------------------------------------------------------


def test_whose_budgets_are_left_over():
    """The rows of the largest (rho, bits); repeated or cut to the next batch."""
    values = np.array([[0.1, 0.4, 16], [0.5, 1.0, 5], [0.3, 1.0, 16], [1.0, 0.4, 16], [0.7, 1.0, 16]])
    np.testing.assert_array_equal(stale_prefill.leftover_rows(values, 0, 5), [2, 4, 2, 4, 2])
    np.testing.assert_array_equal(stale_prefill.leftover_rows(values, 0, 1), [2])
    same = np.array([[0.2, 1.0, 16], [0.4, 1.0, 16]])
    np.testing.assert_array_equal(stale_prefill.leftover_rows(same, 0, 2), [0, 1])


def test_which_keys_a_stale_query_sees():
    """One head of one dimension, pages of 2, positive queries: a page is as good as its largest key.

    Query 4 may keep two of the pages {0,1}, {2,3}, {4,5}; the last counts by key 5, which it cannot see.
    """
    keys, S = np.array([3.0, 1.0, 2.0, 0.0, -5.0, 9.0]), 6
    q, k = jnp.ones((1, 1, S, 1)), jnp.asarray(keys)[None, :, None]
    keep = np.asarray(stale_prefill.quest_keep(q, k, jnp.int32(3), 2))[0, 0].astype(int)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    np.testing.assert_array_equal(keep, expected)


def test_a_stale_prefill_with_budget_for_all_is_the_dense_one(tiny_session):
    setup, weights = tiny_session.setup, tiny_session.weights
    tokens = jnp.asarray(tiny_session.split("test").read([0]).tokens_BxN[0][:32])
    dense, dense_kv = llama.prefill(weights, tokens, setup.model)
    full, full_kv = stale_prefill.sparse_prefill(weights, tokens, jnp.int32(32), 8, setup)
    np.testing.assert_allclose(full, dense, atol=1e-4)
    np.testing.assert_allclose(full_kv.k, dense_kv.k, atol=1e-4)
    sparse, _ = stale_prefill.sparse_prefill(weights, tokens, jnp.int32(4), 8, setup)
    np.testing.assert_allclose(sparse[:8], dense[:8], atol=1e-4)  # one page is all there is
    assert np.abs(sparse[16:] - dense[16:]).max() > 0.01


def test_stale_prefill_moves_what_follows_a_sparse_batch_only(make, tiny_session):
    """Entry 0 ends each batch dense, entry 1 with kappa 0.1; the first batch has nothing before it."""
    space, T = tiny_session.setup.space, tiny_session.setup.episode.horizon
    ends = [space.dense, int(space.join(np.array([0, 1, 1])))]
    action = np.broadcast_to(np.array(ends)[:, None], (5, 1, 2, T)).copy()
    group = EntryGroup("ends", action, REPLAYED)
    clean, stale = make().run([group])[0], make(stale=True).run([group])[0]
    difference = np.abs(clean.logp_NxWxJxT - stale.logp_NxWxJxT)[:, 0]
    assert difference[:2].max() == 0
    assert difference[2:, 0].max() < 1e-4
    assert np.all(difference[2:, 1].max(-1) > 1e-3)


def test_stale_prefill_goes_by_the_row(make, tiny_session):
    """Row 0 ends its batches at 0.1 and row 1 dense, and so they find them again."""
    space, T = tiny_session.setup.space, tiny_session.setup.episode.horizon
    low, dense = int(space.join(np.array([0, 1, 1]))), space.dense
    action = np.broadcast_to(np.array([low, dense, low, dense, dense])[:, None, None, None], (5, 1, 3, T))
    group = EntryGroup("rows", action, REPLAYED)
    clean, stale = make().run([group])[0], make(stale=True).run([group])[0]
    moved = np.abs(clean.logp_NxWxJxT - stale.logp_NxWxJxT).max((1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(moved, [False, False, True, False, True])


def test_a_stale_prefill_needs_quest_and_one_episode(make, tiny_session):
    setup = tiny_session.setup
    shape = dataclasses.replace(setup.episode, episodes_per_prefix=2)
    with pytest.raises(UserError, match="episodes_per_prefix = 1"):
        make(stale=True, setup=setup.with_rules(episode=shape))
    axes = tuple(axis for axis in setup.space.axes if not isinstance(axis, Quest))
    with pytest.raises(UserError, match=r"axes\.kappa\.rule must be quest"):
        make(stale=True, setup=setup.with_rules(space=ActionSpace(axes)))


# --- the comparison ------------------------------------------------------------------------------------


def test_everything_is_matched_to_what_the_policy_spent(make, tiny_session):
    """All controllers at once, also with an axis held dense."""
    heuristics = ("entropy", "drift", "drift_official")
    controllers = ("fixed", "fixed_official", "front", "clock", "swapped", "random", *heuristics)
    plan = ComparisonPlan(BUDGETS, controllers, num_random=3, random_at=(1,), hold=("kappa",))
    labels = []

    def progress(total, done, label):
        labels.append((total, done, label))
        return lambda entries: None

    rows, draws = run(make(), plan, progress)
    assert labels == [(12, 0, "policy"), (3 * (1 + 8 * 4 + 2 * 3), 0, "baselines")]
    always = ["policy", "fixed", "fixed_official", "front", "clock", "swapped", *heuristics]
    names = [[*always, "dense"], [*always, "random", "random_best", "dense"]] * 2
    assert [row.controller for row in rows] == [name for block in names for name in block]
    assert [row.held for row in rows] == [""] * 22 + ["kappa"] * 22
    own = {}
    for row in rows:
        if row.controller == "policy":
            own = row
        assert row.requested == own.requested
        assert row.tokens == 20
        if row.controller in ("fixed", "front", "random", "random_best"):
            np.testing.assert_allclose(row.cost, own.cost, atol=0.9 / 20 + 1e-6)
        if row.controller == "clock":  # matched step by step, in each to one of the sequences
            np.testing.assert_allclose(row.cost, own.cost, atol=0.9 / 5 + 1e-6)
        if row.controller == "swapped":
            assert (row.cost, row.levels) == (own.cost, own.levels)
        if row.held and row.controller != "dense":
            assert row.cost[0] == 1.0
            assert row.levels[0] == "1:1"
        assert row.gain == pytest.approx(row.nats - own.nats, abs=1e-6)
        if row.controller == "dense":
            assert (row.bytes, row.flops) == pytest.approx((1.0, 1.0))
    assert [(draw.held, draw.draw) for draw in draws] == [(h, d) for h in ("", "kappa") for d in range(3)]
    best = min(draw.nats for draw in draws[:3])
    assert next(row.nats for row in rows if row.controller == "random_best") == pytest.approx(best)
    mean = np.mean([draw.nats for draw in draws[:3]])
    assert next(row.nats for row in rows if row.controller == "random") == pytest.approx(mean)


def test_blind_controllers_see_the_policys_costs_and_not_its_text(make, batches, tiny_session, tmp_path):
    """`swapped` plays the schedules of other blocks; `clock` has the mean costs of each step."""
    sweep = make(store=ScoreCache(tmp_path, {"blocks": [""] * len(batches)}))
    run(sweep, ComparisonPlan(BUDGETS, ("clock", "swapped")))
    groups = read_folder(sweep.store.folder).groups
    own, clock, swapped = (groups[name, ""][1] for name in ("policy", "clock", "swapped"))
    N, W = own.action_NxWxJxT.shape[:2]
    assert N > 1
    np.testing.assert_array_equal(swapped.action_NxWxJxT, np.roll(own.action_NxWxJxT, N // 2, 0))
    setup = tiny_session.setup
    by_hand = setup.space.costs_AxX[own.action_NxWxJxT].mean((0, 1))
    np.testing.assert_allclose(own.step_costs(setup), by_hand, atol=1e-6)
    np.testing.assert_allclose(clock.step_costs(setup), by_hand, atol=0.9 / (N * W) + 1e-6)


def test_level_shares_by_hand(policy, tiny_session):
    from sol_jax.evaluation.comparison import level_shares

    scores = policy._replace(action_NxWxJxT=np.array([[[[0, 7, 0, 1]]]]))
    assert level_shares(scores, tiny_session.setup) == ("0.1:0.75 1:0.25", "0.4:0.75 1:0.25", "5:0.5 16:0.5")


def test_draws_do_not_depend_on_what_else_is_run(make):
    few = run(make(), ComparisonPlan(BUDGETS, ("random",), num_random=2, random_at=(1,)))[1]
    all_of_them = run(make(), ComparisonPlan(BUDGETS, ("random", "fixed"), num_random=2))[1]
    assert few == all_of_them[2:]


def test_digests_tell_arrays_apart():
    a = np.arange(6, dtype=np.float32)
    assert array_digest([a, a]) == array_digest([a.copy(), a])
    others = [a.reshape(2, 3), a.astype(np.int32), a[::-1], np.zeros(6, np.float32)]
    assert len({array_digest(x) for x in [a, *others]}) == 5
