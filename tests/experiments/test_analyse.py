"""Analyses: wins and kinds of tokens by hand, spending and effects on scores made for the purpose."""

import json

import jax
import made_up_results
import numpy as np
import pytest

from configs import sol_j_2l
from experiments.figures import plots
from experiments.studies import analyse
from sol_jax.errors import UserError
from sol_jax.evaluation.comparison import ComparisonPlan, run
from sol_jax.evaluation.provenance import decides, found_at
from sol_jax.evaluation.score_cache import CachedScores, ScoreCache, read_folder
from sol_jax.evaluation.scoring import EntryScores
from sol_jax.evaluation.sweep import Sweep
from sol_jax.rl.train_step import init_state
from sol_jax.text.blocks import evaluation_batches

BUDGETS = ((0.3, 0.6, 0.5), (0.7, 0.8, 0.75))


@pytest.fixture(scope="module")
def folders(tiny_session, tmp_path_factory):
    """EntryScores of an untrained policy and schedules on five blocks: clean, and with a stale prefill."""
    root = tmp_path_factory.mktemp("scores")
    params = init_state(jax.random.key(0), tiny_session.setup).params
    batches = list(evaluation_batches(tiny_session.split("test"), 2, 5))
    found = []
    for stale in (False, True):
        store = ScoreCache(root, decides(tiny_session, batches, stale), found_at(tiny_session))
        sweep = Sweep(tiny_session.weights, params, batches, tiny_session.setup, store, 4, stale)
        run(sweep, ComparisonPlan(BUDGETS, num_random=3))
        found.append(store.folder)
    return found


# --- wins --------------------------------------------------------------------------------------------


def test_wins_by_hand(tmp_path):
    """Two seeds of two budgets: seed 0 wins at both, seed 1 loses one, clearly."""
    made_up_results.write(tmp_path, "x", sol_j_2l.get_config())
    row = plots.read(tmp_path / "smollm2-135m" / "x-s0.csv")[1]

    def rows(seed, gains):
        ends = [{"gain": g, "gain_low": g - 0.1, "gain_high": g + 0.1} for g in gains]
        return [plots.ResultRow("x", seed, row.fields | {"controller": "fixed", **end}) for end in ends]

    swept = rows("0", (-5.0,))[0]
    swept.fields["along"] = "kappa"  # no point of the front
    first, second, together = analyse.wins([*rows("0", (0.05, 0.2)), *rows("1", (0.3, -0.2)), swept])
    assert (first["budgets"], first["better"], first["clearly_better"], first["clearly_worse"]) == (
        2,
        1.0,
        0.5,
        0,
    )
    assert (second["better"], second["clearly_better"], second["clearly_worse"]) == (0.5, 0.5, 0.5)
    assert together["seed"] == "all"
    assert (together["budgets"], together["better"], together["runs"]) == (4, 0.75, 2)
    assert together["runs_better_everywhere"] == 0.5
    assert together["mean_gain"] == pytest.approx(0.35 / 4)
    assert together["smallest_gain"] == -0.2


def test_misses_by_hand(tmp_path):
    """Kappa is 0.1 over at one budget, rho 0.02 under and eta 0.04 over at the other."""
    made_up_results.write(tmp_path, "x", sol_j_2l.get_config())
    policy = plots.read(tmp_path / "smollm2-135m" / "x-s0.csv")[0]
    asked = {"requested_kappa": 0.5, "requested_rho": 0.6, "requested_eta": 0.7}

    def row(kappa, rho, eta, **other):
        realised = {"cost_kappa": kappa, "cost_rho": rho, "cost_eta": eta}
        return plots.ResultRow("x", "0", policy.fields | asked | realised | {"controller": "policy"} | other)

    ignored = [row(0, 0, 0, held="rho"), row(0, 0, 0, controller="fixed")]
    found = analyse.misses([row(0.6, 0.6, 0.7), row(0.5, 0.58, 0.74), *ignored])
    by_axis = {record["axis"]: record for record in found}
    assert list(by_axis) == ["kappa", "rho", "eta", "any"]
    assert [by_axis[axis]["within_0.03"] for axis in by_axis] == [0.5, 1.0, 0.5, 0.0]
    assert [by_axis[axis]["largest"] for axis in by_axis] == pytest.approx([0.1, 0.02, 0.04, 0.1])
    assert [by_axis[axis]["mean_signed"] for axis in by_axis] == pytest.approx([0.05, -0.01, 0.02, 0.07])
    assert by_axis["any"]["mean"] == pytest.approx(0.07)
    assert {record["budgets"] for record in found} == {2}
    assert by_axis["kappa"]["largest_at"] == "0.5/0.6/0.7"


def test_wins_as_a_program(tmp_path, capsys):
    for seed in (0, 1):
        made_up_results.write(tmp_path, "sol-j-2l", sol_j_2l.get_config(), seed, num_random=5)
    paths = sorted(map(str, (tmp_path / "smollm2-135m").glob("*.csv")))
    assert len(paths) == 4  # draws among them, which are passed over
    analyse.main(["wins", "--results", *paths, "--output", str(tmp_path / "wins.csv")])
    lines = (tmp_path / "wins.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 11  # eleven controllers, two seeds and both together
    assert "sol-j-2l,fixed,all,10,1,1,0," in "\n".join(lines)
    assert "wrote 33 rows" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["wins", "misses"])
def test_a_csv_of_something_else_is_refused(what, tmp_path, capsys):
    path = made_up_results.write_downstream(tmp_path)
    with pytest.raises(SystemExit):
        analyse.main([what, "--results", str(path), "--output", str(tmp_path / "x.csv")])
    assert f"{path} is not a CSV of sol_jax.evaluate" in capsys.readouterr().err


# --- updates -----------------------------------------------------------------------------------------


def test_updates(tmp_path):
    run_folder = tmp_path / "fl"
    run_folder.mkdir()
    lines = [
        {"step": 1, "reward": -3.0},
        {"step": 50, "reward": -2.0, "eval/gain_over_fixed": 0.1, "eval/nats": "nan"},
    ]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (record,) = analyse.updates([run_folder])
    assert (record["run"], record["update"], record["gain_over_fixed"]) == ("fl", 50, 0.1)
    assert np.isnan(record["nats"])
    with pytest.raises(UserError, match=r"none/metrics\.jsonl cannot be read"):
        analyse.updates([tmp_path / "none"])
    (run_folder / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match=r"set config\.eval\.every"):
        analyse.updates([run_folder])


# --- spending ----------------------------------------------------------------------------------------


class Texts:
    """A tokenizer of these tokens."""

    texts = (" cat", "cat", "ing", " 12", "3", ",", " (", "\n", "A", " Über", "é")

    def decode(self, ids):
        return self.texts[ids[0]]


def test_kinds_of_tokens():
    kinds = analyse.token_kinds(Texts(), np.arange(len(Texts.texts)))
    by_kind = {name: [Texts.texts[i] for i in np.flatnonzero(found)] for name, found in kinds.items()}
    assert by_kind == {
        "word_start": [" cat", " Über"],
        "continuation": ["cat", "ing", "A", "é"],
        "digit": [" 12", "3"],
        "punctuation": [",", " ("],
    }


def test_spending_of_a_made_up_policy():
    """High kappa where it reads a digit, at one of two budgets; high rho in the first step, at the other."""
    rng = np.random.default_rng(0)
    N, T, texts = 40, 8, len(Texts.texts)
    tokens = rng.integers(0, texts, (N, 5 + T + 1))
    digit = np.isin(tokens[:, 5:-1], (3, 4))
    action = np.zeros((N, 1, 2, T), int)
    action[:, 0, 0] = np.where(digit, 4, 0)  # kappa is the first of three axes of two levels
    action[:, 0, 1, 0] = 2
    blank = np.zeros((N, 1, 2, T))
    costs = {"kappa": [0.1, 1.0], "rho": [0.4, 1.0], "eta": [0.3, 1.0]}
    dense = EntryScores(rng.normal(size=(N, 1, 1, T)), rng.random((N, 1, 1, T)), np.full((N, 1, 1, T), 7))
    policy = EntryScores(blank, blank[..., :0], action)
    jobs = {("dense", ""): ([], dense), ("policy", ""): ([(0.5, 0.7, 0.6), (0.2, 0.5, 0.4)], policy)}
    scored = CachedScores({"rules": {"costs": costs}}, tokens, np.arange(N) // 2, jobs)
    found = {(r["axis"], r["feature"], r["budget"]): r for r in analyse.spending(scored, Texts())}
    first, second = "0.5/0.7/0.6", "0.2/0.5/0.4"
    for axis in ("net", "kappa"):
        record = found[axis, "reads_digit", first]
        assert record["correlation"] == pytest.approx(1.0)
        assert record["correlation_low"] == pytest.approx(1.0)
    assert found["kappa", "reads_digit", first]["cost_with"] == pytest.approx(1.0)
    assert found["kappa", "reads_digit", first]["cost_without"] == pytest.approx(0.1)
    assert found["net", "reads_digit", first]["cost_with"] == pytest.approx((1.0 + 0.4 + 0.3) / 3)
    assert np.isnan(found["kappa", "reads_digit", second]["correlation"])  # there it never varies
    assert np.isnan(found["rho", "reads_digit", first]["correlation"])
    assert record["within_step"] == pytest.approx(1.0, abs=0.05)  # digits come at all steps alike
    step = found["kappa", "step", first]
    assert np.isnan(step["within_step"])  # nothing of it is left
    habit = found["rho", "step", second]
    assert habit["correlation"] < -0.5
    assert np.isnan(habit["within_step"])
    assert np.isnan(found["rho", "reads_digit", second]["within_step"])
    both = found["kappa", "reads_digit", "all"]
    assert both["correlation"] == pytest.approx(np.sqrt(0.5))  # half the variance of the digits is met
    other = found["kappa", "predicts_digit", first]
    assert other["correlation_low"] < 0 < other["correlation_high"]
    assert {r[1] for r in found} == {
        *(f"{side}_{kind}" for side in ("reads", "predicts") for kind in analyse.KINDS),
        "dense_entropy", "dense_surprise", "step",
    }  # fmt: skip


def test_over_fixed_by_hand():
    """`clock` is 0.5 ahead of `fixed` at one budget and 0.25 behind at the other, whose order differs."""

    def job(*logp):
        columns = np.broadcast_to(np.array(logp)[None, None, :, None], (6, 1, len(logp), 3))
        return EntryScores(columns, columns[..., :0], np.zeros(columns.shape, int))

    one, two = (0.5, 0.7), (0.2, 0.4)
    jobs = {("fixed", ""): ([one, two], job(-2.0, -3.0)), ("clock", ""): ([two, one], job(-3.25, -1.5))}
    jobs |= {
        ("dense", ""): ([], job(-1.0)),
        ("random0", ""): ([one], job(-4.0)),
        ("clock", "rho"): ([one], job(0)),
    }
    found = analyse.over_fixed(CachedScores({}, np.zeros((6, 9), int), np.arange(6), jobs), "x")
    assert {(r["run"], r["controller"], r["budget"]): r["gain"] for r in found} == {
        ("x", "clock", "0.2/0.4"): -0.25,
        ("x", "clock", "0.5/0.7"): 0.5,
    }
    assert found[1]["gain_low"] == 0.5


def test_scores_are_read_back(folders, tiny_session):
    scored = read_folder(folders[0])
    assert scored.tokens_NxM.shape == (5, tiny_session.setup.episode.block_length)
    assert set(scored.groups) == {(name, "") for name in ("policy", "dense", "fixed", "random0", "random1")}
    asked, scores = scored.groups["random1", ""]
    assert asked == [BUDGETS[1]] * 3
    assert scores.logp_NxWxJxT.shape == (5, 1, 3, 4)
    costs = analyse.step_costs(scored, scores)
    expected = tiny_session.setup.space.costs_AxX[scores.action_NxWxJxT]
    for x, name in enumerate(("kappa", "rho", "eta")):
        np.testing.assert_allclose(costs[name], expected[..., x], rtol=1e-6)
    np.testing.assert_allclose(costs["net"], expected.mean(-1), rtol=1e-6)


def test_incomplete_groups_are_passed_over(folders, tmp_path):
    import shutil

    copy = shutil.copytree(folders[0], tmp_path / "copy")
    next(copy.glob("fixed-*/batch-0001-*.npz")).unlink()
    assert ("fixed", "") not in read_folder(copy).groups
    (copy / "blocks.npz").unlink()
    with pytest.raises(UserError, match="is not a whole folder of scores"):
        read_folder(copy)


def test_spending_as_a_program(folders, tiny_folder, tmp_path):
    output = tmp_path / "spending.csv"
    analyse.main(["spending", "--scores", str(folders[0]), "--output", str(output)])
    head, *lines = output.read_text().splitlines()
    ends = ("", "_low", "_high")
    columns = [
        "axis",
        "feature",
        "budget",
        *(f"{m}{e}" for m in ("correlation", "within_step") for e in ends),
    ]
    assert head.split(",") == [*columns, "cost_with", "cost_without"]
    assert len(lines) == 4 * 11 * 3
    assert any(line.startswith("net,reads_word_start,0.3/0.6/0.5,") for line in lines)


# --- effect ------------------------------------------------------------------------------------------


def test_the_effect_of_nothing_is_nothing(folders):
    scored = read_folder(folders[0])
    for record in analyse.effect(scored, scored, "same"):
        assert record["shift"] == record["shift_low"] == record["shift_high"] == 0
        assert record.get("gain_shift", 0) == 0


def test_the_effect_of_a_stale_prefill(folders, tmp_path):
    clean, stale = map(read_folder, folders)
    found = analyse.effect(clean, stale, "stale")
    assert [(record["budget"], record["controller"]) for record in found] == [
        (f"{a:g}/{b:g}/{c:g}", name) for a, b, c in BUDGETS for name in ("policy", "fixed", "random")
    ]
    mine, fixed, _ = found[:3]
    scores = [
        scored.groups["policy", ""][1].logp_NxWxJxT[:, 0, 0].mean(dtype=float) for scored in (clean, stale)
    ]
    assert mine["shift"] == pytest.approx(scores[1] - scores[0])
    assert any(record["shift"] != 0 for record in found)
    assert fixed["gain_after"] - fixed["gain_before"] == pytest.approx(fixed["gain_shift"])
    assert fixed["gain_shift"] == pytest.approx(mine["shift"] - fixed["shift"])
    args = ["effect", "--scores", str(folders[0]), "--others", str(folders[1]), "--label", "stale"]
    analyse.main([*args, "--output", str(tmp_path / "stale.csv")])
    assert (tmp_path / "stale.csv").read_text().count("\nstale,") == 6


def test_effects_on_different_text_are_refused(folders, tmp_path):
    import dataclasses

    scored = read_folder(folders[0])
    other = dataclasses.replace(scored, tokens_NxM=scored.tokens_NxM + 1)
    with pytest.raises(UserError, match="different text"):
        analyse.effect(scored, other, "")
    for args, expected in (
        (["effect", "--scores", str(folders[0])], "give one folder of scores, not 0"),
        (["wins"], "there is nothing to analyse"),
    ):
        with pytest.raises(SystemExit) as ended:
            analyse.main([*args, "--output", str(tmp_path / "x.csv")])
        assert ended.value.code == 2, expected
