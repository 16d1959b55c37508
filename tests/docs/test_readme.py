"""What the README promises exists: its make targets, modules, config files with their variants, and paths."""

import importlib.util
import pathlib
import re
import shlex

import pytest

from sol_jax.runs.config import RunConfig

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip() for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines()
]


def load_config(reference: str):
    path, _, variants = reference.partition(":")
    spec = importlib.util.spec_from_file_location("config_of_readme", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variants) if variants else module.get_config()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    target = shlex.split(command, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"no target {target}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m ")])
def test_commands_name_modules_configs_and_fields_that_exist(command):
    words = shlex.split(command, comments=True)
    assert importlib.util.find_spec(words[2]), f"no module {words[2]}"
    if "--config" in words:
        config = load_config(words[words.index("--config") + 1])
        RunConfig.from_dict(config.to_dict()).check_here()
        given = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
        assert {word.split("=")[0] for word in given} <= set(RunConfig().flat())


def test_named_files_exist():
    for path in re.findall(r"`((?:sol_jax|configs|experiments|tests|pallas_kernels)/[\w./]+)`", README):
        assert (ROOT / path).exists(), f"README names {path}"


def test_the_map_names_every_package_and_what_stands_beside_them():
    tree = README.split("## Where things are")[1].split("```")[1]
    packages = {path.parent.name for path in (ROOT / "sol_jax").glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / "sol_jax").glob("*.py")} - {"__init__", "errors"}
    assert len(packages) > 5
    missing = {name for name in packages | modules if not re.search(rf"\b{name}\b", tree)}
    assert not missing, f"the README's map leaves out {sorted(missing)}"


def test_linked_files_exist():
    linked = re.findall(r"\]\(([\w./-]+?)(?:#[\w-]+)?\)", README)
    assert len(linked) > 8
    missing = [path for path in linked if not (ROOT / path).exists()]
    assert not missing, f"README links to {missing}"


@pytest.mark.slow
def test_the_python_example_runs(capsys):
    """As it stands, with the published policy."""
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(example, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "['kappa', 'rho', 'eta']" in said


def test_every_variant_is_documented():
    from configs import default

    page = (ROOT / "docs" / "configs.md").read_text()
    missing = [name for name in default.VARIANTS if f"| `{name}` |" not in page]
    assert not missing, f"docs/configs.md does not name the variants {missing}"
