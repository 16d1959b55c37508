"""Decoding under mixed actions against the authors' patched model: what each step kept, saw and predicted.

Pages, channels and quantisation steps are chosen by thresholds.  Where a score lies within rounding of one,
the authors' float32 and ours may choose differently, and the choice changes all that follows.  How far is
measured, by a number of slightly disturbed runs: the comparison is as strict as our answer is steady, value
by value, and over all of them we must be no farther from the authors than rounding takes our own runs.
"""

import dataclasses
from typing import Any, NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest, Recency, Relevancy
from sol_jax.axes.rho import ChannelPruning
from sol_jax.models import llama
from sol_jax.models.weights import load_model
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.rollout import Controller, EpisodeRules, group_rollout, prefill_block, replay

TOLERANCE = 2e-4
UNSTEADY = 5 * TOLERANCE  # runs this far apart made different choices
NUM_RUNS = 16  # the first is not disturbed


@dataclasses.dataclass(frozen=True)
class RecordingQuest(Quest):
    """Quest that appends the pages it keeps to `log`, layer by layer and step by step."""

    log: list[tuple[np.ndarray, ...]] = dataclasses.field(default_factory=list, compare=False)

    def keep_pages(self, *args: Any) -> tuple[jax.Array, jax.Array]:
        masks = super().keep_pages(*args)
        shapes = jax.tree.map(lambda mask: jax.ShapeDtypeStruct(mask.shape, mask.dtype), masks)
        # The next layer waits for the result of the call, so the log is in order.
        return jax.pure_callback(self._record, shapes, masks, vmap_method="expand_dims")

    def _record(self, masks: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        self.log.append(tuple(np.array(mask) for mask in masks))
        return self.log[-1]


class Model(NamedTuple):
    """A language model, and what the authors recorded of it in each case."""

    cfg: llama.LlamaConfig
    weights: llama.Weights
    cases: dict[str, golden.Vectors]  # in arrays of several steps, time comes first
    vocab_sample: np.ndarray | None  # ids of the recorded logits; None: all
    num_runs: int = NUM_RUNS


def _cases(vectors: golden.Vectors) -> dict[str, golden.Vectors]:
    names = sorted({name.removesuffix("/ids") for name in vectors if name.endswith("/ids")})
    if not names:
        golden.absent("case of this model")
    return {name: golden.under(vectors, f"{name}/") for name in names}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Model:
    vectors = golden.load("d1_tiny_model_actions")
    cases = _cases(vectors)
    return Model(*golden.language_model(vectors, "w/", tmp_path_factory.mktemp("tiny")), cases, None)


@pytest.fixture(scope="module")
def smollm2() -> Model:
    vectors = golden.load("d2_smollm2_actions")
    return Model(*load_model("smollm2-135m", "float32"), _cases(vectors), vectors["vocab_sample"])


def _space(case: golden.Vectors, kernels: str) -> ActionSpace:
    """Every level that the case uses; the top ones, which forced steps take, are dense."""

    def options(name: str, dense: float) -> dict[str, Any]:
        levels = tuple(np.unique([*case[name].ravel(), dense]).tolist())
        return {"levels": levels, "budget": (0.0, 1.0), "penalty": 1.0, "kernels": kernels}

    kappa = {"quest": RecordingQuest, "recency": Recency, "relevancy": Relevancy}[str(case["criteria"])]
    pages = {"page_size": int(case["page"])} if kappa is RecordingQuest else {}
    return ActionSpace(
        (
            kappa(**options("keep", 1.0), **pages),
            ChannelPruning(**options("prune", 1.0)),
            OutputQuantization(**options("bits", 16)),
        )
    )


def _actions_TxB(case: golden.Vectors, space: ActionSpace) -> np.ndarray:
    values = (case["keep"], case["prune"], case["bits"])
    level_TxBxX = [np.searchsorted(a.levels, v) for a, v in zip(space.axes, values, strict=True)]
    action_TxB = np.array(space.join(np.stack(level_TxBxX, -1)))
    np.testing.assert_array_equal(space.values_AxX[action_TxB], np.stack(values, -1, dtype=np.float32))
    # What a controller wants in a step that is not controllable must not matter.
    action_TxB[~case.get("eff", np.ones(len(action_TxB), bool))] = 0
    return action_TxB


class Decoded(NamedTuple):
    """Final-norm hidden states."""

    prefill_BxD: jax.Array  # after the last token of the prefix
    reference_BxTxD: jax.Array  # of one dense pass over the whole text
    played_NxBxKxTxD: jax.Array  # of K schedules, in N runs (see `golden.disturbed`)


def _decode(model: Model, case: golden.Vectors, space: ActionSpace) -> Decoded:
    """The recorded actions and the dense ones (K = 2) of all rows, in all runs, as one batch."""
    action_TxB = _actions_TxB(case, space)
    action_BxKxT = np.stack([action_TxB.T, np.full_like(action_TxB.T, space.dense)], 1)
    shape = EpisodeConfig(prefix_len=int(case["ctx"]), horizon=len(action_TxB), sinks=4, window=2)
    rules = EpisodeRules(model.cfg, space, shape)

    def prefill(weights, tokens_N):
        return prefill_block(weights, tokens_N, rules, with_dense=True)

    def play(weights, gains, block, action_KxT):
        def group(episode):
            controller = Controller(replay(action_KxT[0]).act, action_KxT)
            key_K, budget_KxX = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, len(space.axes)))
            run = golden.with_gains(weights, gains)
            return group_rollout(run, rules, block.cache, episode, key_K, budget_KxX, controller).hidden

        return jax.vmap(group)(block.episodes)[0]

    @jax.jit
    def decode(weights, gains_N, ids_BxN):
        block_B = jax.vmap(prefill, (None, 0))(weights, ids_BxN)
        play_rows = jax.vmap(play, (None, None, 0, 0))
        play_runs = jax.vmap(play_rows, (None, 0, None, None))
        played = play_runs(weights, gains_N, block_B, jnp.asarray(action_BxKxT))
        return Decoded(block_B.episodes.hidden[:, 0], block_B.dense_hidden[:, 0], played)

    gains_N = golden.disturbed(model.weights, model.num_runs)
    return jax.block_until_ready(decode(model.weights, gains_N, jnp.asarray(case["ids"], jnp.int32)))


def _predictions(model: Model, case: golden.Vectors, hidden_BxTxD: jax.Array, kind: str) -> golden.Vectors:
    """What the authors recorded of hidden states, under their names and time-major."""
    hidden_TxBxD = hidden_BxTxD.swapaxes(0, 1)
    logits_TxBxV = llama.logits(model.weights, hidden_TxBxD)
    label_TxBx1 = case["ids"][:, int(case["ctx"]) + 1 :].T[..., None]
    top5_ids = case[f"{kind}_top5_ids"]
    total_TxB = jax.nn.logsumexp(logits_TxBxV, -1)
    found = {
        "hidden": hidden_TxBxD,
        "logsumexp": total_TxB,
        "label_logprob": jnp.take_along_axis(logits_TxBxV, label_TxBx1, -1)[..., 0] - total_TxB,
        "top5_logits": jax.lax.top_k(logits_TxBxV, top5_ids.shape[-1])[0],
        "top5_ids": jnp.take_along_axis(logits_TxBxV, top5_ids, -1),
        **_some_logits(model, logits_TxBxV),
    }
    return {f"{kind}_{name}": np.asarray(value) for name, value in found.items()}


def _some_logits(model: Model, logits: jax.Array) -> dict[str, jax.Array]:
    """All, or where the vocabulary is large the authors' sample."""
    if model.vocab_sample is None:
        return {"logits": logits}
    return {"logits_sample": logits[..., model.vocab_sample]}


def _slack(runs: list[golden.Vectors]) -> golden.Vectors:
    """How far rounding may take each value of each row by each step, [T, B, ...]."""
    spread = jax.tree.map(lambda first, *rest: np.abs(np.stack(rest) - first).max(0), *runs)

    def so_far(spread_TxBx_: np.ndarray) -> np.ndarray:
        over_row = tuple(range(2, spread_TxBx_.ndim))
        return 3 * np.maximum.accumulate(spread_TxBx_.max(over_row, keepdims=True), 0)

    return {name: so_far(value) for name, value in spread.items()}


def _assert_close(
    found: golden.Vectors, case: golden.Vectors, what: str, slack: golden.Vectors | None = None
) -> None:
    for name, value in found.items():
        expected = case[name.replace("top5_ids", "top5_logits")]
        allowed = TOLERANCE + 1e-5 * np.abs(expected) + (slack[name] if slack else 0.0)
        assert value.shape == expected.shape
        excess = np.abs(value - expected) - allowed
        where = np.unravel_index(excess.argmax(), excess.shape)
        assert excess.max() <= 0, f"{what}, {name}{where}: {value[where]}, the authors' is {expected[where]}"


def _act_runs(model: Model, case: golden.Vectors, hidden: Decoded) -> list[golden.Vectors]:
    """What each run predicts under the case's actions."""
    return [_predictions(model, case, run_BxKxTxD[:, 0], "act") for run_BxKxTxD in hidden.played_NxBxKxTxD]


class Distances(NamedTuple):
    """Between hidden states after compressed steps, one by one: of our run from the authors', and of the
    disturbed runs from ours."""

    authors: np.ndarray
    runs: np.ndarray


def _check_case(model: Model, case: golden.Vectors, what: str, noisy: Model | None = None) -> Distances:
    """Compares all of a case.

    How far rounding takes its steps is learned from the runs of `noisy`, the same model with more of them.
    """
    space = _space(case, model.cfg.kernels)
    hidden = _decode(model, case, space)
    last_logits = _some_logits(model, llama.logits(model.weights, hidden.prefill_BxD))
    prefill = {"last_hidden": hidden.prefill_BxD, **{f"last_{name}": v for name, v in last_logits.items()}}
    _assert_close({f"prefill_{name}": np.asarray(value) for name, value in prefill.items()}, case, what)

    # The dense model, in one pass and step by step, knows no thresholds.
    for dense_BxTxD in (hidden.reference_BxTxD, hidden.played_NxBxKxTxD[0, :, 1]):
        _assert_close(_predictions(model, case, dense_BxTxD, "dense"), case, what)

    runs = _act_runs(model, case, hidden)
    disturbed = _act_runs(noisy, case, _decode(noisy, case, _space(case, "xla"))) if noisy else runs
    slack = _slack(disturbed)
    _assert_close(runs[0], case, what, slack)
    if isinstance(space.axes[0], RecordingQuest):
        _check_pages(case, space.axes[0], slack["act_hidden"][..., 0] <= 3 * UNSTEADY, what)
    return _distances(case, runs[0], disturbed)


def _distances(case: golden.Vectors, ours: golden.Vectors, disturbed: list[golden.Vectors]) -> Distances:
    compressed_TxB = (case["keep"] < 1) | (case["prune"] < 1) | (case["bits"] < 16)
    compressed_TxB &= case.get("eff", np.ones(len(compressed_TxB), bool))[:, None]

    def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a - b, axis=-1)[..., compressed_TxB].ravel()

    runs_NxTxBxD = np.stack([run["act_hidden"] for run in disturbed])
    return Distances(apart(ours["act_hidden"], case["act_hidden"]), apart(runs_NxTxBxD[1:], runs_NxTxBxD[0]))


def _assert_as_near_as_rounding(found: list[Distances]) -> None:
    """Over all cases: chance evens out, and another rule than the authors' does not."""
    authors, runs = (float(np.mean(np.concatenate(parts))) for parts in zip(*found, strict=True))
    assert authors <= 1.5 * runs + TOLERANCE, (
        f"{authors:.3g} from the authors', and rounding goes {runs:.3g} far"
    )


def _check_pages(case: golden.Vectors, quest: RecordingQuest, steady_TxB: np.ndarray, what: str) -> None:
    """The pages that each layer and head keeps, exactly, unless a disturbed run keeps others."""
    whole = int(case["ctx"]) // quest.page_size
    for t in range(len(steady_TxB)):
        pages_LxBxHxP = case[f"pages_t{t}"]
        if f"pages_t{t}_shape" in case:
            count = case[f"pages_t{t}_shape"][-1]
            pages_LxBxHxP = np.unpackbits(pages_LxBxHxP, -1, count=count).astype(bool)
        L, B, H, P = pages_LxBxHxP.shape
        for layer, (prefix, trailing) in enumerate(quest.log[t * L : (t + 1) * L]):
            ours = np.concatenate([prefix[..., :whole], trailing], -1)[..., :P]
            ours_NxBxHxP = ours.reshape(-1, B, 2, H, P)[:, :, 0]
            unsure_BxH = (ours_NxBxHxP != ours_NxBxHxP[0]).any((0, -1))
            differ_BxH = (ours_NxBxHxP[0] != pages_LxBxHxP[layer]).any(-1)
            wrong_BxH = differ_BxH & ~unsure_BxH & steady_TxB[t][:, None]
            where = f"{what}, step {t}, layer {layer}, row and head {np.argwhere(wrong_BxH).tolist()}"
            assert not wrong_BxH.any(), f"{where}: pages differ from the authors'"


def _all_distances(model: Model, noisy: Model | None = None) -> list[Distances]:
    return [_check_case(model, case, name, noisy) for name, case in model.cases.items()]


def test_tiny_model(tiny):
    _assert_as_near_as_rounding(_all_distances(tiny))


def test_tiny_model_through_kernels(tiny):
    """Interpreted, which is slow: one case of each rule, and two runs, whose slack is that of XLA's."""
    one_each = {str(case["criteria"]): name for name, case in tiny.cases.items()}
    cases = {name: tiny.cases[name] for name in one_each.values()}
    kernels = tiny._replace(cfg=dataclasses.replace(tiny.cfg, kernels="pallas"), cases=cases, num_runs=2)
    _assert_as_near_as_rounding(_all_distances(kernels, noisy=tiny))


def test_smollm2(smollm2):
    """30 layers have many a threshold: most rows part within a step or two, and only their distances tell."""
    _assert_as_near_as_rounding(_all_distances(smollm2))


def test_another_level_is_told_apart(smollm2):
    """What is measured above can fail: an axis off by a little is farther than rounding goes."""
    case = next(iter(smollm2.cases.values()))
    other = {**case, "keep": np.where(case["keep"] < 1, np.minimum(case["keep"] + 0.05, 1), 1)}
    few = smollm2._replace(num_runs=4)
    runs = _act_runs(few, case, _decode(few, other, _space(other, few.cfg.kernels)))
    with pytest.raises(AssertionError, match="and rounding goes"):
        _assert_as_near_as_rounding([_distances(case, runs[0], runs)])
