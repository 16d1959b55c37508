"""Whole runs of the training program: killed, stopped, poisoned and resumed, they lose and invent nothing."""

import dataclasses
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from in_process import run_program
from other_values import OTHER
from safetensors.numpy import load_file, save_file

from configs import default
from sol_jax import options
from sol_jax.errors import UserError
from sol_jax.evaluation import report
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.models import model as model_module
from sol_jax.options import Options
from sol_jax.rl.train_step import init_state
from sol_jax.runs import metrics
from sol_jax.runs.checkpoints import Checkpoints
from sol_jax.runs.config import RunConfig
from sol_jax.runs.session import commit
from sol_jax.training.loop import Interrupted, require_finite, train

ROOT = pathlib.Path(__file__).parents[2]
UPDATES = 7
RUN = {
    "train.num_updates": UPDATES,
    "train.checkpoint_every": 2,
    "train.log_every": 3,
    "train.keep": 2,
    "eval.every": 3,
    "eval.num_blocks": 2,
    "eval.num_test_blocks": 0,
    "eval.num_random": 1,
    "eval.budgets": ((0.5, 0.7, 0.6),),
    "optim.accumulate": 2,  # half of an optimizer step is in flight at every odd update
    "optim.learning_rate": 1e-3,
}


def config_of(folder, **fields):
    return tiny.config_for(folder, **(RUN | fields))


def command(folder, workdir, **fields):
    base = default.get_config("smoke")
    told = tiny.flags_for(config_of(folder, **fields), base)
    return ["sol_jax.train", "--config", "configs/default.py:smoke", "--workdir", str(workdir), *told]


def start(folder, workdir, **fields):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", *command(folder, workdir, **fields)], cwd=ROOT, **pipes)


def metrics_of(workdir):
    """Step -> scalars, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {
        line["step"]: {k: v for k, v in line.items() if k != "time" and not k.startswith("speed/")}
        for line in lines
    }


def saved(session, workdir, config, step=None):
    """Step, leaves as bytes and iterator state of a checkpoint, and what the directory keeps."""
    checkpoints = Checkpoints(workdir, config.flat(), config.train.keep, read_only=True)
    step, state, iterator = checkpoints.restore(init_state(jax.random.key(1), session.setup), step)
    state = state._replace(key=jax.random.key_data(state.key))
    named = jax.tree_util.tree_flatten_with_path(state)[0]
    return step, {jax.tree_util.keystr(k): np.asarray(v).tobytes() for k, v in named}, iterator


def assert_same_run(session, workdir, whole, config):
    assert saved(session, workdir, config) == saved(session, whole, config)
    assert metrics_of(workdir) == metrics_of(whole)


def wait_for(condition, process, seconds=240):
    """Until the condition holds or the process has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.002)


def steps_in(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []


def half_written(workdir):
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(not p.name.isdecimal() for p in folder.iterdir())


@pytest.fixture(scope="module")
def whole(tiny_folder, tiny_session, tmp_path_factory):
    """The workdir of a run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    config = config_of(tiny_folder)
    train(config, workdir)
    return workdir


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of that workdir to do harm to."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "run"))


def test_an_uninterrupted_run(tiny_folder, tiny_session, whole):
    step, _, iterator = saved(tiny_session, whole, config_of(tiny_folder))
    assert (step, iterator["position"]) == (UPDATES, 2 * UPDATES)
    assert steps_in(whole)[-2:] == [6, 7]  # the latest two; besides them at most the best
    assert len(steps_in(whole)) <= 3
    logged = metrics_of(whole)
    assert sorted(logged) == [3, 6, 7]
    assert all("eval/score" in scalars for scalars in logged.values())
    best = max(logged, key=lambda s: (logged[s]["eval/score"], s))
    assert best in steps_in(whole)


def test_checkpoints_name_the_commit_that_trained(tiny_folder, whole):
    checkpoints = Checkpoints(whole, config_of(tiny_folder).flat(), keep=1, read_only=True)
    assert checkpoints.commit_of(UPDATES).rstrip("+") == commit().rstrip("+")


def test_what_is_logged(whole):
    """The names that people plot; there is no speed in the first line, whose updates were compiled too."""
    axes = ("kappa", "rho", "eta")
    learning = {"reward", "penalty", *(f"budget_gap/{axis}" for axis in axes)}
    learning |= {"policy/entropy", "policy/clip_share", "policy/grad_norm"}
    speed = {"speed/seconds_per_update", "speed/schedule_tokens_per_second", "speed/share_of_matmul_rate"}
    first, *others = (json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines())
    assert learning <= set(first)
    for line in others:
        assert learning | speed <= set(line)
        assert all(line[name] > 0 for name in speed)


def test_killed_at_any_moment_and_resumed_it_ends_as_if_it_had_not_been(
    tiny_folder, tiny_session, whole, tmp_path
):
    rng, config = random.Random(0), config_of(tiny_folder)
    moments = (
        # While the first checkpoint is being written, or just after it.
        lambda: half_written(tmp_path) or steps_in(tmp_path),
        lambda: (
            (tmp_path / "metrics.jsonl").exists() and metrics_lines(tmp_path) >= 1
        ),  # before its checkpoint
        lambda: len(steps_in(tmp_path)) >= 2 and 6 in steps_in(tmp_path),
    )
    codes = []
    for moment in moments:
        process = start(tiny_folder, tmp_path)
        wait_for(moment, process)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        _, errors = process.communicate(timeout=60)
        codes.append(process.returncode)
        assert codes[-1] in (-signal.SIGKILL, 0), errors
    assert codes[:2] == [-signal.SIGKILL] * 2, "the run was over before it could be killed"
    train(config, tmp_path)
    assert_same_run(tiny_session, tmp_path, whole, config)
    assert not half_written(tmp_path)


def metrics_lines(workdir):
    return (workdir / "metrics.jsonl").read_text().count("\n")


def test_sigterm_writes_the_update_just_done_and_exits_cleanly(tiny_folder, tiny_session, whole, tmp_path):
    many = {"train.num_updates": 1000, "train.checkpoint_every": 1000, "eval.every": 0, "train.log_every": 1}
    process = start(tiny_folder, tmp_path, **many)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and metrics_lines(tmp_path) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (step,) = steps_in(tmp_path)
    assert step == max(metrics_of(tmp_path)) < 1000
    config = config_of(tiny_folder, **{"train.num_updates": step + 2})
    resumed = train(config, tmp_path)
    straight = train(config, tmp_path.with_name(tmp_path.name + "-straight"))
    jax.tree.map(np.testing.assert_array_equal, resumed.params, straight.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.opt_state, straight.opt_state)


def terminate_itself():
    """Python runs the handler before the next line, so nothing here depends on the clock."""
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_sigterm_that_comes_too_late_for_this_update_s_checkpoint_stops_the_next_one(
    tiny_folder, tmp_path, monkeypatch
):
    def hook(step):  # called once it is decided whether to save
        if step == 3:
            terminate_itself()

    monkeypatch.setattr(metrics, "periodic_actions", lambda writer, num_steps: [hook])
    config = config_of(tiny_folder, **{"train.checkpoint_every": 1000, "eval.every": 0})
    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM after update 4; start again to resume$"):
        train(config, tmp_path)
    assert steps_in(tmp_path) == [4]


def test_the_handler_of_sigterm_is_put_back(tiny_folder, whole):
    """Else a process that has trained (a notebook) could no longer be stopped."""
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_more_updates_continue_the_run(tiny_folder, copied, tmp_path):
    config = config_of(tiny_folder, **{"train.num_updates": UPDATES + 2})
    continued = train(config, copied)
    straight = train(config, tmp_path / "straight")
    jax.tree.map(np.testing.assert_array_equal, continued.params, straight.params)
    assert steps_in(copied)[-2:] == [UPDATES + 1, UPDATES + 2]


def test_a_finished_run_does_nothing_when_started_again(tiny_folder, tiny_session, whole, copied):
    before = metrics_of(copied)
    state = train(config_of(tiny_folder), copied)
    assert int(state.step) == UPDATES
    assert metrics_of(copied) == before


def test_results_are_replaced_by_those_of_more_updates_and_by_nothing_else(
    tiny_folder, copied, monkeypatch, capsys
):
    def files():
        return [(copied / name).read_text() for name in ("results.csv", "results-draws.csv")]

    def updates():
        return {row["updates"] for row in results.read(copied / "results.csv")}

    tested = {"eval.num_test_blocks": 2}
    config = config_of(tiny_folder, **tested)
    train(config, copied)  # which was finished, but not tested
    assert updates() == {str(UPDATES)}

    report.evaluate(EvaluateOptions(workdir=str(copied), budgets="0.4,0.6,0.5;0.5,0.7,0.6"))
    added = files()
    assert len(results.read(copied / "results.csv")) == 10
    capsys.readouterr()
    train(config, copied)
    assert files() == added
    assert capsys.readouterr().out == ""  # no table: there was nothing to evaluate

    more = config_of(tiny_folder, **tested, **{"train.num_updates": UPDATES + 1})
    run = report.run

    def interrupted(*args):
        terminate_itself()
        return run(*args)

    with monkeypatch.context() as patched:
        patched.setattr(report, "run", interrupted)
        stopped = f"^stopped by SIGTERM after update {UPDATES + 1}; start again to resume$"
        with pytest.raises(Interrupted, match=stopped):
            train(more, copied)
    assert files() == added
    train(more, copied)
    assert updates() == {str(UPDATES + 1)}
    assert {row["updates"] for row in results.read(copied / "results-draws.csv")} == updates()


@pytest.mark.parametrize(
    ("field", "value"), [("grpo.gamma", 0.5), ("seed", 1), ("axes.kappa.levels", (0.1, 0.5, 1.0))]
)
def test_another_config_is_refused_and_the_run_left_alone(tiny_folder, copied, field, value):
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=rf"{field}.*use another workdir"):
        train(config_of(tiny_folder, **{field: value}), copied)
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def test_a_damaged_newest_checkpoint_falls_back(tiny_folder, tiny_session, whole, copied, caplog):
    config = config_of(tiny_folder)
    for file in (copied / "checkpoints" / str(UPDATES)).rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    train(config, copied)
    assert f"the checkpoint of step {UPDATES} is damaged" in caplog.text
    assert (copied / "checkpoints" / f"damaged-{UPDATES}").is_dir()
    assert_same_run(tiny_session, copied, whole, config)


def test_a_model_replaced_under_its_name_is_refused_and_the_run_left_alone(
    tiny_session, copied, tmp_path, tiny_folder
):
    """The path is the config's; what lies there is not what the run began with."""
    file = tiny_folder / "model" / "model.safetensors"
    shutil.copy2(file, tmp_path / "old")
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, file)
    try:
        with pytest.raises(UserError) as mistake:
            train(config_of(tiny_folder, **{"train.num_updates": UPDATES + 1}), copied)
    finally:
        shutil.copy2(tmp_path / "old", file)
    told = str(mistake.value)
    assert f"the checkpoint of step {UPDATES} is of another model: the digest of its weights is " in told
    assert f"{tiny_session.identity['weights']}, and here it is " in told
    assert "tokenizer" not in told
    assert told.endswith("; use another workdir, or the model files that the run began with")
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def test_a_run_goes_on_with_a_copy_of_its_model(tiny_folder, whole, copied):
    """At its place: the files were written again, and hold the same."""
    folder = tiny_folder / "model"
    for file in [*folder.iterdir()]:
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    assert int(train(config_of(tiny_folder), copied).step) == UPDATES


def test_every_field_of_the_loop_is_read(tiny_folder, tmp_path, monkeypatch):
    """Of the fields that no program depends on: training a little reads each by its name."""
    config = config_of(tiny_folder, **{"train.num_updates": 2})
    read: set[str] = set()
    groups = {
        type(getattr(config, name)): f"{name}." for name in ("data", "model", "train", "eval", "grpo", "mesh")
    }
    # These read all of them, which proves nothing: copies, digests, comparisons and checks.
    every = (options.__file__, dataclasses.__file__, "<string>")

    def recording(self: Options, name: str):
        caller = sys._getframe(1).f_code
        if caller.co_filename not in every and caller.co_name != "check":
            read.add(groups.get(type(self), "") + name)
        return object.__getattribute__(self, name)

    for kind in (RunConfig, *groups):
        monkeypatch.setattr(kind, "__getattribute__", recording)
    assert hash(config) == hash(config)
    assert "grpo=" in repr(config)
    assert config.flat()["seed"] == 0
    assert read == {"flat"}
    train(config, tmp_path)
    assert {field for field, value in OTHER.items() if value is None} <= read


def test_a_run_can_start_from_a_policy(tiny_folder, tiny_session, tmp_path):
    """GRPO from what the counterfactual learner has learned; a policy of another learner is refused."""
    predicts = {"policy.predict_losses": True, "train.num_updates": 1, "optim.accumulate": 1}
    learner = {"learner": "counterfactual", "eval.every": 0}
    first = train(config_of(tiny_folder, **predicts, **learner), tmp_path / "first")
    start_from = {"start_from": str(tmp_path / "first")}
    still = predicts | start_from | {"optim.learning_rate": 1e-30, "optim.weight_decay": 0.0}
    second = train(config_of(tiny_folder, **still), tmp_path / "second")
    for one, other in zip(*(jax.tree.leaves(s.params["params"]) for s in (first, second)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert int(second.step) == 1
    with pytest.raises(UserError, match=r"has config\.policy\.predict_losses = True, and here it is False"):
        train(config_of(tiny_folder, **start_from), tmp_path / "third")
    with pytest.raises(UserError, match="there is no policy 'nowhere'"):
        train(config_of(tiny_folder, start_from="nowhere"), tmp_path / "fourth")


# --- a NaN or Inf --------------------------------------------------------------------------------


@pytest.fixture
def no_checkpoint_is_poisoned(tiny_session):
    """Checks the state in every checkpoint of a workdir."""

    def check(workdir, config):
        for step in steps_in(workdir):
            checkpoints = Checkpoints(workdir, config.flat(), config.train.keep, read_only=True)
            _, state, _ = checkpoints.restore(init_state(jax.random.key(1), tiny_session.setup), step)
            for leaf in jax.tree.leaves((state.params, state.opt_state)):
                assert np.all(np.isfinite(leaf)), step

    return check


def test_parameters_that_overflow_stop_the_run(tiny_folder, tmp_path, no_checkpoint_is_poisoned):
    """The update that makes them infinite has finite losses itself: it must not be saved all the same."""
    fields = {
        "optim.learning_rate": 3e38,
        "optim.weight_decay": 1.0,
        "optim.accumulate": 1,
        "train.checkpoint_every": 1,
        "eval.every": 0,
    }
    config = config_of(tiny_folder, **fields)
    with pytest.raises(UserError, match=r"update \d+ gave a NaN or Inf in .*(checkpoint)"):
        train(config, tmp_path)
    no_checkpoint_is_poisoned(tmp_path, config)


def test_a_nan_later_names_the_last_good_checkpoint(
    tiny_folder, tmp_path, copied, monkeypatch, no_checkpoint_is_poisoned
):
    poison_model(tiny_folder, tmp_path)
    config = config_of(tiny_folder, **{"train.num_updates": UPDATES + 3, "train.checkpoint_every": 1})
    load = model_module.load_weights
    # Read, not replaced: other files under the model's name would be refused.
    monkeypatch.setattr(
        model_module, "load_weights", lambda path, cfg, cut: load(tmp_path / "model", cfg, cut)
    )
    expected = f"update {UPDATES + 1} gave a NaN or Inf in .*; the last good checkpoint is {UPDATES}$"
    with pytest.raises(UserError, match=expected):
        train(config, copied)
    no_checkpoint_is_poisoned(copied, config)
    assert max(steps_in(copied)) == UPDATES
    assert not any(math.isnan(float(v)) for line in metrics_of(copied).values() for v in line.values())


def test_a_checkpoint_that_is_still_being_written_counts_as_the_last_good_one(tiny_session, tmp_path):
    state = init_state(jax.random.key(0), tiny_session.setup)
    checkpoints = Checkpoints(tmp_path, {}, keep=1)
    checkpoints.save(1, state, {})
    with pytest.raises(
        UserError, match=r"update 2 gave a NaN or Inf in reward; the last good checkpoint is 1$"
    ):
        require_finite({"reward": math.inf, "penalty": 1.0}, 2, checkpoints)
    checkpoints.close()


def poison_model(tiny_folder, into):
    shutil.copytree(tiny_folder / "model", into / "model")
    file = into / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][:] = 3e38  # finite, but no activation that it scales
    save_file(tensors, file)


def test_a_nan_ends_the_program_with_one_sentence(tiny_folder, tmp_path):
    poison_model(tiny_folder, tmp_path)
    ended = run_program(*command(tiny_folder, tmp_path / "run", **{"model.path": str(tmp_path / "model")}))
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 2
    assert last.startswith("error: update 1 gave a NaN or Inf in ")
    assert last.endswith("; no checkpoint was written yet")
    assert "Traceback" not in ended.stderr
    assert steps_in(tmp_path / "run") == []


def test_grpo_does_not_train_for_one_budget(tiny_folder, tmp_path):
    """Its penalties are of each axis; the counterfactual learner does not look at budgets."""
    config = tiny.config_for(tiny_folder, **{"policy.predict_losses": True, "policy.one_budget": "net"})
    with pytest.raises(UserError, match=r"one_budget is 'net'; it must be empty where config\.learner"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
