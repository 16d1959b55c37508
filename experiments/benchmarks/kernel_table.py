"""Rows of the kernels' table: an operation measured beside its peers, and the columns that follow."""

import csv
import datetime
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from experiments.benchmarks.kernel_cases import KernelCase
from experiments.benchmarks.kernel_peers import from_torch

COLUMNS = (
    "op", "shape", "action", "implementation", "peer", "seconds", "bytes", "flops", "launches",
    "gb_per_second", "share_of_copy", "share_of_matmul", "speedup", "kept", "error",
    "layers", "rounds", "note",
    "jax", "device", "date",
)  # fmt: skip


# Largest errors against float64 that the issue of the kernels allows, by dtype.
BOUND = {"bfloat16": 1e-2, "float32": 1e-5}
WRONG = "WRONG: the error is above"


def run_case(case: KernelCase, rounds: int, rates: timing.DeviceRates | None) -> list[dict[str, Any]]:
    """Rows of one case; without `rates` only errors.  A variant that cannot run has its reason as note.

    So has a kernel whose error is above BOUND.  XLA's own forms are what a GPU makes of them: it divides less
    exactly than IEEE 754 asks and rounds float32 operands of products.
    """
    compiled: dict[str, Any] = {}
    notes: dict[str, str] = {}
    rows = []
    for action, inputs in case.actions.items():
        chains: dict[str, timing.Chains] = {}
        errors: dict[str, float] = {}
        inputs = inputs if rates else inputs[:1]
        first = inputs[0], case.buffers[0]
        answers = {dense: case.exact(*first, dense) for dense in (False, True)}
        for name, variant in case.variants.items():
            if name in notes:
                continue
            try:
                adapted = [variant.adapt(x, case.buffers[0])[0] for x in inputs]
                buffers = [variant.adapt(inputs[0], buffer)[1] for buffer in case.buffers]
                if name not in compiled:
                    compile = variant.compile or timing.compile_chains
                    compiled[name] = compile(variant.call, adapted, buffers)
                chains[name] = compiled[name](adapted, buffers)
                out = chains[name].short()[0]
                out = from_torch(out) if variant.compile else out
                errors[name] = difference(variant.first(out), answers[variant.dense])
            # Of a library, a compiler or memory: the rest is still worth measuring.
            except Exception as error:
                notes[name] = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
                chains.pop(name, None)
        seconds = timing.measure(chains, rounds) if rates else dict.fromkeys(chains, math.nan)
        peers = [seconds[name] for name in chains if case.variants[name].peer]
        kept = case.kept(*first)
        for name, variant in case.variants.items():
            row: dict[str, Any] = {
                "op": case.op,
                "shape": case.shape,
                "action": action,
                "implementation": name,
            }
            row |= {"peer": int(variant.peer), "note": notes.get(name, "")}
            if name in chains:
                work = variant.work(kept)
                row |= {"bytes": work.bytes, "flops": work.flops, "launches": chains[name].launches}
                row |= {"kept": 1.0 if variant.dense else kept, "error": errors[name], "rounds": rounds}
                row |= speeds(seconds[name], *work, rates, min(peers, default=math.nan))
                bound = BOUND[jnp.dtype(case.dtype).name]
                if not (variant.peer or name == "xla" or errors[name] <= bound):
                    row["note"] = f"{WRONG} {bound:g}"
            rows.append(row)
    return rows


def is_wrong(row: Mapping[str, Any]) -> bool:
    """Whether an implementation gave another answer than it may."""
    return str(row.get("note")).startswith(WRONG)


def difference(got: Any, exact: np.ndarray) -> float:
    """Largest error, absolute or relative, whichever is less; NaN counts as infinite."""
    miss = np.abs(np.asarray(got, np.float64) - exact) / np.maximum(1, np.abs(exact))
    return float(np.max(np.where(np.isnan(miss), np.inf, miss)))


def speeds(
    seconds: float, bytes: float, flops: float, rates: timing.DeviceRates | None, dense: float
) -> dict[str, float | None]:
    """The columns that follow from a time; None where it was not measurable."""
    if rates is None or math.isnan(seconds):
        return {"seconds": None}
    return {
        "seconds": seconds,
        "gb_per_second": bytes / seconds / 1e9,
        "share_of_copy": bytes / seconds / rates.copy,
        "share_of_matmul": flops / seconds / rates.matmul,
        "speedup": None if math.isnan(dense) else dense / seconds,
    }


def show(row: dict[str, Any]) -> None:
    """One line of a row."""
    facts = (
        f"{row[c]:.3g} {c}" for c in ("kept", "share_of_copy", "speedup", "error") if row.get(c) is not None
    )
    took = f"{row['seconds'] * 1e6:11.1f} us" if row.get("seconds") else f"{'-':>14}"
    name = f"{row['op']} {row['shape']} {row['action']} {row['implementation']}"
    print(f"{took}  {name}: {', '.join(facts)} {row.get('note') or ''}".rstrip(), flush=True)


def write(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """All rows so far, figures with six digits: a run that is cut short has written what it measured."""
    stamp = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            row = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow(row | stamp)


def device_name() -> str:
    """Of the device, for file names: "NVIDIA H200" -> "h200"."""
    return re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower().replace("nvidia", "").strip())


def finish_steps(rows: list[dict[str, Any]], rates: timing.DeviceRates) -> list[dict[str, Any]]:
    """Adds the columns that follow from the times; peers are the rows of the same op and shape."""
    peers: dict[Any, float] = {}
    for row in rows:
        if row["peer"] and not math.isnan(row["seconds"]):
            key = row["op"], row["shape"]
            peers[key] = min(peers.get(key, math.inf), row["seconds"])
    return [
        row
        | speeds(
            row["seconds"], row["bytes"], row["flops"], rates, peers.get((row["op"], row["shape"]), math.nan)
        )
        for row in rows
    ]
