"""What the pages under docs promise can be run: modules, configs with their variants and fields, flags."""

import importlib.util
import pathlib
import re
import shlex

import pytest
from test_readme import ROOT, load_config

from sol_jax.evaluation.comparison import BASELINES
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.generation.options import GenerateOptions
from sol_jax.hosts import HostOptions
from sol_jax.options import described
from sol_jax.planning.options import PlanOptions
from sol_jax.runs.config import RunConfig
from sol_jax.runs.policy_files import known_policies

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]


def commands(page: pathlib.Path) -> list[str]:
    """The lines of all blocks without a language."""
    blocks = re.findall(r"^ *```\n(.*?)^ *```", page.read_text(), re.S | re.M)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


COMMANDS = sorted({(page.name, line) for page in PAGES for line in commands(page)})
PYTHON = [(page, line) for page, line in COMMANDS if line.startswith("python -m ")]


def test_pages_have_commands():
    assert len(PYTHON) > 20


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if c[1].startswith("make ")])
def test_make_targets_exist(page, command):
    target = shlex.split(command, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"{page}: no target {target}"


@pytest.mark.parametrize(("page", "command"), PYTHON)
def test_commands_name_modules_configs_and_flags_that_exist(page, command):
    words = shlex.split(command, comments=True)
    spec = importlib.util.find_spec(words[2])
    assert spec is not None, f"{page}: no module {words[2]}"
    known = {*flags_of(words[2]), "verbosity", "help"}
    if "--config" in words:
        config = RunConfig.from_dict(load_config(words[words.index("--config") + 1]).to_dict())
        assert {name(word) for word in words if word.startswith("--config.")} <= set(config.flat())
    for word in words[3:]:
        theirs = words[2] == "sol_jax.lm_eval_adapter"  # the harness' own flags
        if word.startswith("--") and not word.startswith("--config.") and not theirs:
            flag = name(word).replace("-", "_")
            assert flag in known or flag.removeprefix("no") in known, f"{page}: {words[2]} has no {word}"


def test_published_policies_that_pages_name_are_there():
    """A policy that is no longer published stays on the page of results, but in no command."""
    named = {
        found
        for _, line in COMMANDS
        for found in re.findall(r"(?:policy[= ]|--name )(smollm2-135m/[\w.-]+)", line)
    }
    assert named - {"smollm2-135m/NAME"} <= set(known_policies())
    assert len(named) > 1


def name(word: str) -> str:
    return word.removeprefix("--").removeprefix("config.").split("=")[0]


def flags_of(module: str) -> set[str]:
    """The options of a program: of its options class, or as its source names them for argparse."""
    own = {"sol_jax.evaluate": EvaluateOptions(), "sol_jax.generate": GenerateOptions()}
    joining = {field.name for field in described(HostOptions())}
    if module in own:
        return {field.name for field in described(own[module])} | joining
    if module == "sol_jax.train":
        return {"config", "workdir"} | joining
    if module == "sol_jax.plan":
        return {"config", "workdir", *(field.name for field in described(PlanOptions()))}
    if module == "experiments.reproduce":
        from experiments.reproduce import ReproduceOptions

        return {"config", "workdir", *(field.name for field in described(ReproduceOptions()))}
    spec = importlib.util.find_spec(module)
    assert spec is not None
    if spec.origin.endswith("__init__.py"):
        return set()
    found = set(re.findall(r'"--([\w-]+)"', pathlib.Path(spec.origin).read_text()))
    shared = {"results", "output"} if "plots.run(" in pathlib.Path(spec.origin).read_text() else set()
    return {flag.replace("-", "_") for flag in found | shared}


def test_the_page_on_evaluation_names_every_controller_and_column():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    results = ROOT / "experiments" / "results" / "smollm2-135m"
    files = list(results.glob("sol-j-*-s?.csv")) + list(results.glob("sol-j-*-draws.csv"))
    assert files
    columns = {
        re.sub("_(kappa|rho|eta)$", "_*", column)
        for file in files
        for column in file.read_text().splitlines()[0].split(",")
    }
    wanted = columns | {"policy", "dense", "random_best", *BASELINES}
    missing = sorted(name for name in wanted if f"`{name}`" not in page)
    assert not missing, f"docs/evaluation.md does not explain {missing}"
