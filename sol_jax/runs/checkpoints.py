"""Checkpoints of a run: written while training goes on, verified when read, resumed exactly.

    checkpoints = Checkpoints(workdir, config.flat(), keep=3)
    found = checkpoints.restore(state)  # (step, state, iterator state), or None in a new workdir
    checkpoints.save(step, state, iterator.state(), score)
    checkpoints.close()

How a step lies on disk is the business of `orbax_store`, and on an object store of `object_steps`.
"""

import contextlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from sol_jax import hosts
from sol_jax.errors import UserError
from sol_jax.files import is_remote, path_of, write_whole
from sol_jax.models.identity import differences
from sol_jax.runs.config import RunConfig
from sol_jax.runs.object_steps import ObjectStore, complete_steps, holds_objects, step_path
from sol_jax.runs.orbax_store import FAILURES, StepStore, kinds, reason, to_device, to_host

# What changes how a run goes, but not what it learns (beyond rounding).
FREE_FIELDS = ("train.", "eval.", "memory.", "mesh.", "data.cache_dir", "kernels")
# Where files are matters only as long as it is not known what they hold (`Checkpoints.bind`).
PATHS = {"weights": "model.path", "documents": "data.source", "prices": "axes.prices"}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")


class Checkpoints:
    """The latest `keep` checkpoints of a workdir, and besides them the one with the highest score.

    Args:
      workdir: made if missing.
      config: dotted path -> value, of the run to start or to continue; also written to `config.json`.
      keep: how many of the latest to keep.
      read_only: for evaluation: nothing is made, moved or cleaned up, as a run may be writing there.
      commit: of the code that trains, for `commit_of`.

    Raises `UserError` if the workdir cannot be used.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: Mapping[str, Any],
        keep: int,
        read_only: bool = False,
        commit: str = "",
    ):
        where = path_of(workdir, "the workdir")
        self._workdir = where if is_remote(where) else where.absolute()
        self._directory = self._workdir / "checkpoints"
        self._config = json.loads(json.dumps(dict(config)))  # as a checkpoint will give it back
        self._read_only, self._commit = read_only, commit
        self._identity: dict[str, str] = {}
        self._saving = -1  # the step of the last write
        if not complete_steps(self._directory):  # else once `restore` has found that the config is theirs
            self._write_config()
        store = ObjectStore if holds_objects(self._directory) else StepStore
        self._store: ObjectStore | StepStore = store(self._directory, keep, read_only)

    def steps(self) -> list[int]:
        """Steps whose checkpoint is complete, ascending; one that is still being written is not."""
        return complete_steps(self._directory)

    def latest_step(self) -> int | None:
        """The newest complete step."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step with the highest score, the later of equals; None if none has a score."""
        return self._store.best(self.steps())

    def commit_of(self, step: int) -> str:
        """The commit of the code that wrote a checkpoint; empty if it does not say, or is damaged."""
        return self._read(step)[2].get("commit", "")

    def bind(self, identity: Mapping[str, str]) -> None:
        """Says which model the run is of (see `models.identity`): saved, and compared when restoring.

        `documents` may be one of its parts, the fingerprint of the text, and `prices`, that of a cost model.
        """
        self._identity = dict(identity)

    def identity_of(self, step: int) -> dict[str, str]:
        """The model that a checkpoint's run is of; empty if it does not say, or is damaged."""
        return self._read(step)[2].get("identity", {})

    def save(self, step: int, state: Any, iterator: Mapping[str, Any], score: float | None = None) -> None:
        """Copies `state` and writes it in the background; skips a step that exists.

        Args:
          step: updates done.
          state: a pytree of arrays; with several processes, each must hold all of it.
          iterator: what the data iterator needs to go on from here; anything JSON can hold.
          score: of the evaluation at this step, higher is better; none if it is not finite.

        Raises `UserError` if this save, or the one before it, fails.
        """
        self.wait()
        if hosts.tell(step in self.steps()):
            return
        arrays = to_host(state)
        meta = {
            "iterator": dict(iterator),
            "score": float(score) if score is not None and math.isfinite(score) else None,
            "config": self._config,
            "leaves": kinds(state),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "commit": self._commit,
            "identity": self._identity,
        }
        self._saving = step
        with self._save_errors():
            self._store.write(step, arrays, meta)

    def wait(self) -> None:
        """Until the last save is on disk; raises `UserError` if it could not be written."""
        with self._save_errors():
            self._store.wait()

    def close(self) -> None:
        """Waits, with the errors of `wait`, and ends the background threads."""
        with contextlib.closing(self._store):
            self.wait()

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest good checkpoint: step, state, iterator state; None if there is no checkpoint at all.

        Damaged ones are passed over with a warning, and moved out of the way of later saves.

        Args:
          like: arrays or `ShapeDtypeStruct`s; gives the treedef, the kinds of keys and the shardings.
          step: take this one and no other.

        Raises `UserError` if no good one is left, or if it belongs to another config or model.
        """
        self.wait()
        steps = hosts.tell(self.steps())  # all processes must try the same ones
        if step is not None and step not in steps:
            raise UserError(f"{self._directory}: no checkpoint of step {step}; the steps are {steps}")
        damaged: dict[int, str] = {}
        for candidate in reversed(steps if step is None else [step]):
            problem, arrays, meta = self._read(candidate)
            if problem:
                damaged[candidate] = problem
                continue
            known = meta.get("identity", {})  # older checkpoints do not say, and are known by paths
            held = [path for part, path in PATHS.items() if part in known and part in self._identity]
            now = _binding(self._config, held)
            # A field that came after the run has its default: what the code did before.
            came_later = {name: value for name, value in _defaults().items() if name in now}
            self._check_same("config", candidate, {**came_later, **_binding(meta["config"], held)}, now)
            self._check_identity(candidate, known)
            self._check_same("model or version", candidate, meta["leaves"], kinds(like))
            self._write_config()
            self._pass_over(damaged, candidate)
            return candidate, to_device(arrays, like), meta["iterator"]
        if not damaged:
            return None
        advice = f"the steps are {self.steps()}"
        if step is None:
            advice = "no other is left; put one back from a backup, or move this directory away to start over"
        told = ", ".join(f"step {step} is damaged ({problem})" for step, problem in damaged.items())
        raise UserError(f"{self._directory}: {told}; {advice}")

    def _read(self, step: int) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
        """What is wrong with a step (empty: nothing), its arrays and the rest."""
        try:
            problem, (arrays, meta) = "", self._store.read(step)
        except Exception as error:  # bad bytes make Orbax, tensorstore and JSON fail in many ways
            problem, arrays, meta = reason(error), {}, {}
        if hosts.any_of(bool(problem)):  # all processes must resume from the same step
            problem = problem or "another process cannot read it"
        return problem, arrays, meta

    def _pass_over(self, damaged: Mapping[int, str], used: int) -> None:
        """Says which steps are damaged and moves them aside; nothing is deleted."""
        told = "%s: the checkpoint of step %d is damaged (%s) and kept as %s; that of step %d is used"
        for step, problem in damaged.items():
            there = step_path(self._directory, step)
            kept = there if self._read_only else there.with_name(f"damaged-{there.name}")
            while kept.exists() and not self._read_only:
                kept = kept.with_name(f"{kept.name}-again")
            logging.warning(told, self._directory, step, problem, kept.name, used)
            if jax.process_index() == 0 and not self._read_only:
                there.rename(kept)
        multihost_utils.sync_global_devices("damaged checkpoints are out of the way")
        self._store.reload()

    def _check_same(self, what: str, step: int, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        names = sorted({*saved, *now})
        triples = [(name, saved.get(name, "absent"), now.get(name, "absent")) for name in names]
        told = [f"{name} was {then!r} and is now {new!r}" for name, then, new in triples if then != new]
        if told:
            more = f" and {len(told) - 5} more" if len(told) > 5 else ""
            raise UserError(
                f"{self._directory}: the checkpoint of step {step} is of another {what}: "
                f"{', '.join(told[:5])}{more}; use another workdir, or what the checkpoint was made with"
            )

    def _check_identity(self, step: int, saved: Mapping[str, str]) -> None:
        if told := differences(saved, self._identity):
            other = {name for name in saved if saved[name] != self._identity.get(name, saved[name])}
            what, files = "model", "model files"
            if other == {"prices"}:
                what, files = "cost model", "config.axes.prices"
            raise UserError(
                f"{self._directory}: the checkpoint of step {step} is of another {what}: {told}; "
                f"use another workdir, or the {files} that the run began with"
            )

    def _write_config(self) -> None:
        """Writes `config.json`, all or nothing; also the proof that the workdir can be written to."""
        if self._read_only or jax.process_index() != 0:
            return
        try:
            if not is_remote(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
            write_whole(self._workdir / "config.json", json.dumps(self._config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self._workdir}: cannot be used as a workdir: {reason(error)}") from error

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            self._store.reload()  # it has already forgotten what this save was to replace
            told = f"{self._directory}: step {self._saving} could not be saved ({reason(error)})"
            raise UserError(f"{told}; the newest good checkpoint is of step {self.latest_step()}") from error


def _binding(config: Mapping[str, Any], known_by_content: Sequence[str] = ()) -> dict[str, Any]:
    free = (*FREE_FIELDS, *known_by_content)
    return {name: value for name, value in config.items() if not name.startswith(free)}


def _defaults() -> dict[str, Any]:
    """Every option's default, as a checkpoint would give it back."""
    return json.loads(json.dumps(RunConfig().flat()))
