"""How Sphinx builds this site: `make docs` writes it to `docs/_build/html`, and a warning is an error.

Three checks keep the pages true.  A name in code face that begins with one of our packages must be something
that can be imported; a path into the checkout must exist; and the map in `architecture` names every module.
Else the build warns, and so fails.  The names that the API pages describe become links to them.
"""

import configparser
import importlib
import pathlib
import pkgutil
import re
import sys
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

_metadata = configparser.ConfigParser()
_metadata.read(ROOT / "setup.cfg", encoding="utf-8")
project = "sol_jax"
author = "The sol_jax developers"
copyright = "The sol_jax developers"
version = release = _metadata["metadata"]["version"]

extensions = [
    "myst_nb",  # pages in Markdown, and the notebooks as they are committed
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas need no network: MathJax comes with the site
]
exclude_patterns = ["_build", "gallery", "notebooks/*.md"]
nb_execution_mode = "off"  # `make notebooks` runs them
highlight_language = "none"
html_theme = "furo"
html_title = "sol_jax"
html_copy_source = False
html_static_path: list[str] = []
html_extra_path = ["gallery"]  # pages of shaded texts, as they are

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

PACKAGES = ("sol_jax", "pallas_kernels", "configs", "experiments")
# A dotted name, or a path from the root of the checkout; a placeholder such as NAME is neither.
NAME = re.compile(rf"({'|'.join(PACKAGES)})(\.[A-Za-z_]\w*)+")
PATH = re.compile(rf"({'|'.join((*PACKAGES, 'tests', 'docs'))})(/[a-z0-9_.-]+)+/?")

# Stands for a colon that napoleon is not to see.
COLON = "\N{MODIFIER LETTER COLON}"

_log = logging.getLogger(__name__)


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    if (ROOT / pathlib.Path(*parts)).with_suffix(".py").is_file():
        return True  # some modules need an extra to be imported
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            fields = getattr(found, "__dataclass_fields__", {}) | dict.fromkeys(getattr(found, "_fields", ()))
            if part in fields:
                return part == parts[-1]
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def check_names(app: Sphinx, doctree: nodes.document) -> None:
    """Warns of names and paths that are not there; turns names into references, which may stay unresolved."""
    for literal in list(doctree.findall(nodes.literal)):
        text = literal.astext().removesuffix("()")
        if isinstance(literal.parent, nodes.reference | addnodes.pending_xref):
            continue
        if PATH.fullmatch(text) and not (ROOT / text).exists():
            _log.warning("there is no %s in the checkout", text, location=literal)
        if not NAME.fullmatch(text) or (ROOT / text).exists():
            continue
        if not _exists(text):
            _log.warning("there is no %s to import", text, location=literal)
            continue
        reference = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=text, refexplicit=True)
        reference["refdoc"] = app.env.docname
        literal.replace_self(reference)
        reference += literal


def check_map(app: Sphinx, doctree: nodes.document) -> None:
    """Warns of modules that the map of the architecture leaves out."""
    if app.env.docname != "architecture":
        return
    import sol_jax

    named = {literal.astext() for literal in doctree.findall(nodes.literal)}
    for module in pkgutil.walk_packages(sol_jax.__path__, "sol_jax."):
        if module.name not in named:
            _log.warning("the map leaves out %s", module.name, location=doctree)


def mark_up(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings are plain text with `code` and indented examples; this is them in reStructuredText."""
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(":", COLON)
    marked: list[str] = []
    prose: list[str] = []
    inside = False  # of an example, or a table, indented by four
    for line in lines:
        indented, blank = line.startswith("    "), not line.strip()
        if indented and not inside and prose and not prose[-1].strip():
            marked += [*_code(prose), "::", ""]
            prose, inside = [], True
        elif not indented and not blank:
            inside = False
        (marked if inside else prose).append(line)
    lines[:] = [*marked, *_code(prose)]


def restore_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """To be called after napoleon, which takes what precedes the colon of a property for its type."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def _code(lines: list[str]) -> list[str]:
    """Prose with `code` in double backticks, as reStructuredText wants it."""
    parts = re.split(r"(?<!`)`([^`]+)`(?!`)", "\n".join(lines))
    plain = [_escaped(part, after_code=n > 0) for n, part in enumerate(parts[::2])]
    coded = [f"``{part}``" for part in parts[1::2]]
    return "".join(text for pair in zip(plain, [*coded, ""], strict=True) for text in pair).split("\n")


def _escaped(text: str, after_code: bool) -> str:
    """Prose in which stars and bars stand for themselves, but for *emphasis*."""
    if after_code and re.match(r"\w", text):  # as in "`value`s": a separator that does not show
        text = rf"\ {text}"
    emphasis = r"(?<![\w*])\*(\w[^*\n]*)\*(?![\w*])"
    return re.sub(rf"{emphasis}|[*|]", lambda found: found[0] if found[1] else rf"\{found[0]}", text)


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leaves out the two arguments that Flax adds to every module."""
    if what == "class" and signature and "_Sentinel" in signature:
        signature = re.sub(r", parent: .*", ")", signature)
    return signature, returns


def skip_member(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of NamedTuples, of which Python says no more than their numbers."""
    is_field = type(obj).__name__ == "_tuplegetter"
    return True if is_field else None


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", check_names)
    app.connect("doctree-read", check_map)
    # Before napoleon, which has priority 500 and rewrites "Args:" and the like.
    app.connect("autodoc-process-docstring", mark_up, priority=400)
    app.connect("autodoc-process-docstring", restore_colons, priority=600)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-skip-member", skip_member)
