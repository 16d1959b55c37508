"""Continues a prompt under a policy, a schedule or densely, and says what each token was given.

    python -m sol_jax.generate --model smollm2-135m --policy NAME --prompt "Once upon a time" \\
        --budget 0.5,0.7,0.5 --show-compute --html story.html

`--policy` is a published policy's name, a folder that holds one, `hub:OWNER/NAME`, or the workdir of a
training run.
`--controller fixed` (or random) replays a schedule at the same budget, over the policy's levels or, without
one, all those of SOL-J-FL; `dense` compresses nothing.  The text goes to standard output; what was spent
on it, and how likely the dense model finds it, to standard error.
"""

import functools
import pathlib
import sys
from collections.abc import Sequence

from absl import app

from sol_jax import hosts
from sol_jax.command_line import define_flags, given, parse_flags
from sol_jax.errors import exits_on_user_error
from sol_jax.files import path_of
from sol_jax.generation import html_page
from sol_jax.generation.load_engine import engine_for
from sol_jax.generation.options import GenerateOptions
from sol_jax.generation.shaded_page import write_page
from sol_jax.generation.terminal import facts, write_out
from sol_jax.hosts import HostOptions, joined


@exits_on_user_error
def main(argv: Sequence[str]) -> None:
    del argv
    with joined(given(HostOptions)):
        _generate(hosts.together(lambda: given(GenerateOptions)))


def _page(options: GenerateOptions) -> pathlib.Path | None:
    """Where the first process writes the page; raises `UserError` if it cannot."""
    page = path_of(options.html, "--html") if options.html else None
    if page and hosts.first():
        html_page.check_writable(page)
    return page


def _generate(options: GenerateOptions) -> None:
    page = hosts.together(functools.partial(_page, options))
    engine, request = hosts.together(lambda: engine_for(options))
    first = hosts.first()  # the only one that writes
    output, rate = write_out(engine, request, show=first, shaded=options.show_compute)
    told = facts(engine, output, rate)
    if not first:
        return
    print("\n".join(f"{name:18} {value}" for name, value in told), file=sys.stderr)
    if page:
        write_page(page, options.model, engine, output, told, options.prompt or "" if options.chat else "")


if __name__ == "__main__":
    define_flags(GenerateOptions())
    define_flags(HostOptions())
    app.run(main, flags_parser=parse_flags)
