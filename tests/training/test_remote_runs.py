"""A whole run on an object store: killed, resumed, evaluated, published, written with, as one on a disk."""

import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from fake_bucket import fake_buckets
from in_process import ROOT, run_program

from configs import default
from experiments import publish
from sol_jax import digests
from sol_jax.errors import UserError
from sol_jax.evaluation import results_csv
from sol_jax.evaluation.provenance import recall_documents
from sol_jax.evaluation.report import evaluate_policy
from sol_jax.evaluation.score_cache import ScoreCache, read_folder
from sol_jax.files import path_of
from sol_jax.rl.train_step import init_state
from sol_jax.runs import metrics, object_lock
from sol_jax.runs.checkpoints import Checkpoints
from sol_jax.runs.policy_files import load_policy
from sol_jax.training.loop import Interrupted, train

RUN = {
    "train.num_updates": 6,
    "train.checkpoint_every": 2,
    "train.keep": 2,
    "eval.every": 3,
    "eval.num_blocks": 2,
    "eval.num_test_blocks": 2,
    "eval.num_random": 1,
    "eval.budgets": ((0.5, 0.7, 0.6),),
    "optim.accumulate": 2,
    "optim.learning_rate": 1e-3,
}
EVERYTHING = {
    "model.path": "gs://b/model",
    "data.source": "gs://b/text/*.jsonl",
    "data.cache_dir": "gs://b/blocks",
}


@pytest.fixture(scope="module", autouse=True)
def buckets(tiny_folder, tmp_path_factory):
    """Buckets with the model and the corpus of `tiny_folder`, and an empty cache on this machine."""
    folder = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch, fake_buckets(folder / "buckets"):
        patch.setattr(digests, "CACHE_DIR", str(folder / "cache"))
        for name, seconds in {"BEAT": 0.5, "DEAD": 3.0, "SETTLE": 0.1}.items():
            patch.setattr(object_lock, name, seconds)
        for file in (tiny_folder / "model").iterdir():
            at(f"gs://b/model/{file.name}").write_bytes(file.read_bytes())
        at("gs://b/text/corpus.jsonl").write_bytes((tiny_folder / "corpus.jsonl").read_bytes())
        yield folder / "buckets"


def at(url):
    return path_of(url, "a test")


def config_of(folder, **fields):
    return tiny.config_for(folder, **(RUN | fields))


def metrics_of(workdir, without=("speed/",)):
    """Step -> scalars, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {
        line["step"]: {k: v for k, v in line.items() if k != "time" and not k.startswith(without)}
        for line in lines
    }


def learned(session, workdir, config):
    """Step, leaves as bytes and iterator state of the newest checkpoint."""
    checkpoints = Checkpoints(workdir, config.flat(), config.train.keep, read_only=True)
    checkpoints.bind(session.identity | {"documents": session.split("train").fingerprint})
    step, state, iterator = checkpoints.restore(init_state(jax.random.key(1), session.setup))
    state = state._replace(key=jax.random.key_data(state.key))
    named = jax.tree_util.tree_flatten_with_path(state)[0]
    return step, {jax.tree_util.keystr(k): np.asarray(v).tobytes() for k, v in named}, iterator


def rows_of(workdir):
    """The results, without where and when."""
    rows = results_csv.read(workdir / "results.csv")
    return [{name: row[name] for name in ("controller", "nats", "gain", "net", "updates")} for row in rows]


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """The workdir, on this machine, of a run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    train(config_of(tiny_folder), workdir)
    return workdir


@pytest.fixture(scope="module")
def finished(tiny_folder):
    """The workdir of a run that nothing interrupts, with everything on buckets."""
    train(config_of(tiny_folder, **EVERYTHING), "gs://b/finished")
    return at("gs://b/finished")


def test_it_learns_and_reports_what_a_run_on_a_disk_does(tiny_folder, tiny_session, whole, finished):
    ours, theirs = config_of(tiny_folder, **EVERYTHING), config_of(tiny_folder)
    assert learned(tiny_session, finished, ours) == learned(tiny_session, whole, theirs)
    assert metrics_of(finished) == metrics_of(whole)
    assert rows_of(finished) == rows_of(whole)
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "results-draws.csv", "results.csv",
        "training-documents.txt",
    ]  # fmt: skip
    assert recall_documents(finished) == recall_documents(whole) != []


def start(buckets, folder, workdir, *more, **fields):
    told = tiny.flags_for(config_of(folder, **(EVERYTHING | fields)), default.get_config("smoke"))
    program = [sys.executable, "tests/fake_bucket.py", str(buckets), "sol_jax.train"]
    run = ["--config", "configs/default.py:smoke", "--workdir", workdir, *told, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program + run, cwd=ROOT, **pipes)


def wait_for(path, process):
    deadline = time.monotonic() + 240
    while not path.exists() and process.poll() is None:
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_pod_s_notice_ends_the_first(buckets, tiny_folder, monkeypatch):
    workdir, many = at("gs://b/notice"), {"train.num_updates": 10_000, "eval.every": 0}
    process = start(buckets, tiny_folder, str(workdir), **many)
    wait_for(workdir / "checkpoints" / "2.safetensors", process)
    monkeypatch.setattr(object_lock, "DEAD", 45.0)  # it beats every ten seconds
    with pytest.raises(UserError, match=f"gs://b/notice is in use by process {process.pid} on"):
        train(config_of(tiny_folder, **EVERYTHING), workdir)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    step = int(re.search(r"stopped by SIGTERM after update (\d+)", out)[1])
    assert (workdir / "checkpoints" / f"{step}.safetensors").exists()
    assert sorted(metrics_of(workdir)) == list(range(1, step + 1))
    assert not (workdir / "lock").exists()


@pytest.mark.slow
def test_killed_and_resumed_it_ends_as_if_it_had_not_been(buckets, tiny_folder, tiny_session, whole):
    workdir, config = at("gs://b/killed"), config_of(tiny_folder, **EVERYTHING)
    process = start(buckets, tiny_folder, str(workdir))
    wait_for(workdir / "checkpoints" / "2.safetensors", process)
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert (workdir / "lock").exists()  # which nobody has taken away
    newest = max(int(path.stem) for path in (workdir / "checkpoints").iterdir())
    assert set(range(1, newest + 1)) <= set(metrics_of(workdir))  # what came before a checkpoint is there
    train(config, workdir)
    assert learned(tiny_session, workdir, config) == learned(tiny_session, whole, config_of(tiny_folder))
    assert metrics_of(workdir) == metrics_of(whole)
    assert rows_of(workdir) == rows_of(whole)


@pytest.mark.slow
def test_two_processes_share_a_workdir_there(buckets, tiny_folder, tiny_session, whole):
    """The first holds the lock and writes; the other waits with it until the lock of a dead run is free."""
    workdir, unscored = at("gs://b/two"), {"eval.every": 0, "eval.num_test_blocks": 0}
    config = config_of(tiny_folder, **(EVERYTHING | unscored))
    (workdir / "lock").write_text('{"holder": "a dead run"}')
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fields = unscored | {"mesh.chunk": config.grpo.batch_size}  # as the run of one process
    processes = [
        start(
            buckets, tiny_folder, str(workdir), f"--coordinator=localhost:{port}", "--num_processes=2",
            f"--process_id={number}", **fields,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    assert json.loads((workdir / "hosts.json").read_text())["processes"] == 2
    assert not (workdir / "lock").exists()
    assert learned(tiny_session, workdir, config) == learned(tiny_session, whole, config_of(tiny_folder))
    parts = ("speed/", "eval/")
    assert metrics_of(workdir, parts) == metrics_of(whole, parts)


def stop_after_three(writer, num_steps):
    """In place of `periodic_actions`: SIGTERM, as a scheduler's notice comes."""
    return [lambda step: signal.raise_signal(signal.SIGTERM) if step == 3 else None]


@pytest.mark.parametrize("damaged", [False, True])
def test_stopped_and_resumed_it_ends_as_if_it_had_not_been(
    tiny_folder, tiny_session, whole, monkeypatch, damaged, caplog
):
    url = f"gs://b/stopped-{damaged}"
    config = config_of(tiny_folder, **EVERYTHING)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "periodic_actions", stop_after_three)
        with pytest.raises(Interrupted):
            train(config, url)
    steps = sorted(path.name for path in (at(url) / "checkpoints").iterdir())
    assert len(steps) >= 2
    assert not (at(url) / "lock").exists()
    if damaged:
        newest = at(url) / "checkpoints" / steps[-1]
        newest.write_bytes(newest.read_bytes()[:-1])
    train(config, url)
    assert learned(tiny_session, at(url), config) == learned(tiny_session, whole, config_of(tiny_folder))
    assert metrics_of(at(url)) == metrics_of(whole)
    assert rows_of(at(url)) == rows_of(whole)
    aside = [path.name for path in (at(url) / "checkpoints").iterdir() if path.name.startswith("damaged")]
    assert aside == [f"damaged-{steps[-1]}"] * damaged
    assert ("is damaged" in caplog.text) == damaged


def test_a_disk_and_a_bucket_can_be_changed_for_each_other(
    tiny_folder, tiny_session, whole, finished, tmp_path
):
    """A run belongs to what its files hold: copied here, it is still the run."""
    for name in ("config.json", "metrics.jsonl", "results.csv"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "checkpoints").mkdir()
    for path in (finished / "checkpoints").iterdir():
        (tmp_path / "checkpoints" / path.name).write_bytes(path.read_bytes())
    config = config_of(tiny_folder)
    train(config, tmp_path)  # is done, and says so
    assert learned(tiny_session, tmp_path, config) == learned(tiny_session, whole, config)


def test_it_is_evaluated_and_goes_on_where_it_was(finished, whole, tmp_path, monkeypatch):
    options = {"num_blocks": 2, "controllers": ("fixed",)}
    rows = evaluate_policy("gs://b/finished", output="gs://b/scores/out.csv", **options)
    assert [row.nats for row in rows] == [
        row.nats for row in evaluate_policy(whole, output=str(tmp_path / "out.csv"), **options)
    ]
    (folder,) = at("gs://b/scores/out.scores").iterdir()
    assert {controller for controller, _ in read_folder(folder).groups} == {"policy", "fixed", "dense"}
    with monkeypatch.context() as patch:
        patch.setattr(ScoreCache, "write", lambda *args: pytest.fail("it was scored again"))
        again = evaluate_policy("gs://b/finished", output="gs://b/scores/out.csv", **options)
    assert [row.nats for row in again] == [row.nats for row in rows]


def test_the_programs_take_urls(finished, tiny_folder):
    ended = run_program(
        "sol_jax.evaluate", "--workdir", "gs://b/finished", "--num_blocks", 1, "--output", "gs://b/p.csv"
    )
    assert ended.returncode == 0, ended.stderr
    assert results_csv.read(at("gs://b/p.csv"))
    ended = run_program(
        "sol_jax.generate", "--model", "gs://b/model", "--policy", "gs://b/finished", "--prompt", "the cat",
        "--budget", "0.5,0.7,0.6", "--max_tokens", 12, "--html", "gs://b/pages/cat.html",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    page = at("gs://b/pages/cat.html").read_text()
    assert "the cat" in page
    assert page.rstrip().endswith("</html>")


def test_a_page_that_cannot_be_written_is_told_before_anything_is_loaded():
    ended = run_program(
        "sol_jax.generate", "--model", "none", "--prompt", "a", "--html", "gs://no-entry/page.html"
    )
    assert ended.returncode == 2
    assert re.search(r"error: --html is 'gs://no-entry/page.html', which cannot be reached", ended.stderr)


def test_it_is_published_to_a_bucket_and_used_from_there(finished, tiny_session, monkeypatch):
    arguments = [
        "publish", "--workdir", "gs://b/finished", "--name", "tiny/policy", "--command", "none",
        "--folder", "gs://b/policies", "--results", "gs://b/finished/results.csv",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    publish.main()
    folder = at("gs://b/policies/tiny/policy")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "policy.safetensors",
        "sample.png",
    ]
    assert "sample.png" in (folder / "README.md").read_text()
    params, _, about = load_policy("gs://b/policies/tiny/policy")
    assert about["identity"] == tiny_session.identity
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    with pytest.raises(UserError, match="there is no policy 'gs://b/policies/none'"):
        load_policy("gs://b/policies/none")


def test_the_url_may_not_be_a_path_of_pathlib(tiny_folder):
    """Which has lost a slash."""
    with pytest.raises(
        UserError, match="--workdir is 'gs:/b/run'; it must be a path on this machine, or a URL"
    ):
        train(config_of(tiny_folder), pathlib.Path("gs://b/run"))
