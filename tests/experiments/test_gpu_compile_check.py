"""What kernels take of GPUs: ptxas is read right, what is worse than the table fails, the table is good."""

import configparser
import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import compile_check, gpu_compile_check
from experiments.benchmarks.compile_check import MIB, Check, Rows
from experiments.benchmarks.gpu_compile_check import (
    KERNELS,
    TABLE,
    checks,
    fewer,
    held_to,
    ours,
    rows_of,
    spills,
)
from experiments.benchmarks.ptxas import KernelUse, parse
from experiments.benchmarks.sass import under_way
from pallas_kernels.shapes import distinct
from sol_jax.planning import gpu
from sol_jax.planning.chips import CHIPS

needs_cuda = pytest.mark.skipif(gpu.problem() is not None, reason=str(gpu.problem()))

# Two kernels as ptxas 13.5 tells of them, one that spills and one that has no shared memory.
SAID = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'page_scores' for 'sm_90a'
ptxas info    : Function properties for page_scores
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compile time = 12.345 ms
ptxas info    : Compiling entry function 'loop_add_fusion_2' for 'sm_90a'
ptxas info    : Function properties for loop_add_fusion_2
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers
"""
PTX = """\
.visible .entry page_scores(
\t.param .u64 .ptr .global .align 16 page_scores_param_0
)
.reqntid 128
{
.visible .entry loop_add_fusion_2(
)
.reqntid 32, 4, 1
{
"""


def test_what_ptxas_says_is_read():
    assert parse(SAID, PTX) == [
        KernelUse("page_scores", 128, 255, 20, 512, 1),
        KernelUse("loop_add_fusion_2", 128, 18, 0, 0, 0),
    ]


@pytest.mark.parametrize(
    ("line", "ptx", "message"),
    [
        ("Used 255 registers", PTX, "no registers or spills of page_scores"),
        ("8 bytes spill stores", PTX, "no registers or spills of page_scores"),
        ("nothing", PTX.replace(".reqntid 128", ""), "no threads of page_scores"),
    ],
)
def test_what_ptxas_does_not_say_is_an_error(line, ptx, message):
    """A version that words it otherwise must not pass for one without spills."""
    with pytest.raises(ValueError, match=message):
        parse(SAID.replace(line, "?"), ptx)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (168, 128, 0, 3),  # 65,536 // (168 * 128) = 3
        (40, 1024, 0, 1),  # two would take 2,048 threads, but 81,920 registers
        (32, 1024, 0, 2),
        (33, 128, 0, 12),  # registers are given out by 256 for a warp: 33 count as 40
        (32, 32, 0, 32),  # no more blocks, whatever is left
        (32, 128, 72 << 10, 3),  # 228 KiB less one for each
        (255, 288, 0, 0),  # ptxas would refuse it at the launch
    ],
)
def test_blocks_of_a_core_by_hand(registers, threads, shared, blocks):
    assert KernelUse("k", threads, registers, 0, shared).blocks(gpu.TARGETS["h200"]) == blocks


def test_an_a100_has_less_shared_memory():
    assert KernelUse("k", 128, 32, 0, 72 << 10).blocks(gpu.TARGETS["a100"]) == 2


def test_targets_are_the_chips_that_plans_know():
    for name, target in gpu.TARGETS.items():
        assert CHIPS[name].kind == "gpu"
        assert CHIPS[name].memory < target.memory
        assert f"memory_bandwidth: {int(CHIPS[name].bandwidth)}" in gpu.description(name)
    assert {target.architecture for target in gpu.TARGETS.values()} == {"sm_90a", "sm_80"}


def test_the_extra_names_what_is_asked_of_pip():
    parser = configparser.ConfigParser()
    parser.read("setup.cfg")
    extra = parser["options.extras_require"]["gpu_compile"].split()
    pinned = {text for text in gpu.requirements() if not text.startswith("jax-")}
    assert {text for text in extra if not text.startswith("jax-")} == pinned
    assert [text.partition(">=")[0] for text in extra if text.startswith("jax-")] == [
        text.partition("==")[0] for text in gpu.requirements() if text.startswith("jax-")
    ]


SASS = """\
.text.gather_gemv:
        /*0000*/                   LDC.64 R6, c[0x0][0x220] ;
        /*0010*/                   LDG.E.128 R12, desc[UR8][R6.64] ;
        /*0020*/              @!P0 LDG.E.U16 R4, desc[UR8][R8.64] ;
        /*0030*/                   LDG.E R5, desc[UR8][R8.64] ;
        /*0040*/                   FMUL R2, R14, R3 ;
        /*0050*/                   LDG.E.64 R20, desc[UR8][R6.64+0x10] ;
.L_x_1:
        /*0060*/                   LDG.E.128 R24, desc[UR8][R6.64] ;
        /*0070*/                   STG.E.128 desc[UR8][R6.64], R24 ;
        /*0080*/                   LDG.E.128 R28, desc[UR8][R6.64] ;
.text.masked:
        /*0000*/               @P1 LDG.E.128 R12, desc[UR8][R6.64] ;
        /*0010*/                   SHF.L.U32 R1, R15.reuse, 0x10, RZ ;
        /*0020*/               @P2 LDG.E.128 R12, desc[UR8][R8.64] ;
"""


def test_loads_under_way_by_hand():
    """16 + 2 + 4 bytes until R14, a part of the first load, is read; so do a label and a store."""
    assert under_way(SASS) == {"gather_gemv": 22, "masked": 16}


# --- what fails ---------------------------------------------------------------------------------

CHECK = Check("made up", never=64 * MIB)
GOOD = KernelUse("attend_pages_1", 128, 128, 0, 48 << 10, load_bytes=100)


def test_a_program_has_its_worst_kernels():
    """One row for each kernel, under its own name, and one for the whole."""
    more = [GOOD, dataclasses.replace(GOOD, name="attend_pages", registers=200)]
    rows = rows_of(CHECK, "h200", more, 3 * MIB)
    assert {key[2] for key in rows} == {"", "attend_pages"}
    worst = rows["made up", "h200", "attend_pages"]
    assert (worst["registers"], worst["blocks"], worst["temporaries_mib"]) == ("200", "2", "")
    whole = rows["made up", "h200", ""]
    assert (whole["registers"], whole["temporaries_mib"], whole["bound_mib"]) == ("", "3.0", "12")
    assert set(rows_of(CHECK, "h200", more)) == {("made up", "h200", "attend_pages")}  # without a program


def test_names_of_ours():
    assert ours("page_scores_1_2") == "page_scores"
    assert ours("own_page_scores") == "own_page_scores"
    assert ours("loop_page_scores") is None


def test_spills_count_and_programs_have_none():
    rows = rows_of(CHECK, "h200", [dataclasses.replace(GOOD, spilled=4)], 0)
    assert [spills(rows["made up", "h200", name]) for name in ("attend_pages", "")] == [True, False]


def test_what_is_worse_than_the_table_is_told():
    committed = rows_of(CHECK, "h200", [GOOD], 3 * MIB)
    key = "made up", "h200", "attend_pages"
    worse = rows_of(CHECK, "h200", [dataclasses.replace(GOOD, registers=200)], 13 * MIB)
    assert fewer(worse[key], committed[key]) == (
        "2 blocks of attend_pages fit a core, 4 before: it has 200 registers (128) and 49152 bytes of shared "
        "memory (49152)"
    )
    assert fewer(worse["made up", "h200", ""], committed["made up", "h200", ""]) == (
        "13.0 MiB of temporaries, 12 allowed"
    )
    waiting = rows_of(CHECK, "h200", [dataclasses.replace(GOOD, load_bytes=49)], 0)
    assert fewer(waiting[key], committed[key]) == "attend_pages asks for 49 bytes at a time, 100 before"
    assert [fewer(row, committed[key]) for key, row in committed.items()] == ["", ""]
    assert fewer(worse[key], None) == ""


def test_without_the_compiler_one_sentence_says_what_to_do(monkeypatch):
    real = gpu.importlib.metadata.version

    def version(package: str) -> str:
        if package.startswith("nvidia"):
            raise gpu.importlib.metadata.PackageNotFoundError(package)
        return real("jax") if package.startswith("jax-cuda13") else real(package)

    monkeypatch.setattr(gpu.importlib.metadata, "version", version)
    monkeypatch.setattr("sys.argv", ["gpu_compile_check"])
    with pytest.raises(
        SystemExit, match=r"^gpu-compile-check: .*nvidia-cuda-nvcc \S+, which is not installed: pip"
    ):
        gpu_compile_check.main()


def test_another_ptxas_is_refused(monkeypatch):
    """Its registers would be others."""
    found = {"nvidia-cuda-nvcc": "12.0.0"}
    real = gpu.importlib.metadata.version("jax")
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda package: found.get(package, real))
    assert f"with nvidia-cuda-nvcc {gpu.CUDA}, and this is 12.0.0: pip install" in str(gpu.problem())


# --- the table ----------------------------------------------------------------------------------


@functools.cache
def by_name() -> dict[str, Check]:
    """All programs."""
    found = checks()
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def test_the_table_has_known_programs_and_every_kernel_of_a_step():
    table = TABLE.read()
    assert {name for name, _, _ in table} <= set(by_name())
    assert {chip for _, chip, _ in table} <= set(gpu.TARGETS)
    quick = {(check.name, chip) for check in by_name().values() if check.quick for chip in gpu.TARGETS}
    assert quick <= {key[:2] for key in table}
    found = {kernel for _, chip, kernel in table if chip == "h200"}
    assert found <= {*KERNELS, ""}
    step = {kernel for name, _, kernel in table if name.startswith("decode_step llama-3.2-1b")}
    assert found - step <= {"list_pages", "compact", "gather_gemv", "page_bounds"}  # few rows, prefixes
    assert step >= {"", "attend_pages", "norm_prune", "page_scores", "quantize_residual", "select_pages"}


@pytest.mark.parametrize("chip", gpu.TARGETS)
def test_nothing_in_the_table_spills_or_is_there_twice(chip):
    rows = {key: row for key, row in TABLE.read().items() if key[1] == chip}
    assert rows or chip != "h200"
    for (name, _, kernel), row in rows.items():
        assert not spills(row), name
        if kernel:
            assert int(row["blocks"]) >= 1, name
            assert int(row["shared_bytes"]) <= gpu.TARGETS[chip].shared_of_block, name
        elif (never := by_name()[name].never) is not None:
            assert float(row["temporaries_mib"]) <= float(row["bound_mib"])
            assert float(row["bound_mib"]) * MIB < by_name()[name].once + never, name


@pytest.mark.parametrize("chip", ["h200", "h100"])
def test_loads_under_way_hide_the_latency(chip):
    """Of kernels that move bytes: 700 ns of the memory's rate, cut among processors (25 KB on an H200)."""
    enough = CHIPS[chip].bandwidth * 700e-9 / gpu.TARGETS[chip].cores
    found = 0
    for (name, on, kernel), row in TABLE.read().items():
        if on == chip and kernel == "gather_gemv":
            # The grid has three programs for each processor.
            under_way = min(3, int(row["blocks"])) * int(row["threads"]) * int(row["load_bytes"])
            assert under_way > enough, name
            found += 1
    assert found >= 4 or chip != "h200"


# --- compiling ----------------------------------------------------------------------------------


def run(check: Check, committed: Rows):
    """Runs one check for an H200."""
    return compile_check.run(
        [check], lambda check: ["h200"], lambda check, chip: held_to(check, chip, committed)
    )


@needs_cuda
def test_a_second_copy_is_found():
    """Of a made-up program that sorts its argument, and so holds it once more."""
    x = jax.ShapeDtypeStruct((64 * MIB // 4,), jnp.float32)
    check = Check("made up", lambda: (lambda x: jnp.sort(x) * jnp.cumsum(x)[-1], (x,), ()), never=64 * MIB)
    (line,) = run(check, {})[1]
    assert "a second copy: " in line


@needs_cuda
def test_a_kernel_compiles_as_the_table_says():
    check = by_name()[f"gated_hidden {distinct('name')[0].name} 1 rows bfloat16"]
    measured, failed, compiled = run(check, TABLE.read())
    assert (failed, compiled) == ([], 1)
    assert {key[2] for key in measured} == {"", "norm_prune", "compact", "gather_gemv"}
