"""Plans of the paper's configs on machines that are not here: experiments/results/plans.csv.

    python -m experiments.benchmarks.plans                      # arithmetic, in a minute
    python -m experiments.benchmarks.plans --compile :8b,:1b    # rows of these, compiled for TPUs (libtpu)
    python -m experiments.benchmarks.plans --compile :8b --on v5e:2x4     # those for one topology
    python -m experiments.benchmarks.plans --scale              # thousands of chips: plans-scale.csv
    python -m experiments.benchmarks.plans --show               # both as the tables of docs/pods-plan.md

A row is a config on a topology, as `sol_jax.plan` plans it; where it does not fit, the column `would_fit` has
flags with which it would.  Rows that were compiled stay when the others are made anew.
"""

import argparse
import csv
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
TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v5p:2x2x1", "v6e:2x4", "h100:8")
# Of many chips: the paper's batch, and one that gives every row of the mesh a block.
SCALE = ("v5e:2x4", "v5e:16x16", "v5e:16x16*16", "v5p:8x8x4", "v5p:16x16x16")
SCALED = ("sol_j_fl:1b", "sol_j_fl:8b")
SCALE_COLUMNS = ("batch", *COLUMNS, "playing_seconds")


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


def fitting(config: RunConfig, topology_name: str, compiling: bool) -> Iterator[Plan]:
    """The plan of a config; and, if it does not fit, that of the least change with which it does."""
    topology = parse_topology(topology_name)
    plan = make_plan(config, topology, compiling)
    yield plan
    if not plan.fits and (found := remedies(plan)):
        yield make_plan(found[0][1].config, topology, compiling) if compiling else found[0][1]


def table(path: pathlib.Path, compiled: list[str], on: str) -> None:
    """Makes all rows by arithmetic, those of configs that end in one of `compiled` through the compiler.

    If `on` names a topology, only for that one.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {
        (old["config"], old["topology"]): old for old in read(path)
    }
    for name in CONFIGS:
        for topology in TOPOLOGIES:
            compiling = any(name.endswith(end) for end in compiled) and not topology.startswith("h100")
            compiling &= on in ("", topology)
            if not compiling and rows.get((name, topology), {"compiled": "no"})["compiled"] != "no":
                continue
            labels = name, f"{name}, changed"
            for label in labels:
                rows.pop((label, topology), None)
            for label, plan in zip(labels, fitting(config_of(name), topology, compiling), strict=False):
                made = rows[label, topology] = row(label, plan)
                print(", ".join(f"{key} {value}" for key, value in made.items() if value != ""), flush=True)
            write(path, COLUMNS, [rows[key] for key in _order() if key in rows])


def _order() -> Iterator[tuple[str, str]]:
    for name in CONFIGS:
        for topology in TOPOLOGIES:
            yield name, topology
            yield f"{name}, changed", topology


def scale(path: pathlib.Path) -> None:
    """Makes the rows of many chips, in bfloat16; 8B is cut in two where it must be."""
    rows: list[dict[str, Any]] = []
    for name in SCALED:
        for topology_name in SCALE:
            topology = parse_topology(topology_name)
            model = 2 if name.endswith("8b") and topology_name.startswith("v5e") else 1
            fields = {"model.dtype": "bfloat16", "memory.prefill_batch": 1, "mesh.model": model}
            config = config_of(name).with_fields(fields)
            papers = config.grpo.batch_size
            for batch in dict.fromkeys((papers, max(topology.num_devices // model, papers))):
                asked = config.with_fields({"grpo.batch_size": batch, "mesh.chunk": 1})
                plan = make_plan(asked, topology, compiling=False)
                playing = plan.seconds.total - plan.seconds.learn - plan.seconds.network
                rows.append({"batch": batch, **row(name, plan), "playing_seconds": f"{playing:.3g}"})
                print(plan.seconds, rows[-1]["needs_gib"], flush=True)
    write(path, SCALE_COLUMNS, rows)


def shown() -> Iterator[str]:
    """The lines of the tables in docs/pods-plan.md, of what the CSVs hold."""
    by_place = {(row["config"], row["topology"]): row for row in read(RESULTS / "plans.csv")}
    yield f"| config | {' | '.join(f'`{name}`' for name in TOPOLOGIES)} |"
    yield "|---|" + "---|" * len(TOPOLOGIES)
    for name in CONFIGS:
        cells = [_cell(by_place, name, topology) for topology in TOPOLOGIES]
        yield f"| `{name}` | {' | '.join(cells)} |"
    yield ""
    yield "| config | chips | blocks | GiB | playing, s | learning, s | to all, s | |"
    yield "|---|---|---|---|---|---|---|---|"
    for line in read(RESULTS / "plans-scale.csv"):
        fits = "" if line["fits"] == "yes" else f"does not fit {float(line['has_gib']):.1f}"
        parts = line["topology"], line["batch"], line["needs_gib"]
        times = (line[f"{part}_seconds"] for part in ("playing", "learn", "network"))
        yield f"| `{line['config']}` | `{' | '.join((parts[0] + '`', *parts[1:], *times, fits))} |"


def _cell(by_place: dict[tuple[str, str], dict[str, str]], name: str, topology: str) -> str:
    """GiB that a config needs there; where that is too much, the flags of the least change, and GiB with it.

    In italics, what was compiled.
    """

    def gib(of: dict[str, str]) -> str:
        found = f"{float(of['needs_gib']):.1f}"
        return f"*{found}*" if of["compiled"] != "no" else found

    plain, changed = by_place[name, topology], by_place.get((f"{name}, changed", topology))
    if plain["fits"] == "yes":
        return gib(plain)
    if changed is None:
        return f"{gib(plain)}: too much"
    flags = plain["would_fit"].replace("--config.", "").replace(" mesh.data=-1", "")
    return f"{gib(plain)}: too much; {gib(changed)} with `{flags}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", default="", help="ends of configs' names, with commas between")
    parser.add_argument("--on", default="", choices=("", *TOPOLOGIES), help="of --compile: where alone")
    parser.add_argument("--scale", action="store_true", help="many chips")
    parser.add_argument("--show", action="store_true", help="print what the CSVs hold")
    args = parser.parse_args()
    if args.show:
        print("\n".join(shown()))
    elif args.scale:
        scale(RESULTS / "plans-scale.csv")
    else:
        table(RESULTS / "plans.csv", [end for end in args.compile.split(",") if end], args.on)


if __name__ == "__main__":
    main()
