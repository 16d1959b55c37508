"""Writes docs/configs.md and docs/flags.md from the dataclasses:  python docs/generate_configs.py

A test holds the committed pages to what this makes of today's code.
"""

import dataclasses
import importlib
import pathlib
import pkgutil
import typing
from typing import Any

import configs
from configs import default
from sol_jax.evaluation.options import EvaluateOptions
from sol_jax.generation.options import GenerateOptions
from sol_jax.options import Options
from sol_jax.runs.config import RunConfig

DOCS = pathlib.Path(__file__).parent
CONFIGS = """# Configs

A config file is a small Python file under `configs/`; `configs/default.py` has the paper's shared settings,
and the others override a few fields. Variants follow a colon: `--config configs/sol_j_fl.py:cpu,fast`. Each
field can be set on the command line: `--config.grpo.gamma=0.5`. An unknown field, or a value that cannot be,
is an error that names it. The fields of `train`, `eval`, `memory`, `kernels` and `data.cache_dir` may change
when a run is resumed; the others belong to it.

This page is generated from the dataclasses that hold the fields (`python docs/generate_configs.py`).

## Files

"""


def rules(field: dataclasses.Field, kind: Any) -> str:
    """What a field may be, for people."""
    meta = field.metadata
    choices = meta["choices"] or (typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ())
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    low, above, high = meta["at_least"], meta["above"], meta["at_most"]
    if low is not None and high is not None:
        return f"{low} to {high}"
    if low is not None:
        return f"at least {low}"
    return f"above {above}" if above is not None else ""


def shown(value: Any) -> str:
    """A default, for people."""
    if isinstance(value, tuple):
        return f"`({', '.join(shown(part).strip('`') for part in value)})`" if value else "none"
    return "none" if value is None or value == "" else f"`{value}`"


def table(options: Options, prefix: str) -> str:
    """A row for each field that is no group."""
    hints = typing.get_type_hints(type(options))
    rows = ["| field | default | allowed | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not isinstance(value, Options):
            told = field.metadata["meaning"].replace("|", "\\|")
            allowed = rules(field, hints[field.name])
            rows.append(f"| `{prefix}{field.name}` | {shown(value)} | {allowed} | {told} |")
    return "\n".join(rows)


def sections(options: Options, prefix: str = "", level: int = 2) -> str:
    """The groups of some options, each with a heading of its own."""
    first = (type(options).__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    heading = f"`{prefix.rstrip('.')}`" if prefix else "The run"
    parts = [f"{'#' * level} {heading}\n\n{first}\n\n{table(options, prefix)}\n"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Options):
            parts.append(sections(value, f"{prefix}{field.name}.", level + bool(prefix)))
    return "\n".join(parts)


def files() -> str:
    """Each config file with the first paragraph of its docstring."""
    rows = ["| file | what it is |", "|---|---|"]
    for module in pkgutil.iter_modules(configs.__path__):
        about = (importlib.import_module(f"configs.{module.name}").__doc__ or "").split("\n\n")[0]
        rows.append(f"| `configs/{module.name}.py` | {' '.join(about.split())} |")
    variants = ["| variant | what it changes |", "|---|---|"]
    for name, change in default.VARIANTS.items():
        variants.append(f"| `{name}` | {' '.join((change.__doc__ or '').split())} |")
    return "\n".join(rows) + "\n\n## Variants\n\n" + "\n".join(variants) + "\n\n"


def configs_page() -> str:
    return CONFIGS + files() + sections(RunConfig())


def flags_page() -> str:
    parts = [
        "# Flags\n\nOptions may be written with dashes for underscores. `--verbosity=0` shows what the "
        "libraries log, `--help` lists the flags. This page is generated (`python docs/generate_configs.py`).\n"
    ]
    for program, options in (("evaluate", EvaluateOptions()), ("generate", GenerateOptions())):
        parts.append(f"## `python -m sol_jax.{program}`\n\n{table(options, '--')}\n")
    parts.append(
        "## `python -m sol_jax.train`\n\n| field | meaning |\n|---|---|\n"
        "| `--config` | config file, with variants: `configs/X.py:cpu,t4`; "
        "its fields are on [another page](configs.md) |\n"
        "| `--workdir` | folder for checkpoints, metrics and results |\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    (DOCS / "configs.md").write_text(configs_page())
    (DOCS / "flags.md").write_text(flags_page())
