"""Figure 9: how many random schedules of the same cost the policy beats, budget by budget.

    python -m experiments.figures.figure9

Reads CSVs of `sol-j-2l`, `sol-j-3l` and `sol-j-fl-t16` of SmolLM2-135M: of each `NAME-random-s*.csv` or else
`NAME-s*.csv`, and the draws beside them (`-draws.csv`).  Writes `docs/figures/figure9.png`: violins show what
the policy gains over each draw, and the number above is the share of draws that it beats.
"""

import pathlib
from collections import defaultdict

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.figures import plots
from experiments.figures.figure2 import RUNS


def draw(folder: pathlib.Path) -> Figure:
    runs = plots.with_random_schedules(folder, RUNS)
    figure, line = plt.subplots(
        1, len(runs), figsize=plots.wide(len(runs), 4.2), layout="constrained", squeeze=False
    )
    everything: list[plots.ResultRow] = []
    for axes, (name, title) in zip(line[0], runs.items(), strict=True):
        rows = plots.front_rows(plots.load(folder, f"{plots.MODEL}/{name}-s*"))
        everything += rows
        own = {(row.seed, row.per_axis("requested")): row for row in rows if row.controller == "policy"}
        by_budget = defaultdict(list)
        for drawn in plots.random_schedules(folder, f"{plots.MODEL}/{name}-s*"):
            policy = own.get((drawn.seed, drawn.per_axis("requested")))
            if policy is not None:
                by_budget[drawn.per_axis("requested")].append((policy.net, drawn.nats - policy.nats))
        for pairs in by_budget.values():
            net, gains = np.mean([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
            parts = axes.violinplot(gains, [net], widths=0.06, showmedians=True)
            for part in (*parts.pop("bodies"), *parts.values()):
                part.set_color("0.45")
            axes.text(net, gains.max(), f"{(gains > 0).mean():.1%}", ha="center", va="bottom", fontsize=7)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=title, xlabel=plots.NET)
    line[0, 0].set_ylabel("gain of the policy over each draw, nats per token")
    shown = plots.caption(everything).split(";")[0]
    figure.suptitle(f"{shown}; numbers: share of draws that the policy beats", fontsize=8)
    return figure


if __name__ == "__main__":
    plots.run("figure9", draw, __doc__)
