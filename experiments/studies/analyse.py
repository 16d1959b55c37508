"""Statistics that the paper lacks, computed from CSVs and scores of evaluations.

    python -m experiments.studies.analyse wins --output wins.csv \\
        --results experiments/results/smollm2-135m/sol-j-*.csv
    python -m experiments.studies.analyse misses --output misses.csv \\
        --results experiments/results/smollm2-135m/grid/*.csv
    python -m experiments.studies.analyse updates --workdirs runs/fl-s0 runs/fl-s1 --output updates.csv
    python -m experiments.studies.analyse spending --scores runs/fl-s0/results.scores/* --output spending.csv
    python -m experiments.studies.analyse over_fixed --scores runs/fl-s0/results.scores/* --output F.csv
    python -m experiments.studies.analyse effect --scores CLEAN --others STALE --label stale_prefill \\
        --output stale_prefill.csv

`wins` counts at how many budgets of the front, and in how many runs, the policy beats each other controller.
`misses` tells how far its realised costs are from the requested ones.  `updates` shows how the gain over the
fixed schedule grows while training.  `spending` correlates the cost of a step with word starts, digits,
punctuation, the dense model's entropy and the step in the episode.  `over_fixed` tells what each controller,
not the policy alone, gains over the fixed schedule.  `effect` tells what a change to the evaluation (the
authors' stale prefill; protected sinks and window) does to scores and gains on the same text.

Each reads what its options name and writes the CSV `--output`, one row per estimate.  `--results` are CSVs of
`sol_jax.evaluate`; folders of scores are those that it leaves beside its CSV; `--workdirs` are training runs.
Intervals are over documents.
"""

import argparse
import pathlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.figures import plots
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.score_cache import CachedScores, read_folder
from sol_jax.evaluation.scoring import POLICY, EntryScores
from sol_jax.evaluation.statistics import document_bootstrap, document_correlation
from sol_jax.files import parse_json, path_argument
from sol_jax.models.tokenizer import Tokenizer, load_tokenizer

CsvRow = dict[str, Any]


def interval(name: str, estimate: tuple[float, float, float]) -> CsvRow:
    """Three columns of an estimate and its interval."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), estimate, strict=True))


# --- wins --------------------------------------------------------------------------------------------


def wins(rows: Sequence[plots.ResultRow]) -> list[CsvRow]:
    """Per run and controller the share of the front's budgets at which the policy is better, and clearly so.

    "Clearly": its interval excludes 0; `clearly_worse` likewise.  Runs that differ by their seed alone also
    have a line together, seed "all", with the share of runs that win at every budget.
    """
    by_run = defaultdict(list)
    for row in plots.front_rows(rows):
        if row.controller not in (POLICY, "dense"):
            by_run[row.run, row.controller, row.seed].append(row)
    found = [
        {"run": run, "against": controller, "seed": seed, **_share(same)}
        for (run, controller, seed), same in sorted(by_run.items())
    ]
    for run, controller in sorted({(run, controller) for run, controller, _ in by_run}):
        seeds = [same for key, same in by_run.items() if key[:2] == (run, controller)]
        together = _share([row for same in seeds for row in same])
        everywhere = np.mean([all(row.gain > 0 for row in same) for same in seeds])
        found.append({"run": run, "against": controller, "seed": "all", **together, "runs": len(seeds),
                      "runs_better_everywhere": float(everywhere)})  # fmt: skip
    return found


def _share(rows: Sequence[plots.ResultRow]) -> CsvRow:
    gains = np.array([row.gain for row in rows])
    return {
        "budgets": len(rows),
        "better": float((gains > 0).mean()),
        "clearly_better": float(np.mean([row.gain_low > 0 for row in rows])),
        "clearly_worse": float(np.mean([row.gain_high < 0 for row in rows])),
        "mean_gain": float(gains.mean()),
        "smallest_gain": float(gains.min()),
    }


# --- misses ------------------------------------------------------------------------------------------


def misses(rows: Sequence[plots.ResultRow], bound: float = 0.03) -> list[CsvRow]:
    """Per run and axis how far realised costs are from requested ones, over all budgets of the policy."""
    by_run = defaultdict(list)
    for row in rows:
        if row.controller == POLICY and not row.held:
            by_run[row.run].append(row)
    found = []
    for run, same in sorted(by_run.items()):
        for name, miss_N in _misses(same).items():
            worst = same[int(np.abs(miss_N).argmax())].per_axis("requested")
            found.append(
                {
                    "run": run,
                    "axis": name,
                    "budgets": len(same),
                    f"within_{bound:g}": float((np.abs(miss_N) <= bound).mean()),
                    "mean": float(np.abs(miss_N).mean()),
                    "mean_signed": float(miss_N.mean()),
                    "largest": float(np.abs(miss_N).max()),
                    "largest_at": "/".join(f"{cost:g}" for cost in worst),
                }
            )
    return found


def _misses(rows: Sequence[plots.ResultRow]) -> dict[str, np.ndarray]:
    """Realised less requested cost of each row, by axis; `any` is that of the axis that misses by most."""
    miss_NxX = np.array([np.subtract(row.per_axis("cost"), row.per_axis("requested")) for row in rows])
    names = [key.removeprefix("cost_") for key in rows[0].fields if key.startswith("cost_")]
    largest_N = np.abs(miss_NxX).argmax(1)[:, None]
    return dict(zip(names, miss_NxX.T, strict=True)) | {
        "any": np.take_along_axis(miss_NxX, largest_N, 1)[:, 0]
    }


# --- updates -----------------------------------------------------------------------------------------


def updates(workdirs: Sequence[pathlib.Path]) -> list[CsvRow]:
    """The validation scalars of `metrics.jsonl`, a line per run and evaluation."""
    found = []
    for workdir in workdirs:
        try:
            lines = (workdir / "metrics.jsonl").read_text().splitlines()
            scalars = [parse_json(line) for line in lines]
        except (OSError, ValueError) as error:
            raise UserError(f"{workdir}/metrics.jsonl cannot be read ({error}); name runs") from error
        for line in scalars:
            shown = {
                name.removeprefix("eval/"): float(x) for name, x in line.items() if name.startswith("eval/")
            }
            if shown:
                found.append({"run": workdir.absolute().name, "update": line["step"], **shown})
    if not found:
        raise UserError("these runs were never evaluated while training; set config.eval.every")
    return found


# --- spending ----------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[str], bool]] = {
    "word_start": lambda text: text[:1].isspace() and text.strip()[:1].isalpha(),
    "continuation": lambda text: text[:1].isalpha(),
    "digit": lambda text: any(letter.isdigit() for letter in text),
    "punctuation": lambda text: bool(text.strip()) and not any(letter.isalnum() for letter in text),
}


def token_kinds(tokenizer: Tokenizer, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Which tokens are of which kind, by their text: 0.0 or 1.0 each."""
    texts = {int(token): tokenizer.decode([int(token)]) for token in np.unique(tokens)}
    table = np.zeros((len(KINDS), max(texts) + 1))
    for k, is_kind in enumerate(KINDS.values()):
        for token, text in texts.items():
            table[k, token] = is_kind(text)
    return {name: table[k][tokens] for k, name in enumerate(KINDS)}


def features(scored: CachedScores, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """What is known of each step, [N, W, T]: of the token it reads, of the one it predicts, and the rest."""
    dense = _job(scored, "dense")[1]
    N, W, _, T = dense.logp_NxWxJxT.shape
    start = scored.tokens_NxM.shape[1] - 1 - W * T
    read = scored.tokens_NxM[:, start:-1].reshape(N, W, T)
    predicted = scored.tokens_NxM[:, start + 1 :].reshape(N, W, T)
    of_read = {f"reads_{name}": value for name, value in token_kinds(tokenizer, read).items()}
    of_predicted = {f"predicts_{name}": value for name, value in token_kinds(tokenizer, predicted).items()}
    return {
        **of_read,
        **of_predicted,
        "dense_entropy": dense.entropy_NxWxJxT[:, :, 0],
        "dense_surprise": -dense.logp_NxWxJxT[:, :, 0],
        "step": np.broadcast_to(np.arange(T, dtype=float), (N, W, T)),
    }


def step_costs(scored: CachedScores, scores: EntryScores) -> dict[str, np.ndarray]:
    """Cost of every step of every column by axis, and their mean `net`, [N, W, J, T]."""
    costs = {name: np.array(levels) for name, levels in scored.about["rules"]["costs"].items()}
    indices = np.unravel_index(scores.action_NxWxJxT, tuple(len(levels) for levels in costs.values()))
    by_axis = {name: levels[index] for (name, levels), index in zip(costs.items(), indices, strict=True)}
    return {"net": np.mean(list(by_axis.values()), 0), **by_axis}


def spending(scored: CachedScores, tokenizer: Tokenizer) -> list[CsvRow]:
    """Correlation of the policy's cost per step with each feature, per budget and over all of them.

    Over all budgets ("all") costs count from the mean of their budget.  `within_step` is the correlation
    once the mean of each step of the episode is taken off both: what is left when the policy's habits of
    spending at certain steps are.  For kinds of tokens also the mean cost of steps with and without.
    """
    asked, scores = _job(scored, POLICY)
    N, W, J, T = scores.action_NxWxJxT.shape
    document = np.broadcast_to(scored.document_N[:, None, None], (N, W, T)).ravel()
    known, found = features(scored, tokenizer), []
    for axis, cost in step_costs(scored, scores).items():
        columns = {"/".join(f"{c:g}" for c in asked[j]): cost[:, :, j] for j in range(J)}
        for name, value in known.items():

            def correlations(columns: Sequence[np.ndarray], value: np.ndarray = value) -> CsvRow:
                documents = np.tile(document, len(columns))
                record: CsvRow = {}
                for measure, over in (("correlation", (0, 1, 2)), ("within_step", (0, 1))):
                    y = np.concatenate([_centred(column, over) for column in columns])
                    x = np.tile(_centred(value, over), len(columns))
                    record |= interval(measure, document_correlation(x, y, documents))
                return record

            for budget, column in columns.items():
                record = {"axis": axis, "feature": name, "budget": budget, **correlations([column])}
                found.append(record | _split(value.ravel(), column.ravel()))
            record = {"axis": axis, "feature": name, "budget": "all"}
            found.append(record | correlations(list(columns.values())))
    return found


def _centred(x: np.ndarray, over: tuple[int, ...]) -> np.ndarray:
    """`x` less its mean over some axes, flat; a constant leaves 0, and no rounding that would correlate."""
    rest = (x - x.mean(over, keepdims=True)).ravel()
    return np.where(np.abs(rest) < 1e-9, 0.0, rest)


def _split(value: np.ndarray, cost: np.ndarray) -> CsvRow:
    """Mean cost with and without a kind; nothing for features that are no kinds."""
    if not set(np.unique(value)) <= {0.0, 1.0} or len(np.unique(value)) < 2:
        return {}
    return {"cost_with": float(cost[value == 1].mean()), "cost_without": float(cost[value == 0].mean())}


def _job(scored: CachedScores, controller: str) -> tuple[list[tuple[float, ...]], EntryScores]:
    if (controller, "") not in scored.groups:
        names = ", ".join(sorted(name for name, held in scored.groups if not held))
        raise UserError(f"the folder has no scores of {controller!r}; it has {names}")
    return scored.groups[controller, ""]


# --- over_fixed --------------------------------------------------------------------------------------


def over_fixed(scored: CachedScores, run: str) -> list[CsvRow]:
    """What the policy and whatever plays one schedule of its costs gain over `fixed`, budget by budget."""
    asked, fixed = _by_budget(scored, "fixed")
    found = []
    for controller, held in sorted(scored.groups):
        if held or controller in ("fixed", "dense") or controller.startswith("random"):
            continue
        for budget, logp_N in zip(*_by_budget(scored, controller), strict=True):
            if budget not in asked:
                continue
            record: CsvRow = {"run": run, "controller": controller}
            record["budget"] = "/".join(f"{c:g}" for c in budget)
            gain_N = logp_N - fixed[asked.index(budget)]
            found.append(record | interval("gain", document_bootstrap(gain_N, scored.document_N)))
    return found


# --- effect ------------------------------------------------------------------------------------------


def effect(one: CachedScores, other: CachedScores, label: str) -> list[CsvRow]:
    """What `other` does differently to the policy and to its gain over each controller, budget by budget.

    Paired by block: the difference of scores in nats per token (below 0: `other` is worse), and that of the
    policy's gains, with intervals over documents.
    """
    if not np.array_equal(one.tokens_NxM, other.tokens_NxM):
        raise UserError("the two folders are of different text; evaluate both on the same blocks")
    own = [dict(zip(*_by_budget(scored, POLICY), strict=True)) for scored in (one, other)]
    found = []
    for budget in own[0]:
        if budget not in own[1]:
            continue
        shift_N = own[1][budget] - own[0][budget]
        record: CsvRow = {"label": label, "budget": "/".join(f"{c:g}" for c in budget)}
        found.append(
            record | {"controller": POLICY} | interval("shift", document_bootstrap(shift_N, one.document_N))
        )
        for controller, held in sorted(one.groups):
            if held or controller in (POLICY, "dense") or (controller, "") not in other.groups:
                continue
            name = controller.rstrip("0123456789")  # a budget's random schedules are a job of their own
            theirs = [dict(zip(*_by_budget(scored, controller), strict=True)) for scored in (one, other)]
            if not all(budget in column for column in theirs):
                continue
            gains = [mine[budget] - column[budget] for mine, column in zip(own, theirs, strict=True)]
            shift_N = theirs[1][budget] - theirs[0][budget]
            found.append(
                record
                | {"controller": name}
                | interval("shift", document_bootstrap(shift_N, one.document_N))
                | {"gain_before": float(gains[0].mean()), "gain_after": float(gains[1].mean())}
                | interval("gain_shift", document_bootstrap(gains[1] - gains[0], one.document_N))
            )
    if not found:
        raise UserError("the two folders have no requested budget in common; evaluate both at the same ones")
    return found


def _by_budget(scored: CachedScores, controller: str) -> tuple[list[tuple[float, ...]], list[np.ndarray]]:
    """Requested budgets of a job, and the mean log-probability of each block there; of draws their mean."""
    asked, scores = _job(scored, controller)
    columns = scores.logp_NxWxJxT.mean((1, 3), dtype=np.float64)
    grouped = defaultdict(list)
    for j, budget in enumerate(asked):
        grouped[budget].append(columns[:, j])
    return list(grouped), [np.mean(same, 0) for same in grouped.values()]


# --- the program -------------------------------------------------------------------------------------


def _evaluations(paths: Sequence[pathlib.Path]) -> list[plots.ResultRow]:
    found = []
    for path in paths:
        rows = plots.read(path)
        if not rows or "held" not in rows[0].fields:
            raise UserError(f"{path} is not a CSV of sol_jax.evaluate; leave it out of --results")
        found += rows
    return found


def _one_folder(paths: Sequence[pathlib.Path]) -> CachedScores:
    if len(paths) != 1:
        raise UserError(f"give one folder of scores, not {len(paths)}: {', '.join(map(str, paths))}")
    return read_folder(paths[0])


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("wins", "misses", "updates", "spending", "over_fixed", "effect"))
    parser.add_argument("--results", type=path_argument, nargs="+", default=[], help="CSVs of evaluations")
    parser.add_argument("--workdirs", type=path_argument, nargs="+", default=[], help="training runs")
    parser.add_argument("--scores", type=path_argument, nargs="+", default=[], help="folders of scores")
    parser.add_argument(
        "--others", type=path_argument, nargs="+", default=[], help="another, to compare with"
    )
    parser.add_argument("--label", default="", help="of an effect, for the CSV")
    parser.add_argument("--output", type=path_argument, required=True, help="CSV to write")
    args = parser.parse_args(argv)
    if args.what in ("wins", "misses"):
        paths = [path for path in args.results if not path.stem.endswith("-draws")]
        found = {"wins": wins, "misses": misses}[args.what](_evaluations(paths))
    elif args.what == "updates":
        found = updates(args.workdirs)
    elif args.what == "spending":
        scored = _one_folder(args.scores)
        found = spending(scored, load_tokenizer(scored.found_at["model"]))
    elif args.what == "over_fixed":
        runs = [(path.absolute().parent.name.removesuffix(".scores"), path) for path in args.scores]
        found = [row for run, path in runs for row in over_fixed(read_folder(path), run)]
    else:
        found = effect(_one_folder(args.scores), _one_folder(args.others), args.label)
    if not found:
        raise UserError(
            f"there is nothing to analyse; see python -m experiments.studies.analyse --help for {args.what}"
        )
    results.write(args.output, [results.texts(record) for record in found])
    print(f"wrote {len(found)} rows to {args.output}")


if __name__ == "__main__":
    main()
