"""Disturbs runs and readers in every way that strangers' machines and files do, and says what went wrong.

make chaos                       # an hour or more; 100 kills, 10,000 inputs
python -m chaos --kills 10 --inputs 500 --every 20 --trials 2 --seed 1

A trial is a function of the seed and of its number.  In a folder that is kept, nothing is done twice,
so that a long measurement can be made in portions:

python -m chaos --folder chaos --minutes 4    # again and again, until it has done everything
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

# As in the tests: most of the time would be LLVM's.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10."),
)

from chaos import inputs, runs
from chaos.lab import Lab

from sol_jax.runs.session import commit

COMMIT = commit()  # of what was imported; it may change meanwhile
PORTION = 250  # inputs that one process reads


class Stage(NamedTuple):
    """What is tried: how often, in what portions, and a function of first and count to what was wrong."""

    count: int
    portion: int
    wrong: Callable[[int, int], list[str]]


def stages(lab: Lab, args: argparse.Namespace) -> dict[str, Stage]:
    def one_by_one(trial: Callable, count: int, every: int = 1) -> Stage:
        def wrong(first: int, _: int) -> list[str]:
            rng = random.Random(f"{args.seed} {trial.__name__} {first}")
            told = trial(lab, first * every, rng)
            return [f"{trial.__name__} {first}: {told}"] if told else []

        return Stage(count, 1, wrong)

    wanted = [name for name in NAMES if any(part in name for part in args.stages.split(","))]
    if wanted != ["mutated inputs"]:
        lab.prepare()
        print(f"an undisturbed run takes {lab.seconds:.1f} s", flush=True)
    makers = {
        "kills": lambda: one_by_one(runs.kill, args.kills),
        "storms of SIGTERM": lambda: one_by_one(runs.storm, args.trials),
        "full disks": lambda: one_by_one(runs.full_disk, args.trials),
        "damaged files": lambda: one_by_one(
            runs.damaged, -(-len(runs.damage_cases(lab)) // args.every), args.every
        ),
        "unwritable folder": lambda: one_by_one(runs.unwritable, 1),
        "slow disks": lambda: one_by_one(runs.slow_disk, args.trials),
        "jumping clocks": lambda: one_by_one(runs.clock, args.trials),
        "mutated inputs": lambda: Stage(
            args.inputs, PORTION, lambda first, count: inputs.run(count, args.seed, first)
        ),
    }
    return {name: makers[name]() for name in wanted}


NAMES = (
    "kills", "storms of SIGTERM", "full disks", "damaged files", "unwritable folder", "slow disks",
    "jumping clocks", "mutated inputs",
)  # fmt: skip


def carry_out(name: str, stage: Stage, record: pathlib.Path, until: float) -> tuple[int, list[str]]:
    """Goes on from what the record has; returns how many trials there are in it, and what was wrong."""
    portions = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    done = sum(portion["count"] for portion in portions)
    while done < stage.count and time.monotonic() < until:
        began, count = time.monotonic(), min(stage.portion, stage.count - done)
        wrong = stage.wrong(done, count)
        portions += [{"first": done, "count": count, "wrong": wrong, "seconds": time.monotonic() - began}]
        portions[-1] |= {"commit": COMMIT}
        with open(record, "a") as file:
            file.write(json.dumps(portions[-1]) + "\n")
        done += count
        print(
            f"{name}: {done} done, {sum(len(p['wrong']) for p in portions)} wrong",
            file=sys.stderr,
            flush=True,
        )
    wrong = [line for portion in portions for line in portion["wrong"]]
    seconds = sum(portion["seconds"] for portion in portions)
    print(f"{name}: {done - len(wrong)} of {done} right, {seconds:.0f} s", flush=True)
    for line in wrong:
        print(f"  {line}", flush=True)
    return done, wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--trials", type=int, default=12, help="of each kind of disk, storm and clock")
    parser.add_argument("--every", type=int, default=1, help="of how many damages one is tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default="", help="parts of names, with commas between; default: all")
    parser.add_argument(
        "--folder", help="kept, with a record of what was done in it; default: a temporary one"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no trial begins")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.chmod(folder, 0o755)  # one of the runs is nobody's
        wrong, left = False, False
        for name, stage in stages(Lab(folder), args).items():
            record = folder / f"{name.replace(' ', '-')}-seed-{args.seed}.jsonl"
            done, told = carry_out(name, stage, record, until)
            wrong, left = wrong or bool(told), left or done < stage.count
        if left:
            print("there is more to do: the same command goes on from here", flush=True)
        sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
