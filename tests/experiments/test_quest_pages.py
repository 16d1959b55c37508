"""Gains by the place in a page, from scores made up so that they are known."""

import numpy as np
import pytest

from experiments.studies import quest_pages as pages
from sol_jax.errors import UserError
from sol_jax.evaluation.score_cache import CachedScores
from sol_jax.evaluation.scoring import EntryScores

N, W, T, S = 6, 2, 8, 13
COSTS = {"kappa": [0.1, 1.0], "rho": [0.4, 1.0]}


def scores(logp, action=None):
    logp = np.broadcast_to(logp, (N, W, 1, T)).astype(float)
    return EntryScores(logp, logp[..., :0], np.zeros(logp.shape, int) if action is None else action)


@pytest.fixture
def scored():
    """The fixed schedule loses 1 where the newest page has two keys; the policy has none of it, and pays."""
    position = S + np.arange(W * T).reshape(W, T)
    second = position % 4 == 1
    action = np.broadcast_to(np.where(second, 2, 0)[None, :, None], (N, W, 1, T))
    groups = {
        ("dense", ""): ([], scores(-2.0)),
        ("policy", ""): ([(0.5, 0.5)], scores(-2.0, action)),
        ("fixed", ""): ([(0.5, 0.5)], scores(np.where(second, -3.0, -2.0)[None, :, None])),
    }
    return CachedScores(
        {"rules": {"costs": COSTS}}, np.zeros((N, S + W * T + 1), int), np.arange(N) // 2, groups
    )


def test_places_by_hand(scored):
    np.testing.assert_array_equal(pages.newest_page(scored, 4)[0], [2, 3, 4, 1, 2, 3, 4, 1])
    found = pages.pages(scored, "made-up", 4)
    assert [record["keys"] for record in found] == [1, 2, 3, 4]
    assert [record["loss"] for record in found] == [0, 1, 0, 0]
    assert [record["gain"] for record in found] == [0, 1, 0, 0]
    assert [record["policy_kappa"] for record in found] == pytest.approx([0.1, 1.0, 0.1, 0.1])
    assert [record["fixed_kappa"] for record in found] == pytest.approx([0.1] * 4)
    assert {record["tokens"] for record in found} == {N * W * T // 4}
    assert (found[1]["gain_low"], found[1]["gain_high"]) == (1, 1)
    assert found[0]["budget"] == "0.5/0.5"


def test_budgets_are_paired_by_value(scored):
    """However the two controllers' entries lie."""
    (asked, policy), (_, fixed) = scored.groups["policy", ""], scored.groups["fixed", ""]

    def beside(scores, other):
        return EntryScores(*(np.concatenate([part, other(part)], 2) for part in scores))

    cheap = [(0.2, 0.5)]
    scored.groups["policy", ""] = (asked + cheap, beside(policy, lambda part: part))
    scored.groups["fixed", ""] = (cheap + asked, beside(fixed, lambda part: part))
    lossy = scored.groups["fixed", ""][1]
    lossy.logp_NxWxJxT[:, :, 0] = -9.0
    found = pages.pages(scored, "made-up", 4)
    assert [r["loss"] for r in found if r["budget"] == "0.5/0.5"] == [0, 1, 0, 0]
    assert [r["loss"] for r in found if r["budget"] == "0.2/0.5"] == [7, 7, 7, 7]
    scored.groups["fixed", ""] = (asked, fixed)
    with pytest.raises(UserError, match=r"no fixed schedule at \(0\.2, 0\.5\)"):
        pages.pages(scored, "made-up", 4)


def test_pages_longer_than_the_text_leave_places_out(scored):
    assert [record["keys"] for record in pages.pages(scored, "made-up", 64)] == list(range(14, 14 + W * T))


def test_scores_without_fixed_are_refused(scored):
    del scored.groups["fixed", ""]
    with pytest.raises(UserError, match=r"scores of x lack 'fixed'; evaluate with --controllers fixed"):
        pages.pages(scored, "x", 4)
