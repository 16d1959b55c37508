"""Programs of this project run from Python, each in a process of its own, as a command line would."""

import subprocess
import sys
from typing import Any

from sol_jax.errors import UserError


def run_program(module: str, **flags: Any) -> str:
    """Runs `python -m MODULE --FLAG=VALUE ...` in the current folder, and prints what it says as it says it.

    Args:
      module: such as `experiments.figures.front`.
      flags: its flags by name; lists and tuples become values with commas between.

    Returns what it said.

    Raises `UserError`, with the program's own last line, if it fails.
    """
    command = [sys.executable, "-m", module, *(f"--{name}={_value(flag)}" for name, flag in flags.items())]
    said: list[str] = []
    held = ""
    # No fork of this process, which has threads of JAX: subprocess starts a new one.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            said.append(line)
            print(held, end="")
            # Programs end on their error, which is raised: shown here too, a notebook would say it twice.
            held = line if line.startswith("error: ") else ""
            if not held:
                print(line, end="", flush=True)
    if running.returncode:
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        raise UserError(f"{module} failed: {last.removeprefix('error: ')}")
    print(held, end="", flush=True)
    return "".join(said)


def _value(flag: Any) -> str:
    return ",".join(map(str, flag)) if isinstance(flag, list | tuple) else str(flag)
