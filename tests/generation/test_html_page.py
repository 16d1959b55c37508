"""The HTML page: what it says, that hostile texts stay texts, and how a real browser sees it."""

import html.parser
import itertools
import pathlib
import re
import shutil
import subprocess
import xml.etree.ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sol_jax.errors import UserError
from sol_jax.generation import html_page as page

AXES = ("kappa", "rho", "eta")
HOSTILE = (
    "<script>document.title='run'</script>",
    '<img src="http://127.0.0.1:9/x.png" onerror="document.title=1">',
    "</div></body></html><!-- ",
    "&lt;b&gt; &amp;amp; &#x3c;",
    "\"'` onmouseover='1'",
    "שלום עולם ",
    "مرحبا بالعالم",
    "👩‍👩‍👧 🏳️‍🌈 é €",
    "\n\n  two  spaces\tand a tab",
    "]]> <![CDATA[ <?php ?> {{ 7*7 }} ${7*7}",
)  # fmt: skip
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")


def costs(count, seed=0):
    return np.random.default_rng(seed).choice([0.1, 0.4, 0.7, 1.0], (count, len(AXES)))


class Reader(html.parser.HTMLParser):
    """What a page shows: the characters of each text, the tokens' classes and titles, and all its tags."""

    def __init__(self, document):
        super().__init__()
        self.texts, self.tokens, self.tags, self._open = [], [], [], []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if given.get("class") == "text":
            self.texts.append("")
            self._open = ["div"]
        elif self._open and tag == "span":
            self.tokens.append(given)

    def handle_endtag(self, tag):
        if tag == "div":
            self._open = []

    def handle_data(self, data):
        if self._open:
            self.texts[-1] += data


def sides(pieces):
    return [
        page.Side("policy", pieces, costs(len(pieces)), [("tokens per second", "12.5")]),
        page.Side("dense", pieces, np.ones((len(pieces), len(AXES)))),
    ]


@settings(deadline=None)  # a busy machine is no fault of the page
@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.text(max_size=20))
def test_any_text_is_shown_as_itself(pieces, prompt):
    """Every character, but those that are shown by a picture or by name."""
    read = Reader(page.render("t", prompt, AXES, sides(pieces)))
    shown = page.visible("".join(pieces))
    assert read.texts == [page.visible(prompt), shown, shown]
    assert {tag for tag, _ in read.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "div", "span", "section",
        "table", "tr", "th", "td", "svg", "path", "line",
    }  # fmt: skip


def test_what_controls_a_screen_is_made_visible():
    assert page.visible("a\x1b[31m\x00\r\x7f\x9b\u202e\u2066\ud800b\n\tc") == (
        "a␛[31m␀␍␡<U+009B><U+202E><U+2066>�b\n\tc"
    )


def test_tokens_say_what_was_spent_on_them():
    """The second only begins a character, the fourth is the end token: each says so, differently."""
    cost_NxX = np.array([[1.0, 1.0, 1.0], [0.1, 0.4, 0.5], [0.2, 0.1, 0.0], [1.0, 1.0, 1.0]])
    side = page.Side("policy", ["One", "", "\n", ""], cost_NxX, [("text's <cost>", "3 & 4")], written=3)
    document = page.render("Title", "A prompt", AXES, [side])
    assert Reader(document).tokens == [
        {"class": "k9", "title": "net 1.00: kappa 1.00, rho 1.00, eta 1.00"},
        {"class": "k3 e", "title": "net 0.33: kappa 0.10, rho 0.40, eta 0.50"},
        {"class": "k0 n", "title": "net 0.10: kappa 0.20, rho 0.10, eta 0.00"},
        {"class": "k9 x", "title": "net 1.00: kappa 1.00, rho 1.00, eta 1.00"},
    ]
    for mark, code, meaning in (("e", "00b7", "a token that only begins"), ("x", "25a0", "one that ends")):
        assert f'.text .{mark}::before {{ content: "\\{code}"; }}' in document
        assert re.search(f"&#x0*{code.lstrip('0')}; {meaning}", document)
    assert "<th>text&#x27;s &lt;cost&gt;</th><td>3 &amp; 4</td>" in document


def test_shades_follow_the_net_keep_rate():
    rates = [0.0, 0.1, 0.1001, 0.2, 0.3 + 1e-9, 0.55, 0.9, 0.91, 1.0]
    assert [page.shade(rate) for rate in rates] == [0, 0, 1, 1, 2, 5, 8, 9, 9]


def luminance(colour):
    """WCAG 2.1's relative luminance."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_text_can_be_read_on_every_shade_and_shades_told_apart():
    light = [luminance(colour) for colour in page.SHADES]
    assert all((a + 0.05) / 0.05 >= 6 for a in light)  # black text; AA asks for 4.5
    ratios = [(a + 0.05) / (b + 0.05) for a, b in itertools.pairwise(light)]
    assert min(ratios) > 1.05  # darker each time
    assert (light[0] + 0.05) / (light[-1] + 0.05) > 3  # the ends, as WCAG asks of graphics


def test_the_strip_chart_draws_the_schedule():
    """Costs 0.2, 0.2, 1: two tokens at a fifth of the height, then one over all of it."""
    cost_NxX = np.array([[0.2, 1.0, 1.0]] * 2 + [[1.0, 1.0, 1.0]])
    document = page.render("t", "p", AXES, [page.Side("policy", ["a", "b", "c"], cost_NxX)])
    charts = [xml.etree.ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", document)]
    assert [chart.get("aria-label").split(" over ")[0] for chart in charts] == [*AXES, "net"]
    assert charts[0].find("path").get("d") == "M0 1V0.8H2V0H3V1Z"
    assert charts[0].get("viewBox") == "0 0 3 1"
    assert charts[0].get("aria-label") == "kappa over 3 tokens: mean 0.47, 0.20 to 1.00"
    assert charts[3].find("path").get("d") == "M0 1V0.2667H2V0H3V1Z"


def test_the_page_needs_nothing_but_itself():
    document = page.render("t", "p", AXES, sides(list(HOSTILE)))
    tags = Reader(document).tags
    assert not [name for _, given in tags for name in given if name in ("src", "href", "style", "srcset")]
    assert "@import" not in document
    assert "url(" not in document
    assert ("meta", {"http-equiv": "Content-Security-Policy",
                     "content": "default-src 'none'; style-src 'unsafe-inline'"}) in tags  # fmt: skip


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "none" / "out.html", tmp_path / "file" / "out.html"):
        for use in (page.check_writable, lambda path: page.write(path, "x")):
            with pytest.raises(UserError, match="the page cannot be written there"):
                use(path)
    page.check_writable(tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()
    page.write(tmp_path / "out.html", "<p>é")
    page.check_writable(tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text("utf-8") == "<p>é"


# --- in a browser ------------------------------------------------------------------------------------


def browse(path: pathlib.Path, *options: str) -> str:
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--disable-extensions", "--no-first-run", f"--user-data-dir={path.parent / 'profile'}"]
    done = subprocess.run(
        [*command, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@needs_browser
@pytest.mark.slow
def test_a_browser_shows_hostile_texts_as_texts(tmp_path):
    """The document as Chromium has built it: the same texts, no element of theirs, the title untouched."""
    path = tmp_path / "out.html"
    page.write(path, page.render("the title", "".join(HOSTILE), AXES, sides(list(HOSTILE))))
    shown = browse(path, "--dump-dom")
    read = Reader(shown)
    assert read.texts == ["".join(HOSTILE)] * 3
    assert len(read.tokens) == 2 * len(HOSTILE)
    assert not {"script", "img"} & {tag for tag, _ in read.tags}
    assert "<title>the title</title>" in shown


@needs_browser
@pytest.mark.slow
def test_a_browser_takes_fifty_thousand_tokens(tmp_path):
    words = ["the ", "cat\n", "", "👩‍👩‍👧", "<b>", "שלום "]
    pieces = [words[i % len(words)] for i in range(50_000)]
    path = tmp_path / "out.html"
    page.write(path, page.render("long", "p", AXES, [page.Side("policy", pieces, costs(50_000))]))
    assert path.stat().st_size < 8e6
    read = Reader(browse(path, "--dump-dom"))
    assert read.texts[1] == "".join(pieces)
    assert len(read.tokens) == 50_000
    browse(path, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1200,900")
    assert (tmp_path / "shot.png").stat().st_size > 20_000
