"""Disturbs runs and readers in every way that strangers' machines and files do, and says what went wrong.

make chaos                       # minutes; 100 kills, 10,000 inputs
python -m chaos --kills 10 --inputs 500 --every 20 --trials 2 --seed 1
"""

import argparse
import os
import pathlib
import random
import sys
import tempfile
import time

# As in the tests: most of the time would be LLVM's.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from chaos import inputs, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--trials", type=int, default=12, help="of each kind of disk, storm and clock")
    parser.add_argument("--every", type=int, default=1, help="of how many damages one is tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default="", help="parts of names, with commas between; default: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # one of the runs is nobody's
        lab = runs.Lab(pathlib.Path(folder), random.Random(args.seed))
        if args.stages != "inputs":
            lab.prepare()
            print(f"an undisturbed run takes {lab.seconds:.1f} s", flush=True)
        stages = {
            "kills": lambda: runs.kills(lab, args.kills),
            "storms of SIGTERM": lambda: runs.storms(lab, args.trials),
            "full disks": lambda: runs.full_disks(lab, args.trials),
            "damaged files": lambda: runs.damages(lab, args.every),
            "unwritable folder": lambda: runs.unwritable(lab),
            "slow disks": lambda: runs.slow_disks(lab, args.trials),
            "jumping clocks": lambda: runs.clocks(lab, args.trials),
            "mutated inputs": lambda: lab.told.extend(inputs.run(args.inputs, args.seed)),
        }
        for name, stage in stages.items():
            if not any(part in name for part in args.stages.split(",")):
                continue
            began, before = time.monotonic(), len(lab.told)
            count = stage() or {"mutated inputs": args.inputs, "unwritable folder": 1}.get(name, args.trials)
            wrong = lab.told[before:]
            print(
                f"{name}: {count - len(wrong)} of {count} right, {time.monotonic() - began:.0f} s", flush=True
            )
            for line in wrong:
                print(f"  {line}", flush=True)
        sys.exit(1 if lab.told else 0)


if __name__ == "__main__":
    main()
