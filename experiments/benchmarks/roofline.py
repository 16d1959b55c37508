"""Fits the cost model of a device to a table of kernels, and draws its rooflines.

    python -m experiments.benchmarks.roofline --csv experiments/results/kernels_h200.csv

Writes, beside the table, cost_model_DEVICE.json (prices), and to docs/figures roofline_DEVICE.png
(what each implementation reaches, under the copy and matmul rates of the same run), actions_DEVICE.png
(speedup against what the action keeps) and prediction_DEVICE.png (what a cost model predicts of the shapes
that it was fitted to, and of others that were held out).  The prices written are those of all shapes.
"""

import argparse
import csv
import pathlib
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments import FIGURES
from experiments.figures import plots
from pallas_kernels import cost_model
from pallas_kernels.cost_model import CostModel
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.files import path_argument

TableRow = dict[str, str]
SKIPPING = ("pallas", "triton")  # implementations that read less where an action keeps less


def read(path: pathlib.Path) -> list[TableRow]:
    """The table's rows; `UserError` if it is none."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; python -m experiments.benchmarks.kernels writes it"
        ) from None
    if not rows or "share_of_copy" not in rows[0]:
        raise UserError(
            f"{path}: not a table of kernels (python -m experiments.benchmarks.kernels writes them)"
        )
    return rows


def rates(rows: Sequence[TableRow]) -> tuple[float, float]:
    """Bytes per second of a copy and FLOP per second of a product."""
    found = {row["action"]: row for row in rows if row["op"] == "rates"}
    return 1e9 * float(found["copy"]["gb_per_second"]), float(found["matmul"]["flops"])


def fitted(rows: Sequence[TableRow]) -> list[TableRow]:
    """What the model is fitted to: timed programs whose launches are known and that skip what they should.

    Not updates and generations, which are many programs in one, nor the XLA forms of sparse operations,
    which read masks and intermediate results that no count of bytes holds.
    """
    return [
        row
        for row in rows
        if row["seconds"]
        and row["launches"]
        and row["op"] not in ("update", "generation")
        and (row["implementation"] != "xla" or row["op"] == "quantize_residual")
    ]


def fit(rows: Sequence[TableRow]) -> CostModel:
    """The device's prices; launches per layer are those of a decode step with its kernels."""
    used = fitted(rows)
    if not used:
        raise UserError("the table has no timed rows to fit a cost model to")
    work = ([float(row[column]) for row in used] for column in ("bytes", "flops", "launches", "seconds"))
    bytes_N, flops_N, launches_N, seconds_N = work
    per_layer = [
        float(row["launches"]) / float(row["layers"])
        for row in used
        if row["op"] == "decode_step" and row["implementation"] == "pallas"
    ]
    launches = float(np.median(per_layer)) if per_layer else 0.0
    return cost_model.fit(rows[0]["device"], bytes_N, flops_N, launches_N, seconds_N, launches)


def held_out(rows: Sequence[TableRow]) -> tuple[list[TableRow], list[TableRow]]:
    """The rows to fit to, and those to predict: the last shape of every operation that has several."""
    shapes: dict[str, list[str]] = {}
    for row in fitted(rows):
        of_op = shapes.setdefault(row["op"], [])
        of_op += [row["shape"]] if row["shape"] not in of_op else []
    last = {(op, of_op[-1]) for op, of_op in shapes.items() if len(of_op) > 1}
    kept = [row for row in rows if (row["op"], row["shape"]) not in last]
    return kept, [row for row in fitted(rows) if (row["op"], row["shape"]) in last]


def misses(model: CostModel, rows: Sequence[TableRow]) -> str:
    """How far predictions are off, in words."""
    if not rows:
        return "no rows"
    miss = [abs(predict(model, row) / float(row["seconds"]) - 1) for row in rows]
    return f"{np.median(miss):.0%} over {len(miss)} rows"


def predict(model: CostModel, row: TableRow) -> float:
    return model.seconds(*(float(row[column]) for column in ("bytes", "flops", "launches")))


def draw_roofline(rows: Sequence[TableRow]) -> Figure:
    """What each implementation reaches, under the copy and matmul rates of the same run."""
    copy, matmul = rates(rows)
    timed = [row for row in rows if row["seconds"] and float(row["flops"] or 0) > 0]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    intensity = np.logspace(-1, 4, 100)
    axes.loglog(intensity, np.minimum(intensity * copy, matmul) / 1e12, color="black", lw=1)
    for i, op in enumerate(dict.fromkeys(row["op"] for row in timed)):
        for peer, marker in (("0", "o"), ("1", "x")):
            of_op = [row for row in timed if (row["op"], row["peer"]) == (op, peer)]
            flops, bytes, seconds = (
                np.array([float(row[c]) for row in of_op]) for c in ("flops", "bytes", "seconds")
            )
            label = op + (" (dense peers)" if peer == "1" else "")
            if of_op:
                axes.plot(
                    flops / bytes, flops / seconds / 1e12, f"{marker}C{i}", ms=4, alpha=0.7, label=label
                )
    axes.set(xlabel="operations per byte", ylabel="TFLOP/s", title=rows[0]["device"])
    if timed:
        axes.legend(fontsize=7)
    return figure


def draw_actions(rows: Sequence[TableRow]) -> Figure:
    """Speedup over the best dense peer against what an action leaves, a panel for each operation."""
    dense: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["peer"] == "1" and row["bytes"]:
            key = row["op"], row["shape"]
            dense[key] = min(float(row["bytes"]), dense.get(key, np.inf))
    timed = [row for row in rows if row["speedup"] and row["implementation"] in SKIPPING]
    ops = list(dict.fromkeys(row["op"] for row in timed))
    columns = max(len(ops), 1)
    figure, panels = plt.subplots(
        1, columns, squeeze=False, figsize=(1 + 3.6 * columns, 3.8), layout="constrained"
    )
    for axes, op in zip(panels[0], ops, strict=False):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in timed:
            if row["op"] == op:
                share = float(row["bytes"]) / dense[op, row["shape"]]
                lines.setdefault(f"{row['shape']}, {row['implementation']}", []).append(
                    (share, float(row["speedup"]))
                )
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", ms=4, lw=1, label=label)
        axes.axhline(1, color="black", lw=0.8, ls=":")
        axes.set(xlabel="bytes read / bytes of the dense peer", title=op, xlim=(0, None), ylim=(0, None))
        axes.legend(fontsize=6)
    panels[0][0].set_ylabel("speedup over the best dense peer")
    return figure


def draw_prediction(seen: Sequence[TableRow], unseen: Sequence[TableRow], model: CostModel) -> Figure:
    """The cost model against the times that it was fitted to, and (hollow) of shapes that it was not."""
    figure, axes = plt.subplots(figsize=(5, 4.5), layout="constrained")
    used = [*fitted(seen), *unseen]
    for i, op in enumerate(dict.fromkeys(row["op"] for row in used)):
        for rows, style, label in ((fitted(seen), {}, op), (unseen, {"mfc": "none"}, f"{op}, held out")):
            of_op = [row for row in rows if row["op"] == op]
            measured = [1e6 * float(row["seconds"]) for row in of_op]
            predicted = [1e6 * predict(model, row) for row in of_op]
            if of_op:
                axes.loglog(measured, predicted, f"oC{i}", ms=4, alpha=0.7, label=label, **style)
    ends = [1e6 * f(float(row["seconds"]) for row in used) for f in (min, max)]
    axes.plot(ends, ends, color="black", lw=1)
    axes.set(xlabel="measured, µs", ylabel="predicted, µs", title=f"cost model of {model.device}")
    axes.legend(fontsize=7)
    return figure


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--csv", type=path_argument, required=True, help="written by experiments.benchmarks.kernels"
    )
    parser.add_argument("--figures", type=path_argument, default=FIGURES, help="folder of the figures")
    args = parser.parse_args()
    rows = read(args.csv)
    model = fit(rows)
    name = args.csv.stem.removeprefix("kernels_")
    path = args.csv.parent / f"cost_model_{name}.json"
    model.save(path)
    seen, unseen = held_out(rows)
    checked = fit(seen)
    print(
        f"{model.device}: {to_rate(model.seconds_per_byte, 'TB/s')}, "
        f"{to_rate(model.seconds_per_flop, 'TFLOP/s')}, {model.seconds_per_launch * 1e6:.2f} us a launch; "
        f"median relative error {misses(model, fitted(rows))}; "
        f"of shapes held out from the fit {misses(checked, unseen)}"
    )
    print(f"wrote {path}")
    drawn = {
        "roofline": draw_roofline(rows),
        "actions": draw_actions(rows),
        "prediction": draw_prediction(seen, unseen, checked),
    }
    for kind, figure in drawn.items():
        print(f"wrote {plots.save(figure, args.figures / f'{kind}_{name}.png')}")


def to_rate(price: float, unit: str) -> str:
    return f"{1e-12 / price:.3g} {unit}" if price else f"free {unit}"


if __name__ == "__main__":
    main()
