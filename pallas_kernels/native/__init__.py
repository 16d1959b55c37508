"""Kernels for CPUs in C++, called through XLA's foreign function interface.

`pip install` compiles them if there is a compiler (`build`).  Without the library, or with one for another
jax, `problem` says what is wrong, and operations take XLA.  `kernels.inc` has what one thread does to one
piece of work, `ops.h` the operations, `bindings.cc` what XLA calls; `check.cc` is a program that tests the
operations under the compiler's sanitizers.
"""

import ctypes
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BUILD = "pip install -e ."
BUILD_HERE = "pip install --no-build-isolation -e ."  # with the headers of this jaxlib, not of the newest
TARGETS = (
    "project",
    "match",
    "attend",
    "select_pages",
    "page_bounds",
    "keep_channels",
    "norm_prune",
    "quantize",
    "quantize_residual",
    "cut",
    "put",
)
TYPES = ("float32", "bfloat16")  # of weights, caches and bounds


@functools.cache
def problem() -> str | None:
    """Says why the kernels cannot be used; None if they can, and from then on XLA knows them."""
    try:
        library = load()
        built_for, found = library.sol_interface().decode(), interface()
        if built_for != found:
            wrong = f"it was compiled for XLA's interface {built_for} and this jax has {found}"
            return f"{wrong} (again: {BUILD_HERE})"
        for name in TARGETS:
            capsule = jax.ffi.pycapsule(getattr(library, f"sol_{name}"))
            jax.ffi.register_ffi_target(f"sol_{name}", capsule, platform="cpu")
    except FileNotFoundError:
        return f"it was not compiled when this was installed (with a C++ compiler: {BUILD})"
    except (OSError, AttributeError, RuntimeError) as error:
        return f"its library does not load: {str(error).splitlines()[0]} (again: {BUILD})"
    return None


def interface() -> str:
    """The version of XLA's foreign function interface in this jaxlib, by the headers that come with it."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    return ".".join(re.findall(r"^#define XLA_FFI_API_M(?:AJ|IN)OR (\d+)", header, re.MULTILINE))


@functools.cache
def load() -> ctypes.CDLL:
    """Opens the library.  Raises FileNotFoundError if there is none, and OSError if it cannot be loaded."""
    paths = (pathlib.Path(__file__).with_name(f"_library{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise FileNotFoundError("_library")
    library = ctypes.CDLL(str(path))
    library.sol_interface.restype = library.sol_kernels.restype = ctypes.c_char_p
    library.sol_use_kernels.restype, library.sol_use_kernels.argtypes = ctypes.c_bool, [ctypes.c_char_p]
    return library


def instruction_set() -> str:
    """The instructions whose kernels run: "baseline", "avx2" or "avx512"."""
    return load().sol_kernels().decode()


def use_instruction_set(name: str = "") -> bool:
    """Runs the kernels of other instructions from now on ("": the best again); False if it has none such."""
    return bool(load().sol_use_kernels(name.encode()))


def call(
    name: str,
    out: Sequence[jax.ShapeDtypeStruct],
    *args: jax.Array,
    vmap_method: str | None = None,
    in_place: Mapping[int, int] | None = None,
    **attributes: Any,
) -> Sequence[jax.Array]:
    """Calls one of TARGETS, which `problem` has found to be there.

    `in_place` says which argument becomes which result; XLA copies one that is needed besides.
    """
    aliases = None if in_place is None else dict(in_place)
    target = jax.ffi.ffi_call(f"sol_{name}", list(out), vmap_method=vmap_method, input_output_aliases=aliases)
    return target(*args, **attributes)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def masks(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.bool_)
