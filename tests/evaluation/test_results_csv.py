"""Rows of an evaluation, and the CSV that they become."""

import concurrent.futures
import dataclasses
import time

import numpy as np
import pytest

from experiments import publish
from experiments.figures import plots
from experiments.studies import analyse
from sol_jax.errors import UserError
from sol_jax.evaluation import comparison
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.comparison import ComparisonPlan, ComparisonRow, RandomScheduleRow, summary
from sol_jax.evaluation.scoring import EntryScores

BUDGETS = ((0.3, 0.6, 0.5), (0.7, 0.8, 0.75))
AXES = ("kappa", "rho", "eta")


# --- rows --------------------------------------------------------------------------------------------


def made_up(logp_NxJ, T=4):
    logp = np.repeat(np.array(logp_NxJ, float)[:, None, :, None], T, -1)
    return EntryScores(logp, logp[..., :0], np.zeros(logp.shape, int))


def test_the_best_random_schedule_is_the_best_in_the_mean(tiny_session):
    """Draw 1 wins in one block by far and draw 2 in both by little; the mean decides."""
    scores = {
        ("policy", ""): made_up([[-1.0], [-1.0]]),
        ("dense", ""): made_up([[-0.5], [-0.5]]),
        ("fixed", ""): made_up([[-2.0], [-2.0]]),
        ("random0", ""): made_up([[-3.0, -1.0, -1.5], [-3.0, -9.0, -1.5]]),
    }
    plan, documents = ComparisonPlan(BUDGETS[:1], num_random=3), np.array([0, 1])
    found, draws = comparison._rows(plan, scores, documents, tiny_session.setup)
    rows = {row.controller: row for row in found}
    assert list(rows) == ["policy", "fixed", "random", "random_best", "dense"]
    assert rows["random_best"].nats == pytest.approx(1.5)
    assert rows["random"].nats == pytest.approx((3 + 3 + 1 + 9 + 1.5 + 1.5) / 6)
    assert rows["fixed"].gain == pytest.approx(1.0)
    assert rows["dense"].gain == pytest.approx(-0.5)
    assert rows["policy"].gain == 0.0
    assert rows["policy"].perplexity == pytest.approx(np.e)
    assert (rows["policy"].tokens, rows["policy"].documents) == (8, 2)
    assert [draw.nats for draw in draws] == pytest.approx([3.0, 5.0, 1.5])


def test_the_interval_is_over_documents(tiny_session):
    """Two documents, of three blocks and one: resampled whole, so the gain is 1, 1.5 or 3 at the most."""
    policy, fixed = made_up([[-1.0]] * 4), made_up([[-2.0]] * 3 + [[-4.0]])
    scores = {("policy", ""): policy, ("dense", ""): policy, ("fixed", ""): fixed}
    plan = ComparisonPlan(BUDGETS[:1], ("fixed",))
    rows, _ = comparison._rows(plan, scores, np.array([0, 0, 0, 1]), tiny_session.setup)
    row = rows[1]
    assert (row.gain, row.gain_low, row.gain_high) == pytest.approx((1.5, 1.0, 3.0))


def row_of(controller="policy", **fields):
    costs, numbers = ((0.3, 0.6, 0.5), (0.4, 0.6, 0.6)), (0.5, 0.8, 0.9, 2.0, 7.4, 0.0, 0.0, 0.0, 8, 2)
    made = ComparisonRow(controller, "", "", *costs, *numbers, ("1:1",) * 3)
    return dataclasses.replace(made, **fields)


def test_the_summary_and_what_the_best_checkpoint_has_most_of(tiny_session):
    """Two budgets, missed by 0.1, 0 and 0.1, and met; the fixed schedule is 0.3 and 0.1 behind."""
    met = row_of(cost=(0.3, 0.6, 0.5))
    fixed = [row_of("fixed", gain=gain) for gain in (0.3, 0.1)]
    score = summary([row_of(), met, *fixed], tiny_session.setup)["eval/score"]
    assert score == pytest.approx(0.2 - (0.08 + 0.08) / 2)
    scalars = summary([row_of(), row_of("dense", gain=-0.25)], tiny_session.setup)
    penalty = 100 * (0.1 - 0.02) ** 2 + 200 * (0.1 - 0.02) ** 2
    assert scalars["eval/penalty"] == pytest.approx(penalty)
    assert "eval/score" not in scalars
    assert scalars["eval/budget_gap/kappa"] == pytest.approx(0.1)
    assert scalars["eval/gain_over_dense"] == -0.25
    assert "eval/gain_over_random" not in scalars


# --- files -------------------------------------------------------------------------------------------

ABOUT = {
    "config": "c0ffee",
    "text": "text.txt:test",
    "prefix": 256,
    "protect": False,
    "restate": False,
    "one_budget": "",
    "stale_prefill": False,
    "weights": "01ab",
    "tokenizer": "23cd",
    "text_digest": "45ef",
    "commit": "abc",
}


def test_rows_are_replaced_or_added(tmp_path):
    path = tmp_path / "deep" / "results.csv"
    first = [row_of(), row_of("fixed", nats=2.5), row_of("fixed", held="rho", nats=2.6)]
    results.merge(path, results.records(first, AXES, ABOUT))
    second = [row_of("fixed", nats=2.25), row_of("fixed", requested=(0.5, 0.5, 0.5), nats=3.0)]
    results.merge(path, results.records(second, AXES, ABOUT | {"commit": "def"}))
    rows = results.read(path)
    shown = [
        (row["controller"], row["held"], row["requested_kappa"], row["nats"], row["commit"]) for row in rows
    ]
    assert shown == [
        ("policy", "", "0.3", "2", "abc"),
        ("fixed", "rho", "0.3", "2.6", "abc"),
        ("fixed", "", "0.3", "2.25", "def"),
        ("fixed", "", "0.5", "3", "def"),
    ]
    # Another checkpoint, or more text: at that budget what is not scored anew goes.
    for change in ({"updates": "100"}, {"blocks": "99"}):
        results.merge(path, results.records([row_of(), row_of("fixed", nats=1.0)], AXES, ABOUT | change))
        shown = [(row["controller"], row["held"], row["requested_kappa"]) for row in results.read(path)]
        assert shown == [
            ("fixed", "rho", "0.3"),
            ("fixed", "", "0.5"),
            ("policy", "", "0.3"),
            ("fixed", "", "0.3"),
        ]
        results.merge(path, results.records([row_of("front")], AXES, ABOUT | change))
        assert len(results.read(path)) == 5
    draws = [RandomScheduleRow("", (0.5, 0.5, 0.5), d, 0.5, 2.0 + d) for d in range(3)]
    results.merge(tmp_path / "draws.csv", results.records(draws, AXES, ABOUT))
    assert [row["draw"] for row in results.read(tmp_path / "draws.csv")] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config", "beef"),
        ("text", "other.txt:test"),
        ("prefix", 252),
        ("protect", True),
        ("restate", True),
        ("one_budget", "net"),
        ("stale_prefill", True),
        ("weights", "fedc"),
        ("tokenizer", "fedc"),
        ("text_digest", "fedc"),
    ],
)
def test_results_of_another_config_are_not_added_to(field, value, tmp_path):
    path = tmp_path / "results.csv"
    results.check_same(path, ABOUT)  # there is none yet
    results.merge(path, results.records([row_of()], AXES, ABOUT))
    results.check_same(path, ABOUT | {"commit": "def"})
    with pytest.raises(UserError) as mistake:
        results.check_same(path, ABOUT | {field: value})
    expected = f"{path} holds results of {field} {str(ABOUT[field])!r}, and these are of {str(value)!r}"
    assert str(mistake.value).startswith(expected)


def test_a_csv_from_before_restated_policies_can_be_added_to_twice(tmp_path):
    path, records = tmp_path / "results.csv", results.records([row_of(), row_of("fixed")], AXES, ABOUT)
    results.write(path, [{k: v for k, v in row.items() if k != "restate"} for row in records])
    for _ in range(2):
        results.check_same(path, ABOUT)
        with pytest.raises(UserError, match="holds results of restate 'False'"):
            results.check_same(path, ABOUT | {"restate": True})
        results.merge(path, results.records([row_of("fixed")], AXES, ABOUT))


def test_a_csv_from_before_digests_can_be_added_to_until_it_has_some(tmp_path):
    """Its rows do not say what they are of; those that come now do, and from then on it counts."""
    path, records = tmp_path / "results.csv", results.records([row_of(), row_of("fixed")], AXES, ABOUT)
    results.write(path, [{k: v for k, v in row.items() if k not in results.CONTENT} for row in records])
    results.check_same(path, ABOUT | {"text_digest": "fedc"})
    results.merge(path, results.records([row_of("front")], AXES, ABOUT))
    assert [row["text_digest"] for row in results.read(path)] == ["", "", "45ef"]
    results.check_same(path, ABOUT)
    with pytest.raises(UserError, match="holds results of text_digest '45ef', and these are of 'fedc'"):
        results.check_same(path, ABOUT | {"text_digest": "fedc"})


def test_a_csv_from_before_bytes_and_flops(tmp_path):
    """It is read as it is, and added to: its own rows have nothing there."""
    path, records = tmp_path / "results.csv", results.records([row_of(), row_of("fixed")], AXES, ABOUT)
    results.write(path, [{k: v for k, v in row.items() if k not in ("bytes", "flops")} for row in records])
    rows = plots.read(path)
    assert "bytes" not in rows[0].fields
    assert analyse.wins(rows)[0]["budgets"] == len(publish.card_rows(path)) == 1
    results.check_same(path, ABOUT)
    results.merge(path, records[1:])
    assert [(row["controller"], row["bytes"]) for row in results.read(path)] == [
        ("policy", ""),
        ("fixed", "0.8"),
    ]
    assert plots.points(plots.read(path), "policy", "nats")[0].y == 2.0


def test_a_csv_that_a_spreadsheet_saved_is_the_same(tmp_path):
    """Some put a mark of their encoding before the first name, which then would be another name."""
    rows = [{"config": "é", "controller": "policy", "nats": "1"}]
    results.write(tmp_path / "a.csv", rows)
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    assert results.read(tmp_path / "b.csv") == results.read(tmp_path / "a.csv") == rows


def test_programs_that_add_rows_at_the_same_time_lose_none(tmp_path, monkeypatch):
    path, read = tmp_path / "new" / "a.csv", results.read

    def slowly(file):
        rows = read(file)
        time.sleep(0.02)
        return rows

    monkeypatch.setattr(results, "read", slowly)
    rows = [{"controller": f"c{n}", "nats": "1"} for n in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: results.merge(path, [row]), rows))
    assert sorted(row["controller"] for row in read(path)) == [row["controller"] for row in rows]
    assert [file.name for file in path.parent.iterdir()] == ["a.csv"]


def test_rows_that_came_meanwhile_from_another_model_are_not_mixed_with(tmp_path):
    ours = dict.fromkeys((*results.IDENTITY, *results.CONTENT), "1") | {"controller": "policy", "nats": "1"}
    results.write(tmp_path / "a.csv", [ours | {"weights": "2", "controller": "fixed"}])
    with pytest.raises(UserError, match="holds results of weights '2', and these are of '1'"):
        results.merge(tmp_path / "a.csv", [ours])


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("controller,nats,nats\npolicy,1,2\n")
    with pytest.raises(UserError, match=r"a\.csv has two columns 'nats'; take one of them away"):
        results.read(tmp_path / "a.csv")


def test_the_table_shows_shares():
    (head, _, _, shown) = results.table([row_of()], AXES).splitlines()
    assert head.split()[3:7] == ["net", "bytes", "flops", "ppl"]
    assert shown.split()[-4:] == ["0.500", "0.800", "0.900", "7.40"]


@pytest.mark.parametrize("axes", [1, 3, 4, 6])
def test_the_columns_of_the_table_stand_below_their_names(axes):
    row = row_of(requested=(0.5,) * axes, cost=(0.4,) * axes)
    (head, _, _, shown) = results.table([row], [f"axis{n}" for n in range(axes)]).splitlines()
    for name, value in {"net": "0.500", "bytes": "0.800", "flops": "0.900", "ppl": "7.40"}.items():
        assert shown[: head.index(name) + len(name)].endswith(value)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "controller\npolicy\n", "\xff"])
def test_a_csv_of_something_else_is_not_added_to(content, tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"CSV of sol_jax\.evaluate"):
        results.check_same(path, ABOUT)
    assert path.read_text(encoding="latin-1") == content
