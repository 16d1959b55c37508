"""Exports the best checkpoint of a run as a named policy, with a model card.

    python -m experiments.publish --workdir runs/fl --name smollm2-135m/sol-j-fl \\
        --command 'python -m sol_jax.train --config configs/sol_j_fl.py:cpu,fast --workdir runs/fl' \\
        --results experiments/results/fl.csv

writes `experiments/results/policies/NAME`, which `sol_jax.evaluate --policy NAME` then finds.  With
`--folder` it writes NAME there instead, on this machine or an object store; `--policy FOLDER/NAME` finds it.
"""

import argparse
import pathlib
from collections.abc import Sequence

from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.provenance import training_documents
from sol_jax.files import any_path_argument
from sol_jax.runs import policy_files
from sol_jax.runs.session import open_session
from sol_jax.runs.trained_policy import open_run, policy_of_run


def card_rows(path: pathlib.Path) -> list[str]:
    """The policy beside the fixed schedule at each requested budget of an evaluation, as table rows."""
    rows = results.read(path)
    fixed = {_asked(row): row for row in rows if row["controller"] == "fixed" and not row["held"]}
    shown = []
    for row in rows:
        other = fixed.get(_asked(row))
        if row["controller"] != "policy" or row["held"] or other is None:
            continue
        gain, low, high = (float(other[name]) for name in ("gain", "gain_low", "gain_high"))
        shown.append(
            f"| {row['text']} | {' / '.join(f'{float(cost):.3f}' for cost in _asked(row))} | "
            f"{float(row['net']):.3f} | {float(row['perplexity']):.2f} | {float(other['perplexity']):.2f} | "
            f"{gain:+.4f} [{low:+.4f}, {high:+.4f}] |"
        )
    return shown


def _asked(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(value for name, value in row.items() if name.startswith("requested_"))


def publish(
    workdir: pathlib.Path,
    name: str,
    command: str,
    evaluations: Sequence[pathlib.Path],
    step: int | None = None,
    trained_by: str = "",
    root: pathlib.Path | None = None,
) -> pathlib.Path:
    """Writes the policy and returns its folder; `UserError` if the run has no checkpoint.

    `trained_by` is the commit that trained it, where the checkpoint does not say; `root` is where policies
    lie.
    """
    config, checkpoints = open_run(workdir)
    session = open_session(config)
    checkpoints.bind(session.identity)
    policy = policy_of_run(checkpoints, config, session.setup, name, step)
    about = {
        "title": name,
        "model": policy_files.model_name(config),
        "identity": session.identity,
        "command": command,
        "updates": policy.updates,
        "seed": config.seed,
        "commit": checkpoints.commit_of(policy.updates) or trained_by,
        "documents": training_documents(config, session),
        "results": [line for path in evaluations for line in card_rows(path)],
    }
    folder = (root or policy_files.POLICIES) / name
    policy_files.save_policy(folder, policy.params, config, about)
    return folder


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=any_path_argument, required=True, help="folder of the training run")
    parser.add_argument("--name", required=True, help="MODEL/POLICY, for instance smollm2-135m/sol-j-fl")
    parser.add_argument("--command", required=True, help="the command that trained it, for the card")
    parser.add_argument("--step", type=int, help="update whose checkpoint is taken; default: the best")
    parser.add_argument("--commit", default="", help="that trained it, of a checkpoint that does not say")
    parser.add_argument(
        "--results", type=any_path_argument, nargs="*", default=[], help="CSVs of its evaluations"
    )
    parser.add_argument("--folder", type=any_path_argument, help="of policies; default: the committed ones")
    args = parser.parse_args()
    if not all(part and part not in (".", "..") for part in args.name.split("/")):
        raise UserError(f"--name {args.name!r} must be MODEL/POLICY")
    folder = publish(args.workdir, args.name, args.command, args.results, args.step, args.commit, args.folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
