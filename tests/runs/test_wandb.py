"""Metrics in Weights & Biases: offline, so that nothing leaves the machine.

Skipped where wandb is not installed.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny

from sol_jax.errors import UserError
from sol_jax.runs import wandb_writer
from sol_jax.training.loop import train

ROOT = pathlib.Path(__file__).parents[2]
with_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="needs wandb (extra `wandb`)"
)


def test_a_missing_package_is_named_before_anything_is_opened(tiny_folder, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    config = tiny.config_for(tiny_folder, **{"train.wandb": "sol", "model.path": "/no/such"})
    with pytest.raises(
        UserError, match=r"config\.train\.wandb is 'sol', but the package wandb is not here: pip"
    ) as told:
        train(config, tmp_path / "run")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_wandb_is_not_imported_before_it_is_needed():
    code = "import sys, sol_jax.training.loop; print('wandb' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_it_has_the_interface_of_clus_writers():
    """Method by method, read from clu's file: its package needs TensorFlow to be imported."""
    (folder,) = importlib.util.find_spec("clu").submodule_search_locations
    spec = importlib.util.spec_from_file_location("clu_interface", f"{folder}/metric_writers/interface.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.MetricWriter.__abstractmethods__
    assert set(module.MetricWriter.__abstractmethods__) <= set(dir(wandb_writer.WandbWriter))


@with_wandb
def test_offline_everything_is_in_the_workdir(tmp_path, monkeypatch):
    """What wandb was given, read from its own file; hostile text is escaped.

    A second start goes on in the same run.
    """
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in range(2):
        writer = wandb_writer.WandbWriter(tmp_path, "sol", {"grpo.gamma": 0.5})
        writer.write_scalars(1, {"reward": 0.25, "kl": float("nan")})
        writer.write_texts(2, {"sample/text": "<script>alert(1)</script>"})
        writer.write_images(2, {"sample/shaded": np.zeros((1, 4, 6, 3), np.uint8)})
        writer.write_histograms(3, {"cost": np.arange(5.0)})
        writer.write_hparams({"seed": 0})
        writer.close()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    key = (tmp_path / wandb_writer.ID_FILE).read_text().strip()
    assert runs
    assert {run.name.rsplit("-", 1)[1] for run in runs} == {key}
    files = [file for run in runs for file in run.rglob("*") if file.is_file()]
    stored = b"".join(file.read_bytes() for file in files if file.suffix == ".wandb")
    for part in (b"reward", b"0.25", b"grpo.gamma", b"sample/shaded"):
        assert part in stored, part
    pages = [file.read_text() for file in files if file.suffix == ".html"]
    assert pages
    assert all("&lt;script&gt;alert(1)" in page and "<script>alert" not in page for page in pages)


@with_wandb
def test_a_training_tells_wandb_what_it_tells_the_file(tiny_folder, tmp_path, monkeypatch):
    """The same numbers step by step, and a sample of the policy at work."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    told = []
    monkeypatch.setattr(
        wandb_writer.WandbWriter, "write_scalars", lambda self, step, scalars: told.append((step, scalars))
    )
    pictures = []
    monkeypatch.setattr(
        wandb_writer.WandbWriter, "write_images", lambda self, step, images: pictures.append((step, images))
    )
    fields = {"train.wandb": "sol", "train.num_updates": 2, "eval.every": 2, "eval.num_test_blocks": 0}
    train(tiny.config_for(tiny_folder, **fields), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line.pop("step"), line.pop("time") and line) for line in lines] == told
    ((step, images),) = pictures
    assert step == 2
    assert images["sample/shaded"].shape[0] == 1
    assert len(np.unique(images["sample/shaded"])) > 5


@with_wandb
def test_without_a_login_it_is_told_what_to_do(tmp_path):
    """In a process of its own, for wandb remembers how it was started before."""
    code = "import pathlib, sys; from sol_jax.runs.wandb_writer import WandbWriter; "
    code += "WandbWriter(pathlib.Path(sys.argv[1]), 'sol', {})"
    # An address that no login of this machine is meant for.
    own = {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | own
    environment["NETRC"] = str(tmp_path / "netrc")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.search(
        r"UserError: config\.train\.wandb: wandb cannot start a run \(.*\); log in with `wandb login`, or "
        r"set WANDB_MODE=",
        done.stderr,
    )
