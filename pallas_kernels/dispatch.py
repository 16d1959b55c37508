"""Which implementation of an op runs: XLA, a Pallas kernel, or a Triton kernel through jax-triton.

`choose` is called while an op is traced.  None (or "auto") takes what `tuning.TABLE` says pays for the
platform and shape; a named implementation runs or raises `UnavailableError` with the reason.  Nothing falls
back silently.  The GPU kernels are for NVIDIA's (some hold PTX) from Ampere on; an AMD GPU is a platform
"rocm", for which there are none.
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
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pallas_kernels.errors import UnavailableError
from pallas_kernels.tuning import NO_END, TABLE, Kernel

IMPLEMENTATIONS = ("xla", "pallas", "triton")
OLDEST_GPU = (8, 0)  # compute capability that Triton's bfloat16 and tensor floats need

_log = logging.getLogger(__name__)
_platform: ContextVar[str | None] = ContextVar("platform", default=None)


def choose(
    op: str, implementation: str | None, *, platform: str | None = None, log: bool = True, **facts: Any
) -> str:
    """The implementation of `op` to trace: one of IMPLEMENTATIONS.

    `facts` are what the table's conditions are about (rows, hidden, context ...); `platform` is "cpu", "gpu",
    "tpu" or "rocm", by default the one traced for.  What auto picks is logged, unless the op may ask again
    once it knows more: it then calls `logged`.
    """
    platform = _normal(platform) or current_platform()
    if implementation in (None, "auto"):
        pays = (name for name in IMPLEMENTATIONS[1:] if _pays(op, name, platform, facts))
        picked = next(pays, "xla")
        if log:
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


def _pays(op: str, name: str, platform: str, facts: Mapping[str, Any]) -> bool:
    kernel = TABLE.get((op, name, platform), Kernel())
    if kernel.pays is None or _problem_of_platform(op, name, platform) is not None:
        return False
    return not any(_unmet({**kernel.takes, **kernel.pays}, facts))


def _require(op: str, implementation: str, platform: str, facts: Mapping[str, Any]) -> None:
    if (problem := _problem_of_platform(op, implementation, platform)) is not None:
        raise UnavailableError(op, implementation, f"run on this platform ({platform})", *problem)
    # A CPU interprets the GPU's kernel, so it takes what that takes.
    kernel = TABLE[op, implementation, "gpu" if platform == "cpu" else platform]
    for name, reason in _unmet(kernel.takes, facts):
        cannot = "take numbers of this type" if name == "dtype" else "take this shape"
        raise UnavailableError(op, implementation, cannot, reason, "'xla'")


def _problem_of_platform(op: str, implementation: str, platform: str) -> tuple[str, str] | None:
    """(reason, what to use instead), or None if the op has such a kernel for the platform."""
    if implementation == "triton" and platform == "cpu":
        return "jax-triton has no interpreter", "'pallas' (interpreted) or 'xla'"
    runs_as = "gpu" if platform == "cpu" else platform
    if (op, implementation, runs_as) not in TABLE:
        others = [name for name in IMPLEMENTATIONS[1:] if (op, name, runs_as) in TABLE]
        return f"it has no {runs_as} kernel", " or ".join(map(repr, [*others, "xla"]))
    if platform == "gpu" and (problem := gpu_problem()) is not None:
        return problem, "'xla'"
    if implementation == "triton" and (problem := triton_problem()) is not None:
        return problem, "'pallas' or 'xla'"
    return None


def _unmet(conditions: Mapping[str, Collection[Any]], facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each fact that does not meet its condition, with a clause that says so; one not given meets any."""
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


@functools.cache
def _log_once(op: str, platform: str, picked: str, facts: tuple[tuple[str, Any], ...]) -> None:
    _log.info("%s on %s: %s (%s)", op, platform, picked, ", ".join(f"{name}={fact}" for name, fact in facts))


def logged(x: jax.Array, op: str, implementation: str | None, picked: str, **facts: Any) -> jax.Array:
    """`x`; what `op` picked for it is logged once that is compiled (or run), unless it was asked for.

    An op under vmap is traced for one row first and for all of them then, and only the last is compiled.
    """
    if picked == implementation:
        return x
    return _logged_p.bind(
        x, op=op, platform=current_platform(), picked=picked, facts=tuple(sorted(facts.items()))
    )


def _logged_as_is(x: Any, **pick: Any) -> Any:
    _log_once(**pick)
    return x


_logged_p = Primitive("logged")
_logged_p.def_impl(_logged_as_is)
_logged_p.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_logged_p, lambda ctx, x, **pick: [_logged_as_is(x, **pick)])
batching.primitive_batchers[_logged_p] = lambda xs, axes, **pick: (_logged_p.bind(*xs, **pick), axes[0])


def gpu_problem() -> str | None:
    """Why this machine's NVIDIA GPU cannot run the kernels; None if it can, and where there is none."""
    if _backend() != "gpu":
        return None  # what is traced is for another machine
    found = _capability()
    if _version(found) >= OLDEST_GPU:
        return None
    oldest = ".".join(map(str, OLDEST_GPU))
    return f"this {jax.devices()[0].device_kind} has compute capability {found} and the kernels need {oldest}"


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
    """What is traced for: "cpu", "gpu", "tpu" or "rocm"; the default backend outside `tracing_for`."""
    return _platform.get() or _backend()


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
    return "gpu" if platform == "cuda" else platform


def _backend() -> str:
    """The platform of this machine.  JAX calls an AMD GPU "gpu" too, but its capability is a gfx number."""
    platform = _normal(jax.default_backend()) or "cpu"
    return "rocm" if platform == "gpu" and _capability().startswith("gfx") else platform


def _capability() -> str:
    """Of the GPU: "9.0"; one that does not say is taken to be new enough."""
    oldest = ".".join(map(str, OLDEST_GPU))
    return str(getattr(jax.devices()[0], "compute_capability", None) or oldest)


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
