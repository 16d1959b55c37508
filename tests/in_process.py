"""`python -m MODULE` in the process of the tests, which has imported JAX and compiled what it needs."""

import contextlib
import functools
import io
import pathlib
import runpy
import subprocess
import sys

import pytest
from absl import app, flags
from ml_collections import config_flags

from sol_jax import command_line

ROOT = pathlib.Path(__file__).parents[1]


def use_own_flags(patch: pytest.MonkeyPatch) -> flags.FlagValues:
    """Flags that are defined from now on are these; those of the process stay as they are."""
    values = flags.FlagValues()
    own = lambda define: functools.partial(define, flag_values=values)
    for name in ("DEFINE_enum", "DEFINE_list", "DEFINE_multi_string", "DEFINE_string"):
        patch.setattr(flags, name, own(getattr(flags, name)))
    for kind, define in command_line._DEFINE.items():
        patch.setitem(command_line._DEFINE, kind, own(define))
    patch.setattr(config_flags, "DEFINE_config_file", own(config_flags.DEFINE_config_file))
    patch.setattr(flags, "FLAGS", values)
    return values


def run_program(module: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Its exit status and what it prints, from the root of the repository.

    Logs, and what ends a whole process, are for tests that start one.
    """
    path, argv, code = ROOT / f"{module.replace('.', '/')}.py", [module, *map(str, args)], 0
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        use_own_flags(patch)
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", argv)
        patch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())
