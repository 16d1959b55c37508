"""CSVs of evaluations and of the pollution experiment with made-up numbers, for tests of what reads them."""

import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.studies import pollution
from experiments.tasks.prompts import TASKS
from sol_jax.axes.base import ActionSpace
from sol_jax.evaluation import budget_grid as budgets
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.comparison import BASELINES, ComparisonRow, RandomScheduleRow
from sol_jax.evaluation.statistics import wilson
from sol_jax.runs.config import RunConfig

AXES = ("kappa", "rho", "eta")
# Nats that a controller is behind the policy.
BEHIND = {"policy": 0.0, "fixed": 0.1, "best_fixed": 0.08, "fixed_official": 0.13, "front": 0.09,
          "clock": 0.02, "swapped": 0.03, "random": 0.25,
          "random_best": 0.15, "entropy": 0.12, "drift": 0.2, "drift_official": 0.22,
          "dense": -0.3}  # fmt: skip


def write(
    folder: pathlib.Path, name: str, given: ConfigDict, seed: int = 0, num_random: int = 0, **about
) -> pathlib.Path:
    """`folder/smollm2-135m/NAME-sSEED.csv`, and the draws beside it: a policy that is better everywhere."""
    config = RunConfig.from_dict(given.to_dict())
    space = ActionSpace(config.axes.build(config.axis_context))
    rng = np.random.default_rng([seed, *name.encode()])
    diagonal = budgets.diagonal(space, 5)
    swept, along = budgets.axis_sweeps(space, 4)
    rows, draws = [], []
    for requested, axis in zip(diagonal + swept, ("",) * 5 + along, strict=True):
        cost = tuple(float(c) for c in np.array(requested) + 0.01 * rng.normal(size=3))
        own = 2.7 + 2 * (1 - np.mean(cost)) ** 2 + 0.01 * rng.normal()
        drawn = own + BEHIND["random"] + 0.05 * rng.normal(size=num_random)
        draws += [
            RandomScheduleRow("", requested, d, float(np.mean(cost)), float(x)) for d, x in enumerate(drawn)
        ]
        for controller in ("policy", *BASELINES, "random_best", "dense"):
            gain = BEHIND[controller] + 0.01 * rng.normal() * (controller != "policy")
            net = 1.0 if controller == "dense" else float(np.mean(cost))
            nats = own + gain
            place = (controller, "", axis, requested, cost, net, net, net, nats, float(np.exp(nats)))
            rows.append(ComparisonRow(*place, gain, gain - 0.05, gain + 0.05, 12800, 62, ("1:1",) * 3))
    said = {"run": name, "updates": 300, "model": "smollm2-135m", "prefix": 256, "horizon": 16,
            "text": "wiki.test.raw.gz:test", "blocks": 50, "seed": seed, "config": f"{name}{seed}",
            "commit": "abc", "protect": False, "stale_prefill": False,
            "num_random": num_random} | about  # fmt: skip
    path = folder / "smollm2-135m" / f"{name}-s{seed}.csv"
    results.write(path, results.records(rows, AXES, said))
    if draws:
        drawn_path = path.with_name(f"{path.stem}-draws.csv")
        results.write(drawn_path, results.records(draws, AXES, said))
    return path


def write_downstream(
    folder: pathlib.Path, tasks=tuple(TASKS), seed: int = 0, run: str = "sol-j-fl-t16-page"
) -> pathlib.Path:
    """`downstream-RUN-sSEED.csv`: tasks at three budgets; compute helps, and the policy is ahead."""
    rng, lines = np.random.default_rng(seed), []
    for task in tasks:
        for net in (0.4, 0.6, 0.8):
            for controller in ("policy", "fixed", "dense", "random_best"):
                behind = BEHIND[controller]
                accuracy = float(np.round(200 * (0.3 + 0.3 * net - 0.2 * behind + 0.01 * rng.normal()))) / 200
                low, high = wilson(round(200 * accuracy), 200)
                line = {"task": task, "controller": controller}
                line |= {f"requested_{axis}": net for axis in AXES}
                line |= {"net": 1.0 if controller == "dense" else net, "items": 200, "accuracy": accuracy}
                line |= {"accuracy_low": low, "accuracy_high": high, "nats": 3.0 - net + behind}
                line |= {"gain": behind, "gain_low": behind - 0.04, "gain_high": behind + 0.05}
                lines.append(results.texts(line | {"run": "x", "model": "smollm2-135m", "horizon": 16}))
    path = folder / "smollm2-135m" / f"downstream-{run}-s{seed}.csv"
    results.write(path, lines)
    return path


def write_transfer(folder: pathlib.Path) -> pathlib.Path:
    """`transfer.csv`: two horizons at three budgets, and what is beside it for pairs."""
    lines = []
    for horizon in (4, 16):
        about = {"policy": f"t{horizon}", "horizon": horizon, "prompts": 32, "prompt": 128, "max_tokens": 256}
        cases = [("plain", "dense", 1.0)]
        cases += [
            (mode, controller, net)
            for mode in ("refresh", "no_refresh", "lossless")
            for controller in ("policy", "fixed")
            for net in (0.4, 0.6, 0.8)
        ]
        for mode, controller, net in cases:
            line = {**about, "mode": mode, "controller": controller, "net": net}
            for name, value in {"logp": net - 2, "kept": net / 2, "bytes": 1.5 - net}.items():
                line |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
            lines.append(results.texts(line))
    path = folder / "smollm2-135m" / "transfer.csv"
    results.write(path, lines)
    results.write(path.with_name("transfer-prompts.csv"), lines[:1])
    return path


def write_pollution(folder: pathlib.Path) -> None:
    """`pollution.csv` and its curves: losses that fade."""
    protocol = pollution.PollutionProtocol()
    rng = np.random.default_rng(0)
    T = protocol.compressed + protocol.tail
    lost = 0.3 * np.exp(-np.arange(T) / 8) / np.arange(1, 10)[:, None]
    nll = np.concatenate([np.zeros((64, 1, T)), lost + 0.1 * rng.normal(size=(64, 9, T))], 1)
    rows, curves = pollution.rows_of(nll, rng.integers(0, 40, 64), protocol)
    about = {"model": "smollm2-135m", "windows": 64, "documents": 40, "prefix": 512, "compressed": 4,
             "text": "wiki.test.raw.gz"}  # fmt: skip
    folder = folder / "smollm2-135m"
    results.write(folder / "pollution.csv", [row | results.texts(about) for row in rows])
    results.write(folder / "pollution-curves.csv", curves)


def write_pages(folder: pathlib.Path) -> None:
    """`pages.csv` of two runs at three budgets: losses where the newest page has two keys."""
    rows: list[dict[str, Any]] = []
    for run in ("sol-j-fl-t16-s0", "sol-j-fl-t64-s0"):
        for budget in ("0.2/0.5/0.4", "0.5/0.7/0.6", "0.8/0.9/0.8"):
            for keys in range(1, 9):
                loss = 1.0 if keys == 2 else 0.1
                row = {"run": run, "budget": budget, "keys": keys, "tokens": 100, "policy_kappa": loss}
                row |= {"loss": loss, "loss_low": loss - 0.1, "loss_high": loss + 0.1}
                rows.append(row | {"gain": loss / 2, "gain_low": 0.0, "gain_high": loss})
    results.write(folder / "smollm2-135m" / "pages.csv", [results.texts(row) for row in rows])


def write_clock(folder: pathlib.Path) -> None:
    """What `experiments.benchmarks.clock` writes: two controllers beside the dense decoders."""
    others = [
        (name, every) for name in ("fixed 0.1/1/16", "mine") for every in ("every 1", "every 4", "never")
    ]
    rows = [
        {
            "dtype": dtype,
            "context": context,
            "rule": "kept",
            "controller": name,
            "asked": "0.5 0.5 1" if name == "mine" else "",
            "refresh": refresh,
            "speedup": 0.9 + 0.1 * i,
            "speedup_low": 0.85 + 0.1 * i,
            "speedup_high": 1.0 + 0.1 * i,
            "loss": 0.02 + 0.01 * i,
            "loss_error": 0.01,
        }
        for dtype in ("float32", "bfloat16")
        for context in (2048, 256)
        for i, (name, refresh) in [(0, ("dense", "never")), (0, ("xla", "never")), *enumerate(others)]
    ]
    results.write(folder / "clock_cpu.csv", [results.texts(row) for row in rows])
