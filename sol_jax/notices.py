"""What the package says while it works, apart from its results."""

import sys


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this: its page shows stderr as if something were wrong."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def notice(line: str) -> None:
    """Says a line at once: on stderr, or under a notebook's cell."""
    print(line, file=sys.stdout if in_notebook() else sys.stderr, flush=True)
