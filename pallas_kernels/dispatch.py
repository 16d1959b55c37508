"""Which implementation of an op runs: XLA, a Pallas kernel, or a Triton kernel through jax-triton.

`choose` is called while an op is traced.  None (or "auto") takes what `tuning.TABLE` says pays for the
platform and shape; a named implementation runs or raises `UnavailableError` with the reason.  Nothing falls
back silently.
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

from pallas_kernels.errors import UnavailableError
from pallas_kernels.tuning import NO_END, TABLE, Kernel

IMPLEMENTATIONS = ("xla", "pallas", "triton")

_log = logging.getLogger(__name__)
_platform: ContextVar[str | None] = ContextVar("platform", default=None)


def choose(op: str, implementation: str | None, *, platform: str | None = None, **facts: Any) -> str:
    """The implementation of `op` to trace: one of IMPLEMENTATIONS.

    `facts` are what the table's conditions are about (rows, hidden, context ...); `platform` is "cpu", "gpu"
    or "tpu", by default the one traced for.
    """
    platform = _normal(platform) or current_platform()
    if implementation in (None, "auto"):
        kernels = ((name, TABLE.get((op, name, platform))) for name in IMPLEMENTATIONS)
        picked = next((name for name, kernel in kernels if kernel and _pays(name, kernel, facts)), "xla")
        _log_once(op, platform, picked, tuple(sorted(facts.items())))
        return picked
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: implementation {implementation!r} is none of auto, {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation != "xla":
        _require(op, implementation, platform, facts)
    return implementation


def without_triton(implementation: str | None) -> str | None:
    """What "triton" means for an op of which jax-triton has no kernel: the Pallas one."""
    return "pallas" if implementation == "triton" else implementation


def _pays(name: str, kernel: Kernel, facts: Mapping[str, Any]) -> bool:
    if kernel.pays is None or (name == "triton" and triton_problem() is not None):
        return False
    return not any(_unmet({**kernel.takes, **kernel.pays}, facts))


def _require(op: str, implementation: str, platform: str, facts: Mapping[str, Any]) -> None:
    if (problem := _problem_of_platform(op, implementation, platform)) is not None:
        raise UnavailableError(op, implementation, f"run on this platform ({platform})", *problem)
    # A CPU interprets the GPU's kernel, so it takes what that takes.
    kernel = TABLE[op, implementation, "gpu" if platform == "cpu" else platform]
    for reason in _unmet(kernel.takes, facts):
        raise UnavailableError(op, implementation, "take this shape", reason, "'xla'")


def _problem_of_platform(op: str, implementation: str, platform: str) -> tuple[str, str] | None:
    """(reason, what to use instead), or None if the op has such a kernel for the platform."""
    if implementation == "triton" and platform == "cpu":
        return "jax-triton has no interpreter", "'pallas' (interpreted) or 'xla'"
    runs_as = "gpu" if platform == "cpu" else platform
    if (op, implementation, runs_as) not in TABLE:
        others = [name for name in IMPLEMENTATIONS[1:] if (op, name, runs_as) in TABLE]
        return f"it has no {runs_as} kernel", " or ".join(map(repr, [*others, "xla"]))
    if implementation == "triton" and (problem := triton_problem()) is not None:
        return problem, "'pallas' or 'xla'"
    return None


def _unmet(conditions: Mapping[str, Collection[Any]], facts: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong, a clause for each condition that is not met; a fact that was not given meets any."""
    for name, allowed in conditions.items():
        if name in facts and facts[name] not in allowed:
            yield f"{name} is {facts[name]} and must be {_describe(allowed)}"


def _describe(allowed: Collection[Any]) -> str:
    if not isinstance(allowed, range):
        return " or ".join(map(str, allowed))
    steps = f" in steps of {allowed.step}" if allowed.step > 1 else ""
    return (
        f"at least {allowed.start}{steps}"
        if allowed.stop >= NO_END
        else f"{allowed.start} to {allowed[-1]}{steps}"
    )


@functools.cache
def _log_once(op: str, platform: str, picked: str, facts: tuple[tuple[str, Any], ...]) -> None:
    _log.info("%s on %s: %s (%s)", op, platform, picked, ", ".join(f"{name}={fact}" for name, fact in facts))


@functools.cache
def triton_problem() -> str | None:
    """Why jax-triton cannot be used, or None; decided from the installed versions, nothing is imported."""
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
    """What is traced for: "cpu", "gpu" or "tpu"; the default backend outside `tracing_for`."""
    return _platform.get() or _normal(jax.default_backend()) or "cpu"


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Ops traced inside choose and build for `platform`, for lowering to a device that is not here.

    jit remembers what it traced, whatever it was traced for: give it a new function.
    """
    token = _platform.set(_normal(platform))
    try:
        yield
    finally:
        _platform.reset(token)


def _normal(platform: str | None) -> str | None:
    return "gpu" if platform in ("cuda", "rocm") else platform


def interpret() -> bool:
    """Whether Pallas kernels must be interpreted: on a CPU there is no other way to run them."""
    return current_platform() == "cpu"


def no_gradient(op: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` (arrays to arrays) whose derivative is an error instead of a wrong number: the LLM is frozen."""
    guarded = jax.custom_jvp(fn)

    @guarded.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(
            f"{op}: no gradient goes through it, for the LLM is frozen; use jax.lax.stop_gradient"
        )

    return guarded
