"""Where in a page of Quest's keys schedules lose likelihood and policies gain it.

    python -m experiments.studies.quest_pages --scores runs/fl-s0/results.scores/* \\
        --output experiments/results/smollm2-135m/pages.csv

Quest protects nothing: the newest page, which holds few keys after each page boundary, competes with whole
ones, so that the last tokens may be dropped where they are needed most.  The CSV has one row per run,
requested budget and number of keys in the newest page (the step's own included).  A row tells what the fixed
schedule loses against dense decoding there and what the policy gains over it, both in nats per token with
95 % intervals over documents, and what either spends on each axis.  `--scores` are folders that
`sol_jax.evaluate` leaves beside its CSV.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from experiments.studies.analyse import CsvRow, interval, step_costs
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.score_cache import CachedScores, read_folder
from sol_jax.evaluation.scoring import POLICY
from sol_jax.evaluation.statistics import document_bootstrap
from sol_jax.files import path_argument


def newest_page(scored: CachedScores, page_size: int) -> np.ndarray:
    """Keys in the newest page at every step, from 1 to `page_size`: [W, T]."""
    _, W, _, T = scored.groups["dense", ""][1].logp_NxWxJxT.shape
    position = np.arange(scored.tokens_NxM.shape[1] - 1)[-W * T :]  # of the token that each step consumes
    return (position % page_size + 1).reshape(W, T)


def pages(scored: CachedScores, run: str, page_size: int) -> list[CsvRow]:
    """The rows of one run; `UserError` if its scores lack a controller."""
    for name in (POLICY, "fixed", "dense"):
        if (name, "") not in scored.groups:
            raise UserError(f"the scores of {run} lack {name!r}; evaluate with --controllers fixed")
    (asked, policy), (matched, fixed) = scored.groups[POLICY, ""], scored.groups["fixed", ""]
    if missing := set(asked) - set(matched):
        raise UserError(f"the scores of {run} have no fixed schedule at {', '.join(map(str, missing))}")
    dense_NxWxT = scored.groups["dense", ""][1].logp_NxWxJxT[:, :, 0]
    newest_WxT, found = newest_page(scored, page_size), []
    costs = {"policy": step_costs(scored, policy), "fixed": step_costs(scored, fixed)}
    for budget in asked:
        column = {"policy": asked.index(budget), "fixed": matched.index(budget)}
        fixed_NxWxT = fixed.logp_NxWxJxT[:, :, column["fixed"]]
        loss = dense_NxWxT - fixed_NxWxT
        gain = policy.logp_NxWxJxT[:, :, column["policy"]] - fixed_NxWxT
        for keys in range(1, page_size + 1):
            here_WxT = newest_WxT == keys
            if not here_WxT.any():
                continue
            record: CsvRow = {"run": run, "budget": "/".join(f"{c:g}" for c in budget), "keys": keys}
            record |= {"tokens": int(here_WxT.sum()) * len(loss)}
            for name, value in (("loss", loss), ("gain", gain)):
                mean_N = value[:, here_WxT].mean(1, dtype=np.float64)
                record |= interval(name, document_bootstrap(mean_N, scored.document_N))
            for controller, by_axis in costs.items():
                for axis, cost in by_axis.items():
                    mean = cost[:, :, column[controller]][:, here_WxT].mean()
                    record[f"{controller}_{axis}"] = float(mean)
            found.append(record)
    return found


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scores", type=path_argument, nargs="+", required=True, help="folders of scores")
    parser.add_argument("--page_size", type=int, default=8, help="keys of a page")
    parser.add_argument("--output", type=path_argument, required=True, help="CSV to write")
    args = parser.parse_args(argv)
    if args.page_size < 1:
        raise UserError(f"--page_size={args.page_size} must be at least 1")
    found = []
    for folder in args.scores:
        run = folder.absolute().parent.name.removesuffix(".scores")
        found += pages(read_folder(folder), run, args.page_size)
    results.write(args.output, [results.texts(record) for record in found])
    print(f"wrote {len(found)} rows to {args.output}")


if __name__ == "__main__":
    main()
