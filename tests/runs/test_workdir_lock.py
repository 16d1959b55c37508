"""One run at a time in a workdir; what a dead process held is free."""

import errno
import fcntl
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import tiny

from sol_jax.errors import UserError
from sol_jax.runs.workdir_lock import only_run
from sol_jax.training.loop import train

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """
    import pathlib, sys
    from sol_jax.runs.workdir_lock import only_run
    with only_run(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path` until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_a_killed_one_leaves_nothing(holder, tmp_path, tiny_folder):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        UserError, match=rf"is in use by process {holder.pid} on .*; wait for it, or name another"
    ):
        train(tiny.config_for(tiny_folder), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    holder.kill()
    holder.communicate()
    with only_run(tmp_path):
        pass


def test_runs_of_one_process_exclude_each_other_too(tmp_path):
    with only_run(tmp_path):
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"), only_run(tmp_path):
            pass
        with only_run(tmp_path / "other"):
            pass
    with only_run(tmp_path):
        pass


def test_a_run_that_fails_lets_go(tmp_path):
    with pytest.raises(ZeroDivisionError), only_run(tmp_path):
        raise ZeroDivisionError
    with only_run(tmp_path):
        pass


def test_a_full_disk_keeps_nobody_from_locking(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        only_run(tmp_path),
        pytest.raises(UserError, match="is in use by another process"),
        only_run(tmp_path),
    ):
        pass


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, caplog):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with only_run(tmp_path):
        assert "cannot be locked (No locks available); start no second run there" in caplog.text


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text(""), lambda path: (path / "lock").mkdir(parents=True)]
)
def test_a_workdir_that_cannot_be_locked(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be used as a workdir"), only_run(tmp_path / "run"):
        pass
