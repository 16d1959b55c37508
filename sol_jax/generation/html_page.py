"""A self-contained HTML page of texts, each token shaded by what was spent on it.  No scripts, no resources.

The texts come from a model and may hold anything.  Everything is escaped, control characters are shown as
pictures, direction overrides by name, and a policy in the page forbids it to run or to load anything.
"""

import dataclasses
import html
import itertools
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from sol_jax.errors import UserError
from sol_jax.files import as_os_errors, is_remote

# Background of a token by the tenth that its net keep rate reaches.  One hue, ever darker: it can be read in
# grey, and by whom red and green are alike.  Black text on the darkest has a contrast of 6.
SHADES = ("#ffffff", "#f0f6fc", "#e1edf8", "#d0e3f3", "#bfd9ee",
          "#aecee9", "#9cc3e3", "#85b4da", "#68a3d0", "#4292c6")  # fmt: skip

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #000; background: #fff; }
body { max-width: 90rem; margin: 0 auto; padding: 1rem 1.5rem; }
h1 { font-size: 1.4rem; margin: .3rem 0; } h2 { font-size: 1.1rem; margin: .3rem 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1.5rem; }
.sides > section { min-width: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; line-height: 1.75;
        border: 1px solid #767676; border-radius: .3rem; padding: .6rem .8rem; }
.text span:hover { outline: 2px solid #000; }
.text .n::before { content: "\\21b5"; } .text .e::before { content: "\\00b7"; }
.text .x::before { content: "\\25a0"; }
table { border-collapse: collapse; } td, th { padding: .1rem .8rem .1rem 0; text-align: left; }
.strips { display: grid; grid-template-columns: max-content 1fr max-content; align-items: center;
          gap: .25rem .6rem; margin: .6rem 0; font-size: .85rem; }
.strips svg { width: 100%; height: 2.2rem; background: #f2f2f2; border-bottom: 1px solid #595959; }
.strips path { fill: #2171b5; } .strips line { stroke: #fff; vector-effect: non-scaling-stroke; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem; align-items: center; margin: .5rem 0; }
.legend span { padding: 0 .5rem; border: 1px solid #767676; } .small { color: #595959; font-size: .85rem; }
"""


@dataclasses.dataclass(frozen=True)
class Side:
    """One text of the page: token by token its characters and its costs."""

    title: str
    pieces: Sequence[str]
    cost_NxX: np.ndarray
    facts: Sequence[tuple[str, str]] = ()  # name and value, in a table above the text
    written: int | None = None  # tokens that are of the text, if not all are: the others end it


def visible(text: str) -> str:
    """`text` with everything in it to be seen: nothing that controls a terminal, a page or its direction."""

    def show(found: re.Match) -> str:
        code = ord(found[0])
        if code < 0x20:
            return chr(0x2400 + code)
        if 0xD800 <= code < 0xE000:
            return "\ufffd"
        return "\u2421" if code == 0x7F else f"<U+{code:04X}>"

    return _UNSEEN.sub(show, text)


def shade(net: float) -> int:
    """The index in `SHADES` of a net keep rate: 0 up to a tenth, 9 above nine tenths."""
    return int(np.clip(np.ceil(np.round(net * 10, 6)) - 1, 0, 9))


def render(title: str, prompt: str, axis_names: Sequence[str], sides: Sequence[Side]) -> str:
    """The whole page."""
    shades = "".join(f".k{i} {{ background: {colour}; }}\n" for i, colour in enumerate(SHADES))
    swatches = "".join(f'<span class="k{i}">{(i + 1) / 10:.1f}</span>' for i in range(10))
    sections = "\n".join(_section(side, axis_names) for side in sides)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{_STYLE}{shades}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<div class="legend" role="img" aria-label="White is a net keep rate up to 0.1, the darkest blue above 0.9">
<b>net keep rate up to</b> {swatches}</div>
<p class="small">The share of the full compute that the step which wrote a token was given, the mean over
{_text(", ".join(axis_names))}; hover over a token for each. The prompt and the first token are dense.
The charts run from 0 to 1, token by token. &#x21b5; is a line's end, &#xb7; a token that only begins a
character, &#x25a0; one that ends the text and is not of it: an end token, or cut off by a stop string.</p>
<h2>Prompt</h2>
<div class="text" dir="auto">{_text(prompt)}</div>
<div class="sides">
{sections}
</div>
</body>
</html>
"""


def fragment(pieces: Sequence[str], cost_NxX: np.ndarray, axis_names: Sequence[str], written: int) -> str:
    """A shaded text alone, for a notebook: no scripts, and styles that touch nothing beside it."""
    tokens = []
    for n, (piece, cost_X) in enumerate(zip(pieces, cost_NxX, strict=True)):
        told = _told(cost_X, axis_names)
        colour = SHADES[shade(float(np.mean(cost_X)))]
        shown = _text(piece) if n < written else ""
        tokens.append(f'<span style="background:{colour};color:#000" title="{told}">{shown}</span>')
    swatches = "".join(
        f'<span style="background:{colour};color:#000;padding:0 .4em">{(i + 1) / 10:.1f}</span>'
        for i, colour in enumerate(SHADES)
    )
    box = "white-space:pre-wrap;overflow-wrap:anywhere;background:#fff;padding:.6em;border:1px solid #767676"
    return (
        f'<div style="font-size:85%">net keep rate up to {swatches}</div>'
        f'<div dir="auto" style="{box}">{"".join(tokens)}</div>'
    )


def write(path: pathlib.Path, page: str) -> None:
    """Writes the page.  Raises `UserError` if it cannot."""
    try:
        with as_os_errors():
            path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the page cannot be written there: {error.strerror or error}") from None


def check_writable(path: pathlib.Path) -> None:
    """Raises `UserError` for a path that `write` would fail on, before any work is done for it."""
    try:
        with as_os_errors():
            existed = path.exists()
            if not existed or not is_remote(path):  # an object can be made, and taken away, but not added to
                with path.open("w" if is_remote(path) else "a"):
                    pass
            if not existed:
                path.unlink()
    except OSError as error:
        raise UserError(f"{path}: the page cannot be written there: {error.strerror or error}") from None


def _text(text: str) -> str:
    return html.escape(visible(text))


def _section(side: Side, axis_names: Sequence[str]) -> str:
    facts = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in side.facts)
    strips = [*zip(axis_names, np.asarray(side.cost_NxX).T, strict=True)]
    strips.append(("net", np.mean(side.cost_NxX, -1)))
    written = len(side.pieces) if side.written is None else side.written
    tokens = "".join(
        _token(piece, cost_X, axis_names, n >= written)
        for n, (piece, cost_X) in enumerate(zip(side.pieces, side.cost_NxX, strict=True))
    )
    return f"""<section>
<h2>{_text(side.title)}</h2>
<table>{facts}</table>
<div class="strips">{"".join(_strip(name, cost_N) for name, cost_N in strips)}</div>
<div class="text" dir="auto">{tokens}</div>
</section>"""


def _token(piece: str, cost_X: np.ndarray, axis_names: Sequence[str], ends: bool) -> str:
    # Nothing is seen of a token that is but a line's end, less than a character, or not of the text.
    mark = " x" if ends else " e" if not piece else " n" if "\n" in piece and piece.isspace() else ""
    shaded = f"k{shade(float(np.mean(cost_X)))}{mark}"
    return f'<span class="{shaded}" title="{_told(cost_X, axis_names)}">{_text(piece)}</span>'


def _told(cost_X: np.ndarray, axis_names: Sequence[str]) -> str:
    """What a token was given, for whoever points at it."""
    values = ", ".join(f"{name} {cost:.2f}" for name, cost in zip(axis_names, cost_X, strict=True))
    return f"net {float(np.mean(cost_X)):.2f}: {_text(values)}"


def _strip(name: str, cost_N: np.ndarray) -> str:
    """One row of the strip chart: the cost over the tokens as steps, and its mean."""
    # One point a run of equal costs: schedules repeat, and texts may be long.
    steps, start = [], 0
    for cost, run in itertools.groupby(np.round(cost_N, 4).tolist()):
        start += len(list(run))
        steps.append(f"V{1 - cost:.4g}H{start}")
    mean = float(np.mean(cost_N))
    said = f"{name} over {len(cost_N)} tokens: mean {mean:.2f}, {np.min(cost_N):.2f} to {np.max(cost_N):.2f}"
    return (
        f'<span>{_text(name)}</span><svg viewBox="0 0 {start} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{_text(said)}"><title>{_text(said)}</title><path d="M0 1{"".join(steps)}V1Z"/>'
        f'<line x1="0" x2="{start}" y1=".5" y2=".5"/></svg><span>{mean:.2f}</span>'
    )
