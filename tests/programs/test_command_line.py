"""Command lines made of options: every field is a flag, and what is given comes back checked."""

import dataclasses
import typing

import pytest
from in_process import use_own_flags

from sol_jax.command_line import define_flags, given, parse_flags
from sol_jax.errors import UserError
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.generation.options import GenerateOptions
from sol_jax.options import Options
from sol_jax.planning.options import PlanOptions

KERNELS = ["auto", "native", "pallas", "triton", "xla"]
# Flags that take one of a few words.
CHOICES = {
    EvaluateOptions: {"kernels": KERNELS, "one_budget": ["bytes", "net", "operations", "time"]},
    GenerateOptions: {
        "dtype": ["bfloat16", "float32"],
        "policy_dtype": ["bfloat16", "float32"],
        "kernels": KERNELS,
        "controller": ["dense", "fixed", "policy", "random"],
    },
    PlanOptions: {},
}
PROGRAMS = pytest.mark.parametrize("kind", list(CHOICES))


@pytest.fixture
def registry(monkeypatch):
    return use_own_flags(monkeypatch)


@PROGRAMS
def test_every_field_is_a_flag_with_its_default(kind, registry):
    define_flags(kind())
    fields = {field.name: field for field in dataclasses.fields(kind)}
    assert set(registry) == set(fields)
    for name, field in fields.items():
        flag, default = registry[name], field.default
        assert flag.default == (list(default) if isinstance(default, tuple) else default), name
        assert f"{field.metadata['meaning']}.".lower() in flag.help.lower()  # absl adds to it
        assert sorted(getattr(flag.parser, "enum_values", ())) == CHOICES[kind].get(name, [])


@PROGRAMS
def test_flags_are_of_their_fields_types(kind, registry):
    """A number is no text, and a switch takes no value."""
    define_flags(kind())
    types = {"bool": bool, "int": int, "float": float, "string": str, "string enum": str}
    for name, hint in typing.get_type_hints(kind).items():
        if name == "where":
            continue
        shown = registry[name].flag_type()
        if "list" in shown or "multi" in shown:
            assert hint == tuple[str, ...], name
        else:
            assert types[shown] in (hint, *typing.get_args(hint)) or "Literal" in str(hint), name


@PROGRAMS
def test_nothing_given_is_the_defaults(kind, registry):
    define_flags(kind())
    assert parse_flags(["program"]) == ["program"]
    assert given(kind) == kind()


def test_what_is_given_comes_back(registry):
    define_flags(EvaluateOptions())
    parse_flags(
        ["program", "--workdir=runs/x", "--controllers=fixed,entropy", "--num-blocks=3", "--noprotect",
         "--hold=kappa", "--stale_prefill", "--budgets=0.4,0.6,0.5;1,1,1"]
    )  # fmt: skip
    assert given(EvaluateOptions) == EvaluateOptions(
        workdir="runs/x",
        controllers=("fixed", "entropy"),
        num_blocks=3,
        protect=False,
        hold=("kappa",),
        stale_prefill=True,
        budgets="0.4,0.6,0.5;1,1,1",
    )


def test_texts_to_stop_at_may_hold_commas(registry):
    """One flag for each, rather than commas between them."""
    define_flags(GenerateOptions())
    parse_flags(["program", "--stop=a,b", "--stop=c", "--temperature=0.5", "--show-compute"])
    expected = GenerateOptions(stop=("a,b", "c"), temperature=0.5, show_compute=True)
    assert given(GenerateOptions) == expected


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--kernels=fast", "kernels"),
        ("--num_blocks=few", "num_blocks"),
        ("--stale_prefill=maybe", "stale_prefill"),
        ("--nope=1", "nope"),
        ("word", "'word' is not expected; options start with --"),
    ],
)
def test_slips_are_told_in_one_line(registry, capsys, argument, told):
    define_flags(EvaluateOptions())
    with pytest.raises(SystemExit) as ended:
        parse_flags(["program", argument])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


@pytest.mark.parametrize(
    ("kind", "argument", "told"),
    [
        (EvaluateOptions, "--controllers=fixt", "--controllers: there is no 'fixt'; there are fixed,"),
        (EvaluateOptions, "--num_blocks=0", "--num_blocks is 0; it must be at least 1"),
        (EvaluateOptions, "--seed=-1", "--seed is -1; it must be between 0 and 4294967295"),
        (GenerateOptions, "--max_tokens=0", "--max_tokens is 0; it must be at least 1"),
        (GenerateOptions, "--temperature=nan", "--temperature is nan; it must be at least 0"),
    ],
)
def test_values_that_cannot_be_are_told(registry, kind, argument, told):
    define_flags(kind())
    parse_flags(["program", argument])
    with pytest.raises(UserError) as mistake:
        given(kind)
    assert str(mistake.value).startswith(told)


def test_a_field_without_a_meaning_would_be_a_flag_without_help():
    """Also of the options that a config has."""
    from sol_jax.runs.config import RunConfig

    def fields(options: Options):
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            yield from fields(value) if isinstance(value, Options) else [(field.name, field)]

    for options in (EvaluateOptions(), GenerateOptions(), RunConfig()):
        assert all(field.metadata["meaning"] for _, field in fields(options))
