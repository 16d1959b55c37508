"""Every message on the page of questions is one that the program can give."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faq.md").read_text()
MESSAGES = sorted(
    {quoted for line in re.findall(r"^\*\*(.+)\*\*$", PAGE, re.M) for quoted in re.findall("`([^`]+)`", line)}
)


def templates() -> list[str]:
    """All texts in the code, with a null character for what is filled in."""
    found = [(ROOT / "Makefile").read_text()]
    for package in ("sol_jax", "experiments", "pallas_kernels"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


TEMPLATES = templates()


def test_there_are_messages():
    assert len(MESSAGES) > 15


@pytest.mark.parametrize("message", MESSAGES)
def test_the_program_says_so(message):
    """Word for word but for what stands for `...`."""
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    assert any(re.search(pattern, text, re.S) for text in TEMPLATES), f"nothing in the code says {message!r}"
