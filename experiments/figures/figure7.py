"""Figure 7: KV pollution, or what 4 compressed steps cost the 64 dense ones after them.

    python -m experiments.figures.figure7

Reads `pollution.csv` and `pollution-curves.csv` of SmolLM2-135M, which `experiments.studies.pollution` wrote,
and writes `docs/figures/figure7.png`.  Lines are medians over windows; bands go from the 10th to the 90th
percentile.
"""

import csv
import pathlib

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.figures import plots
from sol_jax.errors import UserError

TITLES = {"kappa": "token sparsity", "rho": "MLP-input pruning", "eta": "MLP-output bits"}


def _read(path: pathlib.Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); run experiments.studies.pollution first"
        ) from error


def draw(folder: pathlib.Path) -> Figure:
    folder = folder / plots.MODEL
    rows, curves = _read(folder / "pollution.csv"), _read(folder / "pollution-curves.csv")
    figure, line = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, (axis, title) in zip(line, TITLES.items(), strict=True):
        for n, row in enumerate(row for row in rows if row["axis"] == axis):
            curve = [point for point in curves if (point["axis"], point["level"]) == (axis, row["level"])]
            step, median, high, low = (
                [float(point[name]) for point in curve]
                for name in ("step", "curve_median_pct", "curve_p90_pct", "curve_p10_pct")
            )
            label = (
                f"{row['level']}: direct {_interval(row, 'direct_pct')}\ntail {_interval(row, 'tail_pct')}, "
                f"p90 peak {float(row['peak_tail_pct_p90']):.0f}"
            )
            axes.plot(step, median, color=f"C{n}", linewidth=1, label=label)
            axes.fill_between(step, low, high, color=f"C{n}", alpha=0.15)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=f"{title} ({axis})", xlabel="dense steps after the compressed ones")
        axes.legend(title="level: change of perplexity, %", fontsize=6.5, title_fontsize=7)
    line[0].set_ylabel("change of perplexity against dense, %")
    about = rows[0]
    figure.suptitle(
        f"{about['model']}, {about['compressed']} compressed steps after {about['prefix']} dense tokens, "
        f"{about['windows']} windows of {about['documents']} documents of {about['text']}; [95 %]",
        fontsize=8,
    )
    return figure


def _interval(row: dict[str, str], name: str) -> str:
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    plots.run("figure7", draw, __doc__)
