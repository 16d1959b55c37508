"""The one exception for mistakes a user can mend, and how entry points end on it."""

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

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


def reason(error: Exception) -> str:
    """The last line of an error's message, which after a quoted traceback is the one that tells."""
    return re.sub(r"^\w+Error: ", "", str(error).strip().splitlines()[-1].strip())
