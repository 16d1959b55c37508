"""The benchmark of evaluations on a tiny model."""

import sys

from small_models import llama_config

from experiments.benchmarks import evaluate as bench_evaluate
from experiments.benchmarks import update as bench_update

TINY = llama_config()


def test_it_compares_evaluation_with_updates(monkeypatch, capsys):
    monkeypatch.setattr(bench_update, "SMOLLM2", TINY)
    monkeypatch.setattr(bench_evaluate.flops, "matmul_rate", lambda dtype: 1e9)
    sizes = {"batch_size": 1, "num_schedules": 2, "horizon": 4, "prefix_len": 16, "entries": 5, "parallel": 2}
    words = [f"--{name}={size}" for name, size in sizes.items()]
    monkeypatch.setattr(sys, "argv", ["bench_evaluate", "--repeats=1", *words])
    bench_evaluate.main()
    *rows, closing = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["what=update", "what=evaluation"]
    shares = [float(row.split("share_of_matmul_rate=")[1]) for row in rows]
    assert closing.startswith(f"evaluation / update: {shares[1] / shares[0]:.2f}; a grid of 3101 entries")
