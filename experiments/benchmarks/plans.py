"""Plans of the paper's configs on machines that are not here: experiments/results/plans.csv.

    python -m experiments.benchmarks.plans                      # arithmetic, in a minute
    python -m experiments.benchmarks.plans --compile :8b,:1b    # rows of these, compiled for TPUs (libtpu)
    python -m experiments.benchmarks.plans --scale              # thousands of chips: plans-scale.csv

A row is a config on a topology, as `sol_jax.plan` plans it; where it does not fit, the column `would_fit` has
flags with which it would.  Rows that were compiled stay when the others are made anew.
"""

import argparse
import csv
import dataclasses
import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

from experiments import RESULTS
from sol_jax.planning.plan import Plan, make_plan, remedies
from sol_jax.planning.report import COLUMNS, row
from sol_jax.planning.topology import parse_topology
from sol_jax.runs.config import RunConfig

CONFIGS = (
    "sol_j_2l", "sol_j_3l", "sol_j_fl", "sol_j_fl:1b", "sol_j_fl:3b", "sol_j_fl:8b",
    "horizon:t4", "horizon:t16", "horizon:t64", "reasoning", "single_axis:kappa-0.2",
)  # fmt: skip
TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v5p:2x2x2", "v6e:2x4", "h100:8")
# Of many chips: the paper's batch, and one that gives every row of the mesh a block.
SCALE = ("v5e:2x4", "v5e:16x16", "v5e:16x16*16", "v5p:8x8x4", "v5p:16x16x16")
SCALED = ("sol_j_fl:1b", "sol_j_fl:8b")
SCALE_COLUMNS = ("batch", *COLUMNS)


def config_of(name: str) -> RunConfig:
    """The config that `configs/NAME.py:VARIANTS` stands for."""
    module, _, variants = name.partition(":")
    made = importlib.import_module(f"configs.{module}").get_config(variants)
    return RunConfig.from_dict(made.to_dict())


def read(path: pathlib.Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: pathlib.Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def fitting(config: RunConfig, topology_name: str, compiling: bool) -> Iterator[tuple[RunConfig, Plan]]:
    """The plan of a config; and, if it does not fit, that of the least change with which it does."""
    topology = parse_topology(topology_name)
    plan = make_plan(config, topology, compiling)
    yield config, plan
    if not plan.fits and (found := remedies(plan)):
        changed = found[0][1].config
        yield changed, make_plan(changed, topology, compiling) if compiling else found[0][1]


def table(path: pathlib.Path, compiled: list[str]) -> None:
    """Makes all rows by arithmetic, those of configs that end in one of `compiled` through the compiler."""
    before = {(old["config"], old["topology"]): old for old in read(path) if old["compiled"] != "no"}
    rows: list[dict[str, Any]] = []
    for name in CONFIGS:
        for topology in TOPOLOGIES:
            compiling = any(name.endswith(end) for end in compiled) and not topology.startswith("h100")
            if not compiling and (name, topology) in before:
                rows += [before[name, topology]]
                continue
            for n, (config, plan) in enumerate(fitting(config_of(name), topology, compiling)):
                label = name if n == 0 else f"{name}, changed"
                rows.append(row(label, plan))
                print(
                    ", ".join(f"{key} {value}" for key, value in rows[-1].items() if value != ""), flush=True
                )
                del config
            write(path, COLUMNS, rows)
    write(path, COLUMNS, rows)


def scale(path: pathlib.Path) -> None:
    """Makes the rows of many chips, in bfloat16, with models cut where they must be."""
    rows: list[dict[str, Any]] = []
    for name in SCALED:
        for topology_name in SCALE:
            topology = parse_topology(topology_name)
            config = config_of(name).with_fields({"model.dtype": "bfloat16", "memory.prefill_batch": 1})
            for whole in (False, True):
                devices = topology.num_devices
                batch = max(devices, config.grpo.batch_size) if whole else config.grpo.batch_size
                asked = config.with_fields({"grpo.batch_size": batch, "mesh.chunk": 1})
                plan = make_plan(asked, topology, compiling=False)
                rows.append({"batch": batch, **row(name, plan)})
                print(dataclasses.replace(plan.seconds), rows[-1]["needs_gib"], flush=True)
    write(path, SCALE_COLUMNS, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", default="", help="ends of configs' names, with commas between")
    parser.add_argument("--scale", action="store_true", help="many chips")
    args = parser.parse_args()
    if args.scale:
        scale(RESULTS / "plans-scale.csv")
    else:
        table(RESULTS / "plans.csv", [end for end in args.compile.split(",") if end])


if __name__ == "__main__":
    main()
