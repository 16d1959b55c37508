"""Options: fields of frozen dataclasses that hold default, choices, bounds and meaning, and check themselves.

    @dataclasses.dataclass(frozen=True)
    class OptimConfig(Options):
        where = "config.optim."
        learning_rate: float = option(1e-4, "of AdamW", above=0)

    OptimConfig(learning_rate=0.0)  # UserError: config.optim.learning_rate is 0.0; it must be above 0

Config files, command lines, checks and the reference page of the docs are all made from these fields, so that
a choice or a default stands in one place.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

from sol_jax.errors import UserError
from sol_jax.files import A_PATH, all_known, shown

MOST = 2**63 - 1  # of whole numbers: what JAX, numpy and files can hold
MOST_SEED = 2**32 - 1  # of seeds, of which JAX takes these bits alone: 2**32 would be the seed 0


def option(
    default: Any,
    meaning: str,
    *,
    choices: tuple[Any, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    repeated: bool = False,
    path: bool = False,
) -> Any:
    """A field of `Options`: its default, what it means, and which values it may have.

    Args:
      meaning: half a sentence for the docs and for `--help`.
      choices: all allowed values; none: any of the field's type within the bounds.
      at_least, above, at_most: bounds of a number.
      repeated: on a command line, a list is one flag for each item rather than commas between them.
      path: of a file or folder, or several, of this machine or of an object store that epath knows.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    return dataclasses.field(
        default=default,
        metadata={"meaning": meaning, "choices": choices, "repeated": repeated, "path": path, **bounds},
    )


def section(config: type["Options"]) -> Any:
    """A field of `Options` that is a group of further ones, at their defaults."""
    return dataclasses.field(default_factory=config)


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of all groups of options.  Raises `UserError`, naming the field, for a value that cannot be."""

    where: ClassVar[str] = ""  # what stands before a field's name in messages: "config.optim." or "--"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), _kinds(type(self))[field.name]
            if not _is_of(value, kind):
                raise self.wrong(field.name, _described(kind))
            if value is not None and (right := _broken_bound(value, field.metadata)):
                raise self.wrong(field.name, right)
        self.check()

    def check(self) -> None:
        """Raises `UserError` for fields that contradict each other."""

    def wrong(self, name: str, right: str) -> UserError:
        """The error that names a field, its value and what would be right."""
        return UserError(f"{self.where}{name} is {shown(getattr(self, name))}; it must be {right}")

    def with_fields(self, fields: Mapping[str, Any]) -> Self:
        """A copy with some fields changed, by dotted path.  Raises `UserError` for one that there is not."""
        own: dict[str, Any] = {}
        inner: dict[str, dict[str, Any]] = {}
        for name, value in fields.items():
            head, _, rest = name.partition(".")
            group = isinstance(getattr(self, head, None), Options)
            if head not in _kinds(type(self)) or group != bool(rest):
                raise _unknown(type(self), name)
            if rest:
                inner.setdefault(head, {})[rest] = value
            else:
                own[head] = _tupled(value)
        own |= {name: getattr(self, name).with_fields(some) for name, some in inner.items()}
        return dataclasses.replace(self, **own)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The options of a nested mapping; lists become tuples, and what is absent has its default.

        Raises `UserError` for a field that there is not, or a value that cannot be.
        """
        fields = {}
        for name, value in values.items():
            kind = _kinds(cls).get(name)
            if kind is None:
                raise _unknown(cls, name)
            if isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, Options):
                fields[name] = kind.from_dict(value)
            else:
                fields[name] = _tupled(value)
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The options as a nested dictionary; the inverse of `from_dict`."""
        return {
            field.name: value.to_dict() if isinstance(value, Options) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }

    def flat(self) -> dict[str, Any]:
        """Dotted path -> value, tuples as lists: what JSON gives back, and what checkpoints are known by."""
        return {row.name: _listed(row.value) for row in described(self)}


class Described(NamedTuple):
    """One field of some options, for docs and command lines."""

    name: str  # dotted path
    kind: Any
    value: Any
    meaning: str
    choices: tuple[Any, ...]
    repeated: bool


def described(options: Options, prefix: str = "") -> Iterator[Described]:
    """All fields of some options, groups opened, in the order of their definition."""
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), prefix + field.name
        if isinstance(value, Options):
            yield from described(value, name + ".")
        else:
            meta, kind = field.metadata, _kinds(type(options))[field.name]
            yield Described(
                name,
                kind,
                value,
                meta.get("meaning", ""),
                meta.get("choices", ()),
                meta.get("repeated", False),
            )


def _kinds(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _unknown(cls: type[Options], name: str) -> UserError:
    return UserError(f"{cls.where}{name}: there is no such field; there are {', '.join(_kinds(cls))}")


def _is_of(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_is_of(value, part) for part in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(_is_of(part, inner[0]) for part in value)
        return len(value) == len(inner) and all(map(_is_of, value, inner))
    if origin is typing.Literal:
        return value in inner
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _described(kind: Any) -> str:
    """What a value of this type is, for people."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_described(part) for part in inner if part is not type(None))
    if origin is tuple:
        if inner[-1] is not Ellipsis:
            return f"a list of {len(inner)} numbers"
        return (
            "a list of lists of numbers"
            if typing.get_origin(inner[0]) is tuple
            else ("a list of numbers" if inner[0] in (int, float) else "a list of names")
        )
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind, f"a group of fields ({kind.__name__})")


def _number(bound: float) -> str:
    """A bound as people write it: a whole number in full."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _broken_bound(value: Any, rules: Mapping[str, Any]) -> str:
    """What would be right, if a value breaks a rule of its field; else empty.  NaN breaks every bound."""
    if rules.get("path") and not all_known(value):
        return A_PATH
    if rules.get("choices") and value not in rules["choices"]:
        return f"one of {', '.join(map(str, rules['choices']))}"
    if type(value) is int and abs(value) > MOST:
        return f"at most {MOST}"
    low, above, high = (rules.get(name) for name in ("at_least", "above", "at_most"))
    if low is not None and high is not None and not low <= value <= high:
        return f"between {_number(low)} and {_number(high)}"
    if low is not None and not low <= value < math.inf:
        return f"at least {low:g}"
    if above is not None and not above < value < math.inf:
        return f"above {above:g}"
    if high is not None and not -math.inf < value <= high:
        return f"at most {_number(high)}"
    return ""


def _tupled(value: Any) -> Any:
    return tuple(_tupled(part) for part in value) if isinstance(value, list | tuple) else value


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, list | tuple) else value
