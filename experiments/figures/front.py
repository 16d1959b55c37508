"""Quality against compute for one run: the policy beside fixed, random and dense schedules (as figure 2).

    python -m experiments.figures.front --results runs/demo/results.csv --output runs/demo/front.png

Reads what `sol_jax.evaluate` wrote.  The left panel shows perplexity over the net keep rate; the right one
requested against realised cost per axis.
"""

import argparse

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.figures import plots
from sol_jax.errors import exits_on_user_error
from sol_jax.files import path_argument

CONTROLLERS = ("policy", "fixed", "random", "random_best")


def draw(rows: list[plots.ResultRow]) -> Figure:
    """The two panels."""
    figure, (front, adherence) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    plots.draw(front, plots.front_rows(rows), CONTROLLERS, "perplexity")
    dense = next(row.perplexity for row in rows if row.controller == "dense")
    front.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense")
    front.set(xlabel=plots.NET, ylabel="perplexity")
    front.legend(fontsize=8)
    policy = [row for row in rows if row.controller == "policy" and not row.held]
    for name, color in plots.AXIS_COLORS.items():
        asked, got = ([row.fields[f"{kind}_{name}"] for row in policy] for kind in ("requested", "cost"))
        adherence.plot(asked, got, "o", color=color, markersize=5, label=name)
    adherence.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    adherence.set(xlabel="requested cost", ylabel="realised cost", title="budgets of the policy")
    adherence.legend(fontsize=8)
    figure.suptitle(f"{rows[0].tokens:.0f} tokens of {rows[0].documents:.0f} documents", fontsize=9)
    return figure


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=path_argument, required=True, help="results.csv of an evaluation")
    parser.add_argument("--output", type=path_argument, required=True, help="image to write")
    args = parser.parse_args()
    print(f"drew {plots.save(draw(plots.read(args.results)), args.output)}")


if __name__ == "__main__":
    main()
