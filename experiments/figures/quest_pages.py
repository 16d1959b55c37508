"""Beyond the paper: where in a page of Quest's keys schedules lose likelihood and policies gain it.

    python -m experiments.figures.quest_pages

Reads `pages.csv` of SmolLM2-135M, which `experiments.studies.quest_pages` wrote, at the middle budget of each
run, and writes `docs/figures/quest_pages.png`.  The left panel shows what the fixed schedule loses against
dense decoding, the middle one the policy's gain over it, the right one the share of the cache that the policy
reads.
"""

import csv
import pathlib
from collections import defaultdict
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.figures import plots
from sol_jax.errors import UserError

PANELS = {
    "loss": "loss of the fixed schedule, nats per token",
    "gain": "gain of the policy, nats per token",
    "policy_kappa": "kappa of the policy, mean",
}


def read(path: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """run -> its rows at the middle one of its budgets; `UserError` if there is no such file."""
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); run experiments.studies.quest_pages first"
        ) from error
    by_run = defaultdict(list)
    for row in rows:
        by_run[row["run"]].append({name: plots.number_or_text(text) for name, text in row.items()})
    found = {}
    for run, same in by_run.items():
        budgets = list(dict.fromkeys(row["budget"] for row in same))
        found[run] = [row for row in same if row["budget"] == budgets[len(budgets) // 2]]
    return found


def draw(folder: pathlib.Path) -> Figure:
    by_run = read(folder / plots.MODEL / "pages.csv")
    figure, line = plt.subplots(1, len(PANELS), figsize=plots.wide(3, 4.2), layout="constrained")
    for axes, (measure, title) in zip(line, PANELS.items(), strict=True):
        for n, (run, rows) in enumerate(by_run.items()):
            keys, y = (np.array([row[name] for row in rows]) for name in ("keys", measure))
            look: dict[str, Any] = {"color": f"C{n}", "marker": "osD^vP*X"[n % 8], "markersize": 4}
            look |= {"linewidth": 1, "label": run.removesuffix("-s0")}
            if f"{measure}_low" in rows[0]:
                low, high = (np.array([row[f"{measure}_{end}"] for row in rows]) for end in ("low", "high"))
                axes.errorbar(keys, y, yerr=[y - low, high - y], capsize=2, **look)
            else:
                axes.plot(keys, y, **look)
        if measure != "policy_kappa":
            axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=title, xlabel="keys in the newest page")
        axes.title.set_fontsize(9)
    lines, labels = line[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{plots.MODEL}, the middle budget of each run; bars: 95 % over documents", fontsize=8)
    return figure


if __name__ == "__main__":
    plots.run("quest_pages", draw, __doc__)
