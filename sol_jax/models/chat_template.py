"""Chat templates: a conversation as the text that the model was tuned to continue.

A template is a Jinja program inside the model's files, so it runs in Jinja's sandbox, with the settings and
functions that `transformers` gives it.  Source: transformers, "Writing a chat template".
"""

import datetime
import json
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sol_jax.errors import UserError
from sol_jax.models.tokenizer import Tokenizer

Message = dict[str, str]  # "role": system, user or assistant; "content": its text

# Where an answer that was begun is to be cut off; a template that trims its messages takes the space away.
CUT = "END OF WHAT WAS BEGUN "


class Generation(Extension):
    """`{% generation %}`, by which templates mark what is trained on: here its content just stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's Extension declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, messages: list[Message], bos: str = "", eos: str = "", begun: bool = False) -> str:
    """The prompt at whose end the assistant answers; `bos` and `eos` are spellings of those tokens.

    `begun`: the last message is the beginning of the answer, and the prompt ends with it.

    Raises `UserError` if the template does not compile, or refuses the messages.
    """
    if begun:
        messages = [*messages[:-1], messages[-1] | {"content": messages[-1]["content"] + CUT}]
    text = _run(template, messages, bos, eos, not begun)
    if not begun:
        return text
    end = text.rfind(CUT.rstrip())
    if end < 0:
        raise UserError("the model's chat template leaves out the beginning of the answer")
    return text[:end] if text.startswith(CUT, end) else text[:end].rstrip()


def _run(template: str, messages: list[Message], bos: str, eos: str, add_generation_prompt: bool) -> str:

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    extensions = ["jinja2.ext.loopcontrols", Generation]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    try:
        return sandbox.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos
        )
    except Exception as error:  # a program of somebody else's can fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(f"the model's chat template refuses this conversation: {reason}") from None


def chat_prompt(tokenizer: Tokenizer, user: str, system: str = "") -> list[int]:
    """Token ids of a conversation's beginning: a question, perhaps after a system message."""
    if tokenizer.chat_template is None:
        raise UserError("this model has no chat template; leave --chat away to continue the prompt as text")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": user})
    bos = "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
    eos = tokenizer.token(tokenizer.eos_id)
    return tokenizer.encode(render(tokenizer.chat_template, messages, bos, eos))
