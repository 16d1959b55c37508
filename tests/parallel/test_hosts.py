"""Several processes as one run: equal to one process, stopped together, and never left hanging."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

from configs import default
from sol_jax.errors import UserError
from sol_jax.hosts import HostOptions, refuse_several
from sol_jax.runs.orbax_store import StepStore, complete_steps
from sol_jax.training.loop import train

ROOT = pathlib.Path(__file__).parents[2]
BOUND = 120  # seconds in which a process must notice that another one has gone
RUN = {
    "train.num_updates": 12,
    "train.checkpoint_every": 5,
    "eval.every": 0,
    "eval.num_test_blocks": 0,
    "optim.accumulate": 2,
    "optim.learning_rate": 1e-3,
    "mesh.chunk": 1,
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def flags(folder, workdir, **fields):
    config = tiny.config_for(folder, **(RUN | fields))
    told = tiny.flags_for(config, default.get_config("smoke"))
    return ["--config", "configs/default.py:smoke", "--workdir", str(workdir), *told]


def joining(count, n, port, seconds=180):
    return {
        "coordinator": f"127.0.0.1:{port}",
        "num_processes": count,
        "process_id": n,
        "init_timeout": seconds,
    }


def run(command, devices=1, cwd=ROOT):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], **pipes, text=True, env=env, cwd=cwd)


def start(count, given, devices=1):
    """`count` processes of the training program."""
    port, command = free_port(), ["-m", "sol_jax.train", *given]
    if count == 1:
        return [run(command, devices)]
    joins = [[f"--{name}={x}" for name, x in joining(count, n, port).items()] for n in range(count)]
    return [run([*command, *join], devices) for join in joins]


def ended(processes, seconds=300):
    """Exit codes, and what each process said."""
    told = [process.communicate(timeout=seconds) for process in processes]
    return [process.returncode for process in processes], ["".join(parts) for parts in told]


def wait_for(workdir, step, processes):
    file = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        lines = file.read_text().splitlines() if file.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        if any(process.poll() is not None for process in processes):
            pytest.fail(f"a process ended early: {ended(processes)[1]}")
        time.sleep(0.05)
    pytest.fail("the run makes no progress")


def saved(workdir):
    """The last step and its arrays."""
    store = workdir / "checkpoints"
    step = complete_steps(store)[-1]
    arrays, _ = StepStore(store, 3, read_only=True).read(step)
    return step, arrays


def test_runs_that_are_stopped_and_killed_end_as_one_that_is_not(tiny_folder, tmp_path):
    """2 processes -> 1 process with 3 devices -> 2 processes: what one process comes to, bit for bit.

    The first two are stopped by SIGTERM to one of them; of the last two, one dies.
    """
    both = start(2, flags(tiny_folder, tmp_path, **{"train.num_updates": 100_000}))
    wait_for(tmp_path, 2, both)
    both[1].send_signal(signal.SIGTERM)
    codes, told = ended(both)
    assert codes == [0, 0], told
    steps = {text.split("stopped by SIGTERM after update ")[1].split(";")[0] for text in told}
    assert len(steps) == 1, told
    first = int(steps.pop())
    assert saved(tmp_path)[0] == first
    assert "2 processes, 2 devices (cpu, 1 here); mesh: data 2 x model 1" in told[0]
    assert "update" not in told[1].split("stopped by")[0]  # only the first one tells of the run
    middle = first + 3
    codes, told = ended(start(1, flags(tiny_folder, tmp_path, **{"train.num_updates": middle}), devices=3))
    assert codes == [0], told
    both = start(2, flags(tiny_folder, tmp_path, **{"train.num_updates": 100_000}))
    wait_for(tmp_path, middle + RUN["train.checkpoint_every"] + 1, both)
    both[1].kill()
    begin = time.monotonic()
    code, told = ended(both[:1], BOUND)
    assert code != [0]
    assert time.monotonic() - begin < BOUND
    assert "has lost another one" in told[0] or "another task died" in told[0], told
    assert "Traceback" not in told[0]
    ended(both[1:])
    last, found = saved(tmp_path)
    assert last > middle
    again = tmp_path / "again"
    train(tiny.config_for(tiny_folder, **(RUN | {"train.num_updates": last})), again)
    step, wanted = saved(again)
    assert step == last
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


SRUN = """#!/usr/bin/env bash
# Two tasks of this machine, with the variables by which SLURM tells them what they are.
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=127.0.0.1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" &
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" || exit
wait "$!"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="launchers are bash scripts")
def test_launchers_run_the_program_with_one_result(tiny_folder, tmp_path):
    """For real, but for `srun`: JAX finds its two tasks by what SLURM tells them."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.pathsep.join(sys.path), "ATTEMPTS": "1"}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "PORT": str(free_port())}
    while True:  # JAX makes the coordinator's port of the job's number
        env["SLURM_JOB_ID"] = str(random.randrange(4096))
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", int(env["SLURM_JOB_ID"]) + 61440))
            break
    for name, *more in (("local.sh", "2"), ("slurm.sh",)):
        given = flags(tiny_folder, tmp_path / name, **{"train.num_updates": 2})
        command = [
            "bash",
            str(ROOT / "experiments" / "launch" / name),
            *more,
            sys.executable,
            "-m",
            "sol_jax.train",
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([*command, *given], text=True, env=env, cwd=ROOT, **pipes)
        told, _ = process.communicate(timeout=300)
        assert process.returncode == 0, told
        assert "2 processes, 2 devices (cpu, 1 here); mesh: data 2 x model 1" in told
    (first, wanted), (second, found) = (saved(tmp_path / name) for name in ("local.sh", "slurm.sh"))
    assert first == second == 2
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def changed(config, fields):
    """A config as a dict with some of its fields changed, which nothing has checked."""
    return config | {
        name: config[name] | value if isinstance(value, dict) else value for name, value in fields.items()
    }


def test_what_hosts_do_not_agree_on_is_refused(tiny_folder, tmp_path):
    """All know of each mistake, of one host or of all, and one tells of it for all."""
    right = tiny.config_for(tiny_folder, **RUN)
    wrong = [
        ({"optim.learning_rate": 0.5}, "run", "config.optim.learning_rate is 0.001 in process 0 and 0.5 in"),
        ({"model.path": "/nowhere"}, "run", "config.model.path is"),
        ({}, str(tmp_path / "other"), "--workdir is"),
        ({}, "run", "--workdir run is not the same folder for all hosts: process 1 does not see"),
    ]
    # Not in what hosts differ in: the same mistake in all of them.
    shared = [
        (
            {"mesh": {"data": 5}},
            "config.mesh.data = 5 and config.mesh.model = 1 need 5 devices, and there are 4",
        ),
        ({"mesh": {"model": 4}}, "config.mesh.model is 4; it must divide the model's 2 key/value heads"),
        ({"mesh": {"model": 2}, "kernels": "pallas"}, "config.kernels is 'pallas'; it must be auto or xla"),
        ({"optim": {"learning_rate": -1.0}}, "config.optim.learning_rate is -1.0; it must be above 0"),
    ]
    both, port = [], free_port()
    for n in range(2):
        (here := tmp_path / f"host{n}").mkdir()
        runs = [
            (right.with_fields(fields if n else {}).to_dict(), workdir if n else "run")
            for fields, workdir, _ in wrong
        ]
        runs += [(changed(right.to_dict(), fields), str(tmp_path / "shared")) for fields, _ in shared]
        runs += [(right.with_fields({"grpo.batch_size": 1}).to_dict(), "run")]
        given = json.dumps(joining(2, n, port)), json.dumps(runs)
        both.append(
            run([str(pathlib.Path(__file__).with_name("refused_runs.py")), *given], devices=2, cwd=here)
        )
    codes, told = ended(both)
    assert codes == [2, 2], told
    for text in told:
        for n, said in enumerate([said for *_, said in wrong + shared]):
            assert f"{n}: {said}" in text
    assert "error: there are 2 processes and config.grpo.batch_size is 1" in told[0]
    assert "error:" not in told[1]


JOIN = """
import json, sys
from sol_jax.errors import exits_on_user_error
from sol_jax.hosts import HostOptions, joined
@exits_on_user_error
def main():
    with joined(HostOptions(**json.loads(sys.argv[1]))):
        pass
main()
"""


def test_hosts_that_are_not_found():
    """Nobody at the address; nothing that says where; and nobody else."""
    port = free_port()
    cases = [
        (joining(2, 1, port, seconds=2), f"the coordinator 127.0.0.1:{port} was not reached"),
        ({"distributed": "on"}, "nothing here says where"),
        ({"distributed": "on", **joining(1, 0, free_port())}, "there is one process"),
    ]
    started = [run(["-c", JOIN, json.dumps(options)]) for options, _ in cases]
    codes, told = ended(started)
    assert codes == [2, 2, 2], told
    for (_, said), text in zip(cases, told, strict=True):
        assert said in text
        assert "Traceback" not in text
    assert "within 2 seconds (--init_timeout)" in told[0]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_NTASKS": "2"}, r"one of several \(SLURM_NTASKS=2\); start it once$"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, r"\(TPU_WORKER_HOSTNAMES=a,b\)"),
        ({"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "many", "TPU_WORKER_HOSTNAMES": "a"}, None),
    ],
)
def test_programs_of_one_process(variables, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if said is None:
        refuse_several("lm_eval")
        return
    with pytest.raises(UserError, match=said):
        refuse_several("lm_eval")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "a:1"}, "give --coordinator, --num_processes and --process_id, or none"),
        (
            {"coordinator": "a", "num_processes": 2, "process_id": 0},
            "--coordinator is 'a'; it must be HOST:PORT",
        ),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            "--process_id is 2; it must be less than",
        ),
        (
            {"distributed": "off", "coordinator": "a:1", "num_processes": 2, "process_id": 0},
            "--distributed is off",
        ),
    ],
)
def test_flags_that_contradict_each_other(options, message):
    with pytest.raises(UserError, match=message):
        HostOptions(**options)
