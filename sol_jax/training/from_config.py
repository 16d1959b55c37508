"""Training from Python: a config by name or as an object, with some fields changed."""

import importlib
import importlib.util
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from sol_jax.errors import UserError, telling_of_memory
from sol_jax.files import path_of
from sol_jax.runs.config import RunConfig
from sol_jax.training.loop import train


def load_config(name: str) -> RunConfig:
    """The config of `configs/X.py:VARIANTS`, as on a command line; `X:VARIANTS` is an installed one.

    Raises `UserError` if there is no such config or variant, or if it holds a value that cannot be.
    """
    file, _, variants = name.partition(":")
    try:
        config = _module(file).get_config(*([variants] if variants else []))
    except (ImportError, OSError):
        raise UserError(f"there is no config {file!r}; give a file such as configs/sol_j_fl.py:cpu") from None
    except ValueError as error:  # of an unknown variant
        raise UserError(f"{name}: {error}") from None
    return RunConfig.from_dict(config.to_dict())


def _module(file: str) -> ModuleType:
    if not file.endswith(".py"):
        return importlib.import_module(f"configs.{file}")
    spec = importlib.util.spec_from_file_location("config_of_run", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stopped(KeyboardInterrupt):
    """Whoever ran it has stopped it."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback, as for a `UserError`."""
        return [str(self)]


@telling_of_memory()
def train_policy(
    config: RunConfig | ConfigDict | str, workdir: str | pathlib.Path, fields: Mapping[str, Any] | None = None
) -> pathlib.Path:
    """Trains a policy, resuming if the workdir holds a part of the run.

    Args:
      config: a config, or the name of one (see `load_config`).
      workdir: folder for checkpoints, metrics and results; it can then be used wherever a policy is asked
      for.
      fields: dotted paths with the values they get instead: `{"train.num_updates": 10}`.

    Returns:
      The workdir.

    Raises:
      UserError: anything wrong with config, model, text or workdir.
      Interrupted: after SIGTERM, once a checkpoint is written.
      Stopped: after an interrupt, as a notebook's button sends it.
    """
    folder = path_of(workdir, "workdir")
    if isinstance(config, str):
        config = load_config(config)
    elif isinstance(config, ConfigDict):
        config = RunConfig.from_dict(config.to_dict())
    try:
        train(config.with_fields(fields or {}), folder)
    except KeyboardInterrupt as stop:
        raise Stopped(f"stopped; run it again to go on from the last checkpoint in {folder}") from stop
    return folder
