"""docs/results.md: tables are what the program prints of the committed CSVs; figures and files are there."""

import importlib.util
import pathlib
import re

import pytest

from experiments import RESULTS
from experiments.figures import plots, table
from experiments.figures.__main__ import NAMES

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "results.md").read_text()
FILES = (RESULTS / "README.md").read_text()


@pytest.mark.parametrize("against", ["fixed", "front", "clock", "swapped"])
def test_tables_are_those_of_the_csvs(against):
    """Every run that has this controller is in, to the digit; the order is the page's."""
    head, _, *lines = table.table(RESULTS, plots.MODEL, against).splitlines()
    told = PAGE.split(head)[1].split("\n\n")[0].splitlines()[2:]
    assert sorted(told) == sorted(lines)


def test_every_figure_is_shown_and_exists():
    shown = re.findall(r"!\[[^]]*\]\((figures/[\w.]+)\)", PAGE)
    for image in shown:
        assert (ROOT / "docs" / image).is_file(), image
    assert {f"figures/{name}.png" for name in NAMES} <= set(shown)


@pytest.mark.parametrize("page", [PAGE, FILES])
def test_commands_name_modules_that_exist(page):
    commands = re.findall(r"^ *(?:\$ )?(python -m [^\n]*)$", page, re.M)
    assert commands
    for command in commands:
        module = command.split()[2]
        assert importlib.util.find_spec(module), module


def test_every_run_is_in_the_glossary():
    """By the name of its CSV, without its seed."""
    glossary = PAGE.split("## Glossary of runs")[1].split("## ")[0]
    runs = {re.sub(r"-s\d+$", "", path.stem) for path in (RESULTS / plots.MODEL).glob("*-s[0-9].csv")}
    for run in {name.removeprefix("downstream-") for name in runs}:
        base = re.sub(r"-(restated|random)$", "", run)
        assert f"`{base}`" in glossary, run


def test_every_csv_is_described():
    """Each is named in full, or by a pattern such as `NAME-sSEED.csv`."""
    patterns = re.findall(r"`([^`\s]+\.csv)`", FILES)
    known = [
        re.compile(re.escape(p).replace("NAME", r"[\w.-]+?").replace("SEED", r"\d").replace("DEVICE", r"\w+"))
        for p in patterns
    ]
    for path in sorted(RESULTS.rglob("*.csv")):
        place = str(path.relative_to(RESULTS)).removeprefix(f"{plots.MODEL}/")
        assert any(one.fullmatch(place) for one in known), f"{place} is described nowhere"
