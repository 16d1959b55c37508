"""Checkpoints against kills, full disks and places that cannot be written to: nothing lost."""

import contextlib
import errno
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
import state_run
from state_run import (
    CONFIG,
    ROOT,
    assert_same,
    first_state,
    listing,
    opened,
    saved,
    start_or_resume,
    train,
)

from sol_jax.errors import UserError
from sol_jax.runs.checkpoints import Checkpoints

# Places that cannot be written to.


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be used as a workdir: (not a directory|file exists)"):
        Checkpoints(tmp_path / "file", CONFIG, 1)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux' /proc, where nobody can write")
def test_a_workdir_where_nobody_can_write():
    with pytest.raises(UserError, match="/proc/self/x: cannot be used as a workdir: "):
        Checkpoints("/proc/self/x", CONFIG, 1)


def test_a_workdir_that_has_become_read_only(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setattr(pathlib.Path, "write_bytes", raising(OSError(errno.EROFS, "Read-only file system")))
    with opened(tmp_path) as checkpoints, pytest.raises(UserError, match=r"workdir: read-only file system$"):
        checkpoints.restore(first_state())


def raising(error):
    def function(*_args, **_kwargs):
        raise error

    return function


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def noise(step):
    return {"w": jax.random.normal(jax.random.key(step), (300_000,))}  # 1.2 MB that do not compress


def test_a_full_disk_loses_nothing_and_is_survived(small_disk, caplog):
    (small_disk / "other").write_bytes(bytes(1_500_000))
    checkpoints = Checkpoints(small_disk, CONFIG, keep=1)
    checkpoints.save(1, noise(1), {})
    checkpoints.save(2, noise(2), {})  # with room for two at a time
    checkpoints.wait()
    (small_disk / "more").write_bytes(bytes(1_000_000))
    checkpoints.save(3, noise(3), {})
    with pytest.raises(UserError) as error:
        checkpoints.close()
    assert str(error.value) == (
        f"{small_disk}/checkpoints: step 3 could not be saved (no space left on device); "
        "the newest good checkpoint is of step 2"
    )
    assert caplog.records == []  # one sentence, no tracebacks
    assert set(listing(small_disk)) > {"2"}
    (small_disk / "more").unlink()
    with opened(small_disk, keep=1) as checkpoints:
        step, found, _ = checkpoints.restore(noise(0))
        assert step == 2
        assert_same(found, noise(2))
        checkpoints.save(3, noise(3), {})
        checkpoints.wait()
        assert listing(small_disk) == ["3"]  # also rid of the half-written one


def test_a_disk_that_is_full_from_the_start(small_disk):
    with contextlib.suppress(OSError):
        (small_disk / "other").write_bytes(bytes(9_000_000))
    with pytest.raises(UserError, match=r"/disk: cannot be used as a workdir: no space left on device$"):
        Checkpoints(small_disk, CONFIG, keep=1)


def test_the_error_of_a_failed_save_comes_with_the_next_one(small_disk):
    checkpoints = Checkpoints(small_disk, CONFIG, keep=9)
    with pytest.raises(
        UserError, match=r"step 4 could not be saved \(no space left on device\); .* of step 3$"
    ):
        save_noise(checkpoints, range(1, 9))
    shutil.rmtree(small_disk / "checkpoints" / "1")  # somebody makes room: the same process can go on
    checkpoints.save(5, noise(5), {})
    checkpoints.close()
    assert complete(small_disk) == ["2", "3", "5"]


def save_noise(checkpoints, steps):
    for step in steps:
        checkpoints.save(step, noise(step), {})


def complete(workdir):
    return [name for name in listing(workdir) if name.isdecimal()]


def run_loop(workdir, *args):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, state_run.__file__, str(workdir), *map(str, args)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_file_that_may_not_grow_is_told_in_one_line_and_nothing_else_is_printed(tmp_path):
    """A limit on the size of files needs no rights, and fails a write in the same way as a full disk."""
    process = run_loop(tmp_path, 9, 40_000, 5)  # 0.5 MB a state; none to be written from step 5 on
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors == (
        f"{tmp_path}/checkpoints: step 5 could not be saved (file too large); "
        "the newest good checkpoint is of step 4\n"
    )
    with opened(tmp_path) as checkpoints:
        step, found, iterator = checkpoints.restore(first_state(40_000))
    assert (step, iterator) == (4, {"position": 12})
    assert_same(found, train(first_state(40_000), {"position": 0}, 4))


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    """Each restart must find at least what was finished; the parent and the child print and check that."""
    rng, width, finished, hit_a_save = random.Random(0), 40_000, 0, 0
    for attempt in range(3):
        process = run_loop(tmp_path, 10_000, width)  # saves 0.5 MB after every update
        lines = [process.stdout.readline(), process.stdout.readline()]
        time.sleep(rng.uniform(0, 0.3))
        while attempt % 2 and not half_written(tmp_path):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate(timeout=60)
        assert errors == ""
        assert int(lines[0].removeprefix("resumed at ")) >= finished
        whole_lines = ("".join(lines[1:]) + rest).split("\n")[:-1]
        finished = int(whole_lines[-1].removeprefix("finished "))
        hit_a_save += half_written(tmp_path)
        assert len(complete(tmp_path)) <= 4  # 2 are kept, one may be new, and one half deleted
    assert hit_a_save
    with opened(tmp_path, keep=2) as checkpoints:
        state, iterator = start_or_resume(checkpoints, width)
        step = int(state.step)
        assert step >= finished
        assert iterator == {"position": 3 * step}
        resumed = train(state, iterator, step + 2, checkpoints)
    assert len(complete(tmp_path)) == len(listing(tmp_path)) == 2  # the remains of killed saves are gone
    assert_same(resumed, train(first_state(width), {"position": 0}, step + 2))


def half_written(workdir):
    return any(not name.isdecimal() for name in listing(workdir))
