"""The optional C++ library of the CPU providers; everything else is in pyproject.toml.

It has a plain C interface: no headers of torch and none of Python are needed to build it, and one file serves all versions of
both. Without a compiler, or with one that cannot build it, the installation goes on without it.
"""

import hashlib
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

FOLDER = Path(__file__).parent / "csrc"
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-g0",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]


def digest() -> str:
    """Of the sources: `stepgraph.csrc.library` refuses a library that was built from others."""
    files = sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


class BuildNative(build_ext):
    """With OpenMP where the compiler has it."""

    def build_extension(self, ext: Any) -> None:
        """Try with OpenMP, then without; `optional` turns a second failure into a warning."""
        if self.compiler.compiler_type == "msvc":
            return super().build_extension(ext)
        ext.extra_compile_args = [*FLAGS, "-fopenmp"]
        ext.extra_link_args = ["-fopenmp"]
        try:
            return super().build_extension(ext)
        except (CompileError, LinkError) as error:
            self.warn(f"no OpenMP, so one thread: {error}")
        ext.extra_compile_args, ext.extra_link_args = FLAGS, []
        return super().build_extension(ext)

    def get_export_symbols(self, ext: Any) -> list[str]:
        """None: the library is loaded by ctypes and is no module of Python."""
        return []


native = Extension(
    "stepgraph.csrc._native",
    sources=sorted(f"csrc/{file.name}" for file in FOLDER.glob("*.cpp")),
    depends=["setup.py", *sorted(f"csrc/{file.name}" for file in FOLDER.glob("*.h"))],
    define_macros=[("STEPGRAPH_SOURCES", f'"{digest()}"')],
    language="c++",
    optional=True,
    py_limited_api=True,
)

setup(ext_modules=[native], cmdclass={"build_ext": BuildNative}, options={"bdist_wheel": {"py_limited_api": "cp310"}})
