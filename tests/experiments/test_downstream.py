"""Downstream tasks: how items are rendered, a sweep on a tiny model that is killed and goes on, mistakes."""

import csv
import json
import math
import pathlib
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from experiments.tasks import downstream, item_records, prompts
from experiments.tasks import sweep as task_sweep
from experiments.tasks.item_records import ItemRecord
from experiments.tasks.sweep import TaskRun
from sol_jax.errors import UserError
from sol_jax.evaluation.statistics import mcnemar, wilson
from sol_jax.generation.load_engine import open_engine
from sol_jax.models.tokenizer import load_tokenizer
from sol_jax.rl.train_step import init_state
from sol_jax.runs import policy_files

ROOT = pathlib.Path(__file__).parents[2]
FILES = {
    "arc_easy/test.jsonl": [
        {"id": f"arc/{n}", "question": "the cat sat on a", "choices": [f"mat {n}", " seven"], "answer": n % 2}
        for n in range(4)
    ],
    "winogrande/dev.jsonl": [
        {
            "id": f"wino/{n}",
            "question": "the cat saw the mat as _ sat.",
            "choices": ["it", "a"],
            "answer": n % 2,
        }
        for n in range(4)
    ],
    "mmlu/test.jsonl": [
        {"id": f"mmlu/{s}", "subject": s, "question": " grey? ", "choices": ["birds", "fly"], "answer": 0}
        for s in (*prompts.SUBJECTS, "another")
    ],
    "gsm8k/test.jsonl": [
        {"id": "g", "question": "1+1?", "answer_text": "It is <<1+1=2>>2.\n#### 2", "answer_number": 1200}
    ],
    "gsm8k/cot8.jsonl": [
        {"id": "c", "question": "0+1?", "answer_text": "1. The answer is 1.", "answer_number": 1}
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, items in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.fixture(scope="module")
def options(tiny_folder, tiny_session, data, tmp_path_factory):
    """What the command line would give, for an untrained policy of the tiny session."""
    folder = tmp_path_factory.mktemp("policy") / "named"
    about = {"title": "named", "model": "model", "documents": [], "updates": 0, "seed": 0}
    about |= {"command": "none", "commit": "none"}
    params = jax.jit(lambda key: init_state(key, tiny_session.setup).params)(jax.random.key(0))
    policy_files.save_policy(folder, params, tiny_session.config, about)
    return types.SimpleNamespace(
        policy=str(folder), data=data, output=tmp_path_factory.mktemp("out") / "x.csv", budgets="0.5,0.7,0.6",
        model=str(tiny_folder / "model"), tasks="arc_easy", limit=0, random=2, seed=0,
        batch_size=4, dtype="float32", kernels="auto",
    )  # fmt: skip


def test_rendering(data):
    """As the harness' own task files render the same items (also compared in tests/parity)."""
    arc = prompts.load(data, "arc_easy")[1]
    context = "Question: the cat sat on a\nAnswer:"
    assert arc.pairs == ((context, " mat 1"), (context, "  seven"))
    assert (arc.answer, arc.lengths) == (1, (5, 6))
    wino = prompts.load(data, "winogrande")[0]
    assert wino.pairs == (("the cat saw the mat as it", " sat."), ("the cat saw the mat as a", " sat."))
    assert wino.lengths == ()
    (mmlu,) = prompts.load(data, "mmlu_high_school_chemistry")
    said = "The following are questions (with answers) about high school chemistry.\n\n"
    assert mmlu.pairs[0] == (f"{said}Question: grey?\nAnswer:", " birds")
    (gsm,) = prompts.load(data, "gsm8k")
    assert gsm.pairs == (("Q: 0+1?\nA: 1. The answer is 1.\n\nQ: 1+1?\nA:", " It is 2. The answer is 1200."),)
    assert prompts.is_right("So ... The answer is 1,200. Then", gsm)
    assert not prompts.is_right("The answer is 12. The answer is 1200.", gsm)
    assert not prompts.is_right("1200", gsm)
    assert prompts.named(["piqa", "mmlu"]) == ["piqa", *(f"mmlu_{s}" for s in prompts.SUBJECTS)]


def test_spaces_belong_to_the_continuation(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder / "model")
    found = prompts.encode(tokenizer, "a cat  ", "sat", 100)
    assert tokenizer.decode(list(found.context)) == "a cat"
    assert tokenizer.decode(list(found.tokens)) == "  sat"
    assert len(prompts.encode(tokenizer, "a cat", " sat", 6).context) == 3


def test_a_sweep_and_its_rows(options, capsys):
    """All rows from the records, by hand; killed in mid-line and started again, the same bytes."""
    downstream.downstream(options)
    with open(options.output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["controller"] for r in rows] == ["policy", "fixed", "dense", "random_best"]
    assert {r["task"] for r in rows} == {"arc_easy"}
    items = options.output.parent / "x-items"
    files = {path.name: path.read_bytes() for path in items.iterdir()}
    assert len(files) == 1 + 1 + 1 + 2
    by_name = {n.rsplit("-", 1)[0]: item_records.read(items / n) for n in files if "random" not in n}
    policy, fixed = by_name["arc_easy-policy"], by_name["arc_easy-fixed"]
    assert sorted(record.item for record in policy) == [f"arc/{n}" for n in range(4)]
    first = rows[0]
    right = [record.right for record in policy]
    assert float(first["accuracy"]) == np.mean(right)
    assert float(first["accuracy_low"]) == pytest.approx(wilson(sum(right), 4)[0], abs=1e-6)
    assert float(first["cost_kappa"]) == pytest.approx(
        sum(r.cost[0] for r in policy) / sum(r.steps for r in policy), abs=1e-6
    )
    # The fixed schedule meets what the policy realised, to one step of all.
    steps = sum(record.steps for record in policy)
    for axis in ("kappa", "rho", "eta"):
        assert abs(float(rows[1][f"cost_{axis}"]) - float(first[f"cost_{axis}"])) <= 1.0 / steps
    assert float(rows[1]["accuracy_p"]) == mcnemar(
        np.array([r.right for r in sorted(policy)]), np.array([r.right for r in sorted(fixed)])
    )
    nats = -sum(r.logp[r.answer] for r in fixed) / sum(r.tokens for r in fixed)
    assert float(rows[1]["nats"]) == pytest.approx(nats, rel=1e-5)
    assert float(rows[1]["gain"]) == pytest.approx(nats - float(first["nats"]), abs=1e-5)
    assert rows[2]["net"] == "1"
    assert (rows[2]["bytes"], rows[2]["flops"]) == ("1", "1")
    assert float(first["bytes"]) > 0
    assert first["accuracy_norm"]
    assert "random_best" in capsys.readouterr().out

    damaged = next(path for path in items.iterdir() if path.name.startswith("arc_easy-policy"))
    damaged.write_bytes(files[damaged.name][: len(files[damaged.name]) // 2])
    before = options.output.read_bytes()
    downstream.downstream(options)
    again = {path.name: path.read_bytes() for path in items.iterdir()}
    assert again.keys() == files.keys()
    for mine, other in zip(item_records.read(damaged), policy, strict=True):
        assert mine.logp == pytest.approx(other.logp, abs=1e-4)
    assert len(options.output.read_bytes()) == pytest.approx(len(before), abs=20)


def test_two_processes_share_a_sweep_that_goes_on(options, tmp_path):
    """With records of a killed one: what one process writes, and only the first writes and speaks."""
    given = vars(options) | {"output": tmp_path / "x.csv", "random": 0}
    downstream.downstream(types.SimpleNamespace(**given))
    alone = {path.name: item_records.read(path) for path in (tmp_path / "x-items").iterdir()}
    (tmp_path / "x.csv").unlink()
    kept = None
    for path in (tmp_path / "x-items").iterdir():
        if "policy" in path.name:  # half of it is there
            kept = path.read_bytes()[: path.stat().st_size // 2]
            path.write_bytes(kept)
        else:
            path.unlink()
    assert kept
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "experiments.tasks.downstream", f"--coordinator=127.0.0.1:{port}"]
    command += ["--num_processes=2", *(f"--{name}={value}" for name, value in given.items())]
    both = [
        subprocess.Popen(
            [*command, f"--process_id={n}"],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for n in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert "fixed" in told[0][0]
    assert "fixed" not in told[1][0]
    found = {path.name: item_records.read(path) for path in (tmp_path / "x-items").iterdir()}
    policy = next(name for name in alone if "policy" in name)
    assert (tmp_path / "x-items" / policy).read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    # Schedules are matched to realised costs, whose last digits may differ, and so their names.
    assert len(found) == len(alone)
    for mine, other in zip(found[policy], alone[policy], strict=True):
        assert mine.item == other.item
        assert mine.logp == pytest.approx(other.logp, abs=1e-4)
        assert mine.cost == other.cost
    with open(tmp_path / "x.csv", newline="") as file:
        assert [row["controller"] for row in csv.DictReader(file)] == ["policy", "fixed", "dense"]


def test_another_task_is_added_and_another_sample_refused(options, monkeypatch):
    line = {"controller": "policy", "nats": 1.0, "net": 0.5, "bytes": 0.5}
    monkeypatch.setattr(downstream, "rows", lambda sweep, asked, tell: [{"task": sweep.task} | line])
    given = vars(options) | {"output": options.output.with_name("y.csv")}
    for name in ("mmlu_conceptual_physics", "gsm8k", "gsm8k"):
        downstream.downstream(types.SimpleNamespace(**given | {"tasks": name}))
    with open(given["output"], newline="") as file:
        assert [row["task"] for row in csv.DictReader(file)] == ["mmlu_conceptual_physics", "gsm8k"]
    with pytest.raises(UserError, match="holds results of limit '0', and these are of '1'"):
        downstream.downstream(types.SimpleNamespace(**given | {"limit": 1}))


def test_answers_are_written(options, monkeypatch, tmp_path):
    """A free answer under a schedule: what was written and spent; a second run finds the record."""
    monkeypatch.setattr(task_sweep, "NEW_TOKENS", 12)
    policy = open_engine(options.model, options.policy, "policy")
    under = downstream.engines(policy)
    items = prompts.load(options.data, "gsm8k_answers")
    sweep = task_sweep.TaskSweep("gsm8k_answers", items, under, tmp_path, 4, 0, 0)
    told: list[int] = []
    (found,) = sweep.run(TaskRun("fixed", (0.5, 0.7, 0.6)), told.append)
    assert (found.right, found.logp, found.right_norm) == (False, (), None)
    assert 0 < found.tokens <= 12
    assert found.steps == found.tokens - 1  # the first is the prefill's
    assert 0 < len(found.text) <= 12  # bytes, of which some may be no character
    assert 0 < found.work[0] != found.dense_work[0]
    assert sweep.run(TaskRun("fixed", (0.5, 0.7, 0.6)), told.append) == [found]
    assert told == [1]
    line = downstream.row("gsm8k_answers", "fixed", dict.fromkeys("abc", 0.5), [found], [found])
    assert (line["accuracy"], line["nats"]) == (0.0, "")


def test_the_sample_is_seeded():
    examples = [prompts.Example(f"{n}", (("a" * n, "b"),)) for n in range(20)]
    first = downstream.sample(examples, 5, 0)
    assert first == downstream.sample(examples, 5, 0) != downstream.sample(examples, 5, 1)
    assert set(first) < set(downstream.sample(examples, 9, 0))  # more items hold the fewer
    assert [len(e.pairs[0][0]) for e in first] == sorted((len(e.pairs[0][0]) for e in first), reverse=True)
    assert len(downstream.sample(examples, 0, 0)) == 20


def test_rows_by_hand():
    """Two items of 1 and 3 tokens: the policy is right on both, the other on one."""

    def record(name, right, logp, tokens):
        return ItemRecord(
            name, right, None, (logp, -9.0), tokens, 0, (1.0, 2.0), 4, (10.0, 5.0), (20.0, 50.0)
        )

    policy = [record("a", True, -1.0, 1), record("b", True, -3.0, 3)]
    other = [record("a", False, -2.0, 1), record("b", True, -6.0, 3)]
    line = downstream.row("t", "fixed", {"x": 0.3, "y": 0.6}, other, policy)
    assert (line["cost_x"], line["cost_y"], line["net"]) == (0.25, 0.5, 0.375)
    assert (line["bytes"], line["flops"]) == (0.5, 0.1)
    assert (line["accuracy"], line["accuracy_p"]) == (0.5, 1.0)
    assert (line["nats"], line["gain"]) == (2.0, 1.0)
    assert "accuracy_norm" not in line  # a task without lengths
    alone = [r._replace(logp=r.logp[:1]) for r in policy]  # a reference solution is always right
    assert "accuracy" not in downstream.row("t", "policy", {"x": 0.3, "y": 0.6}, alone, alone)
    assert "accuracy_p" not in downstream.row("t", "policy", {"x": 0.3, "y": 0.6}, policy, policy)
    assert math.isnan(downstream.row("t", "fixed", {"x": 0.3, "y": 0.6}, other[:1], policy[:1])["gain_low"])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: "),
        ("[]", "line 2: an item must be a JSON object"),
        ('{"id": "x", "question": "q", "choices": ["a"], "answer": 0}', "must be two texts or more"),
        ('{"id": "x", "question": "q", "choices": ["a", ""], "answer": 0}', "must be two texts or more"),
        (
            '{"id": "x", "question": "q", "choices": ["a", "b"], "answer": 2}',
            "is 2, and its choices are 0 to 1",
        ),
        ('{"id": "x", "choices": ["a", "b"], "answer": 1}', "'question' is None"),
        ('{"id": "x", "question": "q", "choices": ["a", "b"], "answer": true}', "'answer' is True"),
        (json.dumps(FILES["arc_easy/test.jsonl"][0]), "is that of an earlier item"),
    ],
)
def test_malformed_items_name_file_and_line(tmp_path, line, told):
    (tmp_path / "arc_easy").mkdir()
    good = json.dumps(FILES["arc_easy/test.jsonl"][0])
    (tmp_path / "arc_easy" / "test.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError) as mistake:
        prompts.load(tmp_path, "arc_easy")
    message = str(mistake.value)
    assert str(tmp_path / "arc_easy" / "test.jsonl") in message
    assert "line 2" in message
    assert told in message
    assert "\n" not in message


def test_other_mistakes(tmp_path, data, options):
    with pytest.raises(UserError, match="there is no task 'arc_hard'; tasks are arc_easy"):
        prompts.named(["arc_easy", "arc_hard"])
    with pytest.raises(
        UserError, match=r"piqa/valid.jsonl cannot be read \(no such file or directory\); --data"
    ):
        prompts.load(data, "piqa")
    (tmp_path / "winogrande").mkdir()
    item = FILES["winogrande/dev.jsonl"][0] | {"question": "no gap"}
    (tmp_path / "winogrande" / "dev.jsonl").write_text(json.dumps(item))
    with pytest.raises(UserError, match="line 1: the item's 'question' must have one _"):
        prompts.load(tmp_path, "winogrande")
    with pytest.raises(UserError, match="--limit, --random and --seed must be at least 0"):
        downstream.downstream(types.SimpleNamespace(**vars(options) | {"seed": -1}))
    with pytest.raises(UserError, match="--budgets"):
        downstream.downstream(types.SimpleNamespace(**vars(options) | {"budgets": "0.5,0.7"}))
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"bad.jsonl is damaged; delete it"):
        item_records.read(tmp_path / "bad.jsonl")


def test_the_command_line_says_it_in_one_sentence(data):
    command = [sys.executable, "-m", "experiments.tasks.downstream", "--policy", "none", "--data", str(data)]
    command += ["--output", "x.csv", "--tasks", "hellaswag"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: there is no task 'hellaswag'")
    assert TaskRun("dense").budget == ()
