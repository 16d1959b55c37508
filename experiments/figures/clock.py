"""Beyond the paper: what decoding under a controller wins on the clock, and what it loses.

    python -m experiments.figures.clock

Reads `clock_cpu.csv`, which `experiments.benchmarks.clock` wrote, and writes `docs/figures/clock.png`: speed
over that of dense decoding by the same kernels against the loss beside it, a panel for each type and context.
The shape of a point says when entries of compressed steps are replaced; bars are the middle half of the
episodes, and one standard error of the loss.
"""

import csv
import pathlib
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.figures import plots
from sol_jax.errors import UserError

REFRESHES = {"every 1": "o", "every 4": "^", "never": "s"}
COLORS = plt.get_cmap("tab20")([*range(0, 20, 2), *range(1, 20, 2)])  # the strong ones first


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Its rows; `UserError` if there is no such file."""
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); run experiments.benchmarks.clock first"
        ) from error
    return [{name: plots.number_or_text(text) for name, text in row.items()} for row in rows]


def named(row: dict[str, Any]) -> str:
    """The controller and what it was asked for, or the rule of the fixed ones if it is not the usual one."""
    dense = row["controller"].startswith("fixed 1/")  # reads every page, by any rule
    rule = "" if dense else {"quest": "as Quest", "group": "pages of a group"}.get(row["rule"], "")
    said = row.get("asked") or (f"({rule})" if rule else "")
    return f"{row['controller']} {said}".strip()


def draw(folder: pathlib.Path) -> Figure:
    rows = read(folder / "clock_cpu.csv")
    dtypes, contexts = (list(dict.fromkeys(row[name] for row in rows)) for name in ("dtype", "context"))
    names = list(dict.fromkeys(named(row) for row in rows if row["controller"] not in ("dense", "xla")))
    if len(names) > len(COLORS):
        raise UserError(f"clock_cpu.csv has {len(names)} controllers; there are colours for {len(COLORS)}")
    size = plots.wide(len(contexts), 2.6 * len(dtypes) + 1)
    figure, panels = plt.subplots(
        len(dtypes), len(contexts), squeeze=False, figsize=size, layout="constrained"
    )
    for line, dtype in zip(panels, dtypes, strict=True):
        for axes, context in zip(line, sorted(contexts), strict=True):
            here = [row for row in rows if (row["dtype"], row["context"]) == (dtype, context)]
            for n, name in enumerate(names):
                for row in (row for row in here if named(row) == name):
                    below, above = (abs(row["speedup"] - row[f"speedup_{end}"]) for end in ("low", "high"))
                    axes.errorbar(
                        row["loss"],
                        row["speedup"],
                        xerr=row["loss_error"],
                        yerr=[[below], [above]],
                        color=COLORS[n],
                        marker=REFRESHES[row["refresh"]],
                        markersize=5,
                        linewidth=0.8,
                    )
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_title(f"{dtype}, {context:g} tokens of context", fontsize=9)
            axes.set(xlabel="loss, nats per token", ylabel="speed over dense")
            axes.locator_params(axis="x", nbins=5)
    looks: list[tuple[dict[str, Any], str]] = [
        ({"color": COLORS[n], "marker": "o"}, name) for n, name in enumerate(names)
    ]
    looks += [
        ({"color": "black", "marker": marker, "fillstyle": "none"}, f"refresh: {name}")
        for name, marker in REFRESHES.items()
    ]
    handles = [plt.Line2D([], [], linestyle="none", **look) for look, _ in looks]
    labels = [name for _, name in looks]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(
        f"{plots.MODEL}, batch 1 on a CPU; bars: middle half of the episodes, one standard error", fontsize=8
    )
    return figure


if __name__ == "__main__":
    plots.run("clock", draw, __doc__)
