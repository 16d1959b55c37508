"""Chat templates: a conversation as the text that the model was tuned to continue.

A template is a Jinja program inside the model's files.  It runs in Jinja's sandbox, in a process of its own
with limits of time and memory, and gets what `transformers` gives it.  Source: transformers, "Writing a chat
template".
"""

import atexit
import html
import json
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sol_jax.errors import UserError
from sol_jax.models.tokenizer import Tokenizer

Message = dict[str, str]  # "role": system, user or assistant; "content": its text

# Where an answer that was begun is to be cut off; a template that trims its messages takes the space away.
CUT = "END OF WHAT WAS BEGUN "
SECONDS = 10.0  # that a template may take


class _Sandbox:
    """The process that renders, started when it is first needed, and anew when it had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def run(self, template: str, values: Mapping[str, Any]) -> dict[str, str]:
        """What `template_process.answer` gives."""
        with self._lock:
            process = self._process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            late = threading.Timer(SECONDS, process.kill)
            late.start()
            try:
                process.stdin.write(json.dumps({"template": template, "values": values}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            finally:
                in_time = late.is_alive()
                late.cancel()
            if line.endswith("\n"):
                return json.loads(line)
            self.end()
            return {"error": "it crashes" if in_time else f"it takes more than {SECONDS:g} seconds"}

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        program = Path(__file__).with_name("template_process.py")
        process = subprocess.Popen(
            [sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
        )  # fmt: skip
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            process.kill()
            raise UserError(
                f"chat templates cannot be rendered: {sys.executable} does not run {program.name}"
            )
        return process

    def end(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_sandbox = _Sandbox()
atexit.register(_sandbox.end)


def render(
    template: str,
    messages: Sequence[Message],
    special: Mapping[str, Any] | None = None,
    begun: bool = False,
) -> str:
    """The prompt at whose end the assistant answers.

    Args:
      special: spellings of special tokens by name, as `Tokenizer.special`.
      begun: the last message is the beginning of the answer, and the prompt ends with it.

    Raises `UserError` if the template does not compile, refuses the messages, or takes too much time or room.
    """
    messages = list(messages)
    if begun:
        messages[-1] = messages[-1] | {"content": messages[-1]["content"] + CUT}
    values = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": not begun,
        **(special or {}),
    }
    answer = _sandbox.run(template, values)
    if "error" in answer:
        raise UserError(f"the model's chat template refuses this conversation: {answer['error']}")
    text = answer["text"]
    if not begun:
        return text
    end = text.rfind(CUT.rstrip())
    if end < 0:
        raise UserError("the model's chat template leaves out the beginning of the answer")
    before = text[:end] if text.startswith(CUT, end) else text[:end].rstrip()
    return re.sub(rf"\s*{CUT.rstrip()}", "", before.replace(CUT, ""))  # of a template that says it twice


def conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], flag: str = "--chat", begun: bool = False
) -> str:
    """A conversation by the tokenizer's template, see `render`; `flag` is what asked for it.

    Raises `UserError` also if there is no template, or if it leaves out what a user or the system says.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"this model has no chat template; leave {flag} away to continue the prompt as text")
    text = render(tokenizer.chat_template, messages, tokenizer.special, begun)
    said = [n for n, message in enumerate(messages) if message["role"] in ("user", "system")]
    left_out = [n for n in said if not _holds(text, messages[n]["content"])]
    left_out = left_out or _left_out_by_name(tokenizer, messages, said, begun)
    if left_out:
        role = messages[left_out[0]]["role"]
        raise UserError(
            f"the model's chat template leaves out the {role}'s message, so the model "
            f"would answer something else; leave {flag} away to continue the prompt as text"
        )
    return text


def _left_out_by_name(
    tokenizer: Tokenizer, messages: Sequence[Message], said: Sequence[int], begun: bool
) -> list[int]:
    """Which messages a template leaves out, of those whose words may stand there for another reason.

    "a" is in most texts, and of two equal messages one may be missing: so each says something of its own.
    """
    words = {n: f"message{n}said" for n in said if messages[n]["content"].strip()}
    own = [{**message, "content": words.get(n, message["content"])} for n, message in enumerate(messages)]
    try:
        text = render(str(tokenizer.chat_template), own, tokenizer.special, begun)
    except UserError:  # it minds what is said
        return []
    return [n for n, word in words.items() if word not in text]


def _holds(text: str, said: str) -> bool:
    """Whether a text has what was said: as it is, or escaped, whatever became of the spaces."""

    def squeezed(words: str) -> str:
        return re.sub(r"\s+", "", words)

    spelled = (said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1])
    texts = (text, html.unescape(text))
    return any(squeezed(words) in squeezed(written) for words in spelled for written in texts)


def chat_prompt(tokenizer: Tokenizer, user: str, system: str = "") -> list[int]:
    """Token ids of a conversation's beginning: a question, perhaps after a system message."""
    messages = [{"role": "system", "content": system}] if system else []
    return tokenizer.encode(conversation(tokenizer, [*messages, {"role": "user", "content": user}]))
