"""A self-contained HTML page of texts, each token shaded by what was spent on it.  No scripts, no resources.

The texts come from a model and may hold anything.  Everything is escaped, control characters are shown as
pictures, direction overrides by name, and a policy in the page forbids it to run or to load anything.  What
can be switched, the axis that shades and the text that is shown, are radio buttons that the style sheet asks.
"""

import dataclasses
import html
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sol_jax.errors import UserError
from sol_jax.files import as_os_errors, is_remote
from sol_jax.generation.page_style import AXIS_CLASSES, SHADES, style

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_TABLE_ROWS = 2000  # at most: browsers take seconds for more
_SHORT_PROMPT = 600  # characters that stand before each text; a longer prompt is folded away above them


@dataclasses.dataclass(frozen=True)
class Side:
    """One text of the page: token by token its characters and its costs."""

    title: str  # one word, for the button that shows it alone
    pieces: Sequence[str]
    cost_NxX: np.ndarray
    facts: Sequence[tuple[str, str]] = ()  # name and value, in a table below the text
    written: int | None = None  # tokens that are of the text, if not all are: the others end it
    heading: str = ""  # empty: the title
    told: Sequence[str] = ()  # paragraphs below the text: what was saved, in words


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
    """The index in `SHADES` of a cost: 0 up to a tenth, 9 above nine tenths."""
    return int(np.clip(np.ceil(np.round(net * 10, 6)) - 1, 0, 9))


def render(title: str, prompt: str, axes: Mapping[str, str], sides: Sequence[Side], lead: str = "") -> str:
    """The whole page.

    Args:
      prompt: stands before each text, in bold.
      axes: the name of each axis, and what its cost is a share of, in plain words.
      sides: the texts; the first is what the page is about.
      lead: a sentence under the title.
    """
    long = len(prompt) > _SHORT_PROMPT
    folded = f"<details><summary>The prompt, {len(prompt)} characters</summary>{_box(prompt)}</details>"
    sections = "\n".join(
        _section(n, side, list(axes), "" if long else prompt) for n, side in enumerate(sides)
    )
    names = "".join(
        f"<dt>{_text(name)}</dt><dd>The share of {_text(kept)} that the step used.</dd>"
        for name, kept in axes.items()
        if kept
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<style>{style(len(axes), len(sides))}</style>
</head>
<body>
<h1>{_text(title)}</h1>
{f"<p>{_text(lead)}</p>" if lead else ""}
{folded if long else ""}
<main class="sides">
{sections}
</main>
{_choices(axes, sides)}
<footer>
<h2>How to read this page</h2>
<p>The prompt is in bold. The stronger the blue of a token, the more compute went into the step that
wrote it. The buttons choose which kind of compute the blue stands for; &#x201c;all&#x201d; is their mean,
the net keep rate. Point at a token, or tap it, for its numbers; they are also in the table under the text.
The prompt and the first token are always dense: nothing is left out.</p>
<dl>{names}</dl>
<p class="small">Charts run from 0 to 1, token by token, with the mean at the right; it counts the dense
steps at the start of a text too, at which nothing may be left out. &#x21b5; is a line's end,
&#xb7; a token that only begins a character, &#x25a0; one that ends the text and is not of it: an end token,
or cut off by a stop string. This page is one file: it has no scripts and loads nothing.</p>
</footer>
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


def _box(inner: str) -> str:
    return f'<div class="text" dir="auto" lang="">{_text(inner)}</div>'


def _choices(axes: Iterable[str], sides: Sequence[Side]) -> str:
    """Which compute the blue stands for, and which text is shown; the first of each is in force."""
    by = [("by-all", "all"), *((f"by-{x}", name) for x, name in enumerate(axes))]
    shown = [("show-all", "all"), *((f"show-{n}", side.title) for n, side in enumerate(sides))]
    if len(sides) == 2:
        shown[0] = ("show-all", "both")
    scale = "".join(f'<i class="k{i}"></i>' for i in range(len(SHADES)))
    groups = _group("Shade by", "by", by) + (_group("Show", "show", shown) if len(sides) > 1 else "")
    return f"""<form class="choices" aria-label="What the page shows">
{groups}
<div class="scale" role="img" aria-label="The scale of the shades, from no compute to all of it">
0 <span>{scale}</span> 1</div>
</form>"""


def _group(legend: str, name: str, choices: Sequence[tuple[str, str]]) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="{name}" id="{key}"{"" if n else " checked"}>{_text(label)}</label>'
        for n, (key, label) in enumerate(choices)
    )
    return f"<fieldset><legend>{legend}</legend>{buttons}</fieldset>"


def _section(number: int, side: Side, names: Sequence[str], prompt: str) -> str:
    facts = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in side.facts)
    strips = [*zip(names, np.asarray(side.cost_NxX).T, strict=True), ("all", np.mean(side.cost_NxX, -1))]
    written = len(side.pieces) if side.written is None else side.written
    tokens = "".join(
        _token(piece, cost_X, names, n >= written)
        for n, (piece, cost_X) in enumerate(zip(side.pieces, side.cost_NxX, strict=True))
    )
    numbers = f"<details><summary>All numbers</summary><table>{facts}</table></details>" if facts else ""
    bold = f"<b>{_text(prompt)}</b>" if prompt else ""
    return f"""<section class="side-{number}" aria-labelledby="side-{number}">
<h2 id="side-{number}">{_text(side.heading or side.title)}</h2>
<div class="text" dir="auto" lang="">{bold}{tokens}</div>
{"".join(f"<p>{_text(line)}</p>" for line in side.told)}
<div class="strips">{"".join(_strip(name, cost_N) for name, cost_N in strips)}</div>
{numbers}
{_table(side, names)}
</section>"""


def _token(piece: str, cost_X: np.ndarray, names: Sequence[str], ends: bool) -> str:
    # Nothing is seen of a token that is but a line's end, less than a character, or not of the text.
    mark = " x" if ends else " e" if not piece else " n" if "\n" in piece and piece.isspace() else ""
    each = "".join(
        f" {letter}{shade(cost)}" for letter, cost in zip(AXIS_CLASSES, map(float, cost_X), strict=False)
    )
    shaded = f"k{shade(float(np.mean(cost_X)))}{each}{mark}"
    return f'<span class="{shaded}" title="{_told(cost_X, names)}">{_text(piece)}</span>'


def _told(cost_X: np.ndarray, names: Iterable[str]) -> str:
    """What a token was given, for whoever points at it."""
    values = ", ".join(f"{name} {cost:.2f}" for name, cost in zip(names, cost_X, strict=True))
    return f"all {float(np.mean(cost_X)):.2f}: {_text(values)}"


def _table(side: Side, names: Sequence[str]) -> str:
    """The costs token by token, for those who cannot point, or see no shades.

    Of long texts a row has the means of several tokens.  End tags that HTML does not ask for are left out.
    """
    each = -(-len(side.pieces) // _TABLE_ROWS)
    head = "".join(
        f'<th scope="col">{_text(name)}' for name in ("token" if each < 2 else "text", *names, "all")
    )
    rows = []
    for start in range(0, len(side.pieces), max(each, 1)):
        text = _text("".join(side.pieces[start : start + each]))
        cost_X = np.mean(side.cost_NxX[start : start + each], 0)
        costs = "".join(f"<td>{cost:.2f}" for cost in (*cost_X, float(np.mean(cost_X))))
        rows.append(f'<tr><td class="t">{text.strip()}{costs}')
    by = "Token by token" if each < 2 else f"By {each} tokens"
    return f"""<details><summary>{by}, as a table</summary>
<div class="scroll" tabindex="0" role="region" aria-label="{by}, {_text(side.title)}"><table>
<thead><tr>{head}</thead><tbody>{"".join(rows)}</tbody></table></div></details>"""


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
        f"</svg><span>{mean:.2f}</span>"
    )
