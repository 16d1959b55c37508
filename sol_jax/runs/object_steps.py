"""Numbered snapshots on an object store: one object each, which is there when it is whole.

`directory/<step>.safetensors` has the arrays, and the rest as JSON in its head.  Orbax is for folders: on
stores it needs a native driver of tensorstore's, which there is for few of those that epath opens, and writes
a step as many objects.  A state here is a policy's, of some MB.
"""

import concurrent.futures
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sol_jax.files import as_os_errors, is_remote, parse_json, write_whole
from sol_jax.runs.orbax_store import complete_steps as folder_steps
from sol_jax.runs.orbax_store import digest
from sol_jax.runs.tensors import pack, unpack

SUFFIX = ".safetensors"


class ObjectStore:
    """What `StepStore` is for folders, with the same methods and arguments."""

    def __init__(self, directory: pathlib.Path, keep: int, read_only: bool):
        self._directory, self._keep, self._read_only = directory, keep, read_only
        self._scores: dict[int, float | None] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._writing: concurrent.futures.Future | None = None

    def best(self, steps: Sequence[int]) -> int | None:
        """The one with the highest `meta["score"]`, the later of equals; None if none has a score."""
        for step in {*steps} - {*self._scores}:
            try:
                self._scores[step] = self.read(step)[1]["score"]
            except Exception:  # a damaged step is nobody's best
                self._scores[step] = None
        ranked = [(score, step) for step in steps if (score := self._scores[step]) is not None]
        return max(ranked)[1] if ranked else None

    def write(self, step: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Writes in the background; `arrays` must not change until `wait`, which raises what goes wrong."""
        sealed = {**meta, "step": step}
        sealed["sha256"] = digest(arrays, sealed)
        if jax.process_index() == 0:  # every process holds all of the state
            self._writing = self._thread.submit(self._write, step, dict(arrays), sealed)

    def _write(self, step: int, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        write_whole(step_path(self._directory, step), pack(arrays, {"meta": json.dumps(meta)}))
        self._scores[step] = meta["score"]
        steps = complete_steps(self._directory)
        for old in {*steps[: -self._keep]} - {self.best(steps)}:
            with as_os_errors():
                step_path(self._directory, old).unlink(missing_ok=True)

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and meta as they were written; raises an exception of any kind if they are damaged."""
        arrays, about = unpack(step_path(self._directory, step).read_bytes())
        meta = parse_json(about["meta"])
        if meta.pop("sha256") != digest(arrays, meta) or meta["step"] != step:
            raise ValueError("its content does not match its sha256")
        return arrays, meta

    def wait(self) -> None:
        """Until the last write is there; raises `orbax_store.FAILURES` if that cannot be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def reload(self) -> None:
        """To be called when something else has changed the directory, or a write has failed."""
        self._scores.clear()

    def close(self) -> None:
        """Ends the background thread."""
        self._thread.shutdown()


def holds_objects(directory: pathlib.Path) -> bool:
    """Whether steps are objects there: on an object store, and in a copy of what was on one."""
    return is_remote(directory) or any(_step_of(path) is not None for path in directory.glob(f"*{SUFFIX}"))


def complete_steps(directory: pathlib.Path) -> list[int]:
    """The steps in a directory, ascending; none if it does not exist."""
    if not holds_objects(directory):
        return folder_steps(directory)
    with as_os_errors():
        paths = list(directory.iterdir()) if directory.is_dir() else []
    return sorted(step for path in paths if (step := _step_of(path)) is not None)


def step_path(directory: pathlib.Path, step: int) -> pathlib.Path:
    """The folder, or the object, of a step."""
    return directory / (f"{step}{SUFFIX}" if holds_objects(directory) else str(step))


def _step_of(path: pathlib.Path) -> int | None:
    found = re.fullmatch(rf"(\d+){re.escape(SUFFIX)}", path.name)
    return int(found[1]) if found else None
