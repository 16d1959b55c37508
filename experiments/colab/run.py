"""Runs a notebook from its first cell to its last, at the size that it has or at another.

    python -m experiments.colab.run quickstart
    python -m experiments.colab.run quickstart --set MAX_TOKENS=16 --output build/notebooks

Prints what each cell took, and writes the notebook with its outputs to `--output`.  The cell that installs is
left out, unless `--install` asks for it.  With `--picture` the picture goes into the committed notebook too.
Needs the extra `notebooks`.
"""

import argparse
import ast
import base64
import copy
import io
import json
import pathlib
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

from experiments.colab import form
from sol_jax.errors import UserError, exits_on_user_error

WIDEST = 900  # pixels of a committed picture
COLOURS = 128


def with_parameters(notebook: form.Notebook, values: Mapping[str, Any]) -> form.Notebook:
    """The notebook with other values in its cell of parameters; `UserError` for names that are not there."""
    changed = copy.deepcopy(notebook)
    (cell,) = form.tagged(changed, "parameters")
    there = form.parameters_of(cell)
    if unknown := sorted(set(values) - set(there)):
        raise UserError(f"the notebook has no parameter {unknown[0]}; it has {', '.join(there)}")
    cell["source"] = "\n".join(f"{name} = {value!r}" for name, value in {**there, **values}.items())
    return changed


def execute(
    notebook: form.Notebook,
    folder: pathlib.Path,
    install: bool = False,
    timeout: int = 3600,
    kernel: str = "python3",
) -> Any:
    """Runs all cells in `folder`, in a kernel of its own; returns the notebook with outputs and times.

    Raises `nbclient.exceptions.CellExecutionError` at the first cell that fails.
    """
    ready = copy.deepcopy(notebook)
    if not install:
        for cell in form.tagged(ready, "install"):
            cell["source"] = "pass"
    node = nbformat.reads(json.dumps(ready), as_version=4)
    client = NotebookClient(
        node, timeout=timeout, kernel_name=kernel, resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def seconds(cell: Any) -> float:
    """What a cell took, by its kernel's clock."""
    told = cell["metadata"].get("execution", {})
    if "shell.execute_reply" not in told or "iopub.execute_input" not in told:
        return 0.0
    begin, end = (
        datetime.fromisoformat(told[name]) for name in ("iopub.execute_input", "shell.execute_reply")
    )
    return (end - begin).total_seconds()


def picture(notebook: form.Notebook) -> bytes:
    """The PNG of the cell with the tag `picture`, made small; `UserError` if it showed none."""
    (cell,) = form.tagged(notebook, "picture")
    shown = [output.get("data", {}) for output in cell["outputs"]]
    found = [data["image/png"] for data in shown if "image/png" in data]
    if not found:
        raise UserError("the cell with the tag picture showed none")
    drawn = Image.open(io.BytesIO(base64.b64decode(found[-1]))).convert("RGB")
    if drawn.width > WIDEST:
        drawn = drawn.resize((WIDEST, round(drawn.height * WIDEST / drawn.width)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # The default method gives the palette to greys, and turns the few pixels of a coloured point grey too.
    drawn.quantize(COLOURS, Image.Quantize.FASTOCTREE).save(file, "PNG", optimize=True)
    return file.getvalue()


def with_picture(notebook: form.Notebook, png: bytes) -> form.Notebook:
    """The committed notebook with a new picture as its only output."""
    changed = copy.deepcopy(notebook)
    (cell,) = form.tagged(changed, "picture")
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": ["<a picture>"]}
    cell["outputs"] = [{"data": data, "metadata": {}, "output_type": "display_data"}]
    return changed


def given(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` of a command line; a value that is no Python literal is text."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=form.NAMES)
    parser.add_argument("--set", action="append", default=[], type=given, metavar="NAME=VALUE", dest="values")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("build/notebooks"))
    parser.add_argument("--install", action="store_true", help="runs the cell that installs, too")
    parser.add_argument("--kernel", default="python3", help="Jupyter's name of the environment it runs in")
    parser.add_argument("--picture", action="store_true", help="commits the picture")
    args = parser.parse_args()
    path = form.FOLDER / f"{args.name}.ipynb"
    committed = form.read(path)
    begin = time.monotonic()
    folder = form.FOLDER if args.install else form.ROOT
    done = execute(with_parameters(committed, dict(args.values)), folder, args.install, kernel=args.kernel)
    for cell in done["cells"]:
        if cell["cell_type"] == "code":
            print(f"{seconds(cell):7.1f} s  {form.source(cell).splitlines()[0][:70]}")
    print(f"{time.monotonic() - begin:7.1f} s  in all")
    args.output.mkdir(parents=True, exist_ok=True)
    nbformat.write(done, args.output / path.name)
    if args.picture:
        form.write(path, with_picture(committed, picture(done)))


if __name__ == "__main__":
    main()
