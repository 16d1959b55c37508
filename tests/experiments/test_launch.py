"""The launchers: they start a command again until it is done, and pass SIGTERM on."""

import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "launch"
SCRIPT = FOLDER / "until_done.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="launchers are bash scripts")


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


def stub(folder: pathlib.Path, name: str, fail: int = 0, status: int = 1) -> pathlib.Path:
    """A program of that name which records its arguments, and fails so many times."""
    folder.mkdir(exist_ok=True)
    calls = folder / f"{name}.calls"
    script = (
        f'#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> {calls}\n'
        f"[[ $(wc -l < {calls}) -gt {fail} ]] || exit {status}\n"
    )
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)
    return calls


def launch(script: str, folder: pathlib.Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(FOLDER / script), *arguments],
        env={"PATH": f"{folder}:/usr/bin:/bin", "PAUSE": "0", **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


TRAIN = ("python", "-m", "sol_jax.train", "--config", "configs/sol_j_fl.py", "--workdir", "/shared/a b")
STUBBED = {
    "slurm.sh": ("srun", (), "--gpu-bind=none --kill-on-bad-exit=1 python -m sol_jax.train"),
    "tpu_vm.sh": (
        "gcloud",
        ("sol", "us-west4-a"),
        "compute tpus tpu-vm ssh sol --zone=us-west4-a --worker=all --command=cd ~/sol_jax",
    ),
    "xpk.sh": ("xpk", ("cluster", "v5litepod-16", "image"), "workload create --cluster=cluster"),
}


@pytest.mark.parametrize("script", STUBBED)
def test_what_is_given_to_the_scheduler(script, tmp_path):
    name, first, begins = STUBBED[script]
    calls = stub(tmp_path / "bin", name)
    done = launch(script, tmp_path / "bin", *first, *TRAIN)
    assert done.returncode == 0, done.stderr
    (call,) = calls.read_text().splitlines()
    assert call.startswith(begins)
    assert call.endswith("--distributed=on")
    quoted = "/shared/a b" if script == "slurm.sh" else r"/shared/a\ b"  # another shell reads the latter
    assert quoted in call


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_vm.sh"])
def test_a_lost_job_is_started_again_and_a_mistake_is_not(script, tmp_path):
    name, first, _ = STUBBED[script]
    calls = stub(tmp_path / "bin", name, fail=2)
    assert launch(script, tmp_path / "bin", *first, *TRAIN).returncode == 0
    assert len(calls.read_text().splitlines()) == 3
    calls = stub(tmp_path / "other", name, fail=9, status=2)
    assert launch(script, tmp_path / "other", *first, *TRAIN).returncode == 2
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.parametrize("script", [*STUBBED, "local.sh"])
def test_a_launcher_says_what_to_give(script, tmp_path):
    done = launch(script, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: give ")


def test_slurm_s_notice_stops_the_tasks_and_queues_the_job_again(tmp_path):
    """SLURM's commands are stand-ins: `scancel` sends the signal to the one task, which has a status."""
    folder = tmp_path / "bin"
    requeued = stub(folder, "scontrol")
    (folder / "srun").write_text(
        f"#!/usr/bin/env bash\ntrap 'echo saved > {tmp_path}/saved; exit 0' TERM\n"
        f"echo $$ > {tmp_path}/task\nsleep 60 &\nwait\n"
    )
    (folder / "scancel").write_text(
        f'#!/usr/bin/env bash\necho "$*" > {tmp_path}/signal\nkill -TERM $(< {tmp_path}/task)\n'
    )
    for name in ("srun", "scancel"):
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
    job = subprocess.Popen(["bash", str(FOLDER / "slurm.sh"), "a-command"], env=env)
    deadline = time.monotonic() + 30
    while not ((tmp_path / "task").exists() and (tmp_path / "task").read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    assert (tmp_path / "signal").read_text() == "--signal=TERM 17\n"
    assert (tmp_path / "saved").exists()
    assert requeued.read_text() == "requeue 17\n"


def test_processes_of_this_machine_start_again_together(tmp_path):
    """The second one dies once; then both run to the end, each with its number."""
    code = (
        "import pathlib, sys, time\n"
        "folder, *told = sys.argv[1:]\n"
        "number = told[-1].split('=')[1]\n"
        "file = pathlib.Path(folder, number)\n"
        "file.write_text((file.read_text() if file.exists() else '') + ' '.join(told) + '\\n')\n"
        "sys.exit(9 if number == '1' and len(file.read_text().splitlines()) == 1 else 0)\n"
    )
    command = (sys.executable, "-c", code, str(tmp_path))
    done = launch("local.sh", tmp_path, "2", *command, PORT="1234")
    assert done.returncode == 0, done.stderr
    for number in "01":
        first, second = (tmp_path / number).read_text().splitlines()
        assert first == second == f"--coordinator=127.0.0.1:1234 --num_processes=2 --process_id={number}"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(
        ["shellcheck", *map(str, sorted(FOLDER.glob("*.sh")))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
