"""Kernels of either platform: an op traced for it, its kernels interpreted unless the device is here."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import pytest

from kernels import devices
from pallas_kernels import attention, gated_mlp, prune, quantize, quest
from pallas_kernels.dispatch import tracing_for

platforms = pytest.mark.parametrize("platform", ["gpu", "tpu"])
OPS = tuple(folder.op for folder in (attention, gated_mlp, prune, quantize, quest))


@contextlib.contextmanager
def traced_for(platform: str, interpret: Any) -> Iterator[None]:
    """Ops take `platform`'s kernels, and interpret them as asked (False: not at all)."""
    patches = (mock.patch.object(module, "interpret", return_value=interpret) for module in OPS)
    with tracing_for(platform), contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def compiled(fn: Callable[..., Any], platform: str, interpret: Any = None) -> Callable[..., Any]:
    """`jit(fn)` with ops as on `platform`; None: interpreted where it is not that of the device."""
    interpret = devices.interpreted(platform) if interpret is None else interpret
    jitted = jax.jit(lambda *args: fn(*args))

    def call(*args: Any) -> Any:
        with traced_for(platform, interpret):
            return jitted(*args)

    return call


def kernel_calls(fn: Callable[..., Any], *args: Any, platform: str = "gpu") -> dict[str, tuple[Any, ...]]:
    """Operand shapes of each kernel that `fn(*args)` calls, by the kernel's name, which must be distinct."""
    calls: dict[str, tuple[Any, ...]] = {}

    def visit(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                name = eqn.params["name"]
                assert name not in calls, f"{name} is called more than once"
                calls[name] = tuple(var.aval.shape for var in eqn.invars)
            else:
                for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
                    if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                        visit(getattr(inner, "jaxpr", inner))

    with traced_for(platform, True):
        visit(jax.make_jaxpr(fn)(*args).jaxpr)
    return calls
