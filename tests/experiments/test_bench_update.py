"""The benchmark of updates: each row in a fresh process, and what a row says."""

import argparse
import os
import pathlib

import pytest
from small_models import llama_config

from experiments.benchmarks import update as bench_update

SIZES = {"batch_size": 1, "num_schedules": 2, "horizon": 4, "prefix_len": 16}


def namespace(config=None):
    return argparse.Namespace(**SIZES, config=config, scaling=False, repeats=1)


def test_axes_of_a_config():
    levels = [len(axis.levels) for axis in bench_update.make_setup(namespace(), "float32", 1).space.axes]
    assert levels == [3, 3, 3]
    setup = bench_update.make_setup(namespace(), "float32", 1, "configs/sol_j_fl.py")
    assert [len(axis.levels) for axis in setup.space.axes] == [10, 13, 12]
    assert setup.policy.num_actions == 10 * 13 * 12


def test_a_mistake_in_the_config_is_told_first(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["update", "--config", "configs/none.py"])
    with pytest.raises(SystemExit) as stop:
        bench_update.main()
    assert stop.value.code == 2
    assert "there is no config 'configs/none.py'" in capsys.readouterr().err


def test_each_measurement_has_a_process_of_its_own():
    assert len({os.getpid(), bench_update.alone(os.getpid), bench_update.alone(os.getpid)}) == 3


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux")
def test_a_row(monkeypatch):
    monkeypatch.setattr(bench_update, "SMOLLM2", llama_config())
    monkeypatch.setattr(bench_update.flops, "matmul_rate", lambda dtype: 1e9)
    row = bench_update.measure(namespace(), "float32", 2)
    assert {name: row[name] for name in SIZES} == SIZES
    assert row["episodes_per_prefix"] == 2
    assert {f"{stage}_seconds" for stage in ("prefill", "rollout", "policy", "head", "fit")} <= set(row)
    assert row["loop_rate"] > 0
    assert row["policy_seconds"] <= row["rollout_seconds"]  # a part of it, to the millisecond
    assert row["running_peak_gib_beyond_weights"] <= row["peak_gib_beyond_weights"]
