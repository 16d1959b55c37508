"""The one exception for mistakes a user can mend, and how entry points end on it."""

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pallas_kernels.errors import UnavailableError

LONGEST = 600  # characters of a message
OUT_OF_MEMORY = (
    "memory has run out; take bfloat16, fewer schedules or blocks at a time (config.grpo.batch_size, "
    "config.grpo.num_schedules, config.eval.batch_size, --parallel), a shorter prefix or a smaller model"
)


class UserError(ValueError):
    """A mistake of the user's: one clear sentence naming the file, field or flag and what would be right.

    It stays one line of readable length, whatever a file or a library put into it.
    """

    def __init__(self, message: str):
        line = " ".join(message.split("\n"))
        half = LONGEST // 2
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}")

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback; IPython asks for it by this name."""
        return [f"error: {self}"]


def exits_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an entry point end as programs on a terminal do, without a traceback.

    A `UserError`, or a kernel that was asked for by name and cannot run here, is printed as one line, with
    exit status 2.  If whoever reads the output has gone (`| head`), the program stops.  Characters that the
    terminal's encoding lacks are replaced.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            with telling_of_memory():
                result = main(*args, **kwargs)
            sys.stdout.flush()
        except (UserError, UnavailableError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except BrokenPipeError:
            # Python flushes stdout once more when it ends; there is nobody to read that either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        return result

    return wrapped


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left: JAX has no type of its own for it.

    What waits for a computation that ran out says INTERNAL, and quotes that.
    """
    return isinstance(error, MemoryError) or (
        type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
        and any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory allocating"))
    )


@contextlib.contextmanager
def telling_of_memory() -> Iterator[None]:
    """Turns a lack of memory into a `UserError` that says what takes less; also decorates functions."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"{OUT_OF_MEMORY} ({UserError(reason(error))})") from error


def reason(error: Exception) -> str:
    """The last line of an error's message, which after a quoted traceback is the one that tells."""
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return re.sub(r"^\w+Error: ", "", last.strip())
