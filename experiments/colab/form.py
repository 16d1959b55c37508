"""What a notebook must be to be committed, and where the repository is.

    python -m experiments.colab.form
    python -m experiments.colab.form --address https://github.com/OWNER/sol_jax

Says what is wrong with which.  The address of the repository is the field `url` of `setup.cfg`; badges and
first cells repeat it, since whoever opens a notebook has nothing else; `--address` writes another there.
"""

import argparse
import ast
import base64
import configparser
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import sol_jax
from sol_jax.errors import UserError, exits_on_user_error

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = pathlib.Path(__file__).parent
NAMES = ("quickstart", "where_does_compute_go", "your_own_axis", "your_own_model", "paper_figures")
WITH_ADDRESS = ("setup.cfg", "README.md", "docs/notebooks.md")  # besides the notebooks
PACKAGES = ("sol_jax", "pallas_kernels", "configs", "experiments")
INTERNAL = {"engine", "output"}  # of a GeneratedText
MOST_BYTES = 100_000  # of a picture: a clone stays light
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"

Notebook = dict[str, Any]
Cell = dict[str, Any]


def read(path: pathlib.Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: pathlib.Path, notebook: Notebook) -> None:
    """As Jupyter writes it."""
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def source(cell: Cell) -> str:
    return "".join(cell["source"])


def tagged(notebook: Notebook, tag: str) -> list[Cell]:
    """The cells with a tag: `install`, `parameters` and `picture` have one each."""
    return [cell for cell in notebook["cells"] if tag in cell["metadata"].get("tags", [])]


def address() -> str:
    """Of the repository, without a slash at the end."""
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg", encoding="utf-8")
    return metadata["metadata"]["url"].rstrip("/")


def badge(name: str, where: str) -> str:
    """The link that opens a notebook in Colab, in Markdown."""
    repository = where.removeprefix("https://github.com/")
    target = f"https://colab.research.google.com/github/{repository}/blob/main/experiments/colab/{name}.ipynb"
    return f"[![Open in Colab]({BADGE})]({target})"


def python_of(cell: Cell) -> str:
    """A cell's Python: magics and shell commands are left out, and so are files that it writes."""
    text = source(cell)
    if text.startswith("%%"):
        return ""
    return "\n".join(re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in text.split("\n"))


def parameters_of(cell: Cell) -> dict[str, Any]:
    """What a cell of parameters sets.  Raises ValueError unless it sets capital names to plain values."""
    found: dict[str, Any] = {}
    for statement in ast.parse(source(cell)).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name.isupper():
                found[name] = ast.literal_eval(value)
            case _:
                raise ValueError(f"line {statement.lineno} sets no capital name")
    return found


def faults(name: str, notebook: Notebook, where: str) -> list[str]:
    """What is wrong with a notebook, a sentence each; none if it may be committed."""
    return [*_first_cell(name, notebook, where), *_tags(notebook), *_outputs(notebook), *_private(notebook)]


def _first_cell(name: str, notebook: Notebook, where: str) -> Iterator[str]:
    first, *rest = notebook["cells"]
    text = source(first)
    if first["cell_type"] != "markdown" or not text.startswith("# "):
        yield "the first cell is no text with a title"
    if badge(name, where) not in text:
        yield f"the first cell lacks the badge that opens {name} at {where}"
    if not re.search(r"\*\*Needs\*\*.*\d+ GB", text):
        yield "the first cell does not say how many GB of memory it **Needs**"
    if not re.search(r"\*\*Takes\*\*.*\d+ minutes", text):
        yield "the first cell does not say how many minutes it **Takes**"
    if not any(cell["cell_type"] == "markdown" for cell in rest):
        yield "nothing explains what the reader sees"
    before = first
    for cell in rest:
        explained = {"install", "parameters"} & {*cell["metadata"].get("tags", [])}
        if cell["cell_type"] == before["cell_type"] == "code" and not explained:
            yield f"the cell {source(cell)[:40]!r} follows another without a word"
        before = cell


def _tags(notebook: Notebook) -> Iterator[str]:
    for tag in ("install", "parameters", "picture"):
        if len(tagged(notebook, tag)) != 1:
            yield f"{len(tagged(notebook, tag))} cells have the tag {tag}; one must"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    expected = [*tagged(notebook, "install"), *tagged(notebook, "parameters")]
    if code[: len(expected)] != expected:
        yield "install and parameters must be the first two cells of code"
    for cell in tagged(notebook, "parameters"):
        try:
            parameters_of(cell)
        except (ValueError, SyntaxError) as error:
            yield f"the parameters must be capital names with plain values: {error}"


def _outputs(notebook: Notebook) -> Iterator[str]:
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        if cell["execution_count"] is not None:
            yield f"the cell {source(cell)[:40]!r} has a number; commit it as never run"
        is_picture = "picture" in cell["metadata"].get("tags", [])
        if cell["outputs"] and not is_picture:
            yield f"the cell {source(cell)[:40]!r} has an output; only that with the tag picture may"
        if not is_picture:
            continue
        pictures = [output.get("data", {}).get("image/png") for output in cell["outputs"]]
        if len(pictures) != 1 or not pictures[0]:
            yield "the cell with the tag picture must have one output, a PNG: experiments.colab.run --picture"
        elif len(base64.b64decode("".join(pictures[0]))) > MOST_BYTES:
            yield f"the picture has more than {MOST_BYTES} bytes"


def _private(notebook: Notebook) -> Iterator[str]:
    """Whatever is used that is neither of the Python interface nor a program that the pages describe."""
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code" or source(cell).startswith("%%"):
            continue
        for program in re.findall(r"(?:-m\",\s*|run_program\(\s*)\"([\w.]+)", source(cell)):
            if program.split(".")[0] in PACKAGES and not re.search(rf"-m {re.escape(program)}\b", pages):
                yield f"{program} is no program that a page describes"
        try:
            tree = ast.parse(python_of(cell))
        except SyntaxError as error:
            yield f"the cell {source(cell)[:40]!r} is no Python: {error}"
            continue
        for node in ast.walk(tree):
            yield from _private_name(node)
        yield from _shown_twice(tree)


def _private_name(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            for alias in names:
                if alias.name.split(".")[0] in PACKAGES and alias.name != "sol_jax":
                    yield f"import {alias.name} is not public; only `import sol_jax` is"
        case ast.ImportFrom(module=str(module)) if module.split(".")[0] in PACKAGES:
            yield f"from {module} import is not public; only `import sol_jax` is"
        case ast.Attribute(value=ast.Name(id="sol_jax"), attr=name) if name not in sol_jax.__all__:
            yield f"sol_jax.{name} is not in sol_jax.__all__"
        case ast.Attribute(attr=name) if name in INTERNAL:
            yield f".{name} is no public attribute of a text"


def _shown_twice(tree: ast.Module) -> Iterator[str]:
    """A page shows the value of a cell's last line: here all that the program has printed before."""
    match tree.body[-1:]:
        case [ast.Expr(value=ast.Call(func=ast.Attribute(attr="run_program")))]:
            yield "what a program said is shown twice: give the value of run_program a name"


def move(where: str) -> None:
    """Writes another address of the repository wherever the present one stands."""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", where):
        raise UserError(f"--address={where!r} must be https://github.com/OWNER/NAME: Colab opens no others")
    old, new = (found.removeprefix("https://github.com/") for found in (address(), where))
    files = [*(ROOT / name for name in WITH_ADDRESS), *(FOLDER / f"{name}.ipynb" for name in NAMES)]
    for file in files:
        text = file.read_text(encoding="utf-8")
        for form in ("https://github.com/{}", "https://colab.research.google.com/github/{}/blob"):
            text = text.replace(form.format(old), form.format(new))
        file.write_text(text, encoding="utf-8")


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--address", default="", help="of the repository, to be written into all files")
    args = parser.parse_args()
    if args.address:
        move(args.address)
    for name in NAMES:
        for fault in faults(name, read(FOLDER / f"{name}.ipynb"), address()):
            raise UserError(f"{name}.ipynb: {fault}")


if __name__ == "__main__":
    main()
