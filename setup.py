"""Builds the native core with the package; everything else about the package stands in pyproject.toml.

Where there is no C++ compiler, or it fails, the package is installed without the core, and PyTorch computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CORE = "topkapi.model.native._core"
SOURCES = Path("model/native")
BESIDE_THEM = SOURCES / "_core.so"
# Products and sums are not contracted, which would round differently on each instruction set. No -march either: a file
# has the instructions of its level, and which one runs is chosen at run time.
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
# With these two gcc takes minutes instead of seconds.
FLAGS += ["-fno-unswitch-loops", "-fno-split-loops"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # of gcc's own intrinsics


# Which sources a core was built from, so that one that is out of date is not taken (model/native/library.py).
DIGEST = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]))
).hexdigest()
FLAGS.append(f'-DTOPKAPI_SOURCES="{DIGEST}"')


def is_built(path: Path) -> bool:
    """Whether the core at `path` is one for this machine, of the sources that are here."""
    try:
        core = ctypes.CDLL(str(path.resolve()))
        core.topkapi_sources.restype = ctypes.c_char_p
    except (OSError, AttributeError):
        return False
    return bool(core.topkapi_sources() == DIGEST.encode())


class BuildCore(build_ext):
    """Compiles the files of the core side by side, as a library for ctypes instead of a module of Python.

    The one beside the sources is taken where it is of them (not with --force, for other flags): the Makefile compiles
    it while pip fetches packages.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        if is_built(BESIDE_THEM) and not self.force:
            path = Path(self.get_ext_fullpath(ext.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (path.exists() and path.samefile(BESIDE_THEM)):
                shutil.copy2(BESIDE_THEM, path)
            return
        compile_files = self.compiler.compile

        def compile_one(source: str, extra_postargs: list[str], **options: object) -> list[str]:
            plainest = Path(source).stem == "kernels_scalar" and platform.machine() in ("x86_64", "AMD64")
            # There it is what the others are tested against, and by -O3 takes gcc as long as all of them together.
            flags = [*extra_postargs, "-O2"] if plainest else extra_postargs
            objects: list[str] = compile_files([source], extra_postargs=flags, **options)
            return objects

        def side_by_side(sources: list[str], **options: object) -> list[str]:
            # Those that take longest first, so that nobody waits for the last one alone.
            order = sorted(sources, key=lambda source: ("kernels_scalar" not in source, "kernels_" not in source))
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: compile_one(source, **options), order))
            return [path for paths in objects for path in paths]

        self.compiler.compile = side_by_side
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildCore},
    ext_modules=[
        Extension(
            CORE,
            sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ],
)
