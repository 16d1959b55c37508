"""What the figures share: which CSVs they read, how controllers look, and how a front is drawn.

Results lie in `experiments/results/MODEL/NAME-sSEED.csv`, as `sol_jax.evaluate --output` wrote them.  Where
there are several seeds a point is their mean.  The bar of a gain is its 95 % interval over documents (of
several seeds, from the lowest to the highest end); that of a perplexity is the range of the seeds.
"""

import argparse
import pathlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import FIGURES, RESULTS
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import results_csv as results
from sol_jax.files import path_argument

MODEL = "smollm2-135m"
NET = "net keep rate: mean over the axes of the\nrealised episode-average costs"
STYLES: dict[str, dict[str, Any]] = {
    "policy": {"color": "#b3301c", "marker": "o", "label": "policy"},
    "fixed": {"color": "#1f5f8b", "marker": "s", "label": "fixed"},
    "fixed_official": {"color": "#6aa5cf", "marker": "D", "label": "fixed, the authors' rule"},
    "best_fixed": {"color": "#0d2f4a", "marker": "P", "label": "fixed, best split"},
    "front": {"color": "#d98a1f", "marker": "<", "label": "fixed, higher levels first"},
    "clock": {"color": "#c7a03c", "marker": ">", "label": "the policy's mean costs at each step"},
    "swapped": {"color": "#7a5c1e", "marker": "p", "label": "the policy's schedules of other text"},
    "random": {"color": "#9a9a9a", "marker": "^", "label": "random, mean of draws"},
    "random_best": {"color": "#3f3f3f", "marker": "v", "label": "random, best draw (chosen on this text)"},
    "entropy": {"color": "#2e7d4f", "marker": "P", "label": "entropy heuristic"},
    "drift": {"color": "#8a5aa8", "marker": "X", "label": "drift heuristic"},
    "drift_official": {"color": "#c39bd8", "marker": "x", "label": "drift, the authors' slip"},
}
AXIS_COLORS = {"kappa": "#b3301c", "rho": "#1f5f8b", "eta": "#2e7d4f"}


class ResultRow(NamedTuple):
    """A row of a CSV; numbers are numbers."""

    run: str  # the file's name without its seed
    seed: str
    fields: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(name) from None

    def per_axis(self, kind: str) -> tuple[float, ...]:
        """`requested` or `cost` of every axis."""
        return tuple(value for name, value in self.fields.items() if name.startswith(f"{kind}_"))


def load(folder: pathlib.Path, *patterns: str) -> list[ResultRow]:
    """The rows of all CSVs `MODEL/NAME` under `folder` that match; `UserError` if there are none.

    Names of texts and files apart, values that are numbers become numbers.
    """
    paths = sorted({path for pattern in patterns for path in folder.glob(f"{pattern}.csv")})
    paths = [path for path in paths if not path.stem.endswith(("-draws", "-curves"))]
    if not paths:
        raise UserError(f"{folder} has no CSV named {' or '.join(patterns)}; evaluate the runs first")
    return [row for path in paths for row in read(path)]


def available(folder: pathlib.Path, runs: dict[str, str]) -> dict[str, str]:
    """Those of `runs` (name -> title) that were evaluated; `UserError` if none was."""
    there = {name: title for name, title in runs.items() if any((folder / MODEL).glob(f"{name}-s[0-9]*.csv"))}
    if not there:
        raise UserError(
            f"{folder / MODEL} has no CSV named {', '.join(runs)} (-sSEED); evaluate the runs first"
        )
    return there


def with_random_schedules(folder: pathlib.Path, runs: dict[str, str]) -> dict[str, str]:
    """Those of `runs` that have random schedules one by one; `UserError` if none has.

    They are of NAME-random, evaluated apart on less text, or else of NAME.
    """
    found: dict[str, str] = {}
    for name, title in runs.items():
        choices = (f"{name}-random", name)
        there = [c for c in choices if any((folder / MODEL).glob(f"{c}-s[0-9]*-draws.csv"))]
        found |= dict.fromkeys(there[:1], title)
    if not found:
        names = ", ".join(runs)
        raise UserError(
            f"{folder / MODEL} has no CSV named {names} (-random-sSEED-draws); evaluate with --num_random"
        )
    return found


def panels(folder: pathlib.Path, runs: dict[str, str]) -> dict[str, list[ResultRow]]:
    """Title -> front of those of `runs` that were evaluated."""
    there = available(folder, runs)
    return {title: front_rows(load(folder, f"{MODEL}/{name}-s*")) for name, title in there.items()}


def random_schedules(folder: pathlib.Path, pattern: str) -> list[ResultRow]:
    """The random schedules of all CSVs that match, those with nothing held dense."""
    paths = sorted(folder.glob(f"{pattern}-draws.csv"))
    if not paths:
        raise UserError(f"{folder} has no CSV named {pattern}-draws; evaluate with --num_random")
    rows = [row for path in paths for row in read(path) if not row.held]
    for row in rows:
        row.fields["perplexity"] = float(np.exp(row.nats))
    return rows


def read(path: pathlib.Path) -> list[ResultRow]:
    """The rows of one CSV."""
    stem = path.stem.removesuffix("-draws")
    match = re.search(r"-s(\d+)$", stem)
    name, seed = (stem[: match.start()], match[1]) if match else (stem, "")
    return [
        ResultRow(name, seed, {name: number_or_text(text) for name, text in row.items()})
        for row in results.read(path)
    ]


def number_or_text(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def front_rows(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """The rows of the quality-efficiency front: nothing held dense, budgets not of a single axis' sweep."""
    return [row for row in rows if not row.held and not row.along]


class Point(NamedTuple):
    """One controller at one requested budget: the mean over seeds, and the ends of its bar (see above)."""

    x: float
    y: float
    low: float
    high: float


def points(rows: Iterable[ResultRow], controller: str, measure: str, over: str = "net") -> list[Point]:
    """The column `measure` of a controller over the column `over`, in ascending order."""
    by_budget = defaultdict(list)
    for row in rows:
        if row.controller == controller:
            by_budget[row.per_axis("requested")].append(row)
    found = []
    for same in by_budget.values():
        values = [row.fields[measure] for row in same]
        ends = ("gain_low", "gain_high") if measure == "gain" else (measure, measure)
        low, high = (
            pick(row.fields[end] for row in same) for pick, end in zip((min, max), ends, strict=True)
        )
        found.append(Point(float(np.mean([row.fields[over] for row in same])), np.mean(values), low, high))
    return sorted(found)


def draw(
    axes: Axes,
    rows: Iterable[ResultRow],
    controllers: Sequence[str],
    measure: str,
    over: str = "net",
    **style: Any,
) -> None:
    """A line with bars per controller that the rows have."""
    rows = list(rows)
    for name in controllers:
        line = points(rows, name, measure, over)
        if line:
            x, y, low, high = (np.array(values) for values in zip(*line, strict=True))
            looks = STYLES[name] | {"linewidth": 1.2, "markersize": 4.5, "capsize": 2} | style
            axes.errorbar(x, y, yerr=[y - low, high - y], **looks)


def draw_pair(
    top: Axes, bottom: Axes, rows: Sequence[ResultRow], title: str, controllers: Sequence[str]
) -> None:
    """Perplexity above, and what the policy gains over each other controller below."""
    draw(top, rows, ("policy", *controllers), "perplexity")
    dense = [row.perplexity for row in rows if row.controller == "dense"]
    top.axhline(float(np.mean(dense)), color="black", linewidth=0.8, linestyle=":", label="dense")
    top.set(title=title, yscale="log")
    top.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    top.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.6)))
    draw(bottom, rows, controllers, "gain")
    bottom.axhline(0, color="black", linewidth=0.8)
    bottom.set(xlabel=NET)


def wide(panels: int, height: float) -> tuple[float, float]:
    """The size of a figure of so many panels in a line: wide enough for legend and caption."""
    return max(3.6 * panels + 0.6, 8.5), height


def fronts(
    panels: Mapping[str, Sequence[ResultRow]], controllers: Sequence[str] = ("fixed", "random", "random_best")
) -> Figure:
    """A column per panel: perplexity over the net keep rate, and the policy's gains with their intervals."""
    size = wide(len(panels), 6.2)
    figure, grid = plt.subplots(
        2, len(panels), figsize=size, layout="constrained", squeeze=False, sharex="col"
    )
    for (title, rows), top, bottom in zip(panels.items(), *grid, strict=True):
        draw_pair(top, bottom, rows, title, controllers)
    grid[0, 0].set_ylabel("perplexity")
    grid[1, 0].set_ylabel("gain of the policy, nats per token\n(above 0 the policy is better)")
    return finish(figure, grid[0, 0], [row for rows in panels.values() for row in rows])


def finish(figure: Figure, axes: Axes, rows: Sequence[ResultRow]) -> Figure:
    """Puts the legend of `axes` below the figure and the caption of `rows` above it."""
    lines, labels = axes.get_legend_handles_labels()
    figure.legend(
        lines, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=8, frameon=False
    )
    figure.suptitle(caption(rows), fontsize=8)
    return figure


def caption(rows: Sequence[ResultRow]) -> str:
    """Model, text and sizes, and what the bars are."""

    def all_of(name: str) -> str:
        found = {row.fields[name] for row in rows}
        return " / ".join(f"{x:.0f}" if isinstance(x, float) else x for x in sorted(found))

    seeds = sorted({len({row.seed for row in rows if row.run == run}) for run in {row.run for row in rows}})
    return (
        f"{all_of('model')}, S={all_of('prefix')}, T={all_of('horizon')}, {all_of('text')}, "
        f"{all_of('tokens')} tokens of {all_of('documents')} documents, "
        f"{' or '.join(map(str, seeds))} seed(s); bars: 95 % over documents"
    )


def run(figure: str, drawn: Callable[[pathlib.Path], Figure], doc: str | None) -> None:
    """The command line of a figure's script: reads `--results`, writes `--output`."""

    @exits_on_user_error
    def main() -> None:
        parser = argparse.ArgumentParser(description=(doc or figure).splitlines()[0])
        parser.add_argument("--results", type=path_argument, default=RESULTS, help="folder of the CSVs")
        parser.add_argument("--output", type=path_argument, default=FIGURES / f"{figure}.png")
        args = parser.parse_args()
        print(f"drew {save(drawn(args.results), args.output)}")

    main()


def save(figure: Figure, path: pathlib.Path) -> pathlib.Path:
    """Writes an image; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path
