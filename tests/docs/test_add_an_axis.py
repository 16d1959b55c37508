"""The worked example of docs/add-an-axis.md on a copy of the package: four axes train and generate."""

import csv
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import tiny

from configs import default

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-an-axis.md").read_text()
FILE, IMPORT, FIELD = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> pathlib.Path:
    """The packages with the two edits of the page."""
    root = tmp_path_factory.mktemp("copy")
    for package in ("sol_jax", "pallas_kernels", "configs"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "__init__.py", root / "experiments")
    (root / "sol_jax" / "axes" / "omega.py").write_text(FILE)
    config = root / "sol_jax" / "axes" / "config.py"
    text = config.read_text()
    before, eta = "from sol_jax.options import", "    eta: EtaConfig = section(EtaConfig)\n"
    assert text.count(before) == text.count(eta) == 1
    config.write_text(text.replace(before, IMPORT + before).replace(eta, eta + FIELD))
    return root


def run(root: pathlib.Path, module: str, *args: str) -> str:
    command = [sys.executable, "-m", f"sol_jax.{module}", *args]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_fourth_axis_trains_evaluates_and_generates(copied, tiny_folder, tmp_path):
    budgets = "0.5,0.7,0.6,0.5;0.8,0.9,0.8,0.9"
    told = tiny.flags_for(tiny.config_for(tiny_folder), default.get_config("smoke"))
    omega = ["--config.axes.omega.levels=(0.25, 1.0)", "--config.axes.omega.budget=(0.25, 1.0)"]
    few = ["--config.train.num_updates=2", "--config.eval.num_test_blocks=2", "--config.eval.every=0"]
    workdir = ["--workdir", str(tmp_path / "run")]
    run(copied, "train", "--config", "configs/default.py:smoke", *workdir, *told, *omega, *few)
    with open(tmp_path / "run" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["requested_omega"] for row in rows} == {"1"}  # left out of the config's budgets
    assert all(0.25 <= float(row["cost_omega"]) <= 1 for row in rows)
    output = str(tmp_path / "four.csv")
    run(copied, "evaluate", *workdir, "--budgets", budgets, "--output", output, "--num_random", "1")
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    fixed = [row for row in rows if row["controller"] == "fixed"]
    assert [row["requested_omega"] for row in fixed] == ["0.5", "0.9"]
    asked = ["--budget", "0.5,0.7,0.6,0.4", "--max_tokens", "6", "--model", str(tiny_folder / "model")]
    run(copied, "generate", "--policy", str(tmp_path / "run"), "--prompt", "the cat", *asked)


def test_the_example_is_found_by_its_numbers():
    """Half of the channels of a hand-made output survive: the largest two of four."""
    import jax.numpy as jnp

    space: dict = {}
    exec(compile(FILE, "omega.py", "exec"), space)
    axis = space["OutputPruning"]((0.5, 1.0), (0.5, 1.0), 100.0)
    kept = axis.mlp_output(jnp.float32(0.5), jnp.array([1.0, -3.0, 0.5, 2.0]))
    assert kept.tolist() == [0.0, -3.0, 0.0, 2.0]
    assert axis.cost(0.5) == 0.5
