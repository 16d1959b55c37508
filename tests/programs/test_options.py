"""Options check themselves: types, bounds, choices; mistakes are named by field; and they survive files."""

import dataclasses
import json
import math
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sol_jax.axes.config import AxesConfig
from sol_jax.errors import UserError
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.generation.options import GenerateOptions
from sol_jax.options import Options, described, option, section
from sol_jax.runs.config import RunConfig

KINDS = ("x", "y")


@dataclasses.dataclass(frozen=True)
class Inner(Options):
    """A field of every kind."""

    where = "config.inner."
    share: float = option(0.5, "a share", at_least=0, at_most=1)
    rate: float = option(1e-3, "a rate", above=0)
    limit: float = option(-1.0, "a limit", at_most=2)
    odds: float = option(1.0, "odds", above=0, at_most=4)
    free: float = option(0.0, "any number")
    count: int = option(3, "a count", at_least=1)
    flag: bool = option(False, "a flag")
    text: str = option("", "a text")
    letter: Literal["a", "b"] = option("a", "a letter")
    kind: str = option("x", "a kind", choices=KINDS)
    levels: tuple[float, ...] = option((0.1, 1.0), "levels")
    ends: tuple[float, float] = option((0.0, 1.0), "the ends")
    names: tuple[str, ...] = option((), "names", repeated=True)
    table: tuple[tuple[float, ...], ...] = option(((1.0, 2.0),), "rows")
    maybe: int | None = option(None, "a number or none", at_least=1)


@dataclasses.dataclass(frozen=True)
class Outer(Options):
    """Two numbers that must go together, and a group."""

    where = "config."
    low: int = option(1, "the lower")
    high: int = option(2, "the higher")
    inner: Inner = section(Inner)

    def check(self) -> None:
        if self.low >= self.high:
            raise self.wrong("low", f"below high = {self.high}")


# --- one value ----------------------------------------------------------------------------------


def test_defaults_are_where_the_fields_are():
    assert Inner() == Inner(share=0.5, rate=1e-3, count=3, levels=(0.1, 1.0), maybe=None)
    assert Outer().inner == Inner()
    assert hash(Outer()) == hash(Outer())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().share = 1.0


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("share", -0.1, "between 0 and 1"),
        ("share", 1.1, "between 0 and 1"),
        ("share", math.nan, "between 0 and 1"),
        ("share", math.inf, "between 0 and 1"),
        ("share", "0.5", "a number"),
        ("share", True, "a number"),
        ("share", None, "a number"),
        ("rate", 0, "above 0"),
        ("rate", 0.0, "above 0"),
        ("rate", math.nan, "above 0"),
        ("rate", math.inf, "above 0"),
        ("limit", 2.1, "at most 2"),
        ("limit", math.nan, "at most 2"),
        ("limit", -math.inf, "at most 2"),
        ("odds", 0.0, "above 0"),
        ("odds", 4.5, "at most 4"),
        ("odds", math.nan, "above 0"),
        ("count", 0, "at least 1"),
        ("count", 1.5, "a whole number"),
        ("count", 2.0, "a whole number"),
        ("count", math.nan, "a whole number"),
        ("count", True, "a whole number"),
        ("count", "3", "a whole number"),
        ("count", 2**63, f"at most {2**63 - 1}"),
        ("rate", 10**30, f"at most {2**63 - 1}"),
        ("flag", 1, "true or false"),
        ("flag", "no", "true or false"),
        ("text", 3, "a text"),
        ("text", None, "a text"),
        ("letter", "c", "one of a, b"),
        ("letter", 1, "one of a, b"),
        ("kind", "z", "one of x, y"),
        ("kind", 1, "a text"),
        ("levels", 0.5, "a list of numbers"),
        ("levels", (0.5, "1"), "a list of numbers"),
        ("levels", (0.5, True), "a list of numbers"),
        ("ends", (1.0,), "a list of 2 numbers"),
        ("ends", (1.0, 2.0, 3.0), "a list of 2 numbers"),
        ("ends", (1.0, None), "a list of 2 numbers"),
        ("names", "abc", "a list of names"),
        ("names", ("a", 1), "a list of names"),
        ("table", (1.0, 2.0), "a list of lists of numbers"),
        ("table", ((1.0,), ("a",)), "a list of lists of numbers"),
        ("maybe", 0, "at least 1"),
        ("maybe", 0.5, "a whole number"),
    ],
)
def test_a_value_that_cannot_be_is_told_with_its_field_and_what_would_be_right(field, value, right):
    with pytest.raises(UserError) as caught:
        Inner(**{field: value})
    assert str(caught.value) == f"config.inner.{field} is {value!r}; it must be {right}"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("share", (0, 0.0, 1, 1.0)),
        ("rate", (1e-30, 7)),
        ("limit", (2, 2.0, -1e30)),
        ("odds", (1e-30, 4)),
        ("free", (-1e30, 0, 3)),
        ("count", (1, 10**12)),
        ("flag", (True, False)),
        ("letter", ("a", "b")),
        ("kind", KINDS),
        ("levels", ((), (1,), (0.5, 3))),
        ("ends", ((1, 2.5),)),
        ("names", ((), ("a", "b"))),
        ("table", ((), ((),), ((1, 2.5), (3,)))),
        ("maybe", (None, 1)),
    ],
)
def test_values_up_to_the_bounds_are_taken_as_they_are(field, values):
    for value in values:
        assert getattr(Inner(**{field: value}), field) is value


def test_a_group_must_be_one():
    with pytest.raises(UserError, match=r"^config.inner is 3; it must be a group of fields \(Inner\)$"):
        Outer(inner=3)


def test_fields_that_contradict_each_other_are_told():
    with pytest.raises(UserError, match=r"^config.low is 2; it must be below high = 2$"):
        Outer(low=2)


# --- some values of many ------------------------------------------------------------------------


def test_with_fields_changes_these_alone():
    before = Outer()
    after = before.with_fields({"inner.levels": [1, 2], "inner.table": [[1], [2, 3]], "high": 9})
    assert after == Outer(high=9, inner=Inner(levels=(1, 2), table=((1,), (2, 3))))
    assert before == Outer()
    assert before.with_fields({}) == before


def test_with_fields_checks_what_comes_of_all_of_them():
    """Fields that go together only when both are changed can be, in any order; those that do not cannot."""
    for names in (("low", "high"), ("high", "low")):
        assert Outer().with_fields({name: {"low": 5, "high": 6}[name] for name in names}) == Outer(5, 6)
    with pytest.raises(UserError, match=r"^config.low is 5; it must be below high = 2$"):
        Outer().with_fields({"low": 5})
    with pytest.raises(UserError, match=r"^config.inner.count is 0; it must be at least 1$"):
        Outer().with_fields({"inner.count": 0})


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lows", "config.lows: there is no such field; there are low, high, inner"),
        ("inner.shares", "config.inner.shares: there is no such field; there are share, rate, limit, "),
        ("low.share", "config.low.share: there is no such field; there are low, high, inner"),
        ("inner.share.x", "config.inner.share.x: there is no such field; there are share, rate, limit, "),
        ("other.share", "config.other.share: there is no such field; there are low, high, inner"),
    ],
)
def test_an_unknown_path_is_told_with_those_that_there_are(name, told):
    with pytest.raises(UserError) as caught:
        Outer().with_fields({name: 1})
    assert str(caught.value).startswith(told)


def test_an_unknown_field_of_a_mapping_is_told_with_those_that_there_are():
    for values, told in (
        ({"lows": 1}, "config.lows: there is no such field; there are low, high, inner"),
        ({"inner": {"shares": 1}}, "config.inner.shares: there is no such field; there are share, rate"),
        ({"low": {"share": 1}}, "config.low is {'share': 1}; it must be a whole number"),
        ({"inner": 1}, "config.inner is 1; it must be a group of fields"),
    ):
        with pytest.raises(UserError) as caught:
            Outer.from_dict(values)
        assert str(caught.value).startswith(told)


def test_what_a_mapping_leaves_out_has_its_default():
    assert Outer.from_dict({}) == Outer()
    assert Outer.from_dict({"inner": {"levels": [2]}}) == Outer(inner=Inner(levels=(2,)))


# --- there and back -----------------------------------------------------------------------------

numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**40), 2**40)
inners = st.builds(
    Inner,
    share=st.floats(0, 1) | st.sampled_from([0, 1]),
    rate=st.floats(0, exclude_min=True, allow_infinity=False),
    limit=st.floats(max_value=2, allow_infinity=False),
    odds=st.floats(0, 4, exclude_min=True),
    free=numbers,
    count=st.integers(1, 2**63 - 1),
    flag=st.booleans(),
    text=st.text(),
    letter=st.sampled_from(["a", "b"]),
    kind=st.sampled_from(KINDS),
    levels=st.lists(numbers, max_size=4).map(tuple),
    ends=st.tuples(numbers, numbers),
    names=st.lists(st.text(), max_size=3).map(tuple),
    table=st.lists(st.lists(numbers, max_size=3).map(tuple), max_size=3).map(tuple),
    maybe=st.none() | st.integers(1, 2**63 - 1),
)
outers = st.builds(Outer, low=st.integers(-9, 0), high=st.integers(1, 9), inner=inners)


@settings(max_examples=50)
@given(outers)
def test_options_survive_dictionaries_and_json(options):
    nested, flat = options.to_dict(), options.flat()
    assert set(flat) == {"low", "high", *(f"inner.{field.name}" for field in dataclasses.fields(Inner))}
    assert Outer.from_dict(nested) == Outer.from_dict(json.loads(json.dumps(nested))) == options
    assert json.loads(json.dumps(flat)) == flat  # of lists, which JSON knows, not of tuples
    assert Outer().with_fields(flat) == options
    assert Outer.from_dict(nested).flat() == flat


def test_fields_are_described_in_the_order_of_their_definition():
    rows = list(described(Outer(high=7)))
    assert [row.name for row in rows[:3]] == ["low", "high", "inner.share"]
    assert (rows[1].value, rows[1].meaning, rows[1].kind) == (7, "the higher", int)
    by_name = {row.name: row for row in rows}
    assert by_name["inner.kind"].choices == KINDS
    assert [name for name, row in by_name.items() if row.repeated] == ["inner.names"]


# --- the options of the programs ----------------------------------------------------------------


def groups(options: Options) -> list[Options]:
    """The options and all groups in them."""
    inner = [getattr(options, field.name) for field in dataclasses.fields(options)]
    return [options, *(group for value in inner if isinstance(value, Options) for group in groups(value))]


SHIPPED = [
    group for program in (RunConfig(), EvaluateOptions(), GenerateOptions()) for group in groups(program)
]
BOUNDED = [
    pytest.param(group, field, id=f"{group.where}{field.name}")
    for group in SHIPPED
    for field in dataclasses.fields(group)
    if any(field.metadata.get(bound) is not None for bound in ("at_least", "above", "at_most"))
]


def test_every_shipped_field_says_what_it_means():
    assert AxesConfig() in SHIPPED
    assert len(BOUNDED) > 40
    for group in SHIPPED:
        assert group.where
        assert type(group).from_dict(group.to_dict()) == type(group)().with_fields(group.flat()) == group
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            assert field.metadata.get("meaning") or isinstance(value, Options), f"{group.where}{field.name}"


@pytest.mark.parametrize(("group", "field"), BOUNDED)
def test_every_shipped_bound_holds(group, field):
    """A little below the least, at what must be exceeded, a little above the most, and NaN."""
    low, above, high = (field.metadata[bound] for bound in ("at_least", "above", "at_most"))
    whole = isinstance(getattr(group, field.name), int) or field.type in (int, int | None)
    refused = [math.nan]
    refused += [] if low is None else [low - 1 if whole else low - 1e-6]
    refused += [] if above is None else [above]
    refused += [] if high is None else [high + 1 if whole else high + 1e-6]
    for value in refused:
        with pytest.raises(UserError) as caught:
            dataclasses.replace(group, **{field.name: value})
        assert str(caught.value).startswith(f"{group.where}{field.name} is {value!r}; it must be ")
