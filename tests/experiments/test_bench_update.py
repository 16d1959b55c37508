"""The benchmark of updates: each row in a fresh process, and what a row says."""

import argparse
import os
import pathlib

import pytest
from small_models import llama_config

from experiments.benchmarks import update as bench_update

SIZES = {"batch_size": 1, "num_schedules": 2, "horizon": 4, "prefix_len": 16}


def test_each_measurement_has_a_process_of_its_own():
    assert len({os.getpid(), bench_update.alone(os.getpid), bench_update.alone(os.getpid)}) == 3


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux")
def test_a_row(monkeypatch):
    monkeypatch.setattr(bench_update, "SMOLLM2", llama_config())
    monkeypatch.setattr(bench_update.flops, "matmul_rate", lambda dtype: 1e9)
    row = bench_update.measure(argparse.Namespace(**SIZES, scaling=False, repeats=1), "float32", 2)
    assert {name: row[name] for name in SIZES} == SIZES
    assert row["episodes_per_prefix"] == 2
    assert {f"{stage}_seconds" for stage in ("prefill", "rollout", "policy", "head", "fit")} <= set(row)
    assert row["loop_rate"] > 0
    assert row["policy_seconds"] <= row["rollout_seconds"]  # a part of it, to the millisecond
    assert row["running_peak_gib_beyond_weights"] <= row["peak_gib_beyond_weights"]
