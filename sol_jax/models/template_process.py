"""A program that renders chat templates, one request a line, within limits of memory and text.

Templates are programs inside model files: Jinja's sandbox keeps them from the machine, and the limits here
keep `'a' * 3000000000` from its memory.  `sol_jax.models.chat_template` starts it, and ends it when it takes
too long.  It is run as a file, without the package, so that it starts in a moment.
"""

import contextlib
import datetime
import functools
import json
import sys
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes of the process
MOST = 4_000_000  # characters of a prompt: more than any model reads


class Generation(Extension):
    """`{% generation %}`, by which templates mark what is trained on: here its content just stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's Extension declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> NoReturn:
    """`raise_exception` of templates."""
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    """The local time, for today's date; the argument has the name that transformers gives it."""
    return datetime.datetime.now().strftime(format)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`tojson` of templates, with the keywords that transformers gives it."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=4)
def compiled(template: str) -> Template:
    """A template, with the settings and functions that transformers gives it."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals |= {
        "raise_exception": refuse,
        "strftime_now": strftime_now,
    }
    return sandbox.from_string(template)


def answer(template: str, values: dict[str, Any]) -> dict[str, str]:
    """The text under `text`, or what is wrong under `error`."""
    try:
        text = compiled(template).render(values)
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 30} GB of memory"}
    except Exception as error:  # a program of somebody else's can fail in any way
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[-1][:200]}
    if len(text) > MOST:
        return {"error": f"it writes {len(text)} characters, and at most {MOST} are taken"}
    return {"text": text}


def main() -> None:
    """Answers until its input ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # where there are no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
