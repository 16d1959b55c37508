"""Command lines from options: the flags of a program are the fields of its `Options`.

define_flags(EvaluateOptions())
app.run(main, flags_parser=parse_flags)       # and in main: options = given(EvaluateOptions)
"""

import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from sol_jax.errors import UserError, exits_on_user_error, reason
from sol_jax.options import Options, described
from sol_jax.runs.config import RunConfig

_OPTIONS = typing.TypeVar("_OPTIONS", bound=Options)
_DEFINE: dict[Any, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}


def define_flags(options: Options) -> None:
    """A flag for every field, with its default, choices and meaning."""
    for field in described(options):
        kind, about = _plain(field.kind), field.meaning
        about = about[:1].upper() + about[1:] + "."
        choices = field.choices or (
            typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        )
        if choices:
            flags.DEFINE_enum(field.name, field.value, list(map(str, choices)), about)
        elif typing.get_origin(kind) is tuple:
            define = flags.DEFINE_multi_string if field.repeated else flags.DEFINE_list
            define(field.name, list(field.value), about)
        else:
            _DEFINE[kind](field.name, field.value, about)


def given(kind: type[_OPTIONS]) -> _OPTIONS:
    """The options that the command line gave.  Raises `UserError` for a value that cannot be."""
    values = {field.name: flags.FLAGS[field.name].value for field in described(kind())}
    return kind.from_dict(values)


def define_run_flags(workdir: str) -> None:
    """`--config` and `--workdir`, of programs that run what a config file says."""
    config_flags.DEFINE_config_file("config", None, "Config file, with variants: configs/X.py:cpu,t4")
    flags.DEFINE_string("workdir", None, workdir)


def given_config() -> RunConfig:
    """The config that the command line gave.  Raises `UserError` for what is wrong with it."""
    if flags.FLAGS.config is None:
        raise UserError("give --config configs/X.py:VARIANTS")
    try:
        return RunConfig.from_dict(flags.FLAGS.config.to_dict())
    except OSError as error:  # of the config file; ml_collections keeps it until the config is used
        raise UserError(reason(error)) from None


@exits_on_user_error
def parse_flags(argv: Sequence[str]) -> list[str]:
    """For `app.run(main, flags_parser=parse_flags)`: a slip on the command line is a `UserError` as well.

    Options may be written with dashes for underscores: `--show-compute`.
    """
    try:
        rest = flags.FLAGS([_underscored(arg) for arg in argv])
    except (AttributeError, KeyError) as error:  # of ml_collections; its message is the field
        name, near = re.search(r"\w+", str(error)), re.search(r"mean \W*(\w+)", str(error))
        field = name[0] if name else str(error)
        slip = next((arg for arg in argv if re.search(rf"\.{field}\b", arg)), field)
        hint = f"; did you mean {near[1]!r}?" if near else ""
        raise UserError(f"{slip}: the config has no field {field!r}{hint}") from None
    except (flags.Error, OSError) as error:  # the former may hold a whole traceback of the config file
        raise UserError(reason(error)) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not expected; options start with --")
    if "verbosity" in flags.FLAGS and flags.FLAGS["verbosity"].using_default_value:
        # What a program has to say it prints; logs of libraries, and ours of what compiles, are for those who
        # ask for them (--verbosity=0, or 1 for more).
        logging.set_verbosity(logging.WARNING)
    return rest


def _underscored(arg: str) -> str:
    name, equals, value = arg.partition("=")
    known = name.startswith("--") and name[2:].replace("-", "_") in flags.FLAGS
    return "--" + name[2:].replace("-", "_") + equals + value if known else arg


def _plain(kind: Any) -> Any:
    """A type without its None."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return kind
