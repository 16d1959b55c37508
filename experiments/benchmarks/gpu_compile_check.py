"""Compiles kernels and programs for NVIDIA GPUs that are not here; `make gpu-compile-check`.

    python -m experiments.benchmarks.gpu_compile_check             # everything, for every chip
    python -m experiments.benchmarks.gpu_compile_check --quick     # what CI compiles, in minutes
    python -m experiments.benchmarks.gpu_compile_check --only attend --chips h200,a100
    python -m experiments.benchmarks.gpu_compile_check --resume    # goes on where one before was stopped

It needs XLA's compiler for CUDA and NVIDIA's ptxas, and no GPU.  What does not compile fails; a kernel of
ours that spills registers, or of which fewer blocks fit a core than experiments/results/gpu_compile_check.csv
says; and a program that holds a second copy of its weights or caches, or more temporaries than that table
allows.  `--write` makes the table of what it measures.
"""

import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Iterable
from typing import Any

import jax

from experiments import RESULTS
from experiments.benchmarks import compile_check, gpu_programs, triton_cases
from experiments.benchmarks.compile_check import (
    MIB,
    Check,
    Found,
    Rows,
    Table,
    TooLargeError,
    bound_of,
    second_copy,
)
from experiments.benchmarks.program_cases import size_of
from experiments.benchmarks.ptxas import KernelUse, assemble
from experiments.benchmarks.triton_cases import TritonCheck
from pallas_kernels.dispatch import tracing_for
from sol_jax.planning import gpu
from sol_jax.planning.compiled import Compiled
from sol_jax.planning.topology import parse_topology

# The kernels of ours; all others of a program are XLA's.
KERNELS = (
    "attend_pages", "compact", "fake_quantize", "gather_gemv", "keep_channels", "list_channels", "list_pages",
    "norm_prune", "own_page_scores", "page_bounds", "page_scores", "quantize_residual", "select_pages",
)  # fmt: skip
TABLE = Table(
    RESULTS / "gpu_compile_check.csv",
    (
        "check", "chip", "kernel", "threads", "registers", "spilled_bytes", "shared_bytes", "blocks",
        "load_bytes", "temporaries_mib", "bound_mib",
    ),
    key=("check", "chip", "kernel"),
)  # fmt: skip
DONE = pathlib.Path("build/gpu_compile_check_done.csv")  # a row for each program that was right


def checks() -> list[Check]:
    """All of them, those of kernels first."""
    return [*gpu_programs.checks(), *triton_cases.checks()]


def compile_on(check: Check, chip: str) -> tuple[Compiled, list[KernelUse], float]:
    """What a program takes of a chip, its kernels, and the bytes of temporaries that would be too many."""
    topology = parse_topology(f"{chip}:1")
    with tracing_for("gpu"):
        if check.on:
            fn, args, donated = check.on(topology)
        else:
            assert check.make
            fn, args, donated = check.make()
        if (size := size_of(args) + check.once) > 0.95 * topology.chip.memory:
            raise TooLargeError(f"{size / 2**30:.1f} GiB of arguments and what is made of them")
        if not check.on:
            args = gpu.on_one(chip, args)
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args))
    with tempfile.TemporaryDirectory() as folder:
        dump = pathlib.Path(folder)
        found = gpu.compile_for_gpu(fn, *args, donate=donated, dump=dump)
        # Parts of attention that are merged take as much as a small cache: they are no copy of it.
        return found, kernels_of(dump, chip), second_copy(check, 3 * largest)


def kernels_of(dump: pathlib.Path, chip: str) -> list[KernelUse]:
    """The kernels of ours in what XLA wrote down of a program: their PTX, and what launches ask for.

    Raises ValueError where XLA does not say what a kernel's launch asks for.
    """
    tools, target = gpu.cuda_folder() / "bin", gpu.TARGETS[chip]
    launches = "".join(path.read_text() for path in dump.glob("*.thunk_sequence.txt"))
    asked: dict[str, int] = {}
    for name, size in re.findall(r"(\S+) grid: .* shared_memory: (\d+) bytes", launches):
        asked[name] = max(asked.get(name, 0), int(size))
    found = []
    for ptx in sorted(dump.glob("*.ptx")):
        names = re.findall(r"\.entry (\w+)\(", ptx.read_text())
        for use in assemble(ptx, target, tools) if any(map(ours, names)) else ():
            if use.name not in asked:
                raise ValueError(f"XLA tells no shared memory of {use.name}'s launch")
            found.append(dataclasses.replace(use, shared=use.shared + asked[use.name]))
    return found


def ours(name: str) -> str | None:
    """The kernel of ours that one of a program is: XLA numbers those of one name."""
    base = re.sub(r"(_\d+)+$", "", name)
    return base if base in KERNELS else None


def rows_of(check: Check, chip: str, uses: Iterable[KernelUse], temporaries: int | None = None) -> Rows:
    """A row for each kernel of ours, as it is at its worst, and one for the program.

    Without temporaries there is no program.
    """
    target, by_name = gpu.TARGETS[chip], dict[str, list[KernelUse]]()
    for use in uses:
        by_name.setdefault(ours(use.name) or use.name, []).append(use)
    found: list[dict[str, Any]] = [
        {
            "kernel": name,
            "threads": max(use.threads for use in those),
            "registers": max(use.registers for use in those),
            "spilled_bytes": max(use.spilled for use in those),
            "shared_bytes": max(use.shared for use in those),
            "blocks": min(use.blocks(target) for use in those),
            "load_bytes": min(use.load_bytes for use in those),
        }
        for name, those in by_name.items()
    ]
    if temporaries is not None:
        taken = {"temporaries_mib": f"{temporaries / MIB:.1f}", "bound_mib": bound_of(check, temporaries)}
        found.append({"kernel": "", **taken})
    rows = [{"check": check.name, "chip": chip} | row for row in found]
    return {
        (check.name, chip, row["kernel"]): {name: str(row.get(name, "")) for name in TABLE.columns}
        for row in rows
    }


def held_to(check: Check, chip: str, committed: Rows) -> Found:
    """A program beside the table; what spills, or is there twice, gets no row."""
    wrong = []
    if isinstance(check, TritonCheck):
        rows, said = rows_of(check, chip, [check.build(chip)]), "1 kernel"
    else:
        found, uses, limit = compile_on(check, chip)
        rows = rows_of(check, chip, uses, found.temporaries)
        taken = f"{found.temporaries / MIB:.1f}"
        said = f"{len(uses)} kernels, {taken} MiB of temporaries"
        if found.temporaries > limit:
            wrong.append(f"a second copy: {taken} of {limit / MIB:.1f} MiB")
    wrong += [f"{row['kernel']} spills {row['spilled_bytes']} bytes" for row in rows.values() if spills(row)]
    if wrong:
        return Found({}, "; ".join(wrong), said)
    worse = [text for key, row in rows.items() if (text := fewer(row, committed.get(key)))]
    return Found(rows, "; ".join(worse), said)


def spills(row: compile_check.Row) -> bool:
    """Whether a kernel does."""
    return int(row["spilled_bytes"] or 0) > 0


def fewer(row: compile_check.Row, committed: compile_check.Row | None) -> str:
    """What is worse than in the table; nothing if it has no such row."""
    if committed is None:
        return ""
    if not row["kernel"]:
        if float(row["temporaries_mib"]) <= float(committed["bound_mib"]):
            return ""
        return f"{row['temporaries_mib']} MiB of temporaries, {committed['bound_mib']} allowed"
    if int(row["load_bytes"]) < int(committed["load_bytes"]) / 2:
        return (
            f"{row['kernel']} asks for {row['load_bytes']} bytes at a time, {committed['load_bytes']} before"
        )
    if int(row["blocks"]) >= int(committed["blocks"]):
        return ""
    return (
        f"{row['blocks']} blocks of {row['kernel']} fit a core, {committed['blocks']} before: it has "
        f"{row['registers']} registers ({committed['registers']}) and {row['shared_bytes']} bytes of shared "
        f"memory ({committed['shared_bytes']})"
    )


def quick_chips(check: Check) -> tuple[str, ...]:
    """What CI compiles for."""
    return ("h200",)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # or the first look for devices is for a GPU and its driver
    about = str(__doc__).splitlines()[0]
    compile_check.main(
        "gpu-compile-check",
        about,
        checks,
        tuple(gpu.TARGETS),
        quick_chips,
        TABLE,
        held_to,
        DONE,
        gpu.problem(),
    )


if __name__ == "__main__":
    main()
