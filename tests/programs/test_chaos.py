"""A short form of `make chaos`, in a process of its own: what it forks must not have computed anything."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--stages", "kills,full,damaged,clocks", "--kills", "2", "--trials", "1", "--every", "80"),
        ("--stages", "inputs", "--inputs", "400"),
    ],
    ids=["runs", "inputs"],
)
def test_a_little_chaos(options):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    ended = subprocess.run(
        [sys.executable, "-m", "chaos", *options, "--seed", "11"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
