# ruff: noqa: RUF001, SIM905 - the dashes are the content, and lists of words read best as words
"""MediaWiki markup to plain prose, with `mwparserfromhell` for the parsing.

The parser's own `strip_code` keeps the captions of pictures, the cells of tables and the lists of references,
and drops every template, which leaves holes such as "a town  away".  So the tree is walked here: what stands
beside the running text goes, what a reader of the sentence would see stays.
"""

import re
from collections.abc import Iterable, Iterator

import mwparserfromhell
from mwparserfromhell import nodes
from mwparserfromhell.wikicode import Wikicode

# Elements that are no running text: tables, pictures, notes.
DROPPED_TAGS = frozenset(
    "center div gallery hr imagemap references ref score source syntaxhighlight table timeline tr".split()
)
# Notes, comments and the quotes of bold and italics go before the parse: they are most of the markup, and an
# unbalanced one would otherwise leave the whole element around it unparsed.
NOTE = re.compile(r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>", re.DOTALL | re.IGNORECASE)
EMPHASIS = re.compile("'{2,}")
# Links that show no text where they stand: pictures, categories, the article in another language.
DROPPED_LINK = re.compile(r"\s*(file|image|category|[a-z]{2,3}|simple|zh-[a-z-]+)\s*:", re.IGNORECASE)
# Sections that list links or books; they go with their subsections.
DROPPED_SECTIONS = frozenset(
    "bibliography|citations|external links|filmography|footnotes|further reading|gallery|notes|publications"
    "|notes and references|references|references and notes|see also|selected bibliography|selected works"
    "|sources|works|works cited".split("|")
)

# Templates that show their first or their last parameter in the sentence.  All others are dropped, but for
# the few that `_render_template` spells out.
SHOWS_FIRST = frozenset(
    "angbr big ipa keypress large linktext nihongo nobold noitalic nowrap railgauge sc small smaller tooltip"
    " us$ vanchor vr".split()
)
SHOWS_LAST = frozenset("lang nq resize rtl-lang script transl".split())
LITERAL = {
    "!": "|", "=": "=", "'": "'", "' \"": "'\"", "'s": "'s", "·": " · ", "mdash": "—", "mdashb": "—",
    "nbsp": " ", "ndash": "–", "pipe": "|", "snd": " – ", "snds": " – ", "spaced ndash": " – ", "spaces": " ",
}  # fmt: skip
UNITS = {
    "acre": "acres", "c": "°C", "cuft": "cubic feet", "f": "°F", "ft": "feet", "ha": "hectares",
    "in": "inches", "km2": "km²", "lb": "pounds", "m2": "m²", "m3": "m³", "mi": "miles",
    "nmi": "nautical miles", "sqft": "square feet", "sqmi": "square miles", "yd": "yards",
}  # fmt: skip
RANGES = {
    "-": "–", "and": "and", "and(-)": "and", "by": "by", "or": "or", "to": "to", "to(-)": "to", "x": "×",
    "–": "–",
}  # fmt: skip
SUPERSCRIPTS = str.maketrans("0123456789+-−n()", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻ⁿ⁽⁾")

# What opens a line of rendered text: a section title (its level follows) or a list item.
HEADING, ITEM = "\x01", "\x02"
NO_SECTION = 7  # one more than the deepest level of a heading


def article_text(markup: str) -> str:
    """Plain text of one article: paragraphs and section titles, with a blank line between them.

    Tables, pictures, notes, references and the sections that only list links are left out; list items
    stay, as paragraphs of their own; formulas stay as LaTeX.

    Args:
      markup: the wikitext of a page, as a MediaWiki dump holds it.
    """
    body = EMPHASIS.sub("", NOTE.sub("", markup))
    return _join_paragraphs(_clean(line) for line in _paragraphs(_render(mwparserfromhell.parse(body))))


def _render(code: Wikicode) -> str:
    """Text of a tree, section titles on lines of their own that open with HEADING and their level."""
    rendered, dropped_level = [], NO_SECTION
    for node in code.nodes:
        if isinstance(node, nodes.Heading):
            title = _render(node.title).strip()
            if node.level <= dropped_level:
                dropped_level = node.level if title.lower() in DROPPED_SECTIONS else NO_SECTION
            if dropped_level == NO_SECTION:
                rendered.append(f"\n{HEADING}{node.level}{title}\n")
        elif dropped_level == NO_SECTION:
            rendered.append(_render_node(node))
    return "".join(rendered)


def _render_node(node: nodes.Node) -> str:
    match node:
        case nodes.Text():
            return str(node.value)
        case nodes.HTMLEntity():
            return node.normalize()
        case nodes.Wikilink():
            if DROPPED_LINK.match(str(node.title)):
                return ""
            return _render(node.title if node.text is None else node.text).removeprefix(":")
        case nodes.ExternalLink():
            return _render(node.title) if node.title is not None else ""
        case nodes.Tag():
            return _render_tag(node)
        case nodes.Template():
            return _render_template(node)
    return ""  # comments and template arguments


def _render_tag(tag: nodes.Tag) -> str:
    name = str(tag.tag).strip().lower()
    if name in DROPPED_TAGS:
        return ""
    if name == "br":
        return "\n\n"
    text = _render(tag.contents) if tag.contents is not None else ""
    if name == "sup":
        return text.translate(SUPERSCRIPTS)
    if name == "math":  # on one line, and its brackets apart so that they are not taken for markup
        return " ".join(re.sub(r"([{}\[\]])(?=\1)", r"\1 ", text).split())
    if name in ("li", "dd", "dt") and not text:
        return ITEM
    return f"\n\n{text}\n\n" if name in ("blockquote", "poem") else text


def _render_template(template: nodes.Template) -> str:
    name = str(template.name).strip().lower()
    shown = [_render(parameter.value).strip() for parameter in template.params if not parameter.showkey]
    if name in LITERAL:
        return LITERAL[name]
    if not shown:
        return ""
    if name in ("convert", "cvt"):
        return _render_convert(shown)
    if name == "as of":
        return f"{'as' if template.has('lc') else 'As'} of {'-'.join(shown)}"
    if name == "chem":
        return "".join(shown)
    if name in ("frac", "sfrac"):  # {{frac|3}} is 1/3, {{frac|2|1|3}} is 2 1/3
        return " ".join([*shown[:-2], "/".join(["1", *shown][-2:])])
    if name == "val":
        exponent = f" × 10{str(template.get('e').value).translate(SUPERSCRIPTS)}" if template.has("e") else ""
        return shown[0] + exponent
    if name in ("quote", "bquote", "cquote", "quotation"):
        return f"\n\n{shown[0]}\n\n"
    if name in SHOWS_FIRST:
        return shown[0]
    if name in SHOWS_LAST or name.startswith("lang-"):
        return shown[-1]
    return ""


def _render_convert(shown: list[str]) -> str:
    """`{{convert|3|to|5|mi|km}}` reads "3 to 5 miles": all up to the first unit, the conversion left out."""
    words, rest = shown[:1], shown[1:]
    while len(rest) > 2 and rest[0] in RANGES:
        words += [RANGES[rest[0]], rest[1]]
        rest = rest[2:]
    words = [f"{int(word):,}" if re.fullmatch(r"\d{4,}", word) else word for word in words]
    return " ".join([*words, *(UNITS.get(unit.lower(), unit) for unit in rest[:1])])


def _paragraphs(text: str) -> Iterator[str]:
    """Lines joined where the page shows one paragraph; a title or a list item is one of its own."""
    running: list[str] = []
    for line in [*text.split("\n"), ""]:
        alone = line[:1] in (HEADING, ITEM, " ")
        if alone or not line.strip():
            yield " ".join(running)
            running = []
        if alone:
            yield line
        else:
            running.append(line)


def _clean(line: str) -> str:
    """One line without what dropped markup leaves behind: empty brackets, doubled or dangling punctuation."""
    line = re.sub(r"__[A-Z]+__|\x02", "", line)
    line = re.sub(r"[\s\u200b]+", " ", line)
    line = re.sub(r"\( ?(?:[,;:–] ?)*", "(", line)  # "(; born 1809)" once the pronunciation is gone
    line = re.sub(r" ?[,;:]* ?\)", ")", line)
    line = re.sub(r" ?(\(\)|\[\])", "", line)
    line = re.sub(r" +([,.;:)])(?=\s|$)", r"\1", line)
    return line.strip()


def _join_paragraphs(lines: Iterable[str]) -> str:
    """The text, without titles of sections that have none and without remains of tables."""
    paragraphs: list[str] = []
    waiting: list[int] = []  # levels of the titles at the end of `paragraphs`, whose sections are still empty
    for line in lines:
        title = re.fullmatch(HEADING + "(.)(.*)", line)
        if title:
            while waiting and waiting[-1] >= int(title[1]):
                waiting.pop()
                paragraphs.pop()
            waiting.append(int(title[1]))
            paragraphs.append(title[2])
        elif line[:1] not in ("{", "|", "!", "}") and any(c.isalpha() or c.isdecimal() for c in line):
            waiting.clear()
            paragraphs.append(line)
    return "\n\n".join(paragraphs[: len(paragraphs) - len(waiting)])
