"""The one exception for mistakes a user can mend, and how entry points end on it."""

import functools
import sys
from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """A mistake of the user's: one clear sentence naming the file, field or flag and what would be right."""


def exits_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an entry point print a `UserError` as one line, without a traceback, and exit with status 2."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapped
