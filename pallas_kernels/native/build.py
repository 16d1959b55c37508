"""How setuptools compiles the CPU's kernels (pyproject.toml); nothing here is imported at run time.

It fails without a compiler or without jaxlib, whose headers it takes; the extension is optional, so that the
installation then goes on without it, and `pallas_kernels.native.problem` says so.
"""

import importlib.util
import pathlib

from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class BuildExt(build_ext):
    """`build_ext` with the headers of jaxlib and what optimised C++ takes; sanitizers come in CXXFLAGS."""

    def build_extension(self, ext):
        found = importlib.util.find_spec("jaxlib")
        if found is None or found.origin is None:
            raise CompileError("jaxlib, whose headers are needed, is not installed")
        ext.include_dirs.append(str(pathlib.Path(found.origin).parent / "include"))
        # No -march: one library serves all machines, and kernels.cc chooses among sets of instructions.
        ext.extra_compile_args += ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"]
        super().build_extension(ext)

    def get_export_symbols(self, ext):
        """No PyInit: the library is opened with ctypes."""
        return ext.export_symbols
