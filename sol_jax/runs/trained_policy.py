"""A trained policy, of a run's checkpoints: parameters, the config they were trained with, and a name."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from sol_jax.errors import UserError
from sol_jax.files import path_of
from sol_jax.rl.setup import Setup
from sol_jax.rl.train_step import init_state
from sol_jax.runs.checkpoints import Checkpoints
from sol_jax.runs.config import RunConfig, read_config
from sol_jax.runs.policy_files import load_policy


class TrainedPolicy(NamedTuple):
    """A policy, the config of the run it comes from, and that run's name."""

    params: Any
    config: RunConfig
    name: str
    updates: int


def find_policy(
    name: str, identity: Mapping[str, str], setup_of: Callable[[RunConfig], Setup]
) -> tuple[TrainedPolicy, Mapping[str, Any]]:
    """A policy by the folder of its run or by its published name, and what is known of where it comes from.

    Args:
      identity: of the model here; a run of another one is refused.
      setup_of: the setup in which the policy of a config would run here.

    Raises `UserError` if there is none.
    """
    workdir = path_of(name, "the policy")
    if (workdir / "checkpoints").is_dir():
        config, checkpoints = open_run(workdir)
        checkpoints.bind(identity)
        trained = policy_of_run(checkpoints, config, setup_of(config), name)
        return trained, {"identity": checkpoints.identity_of(trained.updates)}
    params, config, about = load_policy(name)
    return TrainedPolicy(params, config, name, about["updates"]), about


def open_run(workdir: pathlib.Path) -> tuple[RunConfig, Checkpoints]:
    """The config and the checkpoints of a run; `UserError` if it has none."""
    config = read_config(workdir)
    checkpoints = Checkpoints(workdir, config.flat(), config.train.keep, read_only=True)
    if not checkpoints.steps():
        raise UserError(f"{workdir} holds no checkpoint; --workdir must be the folder of a training run")
    return config, checkpoints


def policy_of_run(
    checkpoints: Checkpoints, config: RunConfig, setup: Setup, name: str, step: int | None = None
) -> TrainedPolicy:
    """The policy of the best checkpoint of the run `name`, or of that of update `step`."""
    like = jax.eval_shape(lambda: init_state(jax.random.key(0), setup))
    restored = checkpoints.restore(like, checkpoints.best_step() if step is None else step)
    assert restored is not None
    updates, state, _ = restored
    return TrainedPolicy(state.params, config, name, updates)
