"""Beyond the paper: what policies do when the model writes its own text.

    python -m experiments.figures.generation

Reads `transfer.csv` of SmolLM2-135M, which `experiments.studies.transfer` wrote with one policy per horizon,
and writes `docs/figures/generation.png`.  The first two panels show the dense model's log-probability of the
text, with and without the dense refresh of the cache after each episode.  The third shows the share of
drafted tokens that the dense model accepts in lossless mode.  The last shows tokens accepted for the bytes of
one dense step, where 1 is what dense decoding gives.
"""

import csv
import pathlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import plots
from sol_jax.errors import UserError

TITLES = {"refresh": "cache refreshed", "no_refresh": "cache left as it is", "lossless": "lossless mode"}
LineKey = tuple[str, str]  # horizon, controller


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of the CSV, numbers as numbers; `UserError` if there is none."""
    path = folder / plots.MODEL / "transfer.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing; run experiments.studies.transfer first")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return [{name: plots.number_or_text(text) for name, text in row.items()} for row in rows]


def lines(rows: Sequence[dict[str, Any]], mode: str) -> dict[LineKey, list[dict[str, Any]]]:
    """The rows of each line of a panel, by ascending keep rate; horizons ascend too."""
    found = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["horizon"], row["net"])):
        if row["mode"] == mode:
            found[f"{row['horizon']:g}", row["controller"]].append(row)
    return found


def panel(axes: Axes, rows: Sequence[dict[str, Any]], mode: str, measure: str) -> None:
    """`measure` over the realised keep rate, a line per horizon and controller."""
    shades = {T: 1 - 0.3 * i for i, T in enumerate(sorted({row["horizon"] for row in rows}, reverse=True))}
    for (T, controller), same in lines(rows, mode).items():
        x, y, low, high = (
            np.array([row[name] for row in same])
            for name in ("net", measure, f"{measure}_low", f"{measure}_high")
        )
        looks = plots.STYLES[controller] | {"label": f"{controller}, T={T}"}
        axes.errorbar(
            x, y, yerr=[y - low, high - y], linewidth=1.2, markersize=4, capsize=2,
            alpha=shades[float(T)], **looks,
        )  # fmt: skip
    axes.set_xlabel(plots.NET)
    axes.set_title(TITLES[mode], fontsize=9)


def draw(folder: pathlib.Path) -> Figure:
    rows = [row | inverse(row) for row in read(folder)]
    size = plots.wide(4, 4.8)
    figure, (refreshed, left, kept, speed) = plots.plt.subplots(1, 4, figsize=size, layout="constrained")
    dense = float(np.mean([row["logp"] for row in rows if row["mode"] == "plain"]))
    for axes, mode in ((refreshed, "refresh"), (left, "no_refresh")):
        panel(axes, rows, mode, "logp")
        axes.axhline(dense, color="black", linewidth=0.8, linestyle="--", label="dense, greedy")
    left.sharey(refreshed)
    refreshed.set_ylabel("dense model's log-probability, nats per token")
    panel(kept, rows, "lossless", "kept")
    kept.set_ylabel("share of drafted tokens that are accepted")
    panel(speed, rows, "lossless", "tokens")
    speed.axhline(1, color="black", linewidth=0.8, linestyle="--")
    speed.set_ylabel("tokens for the bytes of one dense step")
    lines, labels = refreshed.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    prompts = f"{rows[0]['prompts']:g} prompts of {rows[0]['prompt']:g} tokens"
    figure.suptitle(
        f"{plots.MODEL}, {prompts}, {rows[0]['max_tokens']:g} written; bars: 95 % over prompts", fontsize=8
    )
    return figure


def inverse(row: dict[str, Any]) -> dict[str, float]:
    """Tokens for the bytes of a dense step: one over the share of bytes, its interval turned round."""
    return {
        "tokens": 1 / row["bytes"],
        "tokens_low": 1 / row["bytes_high"],
        "tokens_high": 1 / row["bytes_low"],
    }


if __name__ == "__main__":
    plots.run("generation", draw, __doc__)
