"""Quality against compute: the policy beside fixed, random and dense schedules (the paper's figure 2).

    python -m experiments.front --results runs/demo/results.csv --output runs/demo/front.png

Reads what `sol_jax.evaluate` wrote.  The left panel shows perplexity over the net keep rate (the mean over
the axes of the realised episode-average costs); the right one requested against realised cost per axis.
"""

import argparse
import csv
import pathlib
import sys
from collections import defaultdict

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    "policy": {"color": "#b3301c", "marker": "o", "label": "policy"},
    "fixed": {"color": "#1f5f8b", "marker": "s", "label": "fixed, matched"},
    "random": {"color": "#8a8a8a", "marker": "^", "label": "random, matched (mean)"},
    "random_best": {"color": "#3f3f3f", "marker": "v", "label": "random, matched (best draw)"},
}


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a `results.csv`; exits with a sentence if there are none."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        sys.exit(f"error: {path} cannot be read ({error.strerror}); give the results.csv of an evaluation")
    if not rows or "perplexity" not in rows[0]:
        sys.exit(f"error: {path} is not a results.csv of sol_jax.evaluate")
    return rows


def draw(rows: list[dict[str, str]], title: str) -> plt.Figure:
    """The two panels."""
    by_controller = defaultdict(list)
    for row in rows:
        by_controller[row["controller"]].append(row)
    figure, (front, adherence) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name, style in STYLES.items():
        points = sorted((float(r["net"]), float(r["perplexity"])) for r in by_controller[name])
        if points:
            front.plot(*zip(*points, strict=True), linewidth=1.2, markersize=5, **style)
    dense = float(by_controller["dense"][0]["perplexity"])
    front.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense")
    front.set(xlabel="net keep rate (realised)", ylabel="perplexity", title=title)
    front.legend(fontsize=8)
    axes = [name.removeprefix("requested_") for name in rows[0] if name.startswith("requested_")]
    for name, marker in zip(axes, "os^D", strict=False):
        asked, got = (
            [float(r[f"{kind}_{name}"]) for r in by_controller["policy"]] for kind in ("requested", "cost")
        )
        adherence.plot(asked, got, marker, markersize=5, label=name)
    adherence.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    adherence.set(xlabel="requested cost", ylabel="realised cost", title="budgets of the policy")
    adherence.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, required=True, help="results.csv of an evaluation")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="image to write")
    args = parser.parse_args()
    rows = read(args.results)
    title = f"{rows[0]['tokens']} tokens of {rows[0]['documents']} documents"
    draw(rows, title).savefig(args.output, dpi=150)
    print(f"drew {args.output}")


if __name__ == "__main__":
    main()
