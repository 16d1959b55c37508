"""The launcher: it starts a command again until it is done, and passes SIGTERM on."""

import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "launch" / "until_done.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the launcher is a bash script")


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SCRIPT), *command],
        env={"PATH": "/usr/bin:/bin", "PAUSE": "0", **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def counting(folder: pathlib.Path, fail: int, status: int) -> tuple[str, ...]:
    """A command that fails so many times with a status."""
    code = (
        "import pathlib, sys; f = pathlib.Path(sys.argv[1]); n = len(f.read_text()) if f.exists() else 0;"
        " f.write_text('x' * (n + 1)); sys.exit(int(sys.argv[3]) if n < int(sys.argv[2]) else 0)"
    )
    return sys.executable, "-c", code, str(folder / "starts"), str(fail), str(status)


def test_a_killed_run_is_started_again(tmp_path):
    done = run(*counting(tmp_path, 2, 137))
    assert done.returncode == 0
    assert (tmp_path / "starts").read_text() == "xxx"
    assert "attempt 2 of 20 ended with status 137" in done.stderr


def test_a_mistake_is_not_tried_again(tmp_path):
    assert run(*counting(tmp_path, 5, 2)).returncode == 2
    assert (tmp_path / "starts").read_text() == "x"


def test_it_gives_up(tmp_path):
    assert run(*counting(tmp_path, 9, 1), ATTEMPTS="3").returncode == 1
    assert (tmp_path / "starts").read_text() == "xxx"


def test_without_a_command_it_says_what_to_give():
    done = run()
    assert done.returncode == 2
    assert "give the command" in done.stderr


def test_sigterm_reaches_the_run_and_nothing_is_started_after_it(tmp_path):
    code = (
        "import pathlib, signal, sys, time\n"
        "f = pathlib.Path(sys.argv[1])\n"
        "def stop(*_):\n    f.write_text(f.read_text() + 'saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "f.write_text('started,')\n"
        "time.sleep(60)\n"
    )
    command = ["bash", str(SCRIPT), sys.executable, "-c", code, str(tmp_path / "log")]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").exists() or "started" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "log").read_text() == "started,saved"
