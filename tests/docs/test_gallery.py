"""The gallery: small pages as today's code makes them, and what the page about them says of each."""

import html
import pathlib
import re

import pytest

from sol_jax.generation.page_style import style

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = sorted((DOCS / "gallery").glob("*.html"))
TEXT = (DOCS / "gallery.md").read_text()


def test_there_are_three_and_all_are_linked():
    assert len(PAGES) == 3
    assert {page.name for page in PAGES} == set(re.findall(r'href="(.*?)"', TEXT))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_small_and_as_the_code_makes_it_today(page):
    document = page.read_text("utf-8")
    assert page.stat().st_size < 100_000
    assert f"<style>{style(3, 2)}</style>" in document, "make it anew: docs/gallery.md has its command"
    assert "<script" not in document
    assert not re.search(r"(?:src|href)=", document)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_command_asks_for_what_the_page_says(page):
    (command,) = (line for line in TEXT.splitlines() if line.endswith(f"--html {page.name}"))
    document = page.read_text("utf-8")
    asked = [float(cost) for cost in re.search(r"--budget ([\d.,]+)", command)[1].split(",")]
    requested = re.search(r"<th>requested</th><td>(.*?)</td>", document)[1]
    assert [float(cost) for cost in re.findall(r"\d\.\d+", requested)] == asked
    prompt = re.search(r"--prompt '(.*?)'", command)[1]
    assert f"<b>{html.escape(prompt)}" in document


def test_the_numbers_of_the_table_are_those_of_the_pages():
    """The difference of two likelihoods, and the shares of bytes."""

    def told(stem, name):
        document = (DOCS / "gallery" / f"{stem}.html").read_text("utf-8")
        return re.search(rf"<th>{name}</th><td>(.*?)</td>", document)[1]

    logp = {
        stem: float(re.search(r"(-?[\d.]+) a token", told(stem, "log-probability"))[1])
        for stem in ("half", "most")
    }
    assert f"less likely by {logp['most'] - logp['half']:.2f} nats a token" in TEXT
    share = {
        stem: float(re.search(r"([\d.]+) of dense", told(stem, "bytes read"))[1])
        for stem in ("most", "answer")
    }
    assert f"reads {100 * (share['most'] - 1):.1f} % *more* bytes" in TEXT
    assert f"{100 * (1 - share['answer']):.0f} % fewer bytes are read" in TEXT
