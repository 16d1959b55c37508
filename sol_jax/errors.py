"""The one exception for mistakes a user can mend, and how entry points end on it."""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from pallas_kernels.errors import UnavailableError


class UserError(ValueError):
    """A mistake of the user's: one clear sentence naming the file, field or flag and what would be right."""


def exits_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an entry point print a `UserError` as one line, without a traceback, and exit with status 2.

    A kernel that was asked for by name and cannot run here counts as one.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except (UserError, UnavailableError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapped


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
    return rest


def _underscored(arg: str) -> str:
    name, equals, value = arg.partition("=")
    known = name.startswith("--") and name[2:].replace("-", "_") in flags.FLAGS
    return "--" + name[2:].replace("-", "_") + equals + value if known else arg


def reason(error: Exception) -> str:
    """The last line of an error's message, which after a quoted traceback is the one that tells."""
    return re.sub(r"^\w+Error: ", "", str(error).strip().splitlines()[-1].strip())
