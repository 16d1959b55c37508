"""The evaluation program: its CSV, what it refuses, and that a killed sweep goes on."""

import csv
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from in_process import run_program

from sol_jax.errors import UserError
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.comparison import ComparisonPlan
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.evaluation.provenance import open_text, refuse_training_text, training_documents
from sol_jax.evaluation.report import compare_quietly, evaluate, report_run
from sol_jax.rl.train_step import init_state
from sol_jax.runs import policy_files
from sol_jax.runs.checkpoints import Checkpoints
from sol_jax.runs.trained_policy import open_run, policy_of_run
from sol_jax.text.blocks import evaluation_batches

ROOT = pathlib.Path(__file__).parents[2]
EVALUATE = "sol_jax.evaluate"
BUDGETS = ((0.3, 0.6, 0.5), (0.7, 0.8, 0.75))
FIELDS = {"eval.budgets": BUDGETS, "eval.num_random": 3, "eval.batch_size": 2, "eval.num_test_blocks": 5}
AXES = ("kappa", "rho", "eta")


@pytest.fixture(scope="module")
def session(tiny_folder, tiny_session):
    return dataclasses.replace(tiny_session, config=tiny.config_for(tiny_folder, **FIELDS))


@pytest.fixture(scope="module")
def state(session):
    return init_state(jax.random.key(0), session.setup)


@pytest.fixture
def workdir(session, state, tmp_path):
    """A run with one checkpoint."""
    checkpoints = Checkpoints(tmp_path / "run", session.config.flat(), keep=1)
    checkpoints.save(1, state, {"position": 0}, 0.0)
    checkpoints.close()
    return tmp_path / "run"


def command(*args):
    return [sys.executable, "-m", EVALUATE, *map(str, args)]


def told(ended):
    """The one line of a refusal."""
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# --- text --------------------------------------------------------------------------------------------


def test_training_text_is_refused_by_name(tiny_folder, session, tmp_path):
    """One article of the training text among new ones; each is told by title and hash."""
    lines = (tiny_folder / "corpus.jsonl").read_text().splitlines()
    trained = set(session.blocks["train"].documents)
    from sol_jax.text.documents import Document, document_hashes

    def is_trained(line):
        return document_hashes([Document(json.loads(line)["text"], "")])[0] in trained

    leak = next(line for line in lines if is_trained(line))
    text = tmp_path / "text.jsonl"
    fresh = json.dumps({"text": "a new text about walls " * 30})
    text.write_text(fresh + "\n" + json.dumps(json.loads(leak) | {"title": "Grey Birds"}) + "\n")
    config = session.config
    other = open_text(config, str(text), "")
    assert list(other.blocks) == ["test"]
    documents = training_documents(config, other)
    assert set(documents) == {name[: policy_files.HASH_LENGTH] for name in trained}
    with pytest.raises(UserError) as mistake:
        refuse_training_text(other, "test", documents)
    assert "holds documents that the policy was trained on: 'Grey Birds' (sha256 " in str(mistake.value)
    # The very text that it was trained on, by the name that the run has for it.
    whole = open_text(config, config.data.source, config.data.document_start)
    assert set(training_documents(config, whole)) == set(documents)
    with pytest.raises(UserError, match="documents that the policy was trained on"):
        refuse_training_text(whole, "test", documents)
    text.write_text(fresh + "\n")
    refuse_training_text(open_text(config, str(text), ""), "test", documents)
    refuse_training_text(session, "test", documents)
    with pytest.raises(UserError, match="the train text of"):
        refuse_training_text(session, "train", documents)


# --- the program ---------------------------------------------------------------------------------------


def test_the_command_reproduces_the_report(session, state, workdir, capsys):
    """results.csv of a run, by the program and in the process."""
    rows = report_run(session, state._replace(step=1), workdir)
    shown = capsys.readouterr().out
    written = (workdir / "results.csv").read_text()
    records = list(csv.DictReader(written.splitlines()))
    assert [record["controller"] for record in records] == [row.controller for row in rows]
    assert [record["controller"] for record in records] == [
        "policy", "fixed", "random", "random_best", "dense"
    ] * 2  # fmt: skip
    assert list(records[0]) == [
        "controller", "held", "along", *(f"requested_{axis}" for axis in AXES),
        *(f"cost_{axis}" for axis in AXES), "net", "bytes", "flops", "nats", "perplexity",
        "gain", "gain_low", "gain_high", "tokens", "documents",
        *(f"levels_{axis}" for axis in AXES), "run", "updates", "model", "prefix", "horizon", "text",
        "protect", "restate", "one_budget", "blocks", "seed", "config", "text_digest", "weights", "tokenizer",
        "commit", "run_updates", "stale_prefill", "num_random", "note",
    ]  # fmt: skip
    assert {record["blocks"] for record in records} == {"5"}
    noted = {record["controller"] for record in records if "favours it" in record["note"]}
    assert noted == {"random_best"}
    for row in rows:
        assert row.nats == pytest.approx(np.log(row.perplexity))
        assert row.controller == "policy" or row.gain_low <= row.gain <= row.gain_high
        assert row.net == pytest.approx(np.mean(row.cost))

    before = {p: p.read_bytes() for p in (workdir / "checkpoints").rglob("*") if p.is_file()}
    (workdir / "results.csv").unlink()
    ended = subprocess.run(
        command("--workdir", workdir), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"evaluating the policy of update 1\n{shown}"
    again = (workdir / "results.csv").read_text()
    assert again == written
    assert len(results.read(workdir / "results-draws.csv")) == 6
    assert {p: p.read_bytes() for p in (workdir / "checkpoints").rglob("*") if p.is_file()} == before


def finished(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("batch-*.npz"))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(workdir, tmp_path):
    """Killed in the middle, it ends with the very CSV of an undisturbed one, and repeats nothing."""
    args = ("--workdir", workdir, "--controllers", "fixed,random,entropy", "--num_random", 40, "--output")
    whole, torn = tmp_path / "whole.csv", tmp_path / "torn.csv"
    assert run_program(EVALUATE, *args, whole).returncode == 0
    process = subprocess.Popen(command(*args, torn), cwd=ROOT, stderr=subprocess.DEVNULL)
    folder, deadline = tmp_path / "torn.scores", time.monotonic() + 120
    while len(finished(folder)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the sweep was over before it could be killed"
    kept = {name: (folder / name).stat().st_mtime_ns for name in finished(folder)}
    assert len(kept) >= 5
    assert not torn.exists()
    ended = run_program(EVALUATE, *args, torn)
    assert ended.returncode == 0, ended.stderr
    assert torn.read_text() == whole.read_text()
    assert finished(folder) == finished(tmp_path / "whole.scores")
    for name, stamp in kept.items():
        assert (folder / name).stat().st_mtime_ns == stamp


def test_a_policy_by_folder(session, state, workdir, tmp_path):
    """Saved in bfloat16 and loaded by the program, on another text, beside a heuristic."""
    about = {
        "title": "tiny/test", "model": "tiny", "command": "none", "updates": 7, "seed": 0, "commit": "abc",
        "documents": policy_files.document_names(session.blocks["train"].documents), "results": [],
    }  # fmt: skip
    policy_files.save_policy(tmp_path / "policy", state.params, session.config, about)
    text = tmp_path / "other.txt"
    text.write_text("".join(f"= {n} =\n" + "new words on walls and birds " * 9 + "\n" for n in range(4)))
    output = tmp_path / "other.csv"
    args = ("--policy", tmp_path / "policy", "--source", text, "--document_start", "^= .* =$")
    asked = ("--grid", "1", "--protect", "--prefix_len", "29")
    ended = run_program(
        EVALUATE, *args, "--output", output, "--controllers", "drift", "--hold", "rho", *asked
    )
    assert ended.returncode == 0, ended.stderr
    rows = results.read(output)
    assert [row["controller"] for row in rows[:3]] == ["policy", "drift", "dense"]
    assert [row["held"] for row in rows] == [""] * 21 + ["rho"] * 21  # 1 + 3 * 2 budgets
    said = {(row["updates"], row["text"], row["documents"], row["protect"], row["restate"]) for row in rows}
    assert said == {("7", "other.txt:test", "4", "True", "False")}
    assert {row["prefix"] for row in rows} == {"29"}
    refused = run_program(EVALUATE, *args, "--output", output, "--restate", *asked)
    assert refused.returncode != 0
    assert "holds results of restate 'False', and these are of 'True'" in refused.stderr


def test_texts_of_one_name_and_different_content_share_no_csv(session, workdir, tmp_path):
    """Nor do a model and another of its name; a copy of the text elsewhere is the same text."""
    folders = {name: tmp_path / name for name in ("first", "copy", "second")}
    for name, folder in folders.items():
        folder.mkdir()
        words = "walls and birds " if name == "second" else "birds and walls "
        lines = [json.dumps({"text": f"{n} new words on {words}" * 9}) + "\n" for n in range(3)]
        (folder / "text.jsonl").write_text("".join(lines))
    output = tmp_path / "out.csv"

    def scored(name):
        source = str(folders[name] / "text.jsonl")
        asked = {"source": source, "output": str(output), "controllers": ("fixed",), "num_blocks": 2}
        return evaluate(EvaluateOptions(str(workdir), **asked))

    scored("first")
    first = results.read(output)
    assert {row["text"] for row in first} == {"text.jsonl:test"}
    scored("copy")
    assert results.read(output) == first
    with pytest.raises(UserError) as mistake:
        scored("second")
    told_of = f"{output} holds results of text_digest {first[0]['text_digest']!r}, and these are of "
    assert str(mistake.value).startswith(told_of)
    assert str(mistake.value).endswith("; name another --output")
    assert results.read(output) == first
    assert {row["weights"] for row in first} == {session.identity["weights"]}
    assert {row["tokenizer"] for row in first} == {session.identity["tokenizer"]}


@pytest.mark.parametrize(("given", "said"), [((), "3"), (("--norestate",), "False")])
def test_a_policy_is_asked_as_it_was_trained_on_any_run_s_text(
    given, said, session, state, workdir, tmp_path
):
    config = session.config.with_fields({"policy.restate": True, "policy.restate_steps": 3})
    about = {
        "title": "tiny/restated", "model": "tiny", "command": "none", "updates": 7, "seed": 0, "commit": "a",
        "documents": policy_files.document_names(session.blocks["train"].documents), "results": [],
    }  # fmt: skip
    policy_files.save_policy(tmp_path / "policy", state.params, config, about)
    output = tmp_path / "asked.csv"
    args = ("--policy", tmp_path / "policy", "--workdir", workdir, "--controllers", "fixed", *given)
    ended = run_program(EVALUATE, *args, "--output", output)
    assert ended.returncode == 0, ended.stderr
    assert {row["restate"] for row in results.read(output)} == {said}


def test_one_budget_for_all_axes(session, tmp_path):
    """Asked as one sum, a policy may split it: the sum is met, and `best_fixed` has the same sum."""
    config = session.config.with_fields({"policy.predict_losses": True})
    setup, run = config.setup(session.setup.model), tmp_path / "run"
    state, levels = init_state(jax.random.key(0), setup), setup.policy.level_costs
    # What levels lose, on axes that differ: the last can save all that is asked for nothing.
    loss = np.concatenate(
        [weight * (1.0 - np.array(c)) for weight, c in zip((5, 1, 0), setup.policy.level_costs, strict=True)]
    )
    params = {**state.params, "prices": {**state.params["prices"], "loss": jnp.asarray(loss)}}
    about = {
        "title": "tiny/one", "model": "tiny", "command": "none", "updates": 7, "seed": 0, "commit": "a",
        "documents": policy_files.document_names(session.blocks["train"].documents), "results": [],
    }  # fmt: skip
    policy_files.save_policy(run, params, config, about)
    output = tmp_path / "one.csv"
    asked = EvaluateOptions(
        policy=str(run), output=str(output), one_budget="net", budgets="0.4;0.6", controllers=("best_fixed",),
        num_blocks=4,
    )  # fmt: skip
    evaluate(asked)
    found = results.read(output)
    assert {row["one_budget"] for row in found} == {"net"}
    assert [row["controller"] for row in found] == ["policy", "best_fixed", "dense"] * 2
    for policy, best in zip(found[0::3], found[1::3], strict=True):
        assert float(best["net"]) == pytest.approx(float(policy["net"]), abs=0.01)
        # What is saved in all is saved on eta first, which is free, and on kappa last, which is dearest.
        left = 3 * (1 - float(policy["net"]))
        assert left > 0.1
        for axis, low in zip(("eta", "rho", "kappa"), (costs[0] for costs in reversed(levels)), strict=True):
            saved = min(left, 1 - low)
            assert float(best[f"cost_{axis}"]) == pytest.approx(1 - saved, abs=0.02), axis
            left -= saved
    with pytest.raises(UserError, match=r"no price makes a step cost 0\.01; with these levels it costs"):
        evaluate(dataclasses.replace(asked, budgets="0.01"))


REFUSED = {
    "no run": (("--workdir", "{tmp}"), "config.json cannot be read"),
    "nothing": ((), "give --workdir RUN or --policy NAME"),
    "no output": (("--policy", "tiny"), "give --output FILE.csv with --policy"),
    "unknown policy": (("--policy", "none/such", "--output", "x.csv"), "there is no policy 'none/such'"),
    "unknown flag": (("--workdir", "{run}", "--number", "3"), "number"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_once(name, workdir, tmp_path):
    args, expected = REFUSED[name]
    ended = run_program(EVALUATE, *(arg.format(tmp=tmp_path, run=workdir) for arg in args))
    assert expected in told(ended)


def test_a_run_without_a_checkpoint(session, tmp_path):
    Checkpoints(tmp_path, session.config.flat(), keep=1).close()
    message = told(run_program(EVALUATE, "--workdir", tmp_path))
    assert message == (
        f"error: {tmp_path} holds no checkpoint; --workdir must be the folder of a training run"
    )


def test_a_run_from_before_a_field_was_added(session, workdir):
    """It is evaluated with that field's default, though its checkpoints do not know it."""
    own = json.loads((workdir / "config.json").read_text())
    del own["kernels"]
    bare = workdir.parent / "bare"
    checkpoints = Checkpoints(bare, own, keep=1)
    checkpoints.save(4, init_state(jax.random.key(1), session.setup), {"position": 0}, 0.0)
    checkpoints.close()
    config, checkpoints = open_run(bare)
    assert config.kernels == "auto"
    assert policy_of_run(checkpoints, config, session.setup, "bare").updates == 4


def test_another_checkpoint_than_the_best(session, tmp_path):
    checkpoints = Checkpoints(tmp_path, session.config.flat(), keep=2)
    for step, score in ((1, 0.5), (2, 0.1)):
        checkpoints.save(step, init_state(jax.random.key(step), session.setup), {"position": 0}, score)
    checkpoints.close()
    config, checkpoints = open_run(tmp_path)
    taken = {step: policy_of_run(checkpoints, config, session.setup, "x", step) for step in (None, 2)}
    assert [policy.updates for policy in taken.values()] == [1, 2]
    with pytest.raises(UserError, match=r"no checkpoint of step 3; the steps are \[1, 2\]"):
        policy_of_run(checkpoints, config, session.setup, "x", 3)


def test_plans(session):
    config, setup = session.config, session.setup
    plan = EvaluateOptions().plan(config, setup)
    assert plan == ComparisonPlan(BUDGETS, ("fixed", "random"), 3, (0, 1), (), 0)
    asked = EvaluateOptions(grid=20, random_budgets=6, num_random=500, hold=("eta",), seed=3)
    plan = asked.plan(config, setup)
    assert len(plan.budgets) == 50
    assert plan.random_at == (1, 5, 8, 11, 15, 18)  # of the diagonal
    assert plan.along == ("",) * 20 + ("kappa",) * 10 + ("rho",) * 10 + ("eta",) * 10
    assert (plan.num_random, plan.hold, plan.seed) == (500, ("eta",), 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"controllers": ("fixt",)},
            "--controllers: there is no 'fixt'; there are fixed, best_fixed, fixed_official",
        ),
        ({"hold": ("tau",)}, "--hold: there is no axis 'tau'; the axes are kappa, rho, eta"),
        ({"budgets": "0.5,0.5,0.5", "grid": 3}, "give --budgets or --grid, not both"),
        ({"budgets": "0.05,0.5,0.5"}, "--budgets: kappa = 0.05 cannot be met"),
        ({"budgets": "0.7"}, "--budgets='0.7' must be costs of kappa, rho, eta"),
        ({"controllers": ("best_fixed",)}, "best_fixed splits one budget for all axes; give --one_budget"),
    ],
)
def test_plans_that_are_refused(session, given, expected):
    with pytest.raises(UserError) as mistake:
        EvaluateOptions(**given).plan(session.config, session.setup)
    assert expected in str(mistake.value)


def test_compare_for_training(session, state):
    batches = list(evaluation_batches(session.split("test"), 2, 3))
    rows = compare_quietly(session.weights, state.params, batches, BUDGETS, 2, session.setup)
    assert [row.controller for row in rows] == ["policy", "fixed", "random", "random_best", "dense"] * 2
    np.testing.assert_allclose([row.requested for row in rows[::5]], BUDGETS)
