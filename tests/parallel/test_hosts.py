"""Several processes as one run: equal to one process, stopped together, and never left hanging."""

import json
import os
import pathlib
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
from sol_jax.hosts import HostOptions
from sol_jax.runs.orbax_store import StepStore, complete_steps

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


def start(count, commands, devices=1, port=None):
    """`count` processes of the training program; `commands` are the flags of each, or of all."""
    port = port or free_port()
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    several = commands if isinstance(commands[0], list) else [commands] * count
    joins = [
        [
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={count}",
            f"--process_id={n}",
            "--init_timeout=90",
        ]
        for n in range(count)
    ]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "sol_jax.train", *given, *(join if count > 1 else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=ROOT,
        )
        for given, join in zip(several, joins, strict=False)
    ]


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


def test_sigterm_to_one_stops_both_and_any_mesh_goes_on(tiny_folder, tmp_path):
    """2 processes -> 1 process with 3 devices -> 2 processes: what one process ends with, bit for bit."""
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
    last = middle + 3
    codes, told = ended(start(2, flags(tiny_folder, tmp_path, **{"train.num_updates": last})))
    assert codes == [0, 0], told
    assert saved(tmp_path)[0] == last
    again = tmp_path / "again"
    codes, told = ended(start(1, flags(tiny_folder, again, **{"train.num_updates": last})))
    assert codes == [0], told
    assert "1 process, 1 device" in told[0]
    _, wanted = saved(again)
    _, found = saved(tmp_path)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_process_that_dies_does_not_leave_the_other_hanging(tiny_folder, tmp_path):
    both = start(2, flags(tiny_folder, tmp_path, **{"train.num_updates": 100_000}))
    wait_for(tmp_path, 2, both)
    both[1].kill()
    begin = time.monotonic()
    code, told = ended(both[:1], BOUND)
    assert code != [0]
    assert time.monotonic() - begin < BOUND
    assert "has lost another one" in told[0] or "another task died" in told[0], told
    assert "Traceback" not in told[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"optim.learning_rate": 0.5},
            "config.optim.learning_rate is 0.001 in process 0 and 0.5 in process 1",
        ),
        ({"model.path": "/nowhere"}, "config.model.path is"),
    ],
)
def test_hosts_with_different_configs(tiny_folder, tmp_path, fields, message):
    commands = [flags(tiny_folder, tmp_path), flags(tiny_folder, tmp_path, **fields)]
    codes, told = ended(start(2, commands), BOUND)
    assert codes == [2, 2], told
    assert message in told[0]
    assert "error:" not in told[1]  # one host tells it for all


def test_hosts_with_different_workdirs(tiny_folder, tmp_path):
    commands = [flags(tiny_folder, tmp_path / name) for name in ("one", "two")]
    codes, told = ended(start(2, commands), BOUND)
    assert codes == [2, 2], told
    assert "--workdir is" in told[0]


def test_more_processes_than_blocks(tiny_folder, tmp_path):
    codes, told = ended(start(2, flags(tiny_folder, tmp_path, **{"grpo.batch_size": 1})), BOUND)
    assert codes == [2, 2], told
    assert "there are 2 processes and config.grpo.batch_size is 1" in told[0]


def test_a_coordinator_that_cannot_be_reached(tiny_folder, tmp_path):
    port = free_port()
    join = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--process_id=1", "--init_timeout=3"]
    command = [sys.executable, "-m", "sol_jax.train", *flags(tiny_folder, tmp_path), *join]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=BOUND, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert "within 3 seconds (--init_timeout)" in done.stderr
    assert "Traceback" not in done.stderr


def test_distributed_with_nobody_else(tiny_folder, tmp_path):
    command = [sys.executable, "-m", "sol_jax.train", *flags(tiny_folder, tmp_path), "--distributed=on"]
    alone = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=1", "--process_id=0"]
    for extra, message in (([], "nothing here says where"), (alone, "there is one process")):
        done = subprocess.run(
            [*command, *extra], capture_output=True, text=True, cwd=ROOT, timeout=BOUND, check=False
        )
        assert done.returncode == 2, done.stderr
        assert message in done.stderr


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
