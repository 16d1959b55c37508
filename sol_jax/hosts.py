"""Several processes as one program: joining them, what the first decides, and what all must agree on.

Every host runs the same command.  The first process writes files and makes decisions; the others follow.  A
process that goes away ends the rest with a sentence: see `lost`.

Nothing here is used by a program of one process, in which `tell(x)` is x and `together(work)` is work().
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sol_jax.errors import UserError
from sol_jax.files import as_os_errors, write_whole
from sol_jax.libtpu import set_flags
from sol_jax.options import Options, option

_T = TypeVar("_T")
HEARTBEAT_SECONDS = 60  # without a sign of life, after which a process counts as gone
# Variables of launchers that start several processes -> whether a value says so.
_LAUNCHERS: Mapping[str, Callable[[str], bool]] = {
    "JAX_COORDINATOR_ADDRESS": bool,
    "SLURM_NTASKS": lambda value: int(value) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda value: int(value) > 1,
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,
    "MEGASCALE_COORDINATOR_ADDRESS": bool,
}
SHARED_SECONDS = 30  # that a network file system may take to show a file
# What JAX, Gloo and gRPC say where another process has gone.
_GONE = (
    "heartbeat",
    "Connection closed by peer",
    "Connection reset by peer",
    "Gloo",
    "UNAVAILABLE",
    "ABORTED",
)


@dataclasses.dataclass(frozen=True)
class HostOptions(Options):
    """How the processes of a run find each other.  TPU pods, SLURM and Open MPI need none of it."""

    where = "--"
    distributed: Literal["auto", "on", "off"] = option(
        "auto", "whether this is one of several processes: if it is started as one, yes, or no"
    )
    coordinator: str = option("", "HOST:PORT of process 0, where nothing else tells it")
    num_processes: int | None = option(None, "likewise: how many there are", at_least=1)
    process_id: int | None = option(None, "likewise: which this is, from 0", at_least=0)
    init_timeout: int = option(
        1800, "seconds in which all must have come; pods can be slow to start", at_least=1
    )

    def check(self) -> None:
        said = bool(self.coordinator), self.num_processes is not None, self.process_id is not None
        if any(said) and not all(said):
            raise UserError("give --coordinator, --num_processes and --process_id, or none of them")
        if any(said) and self.distributed == "off":
            raise UserError("--distributed is off; it must be auto or on with --coordinator")
        if self.coordinator and not self.coordinator.rpartition(":")[2].isdigit():
            raise self.wrong("coordinator", "HOST:PORT")
        if self.process_id is not None and self.process_id >= (self.num_processes or 0):
            raise self.wrong("process_id", f"less than --num_processes = {self.num_processes}")


class AgreedError(UserError):
    """A mistake that all processes know of, so that the first one tells of it for all."""


@contextlib.contextmanager
def joined(options: HostOptions) -> Iterator[None]:
    """Makes this process one of several, if it is; must come before anything that asks JAX for devices.

    At the end all wait for each other, so that a launcher does not take the first to leave for a failure;
    after a fault nobody waits.  Raises `UserError` if the others cannot be found.
    """
    set_flags()
    if _is_one_of_several(options):
        _initialize(options)
    if not jax.distributed.is_initialized():
        yield
        return
    if options.distributed == "on" and jax.process_count() == 1:
        jax.distributed.shutdown()
        raise UserError(
            "--distributed is on, but there is one process; start one on every host, or leave it out"
        )
    try:
        yield
    except Exception as fault:
        if jax.process_count() == 1:
            raise
        _leave(fault)
    jax.distributed.shutdown()


def _launcher() -> str:
    """The variable by which a launcher says that it started several processes, as NAME=VALUE; or nothing."""
    for name, says in _LAUNCHERS.items():
        with contextlib.suppress(ValueError):  # a number that is none
            if name in os.environ and says(os.environ[name]):
                return f"{name}={os.environ[name]}"
    return ""


def _is_one_of_several(options: HostOptions) -> bool:
    if options.distributed != "auto":
        return options.distributed == "on"
    if options.coordinator or _launcher():
        return True
    # On a TPU's host JAX finds the others by itself.
    return importlib.util.find_spec("libtpu") is not None and "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")


def _initialize(options: HostOptions) -> None:
    # JAX would end the process itself, with a page of addresses, when its own time is over.
    late = threading.Timer(options.init_timeout, _give_up, (options,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            options.coordinator or None,
            options.num_processes,
            options.process_id,
            initialization_timeout=options.init_timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError:  # nothing tells where the others are
        if options.distributed == "on":
            raise UserError(
                "--distributed is on, but nothing here says where the other processes are; give "
                "--coordinator, --num_processes and --process_id"
            ) from None
    finally:
        late.cancel()


def _give_up(options: HostOptions) -> None:
    where = options.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "of process 0")
    print(
        f"error: the coordinator {where} was not reached, or not all processes came, within "
        f"{options.init_timeout} seconds (--init_timeout)",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _leave(fault: Exception) -> NoReturn:
    """Ends the process at once: the others must not be waited for."""
    if not isinstance(fault, AgreedError) or first():
        if told := str(fault) if isinstance(fault, UserError) else lost(fault):
            print(f"error: {told}", file=sys.stderr)
        else:
            traceback.print_exception(fault)
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(fault, AgreedError) and first():
        time.sleep(1)  # the others would end with a complaint about its going
    os._exit(2 if isinstance(fault, UserError) else 1)


def lost(fault: BaseException) -> str:
    """What to say if a fault means that another process has gone; empty if it does not."""
    if jax.process_count() == 1 or not isinstance(fault, RuntimeError | ValueError):
        return ""
    text = str(fault)
    if not any(sign in text for sign in _GONE):
        return ""
    gist = text.strip().splitlines()[0][:200]
    return (
        f"process {jax.process_index()} of {jax.process_count()} has lost another one ({gist}); "
        "what the last checkpoint holds is safe: start all of them again to go on"
    )


def first() -> bool:
    """Whether this is the process that writes and decides."""
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """A value of every process (anything JSON can hold), in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:size]).decode()) for row, size in zip(rows, np.ravel(sizes), strict=True)]


def tell(value: Any) -> Any:
    """The first process' value (anything JSON can hold), in all of them."""
    return gathered(value if first() else None)[0]


def tell_arrays(arrays: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
    """The first process' arrays, or its None, in all of them."""
    if jax.process_count() == 1:
        return None if arrays is None else list(arrays)
    heads = tell(None if arrays is None else [[array.dtype.str, array.shape] for array in arrays])
    if heads is None:
        return None
    mine = arrays or [np.zeros(shape, dtype) for dtype, shape in heads]
    told = []
    for array, (dtype, shape) in zip(mine, heads, strict=True):
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)  # JAX would narrow 64 bits
        shared = multihost_utils.broadcast_one_to_all(data) if len(data) else data
        told.append(np.frombuffer(np.asarray(shared).tobytes(), dtype).reshape(shape))
    return told


def any_of(flag: bool) -> bool:
    """Whether a flag is set in any process."""
    return flag if jax.process_count() == 1 else any(gathered(bool(flag)))


def together(work: Callable[[], _T]) -> _T:
    """What `work` returns, if it succeeds in every process; else each raises `AgreedError`.

    For work in which one process may fail alone, as on a host that lacks a file: nobody is left waiting.
    Work may itself use this: what was agreed on inside is agreed on.
    """
    if jax.process_count() == 1:
        return work()
    fault, results = "", []
    try:
        results.append(work())
    except AgreedError:
        raise
    except UserError as error:
        fault = str(error)
    for process, told in enumerate(gathered(fault)):
        if told:  # by the first that has it, which tells of it as one process would
            raise AgreedError(f"process {process}: {told}" if process else told)
    return results[0]


def first_then_others(work: Callable[[], _T]) -> _T:
    """`together`, where the first process does the work and the others, after it, find what it left on
    disk."""
    if jax.process_count() == 1:
        return work()
    mine = together(lambda: [work()] if first() else [])
    others = together(lambda: [] if first() else [work()])
    return [*mine, *others][0]


def check_same(what: str, value: Mapping[str, Any]) -> None:
    """Raises `UserError`, naming the field, in all processes if their values are not the same."""
    values = gathered(dict(value))
    for process, other in enumerate(values):
        for name in sorted({*values[0], *other}):
            here, there = values[0].get(name), other.get(name)
            if here != there:
                raise AgreedError(
                    f"{what}{name} is {here!r} in process 0 and {there!r} in process {process}; "
                    "they must agree"
                )


def refuse_several(program: str) -> None:
    """Raises `UserError` in a program that runs in one process, if a launcher has started several."""
    if said := _launcher() or (f"{jax.process_count()} processes" if jax.process_count() > 1 else ""):
        raise UserError(
            f"{program} runs in one process, on all devices of one host, and this is one of several "
            f"({said}); start it once"
        )


def summary() -> str:
    """Processes and devices, for the first line of a log."""
    devices, count = jax.devices(), jax.process_count()
    processes = f"{count} processes" if count > 1 else "1 process"
    kind = devices[0].device_kind
    found = f"{len(devices)} devices" if len(devices) > 1 else "1 device"
    return f"{processes}, {found} ({kind}, {jax.local_device_count()} here)"


def same_folder(folder: pathlib.Path, name: str) -> None:
    """Raises `UserError` in all processes if one of them sees another folder under this path."""
    if jax.process_count() == 1:
        return
    file = folder / "hosts.json"
    mark = tell(uuid.uuid4().hex)

    def write() -> None:
        try:
            write_whole(file, json.dumps({"mark": mark, "processes": jax.process_count()}))
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error

    together(lambda: write() if first() else None)
    deadline = time.monotonic() + SHARED_SECONDS
    while not (seen := _reads(file, mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [process for process, sees in enumerate(gathered(seen)) if not sees]
    if blind:
        raise AgreedError(
            f"{name} {folder} is not the same folder for all hosts: process {blind[0]} does not see what "
            "process 0 wrote there; it must be on storage that they share"
        )


def _reads(file: pathlib.Path, mark: str) -> bool:
    try:
        with as_os_errors():
            content = file.read_text()
        return json.loads(content)["mark"] == mark
    except (OSError, ValueError, KeyError):
        return False
