"""Numbered snapshots of a pytree on disk: Orbax, with a seal that shows any damage.

    store.write(step, to_host(tree), {"score": 0.5})
    arrays, meta = store.read(step)
    tree = to_device(arrays, like=tree)

`directory/<step>` is an Orbax checkpoint: item `state` maps the path of each leaf to a numpy array, item
`meta` is JSON and holds a sha256 over everything.  The structure is not stored, so that NamedTuples, empty
optimizer states and None come back as what they are.  Orbax writes a step under another name and renames it
when complete, so a killed save leaves no step behind; but it does not notice a flipped bit in an array,
hence the sha256.
"""

import dataclasses
import hashlib
import json
import logging as standard_logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

FAILURES = (OSError, ValueError, RuntimeError)  # of the disk, as Orbax and tensorstore tell of them


class StepStore:
    """The latest `keep` steps in a directory and besides them the one with the highest score.

    Args:
      directory: absolute.
      keep: how many of the latest to keep.
      read_only: makes, removes and moves nothing; else remains of killed saves are cleaned up.

    Orbax's own log appears at debug verbosity only: what it complains of is raised here, once.
    """

    def __init__(self, directory: pathlib.Path, keep: int, read_only: bool):
        self._scores: dict[int, float | None] = {}
        _quiet_orbax()
        policy = AnyPreservationPolicy([LatestN(keep), _Best(self.best)])
        options = ocp.CheckpointManagerOptions(
            read_only=read_only, cleanup_tmp_directories=not read_only, preservation_policy=policy
        )
        self._manager = ocp.CheckpointManager(directory, options=options)

    def best(self, steps: Sequence[int]) -> int | None:
        """The one with the highest `meta["score"]`, the later of equals; None if none has a score."""
        for step in {*steps} - {*self._scores}:
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
                self._scores[step] = meta["score"]
            except Exception:  # a damaged step is nobody's best
                self._scores[step] = None
        ranked = [(score, step) for step in steps if (score := self._scores[step]) is not None]
        return max(ranked)[1] if ranked else None

    def write(self, step: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Writes in the background; `arrays` must not change until `wait`.  Raises `FAILURES`."""
        sealed = {**meta, "step": step}
        sealed["sha256"] = digest(arrays, sealed)
        self._scores[step] = meta["score"]
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(sealed))
        self._manager.save(step, args=items, force=True)

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and meta as they were written; raises an exception of any kind if they are damaged."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        items = self._manager.restore(step, args=args)
        if items.meta.pop("sha256") != digest(items.state, items.meta) or items.meta["step"] != step:
            raise ValueError("its content does not match its sha256")
        return items.state, items.meta

    def wait(self) -> None:
        """Until the last write is on disk; raises `FAILURES` if that cannot be."""
        self._manager.wait_until_finished()

    def reload(self) -> None:
        """To be called when something else has changed the directory, or a write has failed."""
        self._manager.reload()

    def close(self) -> None:
        """Ends the background threads."""
        self._manager.close()


def complete_steps(directory: pathlib.Path) -> list[int]:
    """The steps in a directory, ascending; none if it does not exist."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(path.name) for path in paths if path.name.isdecimal() and path.is_dir())


@dataclasses.dataclass
class _Best:
    """Preservation policy: the step that `choose` picks among all."""

    choose: Callable[[list[int]], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = self.choose([info.step for info in checkpoints])
        return [info.step == best for info in checkpoints]


def reason(error: Exception) -> str:
    """What the operating system said, which tensorstore has in its text, or else the gist of the error."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    gist = (str(error) or repr(error)).splitlines()[0].split(" in OCDBT database")[0][:150]
    return os.strerror(number).lower() if number else gist


def kinds(tree: Any) -> dict[str, str]:
    """Path -> dtype and shape of each leaf."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named(tree).items()}


def to_host(tree: Any) -> dict[str, np.ndarray]:
    """Path -> a copy of each leaf that has elements (Orbax holds no others); of a PRNG key, its data.

    Never views: the next update is free to overwrite the buffers of a donated state.
    """
    leaves = {name: leaf for name, leaf in _named(tree).items() if leaf.size}
    return {name: np.array(jax.random.key_data(x) if _is_key(x) else x) for name, x in leaves.items()}


def to_device(arrays: Mapping[str, np.ndarray], like: Any) -> Any:
    """The tree that `to_host` was given, with the treedef, kinds of keys and shardings of `like`.

    Args:
      arrays: what `to_host` returned.
      like: a tree of arrays or `ShapeDtypeStruct`s of the same `kinds`.
    """
    leaves = [_placed(arrays.get(name), leaf) for name, leaf in _named(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _placed(array: np.ndarray | None, like: Any) -> jax.Array:
    # An uncommitted array stays one: `jit` may still move it to where its other arguments are.
    sharding = like.sharding if getattr(like, "committed", True) else None
    value = jax.device_put(jnp.zeros(like.shape, like.dtype) if array is None else jnp.array(array), sharding)
    if _is_key(like):
        value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(jnp.empty((), like.dtype)))
    return value


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def digest(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> str:
    """sha256 of the names, dtypes, shapes and bytes of all arrays and of `meta` as JSON."""
    sha256 = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        sha256.update(f"{name} {array.dtype} {array.shape}".encode())
        sha256.update(array.tobytes())
    return sha256.hexdigest()


def _quiet_orbax() -> None:
    """One failed read or write makes Orbax print dozens of tracebacks; none of them reaches the console."""
    logging.get_absl_logger().addFilter(_is_wanted)
    # Orbax reads leaves at once and leaves the others' failures behind when the first one fails.
    standard_logging.getLogger("asyncio").addFilter(_is_no_leftover)
    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)


def _is_wanted(record: Any) -> bool:
    return f"{os.sep}orbax{os.sep}checkpoint{os.sep}" not in record.pathname or logging.level_debug()


def _is_no_leftover(record: Any) -> bool:
    return not record.getMessage().startswith("Task exception was never retrieved")


@dataclasses.dataclass
class _UnraisableHook:
    """Drops what tensorstore's callbacks say after Orbax, at the first failure, has left the other ones."""

    otherwise: Callable[[Any], Any]

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.otherwise(unraisable)
