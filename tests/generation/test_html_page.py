"""The HTML page: what it says, that hostile texts stay texts, and how a real browser sees it."""

import html
import html.parser
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import xml.etree.ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sol_jax.errors import UserError
from sol_jax.generation import html_page as page
from sol_jax.generation.page_style import DARK_SHADES, style

AXES = {"kappa": "the earlier text", "rho": "the MLP's input channels", "eta": "the MLP's output bits"}
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
        self.texts, self.tokens, self.tags, self.cells, self._open = [], [], [], [], []
        self._in_cell = False
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
        elif tag == "td" and given.get("class") == "t":
            self.cells.append("")
            self._in_cell = True
        elif tag == "td":
            self._in_cell = False

    def handle_endtag(self, tag):
        if tag == "div":
            self._open = []

    def handle_data(self, data):
        if self._open:
            self.texts[-1] += data
        if self._in_cell:
            self.cells[-1] += data


def sides(pieces):
    return [
        page.Side("policy", pieces, costs(len(pieces)), [("tokens per second", "12.5")]),
        page.Side("dense", pieces, np.ones((len(pieces), len(AXES)))),
    ]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.text(max_size=20))
def test_any_text_is_shown_as_itself(pieces, prompt):
    """Every character, but those that are shown by a picture or by name.

    The prompt stands before each text.
    """
    read = Reader(page.render("t", prompt, AXES, sides(pieces)))
    shown = page.visible(prompt + "".join(pieces))
    assert read.texts == [shown, shown]
    assert read.cells == [page.visible(piece).strip() for piece in pieces] * 2
    assert {tag for tag, _ in read.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "i", "div", "span", "section",
        "table", "thead", "tbody", "tr", "th", "td", "svg", "path", "main", "form", "fieldset",
        "legend", "label", "input", "details", "summary", "footer", "dl", "dt", "dd",
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
        {"class": "k9 a9 b9 c9", "title": "all 1.00: kappa 1.00, rho 1.00, eta 1.00"},
        {"class": "k3 a0 b3 c4 e", "title": "all 0.33: kappa 0.10, rho 0.40, eta 0.50"},
        {"class": "k0 a1 b0 c0 n", "title": "all 0.10: kappa 0.20, rho 0.10, eta 0.00"},
        {"class": "k9 a9 b9 c9 x", "title": "all 1.00: kappa 1.00, rho 1.00, eta 1.00"},
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


@pytest.mark.parametrize(("shades", "ink"), [(page.SHADES, "#000000"), (DARK_SHADES, "#f2f2f2")])
def test_text_can_be_read_on_every_shade_and_shades_told_apart(shades, ink):
    """AA asks for a contrast of 4.5 of texts, and for 3 of what a picture tells."""
    contrast = lambda a, b: (max(a, b) + 0.05) / (min(a, b) + 0.05)
    light, text = [luminance(colour) for colour in shades], luminance(ink)
    assert f"--ink: {ink.replace('000000', '000')};" in style(3, 2)
    assert min(contrast(text, a) for a in light) >= 4.8
    steps = [contrast(a, b) for a, b in itertools.pairwise(light)]
    assert min(steps) > 1.05
    assert light in (sorted(light), sorted(light, reverse=True))  # one way all along
    assert contrast(light[0], light[-1]) > 3


def test_the_strip_chart_draws_the_schedule():
    """Costs 0.2, 0.2, 1: two tokens at a fifth of the height, then one over all of it."""
    cost_NxX = np.array([[0.2, 1.0, 1.0]] * 2 + [[1.0, 1.0, 1.0]])
    document = page.render("t", "p", AXES, [page.Side("policy", ["a", "b", "c"], cost_NxX)])
    charts = [xml.etree.ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", document)]
    assert [chart.get("aria-label").split(" over ")[0] for chart in charts] == [*AXES, "all"]
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


def drive(path: pathlib.Path, script: str, width: int = 1200, *options: str) -> dict:
    """What `script`, a function body of `page` and `window`, returns of the page in a frame of that width.

    The page itself forbids scripts, so it is a page around it that looks and clicks.
    """
    outer = path.with_name("outer.html")
    outer.write_text(
        f"""<!DOCTYPE html><iframe src="{path.name}" style="border:0;width:{width}px;height:800px"></iframe>
<pre id="found"></pre><script>
document.querySelector("iframe").onload = (event) => {{
  const window = event.target.contentWindow, page = event.target.contentDocument;
  const run = (page, window) => {{ {script} }};
  let told;
  try {{ told = run(page, window); }} catch (fault) {{ told = {{fault: String(fault)}}; }}
  document.getElementById("found").textContent = JSON.stringify(told);
}};</script>"""
    )
    shown = browse(
        outer, "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=4000", *options
    )
    (found,) = re.findall('<pre id="found">(.*?)</pre>', shown, re.S)
    return json.loads(html.unescape(found))


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
    assert read.texts == ["".join(HOSTILE) * 2] * 2
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
    assert path.stat().st_size < 10e6
    read = Reader(browse(path, "--dump-dom"))
    assert read.texts[0] == "p" + "".join(pieces)
    assert len(read.tokens) == 50_000
    assert len(read.cells) == 2000  # of 25 tokens each
    assert read.cells[0] == "".join(pieces[:25]).strip()
    browse(path, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1200,900")
    assert (tmp_path / "shot.png").stat().st_size > 20_000


def rgb(colour):
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "shades"), [(1, page.SHADES), (0, DARK_SHADES)], ids=["light", "dark"])
def test_a_browser_switches_the_axis_and_the_text(tmp_path, scheme, shades):
    """The shades in force after each click, and which texts are to be seen.

    As the machine is set, light or dark.
    """
    path = tmp_path / "out.html"
    given = sides(["One", " two", " three", "\n"])
    page.write(path, page.render("t", "A prompt", AXES, given))
    script = """
      const told = {};
      const shades = () => [...page.querySelectorAll(".side-0 .text span")].map(
        (token) => window.getComputedStyle(token).backgroundColor);
      const seen = () => [...page.querySelectorAll("section")].map((one) => one.getClientRects().length > 0);
      const after = (key, look) => { page.getElementById(key).click(); told[key] = look(); };
      ["by-all", "by-0", "by-1", "by-2"].forEach((key) => after(key, shades));
      ["show-all", "show-0", "show-1"].forEach((key) => after(key, seen));
      return told;"""
    found = drive(path, script, 1200, f"--blink-settings=preferredColorScheme={scheme}")
    cost_NxX = given[0].cost_NxX
    wanted = {"by-all": cost_NxX.mean(1)} | {f"by-{x}": cost_NxX[:, x] for x in range(3)}
    for key, cost_N in wanted.items():
        assert found.pop(key) == [rgb(shades[page.shade(cost)]) for cost in cost_N], key
    assert found == {"show-all": [True, True], "show-0": [True, False], "show-1": [False, True]}


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_a_browser_finds_room_for_the_page_and_the_keyboard_a_way(tmp_path, width):
    """Nothing is wider than a phone; buttons are in sight, large enough for a thumb, named, and in the
    tabs' way.
    """
    path = tmp_path / "out.html"
    pieces = [" word"] * 400 + ["W" * 300]
    page.write(path, page.render("A title " + "x" * 60, "p" * 300, AXES, sides(pieces)))
    script = """
      const root = page.scrollingElement, told = {};
      told.fits = root.scrollWidth <= root.clientWidth;
      const labels = [...page.querySelectorAll("label")];
      told.insight = labels.every((label) => label.getBoundingClientRect().bottom <= window.innerHeight);
      told.height = Math.min(...labels.map((label) => label.getBoundingClientRect().height));
      told.named = labels.every((label) => label.control && label.textContent.trim());
      const stops = [...page.querySelectorAll("input, summary, [tabindex='0']")];
      told.reached = stops.filter((stop) => stop.checkVisibility()).every((stop) => {
        stop.focus(); return page.activeElement === stop; });
      told.regions = [...page.querySelectorAll("[aria-labelledby]")].every(
        (one) => page.getElementById(one.getAttribute("aria-labelledby")).textContent);
      const [one, other] = page.querySelectorAll("section");
      told.columns = one.offsetTop === other.offsetTop;
      return told;"""
    found = drive(path, script, width)
    assert found.pop("height") >= 24  # WCAG 2.2's least size of a target
    assert found.pop("columns") == (width > 1000)
    assert found == dict.fromkeys(("fits", "insight", "named", "reached", "regions"), True)


@needs_browser
@pytest.mark.slow
def test_a_browser_unfolds_the_numbers_of_each_token(tmp_path):
    """The table has one row a token, in sight once it is opened, and scrolls in itself."""
    path = tmp_path / "out.html"
    page.write(path, page.render("t", "p", AXES, sides([" word"] * 300)))
    script = """
      const folded = page.querySelectorAll(".side-0 details")[1];
      folded.querySelector("summary").click();
      const box = folded.querySelector(".scroll");
      return {open: folded.open, rows: folded.querySelectorAll("tbody tr").length,
              scrolls: box.scrollHeight > box.clientHeight,
              first: folded.querySelector("tbody tr").textContent};"""
    first = costs(300)[0]
    told = "word" + "".join(f"{cost:.2f}" for cost in (*first, first.mean()))
    assert drive(path, script, 390) == {"open": True, "rows": 300, "scrolls": True, "first": told}
