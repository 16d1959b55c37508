"""One run at a time in a workdir on an object store."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import tiny
from fake_bucket import FakeBuckets, fake_buckets
from in_process import ROOT

from sol_jax.errors import UserError
from sol_jax.files import path_of
from sol_jax.runs import object_lock
from sol_jax.runs.workdir_lock import only_run
from sol_jax.training.loop import train

HOLD = """
    import pathlib, sys
    sys.path.insert(0, "tests")
    from fake_bucket import fake_buckets
    from sol_jax.files import path_of
    from sol_jax.runs import object_lock
    from sol_jax.runs.workdir_lock import only_run
    object_lock.BEAT, object_lock.SETTLE = 0.2, 0.1
    with fake_buckets(pathlib.Path(sys.argv[1])), only_run(path_of("gs://b/run", "x")):
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def buckets(tmp_path, monkeypatch):
    """Beats of 0.2 s, and runs that are dead after 1.5."""
    for name, seconds in {"BEAT": 0.2, "DEAD": 1.5, "SETTLE": 0.1}.items():
        monkeypatch.setattr(object_lock, name, seconds)
    with fake_buckets(tmp_path / "buckets"):
        yield tmp_path / "buckets"


@pytest.fixture
def workdir():
    return path_of("gs://b/run", "--workdir")


@pytest.fixture
def holder(buckets):
    """A process that holds the lock of gs://b/run until it is killed."""
    lines = "\n".join(line[4:] for line in HOLD.splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", lines, str(buckets)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_a_killed_one_holds_nothing_for_long(holder, workdir, tiny_folder):
    with pytest.raises(
        UserError, match=rf"gs://b/run is in use by process {holder.pid} on .*; wait for it, or name another"
    ):
        train(tiny.config_for(tiny_folder), workdir)
    assert [path.name for path in workdir.iterdir()] == ["lock"]
    holder.kill()
    holder.communicate()
    started = time.monotonic()
    with only_run(workdir):
        assert object_lock.DEAD <= time.monotonic() - started < object_lock.DEAD + 5
    assert not (workdir / "lock").exists()


def test_a_run_that_ends_in_any_orderly_way_leaves_no_lock(workdir):
    def stop():
        with only_run(workdir):
            assert json.loads((workdir / "lock").read_text())["holder"].startswith(
                f"process {os.getpid()} on"
            )
            raise UserError("a NaN")

    with pytest.raises(UserError, match="a NaN"):
        stop()
    started = time.monotonic()
    with only_run(workdir):
        assert time.monotonic() - started < object_lock.DEAD
    assert not workdir.exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "workdir lock"]


def test_runs_of_other_workdirs_do_not_matter(holder, workdir):
    with only_run(workdir.with_name("other")):
        assert (workdir.parent / "other" / "lock").exists()


def test_of_many_that_start_at_once_one_runs(workdir):
    running, refused = [], []

    def start():
        try:
            with only_run(workdir):
                running.append(1)
                time.sleep(6 * object_lock.BEAT)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(running) == 1
    assert len(refused) == 4
    assert all("gs://b/run is in use by process" in sentence for sentence in refused)


def test_a_run_that_has_lost_its_workdir_stops(workdir):
    def suspended():
        with only_run(workdir):
            other = {"holder": "process 7 on elsewhere", "run": "0" * 32, "beat": "1"}
            (workdir / "lock").write_text(json.dumps(other))
            for _ in range(6000):  # as updates come, one after the other
                time.sleep(0.01)

    started = time.monotonic()
    with pytest.raises(
        UserError, match="process 7 on elsewhere has taken this workdir, for this run gave no sign"
    ):
        suspended()
    assert time.monotonic() - started < 30
    assert "elsewhere" in (workdir / "lock").read_text()  # which is the other's, and stays


def test_a_lock_that_somebody_deletes_is_written_anew(workdir):
    with only_run(workdir):
        (workdir / "lock").unlink()
        time.sleep(4 * object_lock.BEAT)
        assert (workdir / "lock").exists()


def test_ctrl_c_is_no_lost_workdir(workdir):
    with pytest.raises(KeyboardInterrupt), only_run(workdir):
        raise KeyboardInterrupt
    assert not (workdir / "lock").exists()


def test_a_beat_that_does_not_come_through_is_told_and_tried_again(workdir, monkeypatch, caplog):
    opened, failed = FakeBuckets._open, []

    def flaky(self, path, mode="rb", **kwargs):
        if mode == "wb" and len(failed) < 2:
            failed.append(path)
            raise RuntimeError("503 Service Unavailable")
        return opened(self, path, mode)

    with only_run(workdir):
        monkeypatch.setattr(FakeBuckets, "_open", flaky)
        time.sleep(5 * object_lock.BEAT)
        beats = json.loads((workdir / "lock").read_text())["beat"]
        assert len(failed) == 2
        assert int(beats) > 3
    assert "cannot be renewed: RuntimeError: 503" in caplog.text


def test_a_lock_that_is_garbled_is_somebody_s(workdir):
    (workdir / "lock").write_bytes(b"\xff{")
    with only_run(workdir):  # who does not beat
        pass


def test_a_workdir_that_cannot_be_written(workdir, monkeypatch):
    def forbidden(self, path, mode="rb", **kwargs):
        raise RuntimeError("403 Forbidden") if mode == "wb" else FileNotFoundError(path)

    monkeypatch.setattr(FakeBuckets, "_open", forbidden)
    with (
        pytest.raises(
            UserError, match="gs://b/run: cannot be used as a workdir: RuntimeError: 403 Forbidden"
        ),
        only_run(workdir),
    ):
        pass
