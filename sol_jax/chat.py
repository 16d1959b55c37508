"""Chat templates: a conversation as the text that the model was tuned to continue.

A template is a Jinja program inside the model's files, so it runs in Jinja's sandbox, with the settings and
functions that `transformers` gives it.  Source: transformers, "Writing a chat template".
"""

import datetime
import json
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sol_jax.errors import UserError
from sol_jax.tokenizer import Tokenizer

Message = dict[str, str]  # "role": system, user or assistant; "content": its text


def render(template: str, messages: list[Message], bos: str = "", eos: str = "") -> str:
    """The prompt at whose end the assistant answers; `bos` and `eos` are spellings of those tokens.

    Raises `UserError` if the template does not compile, or refuses the messages.
    """

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    try:
        return sandbox.from_string(template).render(
            messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
    except (TemplateError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1]
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
