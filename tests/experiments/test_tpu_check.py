"""The bounds on TPU programs: the table covers every program, and none allows a second copy."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import compile_check, program_cases, tpu_check, tpu_programs
from experiments.benchmarks.compile_check import MIB, Check, Rows, second_copy
from experiments.benchmarks.tpu_check import TABLE, TOPOLOGIES, held_to, measure, quick_chips
from experiments.benchmarks.tpu_programs import checks
from pallas_kernels.dispatch import tracing_for
from sol_jax.planning import tpu


@functools.cache
def by_name() -> dict[str, Check]:
    """All programs."""
    found = checks()
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


needs_libtpu = pytest.mark.skipif(tpu.problem() is not None, reason=str(tpu.problem()))


def test_every_kernel_and_program_is_there():
    ops = {name.split()[0] for name in by_name()}
    assert ops >= {"attend", "select_pages", "page_bounds", "shared_prefix", "gated_hidden"}
    assert ops >= {"quantize_residual", "decode_step", "play", "learn", "generate"}


def test_the_table_has_what_ci_compiles_and_nothing_unknown():
    programs = {name for name, check in by_name().items() if check.never is not None}
    assert {chip for _, chip in TABLE.read()} <= set(TOPOLOGIES)
    assert {name for name, _ in TABLE.read()} <= programs
    quick = [check for check in by_name().values() if check.quick and check.never is not None]
    if TABLE.read():  # made by a run of everything with --write
        assert {(check.name, chip) for check in quick for chip in quick_chips(check)} <= set(TABLE.read())


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_no_bound_of_a_whole_program_allows_a_second_copy(chip):
    """Of the smaller of weights and caches."""
    table = TABLE.read()
    for name, check in by_name().items():
        if check.never is not None and (name, chip) in table:
            row = table[name, chip]
            assert float(row["temporaries_mib"]) <= float(row["bound_mib"])
            assert float(row["bound_mib"]) * MIB < check.once + check.never, name


def test_sizes_by_hand():
    """A decode step of Llama-3.1-8B against 8,192 tokens: 15 GiB of weights, 1 GiB of cache."""
    check = by_name()["decode_step llama-3.1-8b 1x1x8192 xla"]
    cache = 2 * 32 * 8 * 8192 * 128 * 2
    assert check.never == cache
    assert second_copy(check, 0) == cache / 2
    with tracing_for("tpu"):
        _, args, donated = check.make()
    assert donated == (3,)
    weights = 2 * (128256 * 4096 * 2 + 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336 + 2 * 4096) + 4096)
    assert program_cases.size_of(args[0]) == weights
    assert program_cases.size_of(args[1]) == cache


def test_copies_of_narrow_heads_are_no_second_ones():
    """Keys of 64 channels are padded to 128 for a kernel, those of 128 are read where they are."""
    keys = jax.ShapeDtypeStruct((2, 3, 1024, 64), jnp.bfloat16)
    size = 2 * 3 * 1024 * 64 * 2
    mask = jax.ShapeDtypeStruct((1024, 64), jnp.bool_)  # no cache
    assert tpu_programs.turned_operands([keys, mask]) == int(1.05 * 2 * size)
    assert tpu_programs.turned_operands([jax.ShapeDtypeStruct((2, 3, 1024, 128), jnp.bfloat16)]) == 0
    assert second_copy(Check("kernel", once=7), 64 * MIB) == 7 + 32 * MIB


def run(check: Check, committed: Rows, done: compile_check.Done | None = None):
    """Runs one check on a v5e."""
    return compile_check.run(
        [check], lambda check: ["v5e"], lambda check, chip: held_to(check, chip, committed), done=done
    )


def doubling(again: bool, never: int | None = None) -> Check:
    """A made-up program that holds its argument once more, or not."""

    def double(x):
        return jnp.sort(x) if again else x[:8] * 2

    x = jax.ShapeDtypeStruct((64 * MIB // 4,), jnp.float32)
    return Check("made up", lambda: (double, (x,), ()), never=never)


@needs_libtpu
def test_a_second_copy_is_found():
    _, wrong = measure(doubling(True), "v5e")
    assert wrong.startswith("a second copy: ")
    row, wrong = measure(doubling(False), "v5e")
    assert not wrong
    assert math.isclose(float(row["arguments_mib"]), 64, rel_tol=0.01)


@needs_libtpu
def test_what_exceeds_its_bound_fails(capsys):
    check = doubling(False, never=64 * MIB)
    measured, failed, compiled = run(check, {})
    assert (failed, compiled) == ([], 1)
    tight = {("made up", "v5e"): {**measured["made up", "v5e"], "bound_mib": "-1"}}
    (line,) = run(check, tight)[1]
    assert line.endswith("MiB of temporaries, -1 allowed")
    assert run(check, measured)[1] == []
    assert run(doubling(False), {}) == ({}, [], 1)  # of kernels no rows are kept
    assert "made up on v5e" in capsys.readouterr().out


@needs_libtpu
def test_a_decode_step_compiles_within_its_bounds():
    check = by_name()["decode_step smollm2-135m 8x16x1024 xla"]
    assert run(check, TABLE.read())[1] == []


def test_a_check_that_was_stopped_goes_on(tmp_path):
    """What was right is left out, whether or not libtpu is here; a new check begins anew."""
    path = tmp_path / "build" / "done.csv"
    compile_check.Done(path, resume=False).add("made up", "v5e")
    done = compile_check.Done(path, resume=True)
    assert run(doubling(False), {}, done=done) == ({}, [], 0)
    assert ("made up", "v4") not in done
    assert ("made up", "v5e") not in compile_check.Done(path, resume=False)


def test_without_libtpu_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["tpu_check"])
    with pytest.raises(SystemExit, match=r"^tpu-check: .* not installed: pip install .*libtpu==\S+"):
        tpu_check.main()


@needs_libtpu
def test_what_cannot_fit_is_left_out(capsys):
    """16 GiB of weights and cache are too much for a v5e, however they are used."""
    assert run(by_name()["decode_step llama-3.1-8b 1x1x8192 xla"], {}) == ({}, [], 0)
    assert "left out, 16.0 GiB of arguments" in capsys.readouterr().out
