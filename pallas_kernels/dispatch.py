"""Which implementation of an op runs: XLA, a Pallas kernel, or a Triton kernel through jax-triton.

Ops call `choose` while they are traced.  None (or "auto") takes what `tuning.TABLE` says pays for the
platform and shape; a named implementation runs or raises `UnavailableError` with the reason.  The GPU kernels
are for NVIDIA's GPUs from Ampere on (some hold PTX); an AMD GPU is a platform "rocm", for which there are
none.  On a CPU Pallas' GPU kernels are interpreted, and "native" are those in C++ (`pallas_kernels.native`);
where these were not compiled, auto says why, once, and takes XLA.

What auto picks is logged once for each shape, at the level DEBUG of the logger `pallas_kernels.dispatch`, so
programs are quiet about it by default.  A program of absl's shows it with
`--logger_levels=pallas_kernels.dispatch:DEBUG`, or among everything else with `--verbosity=1`.
"""

import contextlib
import functools
import importlib.metadata
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax

from pallas_kernels import native, pallas_triton
from pallas_kernels.errors import UnavailableError
from pallas_kernels.tuning import NO_END, TABLE, Kernel

IMPLEMENTATIONS = ("xla", "pallas", "triton", "native")
OLDEST_GPU = (8, 0)  # compute capability that Triton's bfloat16 and tensor floats need

_log = logging.getLogger(__name__)
_platform: ContextVar[str | None] = ContextVar("platform", default=None)


def choose(
    op: str,
    implementation: str | None,
    *,
    platform: str | None = None,
    asks_again: bool = False,
    **facts: Any,
) -> str:
    """Returns the implementation of `op` to trace: one of IMPLEMENTATIONS.

    `facts` are what the table's conditions are about (rows, hidden, context ...); `platform` is "cpu", "gpu",
    "tpu" or "rocm", by default the one traced for.  With `asks_again` the op chooses once more if this is a
    kernel, when it knows its rows; so only that later pick is logged.

    Raises `UnavailableError` if a named implementation cannot run, and ValueError if there is none of the
    name.
    """
    platform = _normal(platform) or current_platform()
    if implementation in (None, "auto"):
        pays = (name for name in IMPLEMENTATIONS[1:] if _pays(op, name, platform, facts))
        picked = next(pays, "xla")
        if picked == "xla" or not asks_again:
            log_once(f"auto picks {picked} for {op} on {platform}", **facts)
        return picked
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: implementation {implementation!r} is none of auto, {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation != "xla":
        _require(op, implementation, platform, facts)
    return implementation


def log_once(message: str, **facts: Any) -> None:
    """Logs what was decided for an op of such `facts`, unless the same was logged before.

    This tells of decisions, not of runs: under vmap an op is traced, and decides, for one row first and then
    for all of them, and only the last of these becomes a part of the program.
    """
    if not _log.isEnabledFor(logging.DEBUG):
        return
    details = ", ".join(f"{name}={fact}" for name, fact in sorted(facts.items()))
    _log_new(f"{message} ({details})" if facts else message)


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


@functools.cache
def _log_new(message: str) -> None:
    _log.debug(message)


def without_triton(implementation: str | None) -> str | None:
    """Returns the implementation meant by "triton" where jax-triton has no kernel of the op: Pallas'.

    With a jax whose Pallas cannot go through Triton any more it is XLA's on GPUs, which is logged.
    """
    if implementation != "triton":
        return implementation
    if current_platform() == "gpu" and (problem := pallas_triton.problem()) is not None:
        log_once(f"triton is xla where jax-triton has no kernel, for {problem}")
        return "xla"
    return "pallas"


def only_native(implementation: str | None) -> str | None:
    """Returns the implementation meant by "pallas" or "triton" where CPUs alone have a kernel: XLA's."""
    return "xla" if implementation in ("pallas", "triton") else implementation


def _pays(op: str, name: str, platform: str, facts: Mapping[str, Any]) -> bool:
    kernel = TABLE.get((op, name, platform), Kernel())
    if kernel.pays is None:
        return False
    if (problem := _problem_of_platform(op, name, platform)) is not None:
        if name == "native":
            _say_once(f"decode steps go without the CPU's kernels: {problem[0]}")
        return False
    return not any(_unmet({**kernel.takes, **kernel.pays}, facts))


def _require(op: str, implementation: str, platform: str, facts: Mapping[str, Any]) -> None:
    if (problem := _problem_of_platform(op, implementation, platform)) is not None:
        raise UnavailableError(op, implementation, f"run on this platform ({platform})", *problem)
    # A CPU interprets the GPU's kernel, so it takes what that takes.
    kernel = TABLE[op, implementation, _runs_as(implementation, platform)]
    for name, reason in _unmet(kernel.takes, facts):
        cannot = "take numbers of this type" if name == "dtype" else "take this shape"
        raise UnavailableError(op, implementation, cannot, reason, "'xla'")


def _problem_of_platform(op: str, implementation: str, platform: str) -> tuple[str, str] | None:
    """Returns the reason and what to use instead, or None if the op has such a kernel for the platform."""
    if implementation == "triton" and platform == "cpu":
        return "jax-triton has no interpreter", "'pallas' (interpreted) or 'xla'"
    if implementation == "native" and platform == "cpu" and (problem := native.problem()) is not None:
        return problem, "'xla'"
    runs_as = _runs_as(implementation, platform)
    if (op, implementation, runs_as) not in TABLE:
        others = [name for name in IMPLEMENTATIONS[1:] if (op, name, _runs_as(name, platform)) in TABLE]
        return f"it has no {runs_as} kernel", " or ".join(map(repr, [*others, "xla"]))
    if (implementation, runs_as) == ("pallas", "gpu") and (problem := pallas_triton.problem()) is not None:
        return problem, "'xla'"
    if platform == "gpu" and (problem := gpu_problem()) is not None:
        return problem, "'xla'"
    if implementation == "triton" and (problem := triton_problem()) is not None:
        return problem, "'pallas' or 'xla'"
    return None


def _runs_as(implementation: str, platform: str) -> str:
    """Returns the platform whose entry of the table holds: a CPU interprets the GPU's kernels."""
    return "gpu" if platform == "cpu" and implementation != "native" else platform


def _unmet(conditions: Mapping[str, Collection[Any]], facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields each fact that does not meet its condition, with a clause that says so.

    A fact that is not given meets every condition.
    """
    for name, allowed in conditions.items():
        if name in facts and facts[name] not in allowed:
            yield name, f"{name} is {facts[name]} and must be {_describe(allowed)}"


def _describe(allowed: Collection[Any]) -> str:
    if not isinstance(allowed, range):
        return " or ".join(map(str, allowed))
    steps = f" in steps of {allowed.step}" if allowed.step > 1 else ""
    return (
        f"at least {allowed.start}{steps}"
        if allowed.stop >= NO_END
        else f"{allowed.start} to {allowed[-1]}{steps}"
    )


def gpu_problem() -> str | None:
    """Says why this machine's NVIDIA GPU cannot run the kernels; None if it can, or if there is no GPU."""
    if _backend() != "gpu":
        return None  # what is traced is for another machine
    found = _capability()
    if _version(found) >= OLDEST_GPU:
        return None
    oldest = ".".join(map(str, OLDEST_GPU))
    return f"this {jax.devices()[0].device_kind} has compute capability {found} and the kernels need {oldest}"


@functools.cache
def triton_problem() -> str | None:
    """Says why jax-triton cannot be used, or None.

    The installed versions decide; nothing is imported.
    """
    wanted = ((0, 4, 1), (3, 7)) if _version(jax.__version__) >= (0, 11) else ((0, 3, 1), (3, 6))
    for package, lowest in zip(("jax-triton", "triton"), wanted, strict=True):
        need = f"jax {jax.__version__} needs {package} >= {'.'.join(map(str, lowest))}"
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{need} and there is none (pip install 'sol_jax[triton]')"
        if _version(found) < lowest:
            return f"{need} and this is {found}"
    return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def current_platform() -> str:
    """Returns what is traced for: "cpu", "gpu", "tpu" or "rocm".

    Outside `tracing_for` it is the platform of JAX's default backend.
    """
    return _platform.get() or _backend()


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Makes ops that are traced inside choose and build for `platform`, which need not be here.

    jit does not know of this and would reuse what it traced for another platform: give it a new function.
    """
    token = _platform.set(_normal(platform))
    try:
        yield
    finally:
        _platform.reset(token)


def _normal(platform: str | None) -> str | None:
    return "gpu" if platform == "cuda" else platform


def _backend() -> str:
    """Returns the platform of this machine.

    JAX calls an AMD GPU "gpu" too, but its capability is a gfx number.
    """
    platform = _normal(jax.default_backend()) or "cpu"
    return "rocm" if platform == "gpu" and _capability().startswith("gfx") else platform


def _capability() -> str:
    """Returns the GPU's compute capability, such as "9.0"; one that tells none is taken to be new enough."""
    oldest = ".".join(map(str, OLDEST_GPU))
    return str(getattr(jax.devices()[0], "compute_capability", None) or oldest)


def interpret() -> bool:
    """Says whether Pallas kernels must be interpreted; on a CPU there is no other way to run them."""
    return current_platform() == "cpu"


def no_gradient(op: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn` (arrays to arrays) with a derivative that raises TypeError instead of being wrong.

    The LLM is frozen, so nothing needs the derivative.
    """
    guarded = jax.custom_jvp(fn)

    @guarded.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(
            f"{op}: no gradient goes through it, for the LLM is frozen; use jax.lax.stop_gradient"
        )

    return guarded
