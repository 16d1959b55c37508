"""Exports the best checkpoint of a run as a named policy with a card, and uploads it to a hub if asked.

    python -m experiments.publish --workdir runs/fl --name smollm2-135m/sol-j-fl \\
        --command 'python -m sol_jax.train --config configs/sol_j_fl.py:cpu,fast --workdir runs/fl' \\
        --results experiments/results/fl.csv
    python -m experiments.publish --name smollm2-135m/sol-j-fl --push OWNER/NAME

The first writes `experiments/results/policies/NAME`, which `sol_jax.evaluate --policy NAME` then finds.  With
`--folder` it writes NAME there instead, on this machine or an object store; `--policy FOLDER/NAME` finds it.
The second uploads it to the Hugging Face hub, where `--policy hub:OWNER/NAME` finds it; both can be done at
once.
"""

import argparse
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.figures import plots, shaded_text
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.provenance import training_documents
from sol_jax.files import any_path_argument, write_whole
from sol_jax.generation.generated_text import generate_text
from sol_jax.models import hub
from sol_jax.models.model import open_model
from sol_jax.runs import policy_files
from sol_jax.runs.policy_card import LICENSE, middle_budget
from sol_jax.runs.session import open_session
from sol_jax.runs.trained_policy import open_run, policy_of_run

SAMPLE_TOKENS = 60


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
    metadata: Mapping[str, Any] | None = None,
    root: pathlib.Path | None = None,
) -> pathlib.Path:
    """Writes the policy and returns its folder; `UserError` if the run has no checkpoint.

    `trained_by` is the commit that trained it, where the checkpoint does not say; `metadata` what
    `policy_card.metadata` is to know; `root` is where policies lie.
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
        "documents": training_documents(config, session, workdir),
        "results": [line for path in evaluations for line in card_rows(path)],
        **(metadata or {}),
    }
    folder = (root or policy_files.POLICIES) / name
    (folder / policy_files.PICTURE).unlink(missing_ok=True)  # of an earlier policy of that name
    policy_files.save_policy(folder, policy.params, config, about)
    return folder


def add_picture(folder: pathlib.Path, prompt: str) -> None:
    """Draws a text that the policy writes, for its card.  Raises `UserError` if its model cannot be had."""
    _, config, about = policy_files.load_policy(folder)
    model = open_model(config.model.path, config.model.dtype)
    budget = middle_budget(config)
    text = generate_text(prompt, model, str(folder), budget=budget, max_tokens=SAMPLE_TOKENS)
    with tempfile.TemporaryDirectory() as made:
        drawn = plots.save(shaded_text.draw_text(prompt, text), pathlib.Path(made) / policy_files.PICTURE)
        picture = drawn.read_bytes()
    with policy_files.written_to(folder):
        write_whole(folder / policy_files.PICTURE, picture)
        policy_files.describe(folder, config, about)


def push(
    folder: pathlib.Path,
    name: str,
    private: bool = False,
    metadata: Mapping[str, Any] | None = None,
    sample: str = "",
) -> str:
    """Uploads a policy to the hub's repository OWNER/NAME, under which its card names it.

    Returns the address.

    The policy's own folder stays as it is; a picture of `sample`, a prompt, is made where it has none.

    Raises `UserError`, with what to do, if that is not possible.
    """
    _, config, about = policy_files.load_policy(folder)
    with tempfile.TemporaryDirectory() as made:
        copy = pathlib.Path(made)
        for file in policy_files.FILES:
            if (folder / file).is_file():
                (copy / file).write_bytes((folder / file).read_bytes())
        policy_files.describe(copy, config, {**about, **(metadata or {}), "hub": name})
        if sample and not (copy / policy_files.PICTURE).is_file():
            add_picture(copy, sample)
        return hub.push(copy, policy_files.FILES, name, private)


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workdir", type=any_path_argument, help="folder of the training run; with --push alone: none"
    )
    parser.add_argument(
        "--name",
        required=True,
        help="MODEL/POLICY, for instance smollm2-135m/sol-j-fl; of --push alone, also a folder",
    )
    parser.add_argument("--command", help="the command that trained it, for the card")
    parser.add_argument("--step", type=int, help="update whose checkpoint is taken; default: the best")
    parser.add_argument("--commit", default="", help="that trained it, of a checkpoint that does not say")
    parser.add_argument(
        "--results", type=any_path_argument, nargs="*", default=[], help="CSVs of its evaluations"
    )
    parser.add_argument("--folder", type=any_path_argument, help="of policies; default: the committed ones")
    parser.add_argument("--sample", default="The sea", help="prompt of the card's picture; empty: no picture")
    parser.add_argument("--license", help=f"as the hub writes it; default: {LICENSE}")
    parser.add_argument("--base_model", help="OWNER/NAME of the language model, if its path does not say it")
    parser.add_argument("--datasets", nargs="*", help="of the training text, as the hub names them")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="make that repository a private one")
    args = parser.parse_args()
    if args.workdir and not all(part and part not in (".", "..") for part in args.name.split("/")):
        raise UserError(f"--name {args.name!r} must be MODEL/POLICY")
    if not args.workdir and not args.push:
        raise UserError(
            "give --workdir RUN to export a policy, or --push OWNER/NAME to upload one that is there"
        )
    if args.workdir and not args.command:
        raise UserError("give --command, the command that trained the policy, for its card")
    if args.push and not hub.is_id(args.push):
        raise UserError(f"--push {args.push!r} must be OWNER/NAME, a repository of the hub")
    given = {"license": args.license, "base_model": args.base_model, "datasets": args.datasets}
    metadata = {name: value for name, value in given.items() if value}
    if args.workdir:
        more = args.results, args.step, args.commit, metadata, args.folder
        folder = publish(args.workdir, args.name, args.command, *more)
        if args.sample:
            add_picture(folder, args.sample)
        print(f"wrote {folder}")
    else:
        folder = policy_files.folder_of(str(args.folder / args.name) if args.folder else args.name)
    if args.push:
        address = push(folder, args.push, args.private, metadata, args.sample)
        print(f"uploaded to {address}; use it as --policy hub:{args.push}")


if __name__ == "__main__":
    main()
