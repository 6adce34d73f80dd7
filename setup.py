"""Builds the package. What is compiled stands in build_extensions.py; the sdist and the metadata need neither torch nor a compiler.

Environment variables:
    BCE_EXT_FORCE_CUDA    1 builds the CUDA kernels or fails, 0 leaves them out.
                          Default: they are built where torch has CUDA and nvcc is found.
    TORCH_CUDA_ARCH_LIST  the GPU architectures, as for every PyTorch extension, for example "8.0;9.0+PTX",
                          or native: those of the GPUs that are present.
    BCE_EXT_CXX_FLAGS, BCE_EXT_NVCC_FLAGS, BCE_EXT_LINK_FLAGS
                          further flags, for example "-Xptxas -v" for nvcc.
    CXX                   the C++ compiler.
    MAX_JOBS              the number of compilers at a time.
    BCE_EXT_RELEASE       1 makes a wheel for others: its version says which torch it is for (0.1.0+pt213cpu), and it requires that torch.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"bce_ext: setuptools 77 or newer is needed, but this is {setuptools.__version__}: pip install -U setuptools"
    )

sys.path.insert(0, str(Path(__file__).parent))  # a build backend leaves it out
try:
    from build_extensions import BuildCommand, torch_minor, torch_tag, why_nothing_compiles
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    BuildCommand = build_ext

    def why_nothing_compiles() -> str:
        why = "it is compiled against the torch that it will run with, and"
        if is_isolated():
            return (
                f"{why} this build is isolated from whatever is installed: "
                "with torch installed, run `pip install --no-build-isolation .`"
            )
        return f"{why} there is none: install torch first, then run `pip install --no-build-isolation .`"


def is_isolated() -> bool:
    """Whether a build tool made an environment of its own for this build: pip, build and poetry as a temporary directory, uv in its cache."""
    here = Path(setuptools.__file__)
    by_tool = "setuptools.build_meta" in sys.modules
    return by_tool and (here.is_relative_to(tempfile.gettempdir()) or "builds-v0" in here.parts)


def stop_unless_it_compiles() -> None:
    if reason := why_nothing_compiles():
        sys.exit(f"bce_ext: {reason}")


class Build(build):
    """Says before anything else is done why nothing can be compiled."""

    def run(self) -> None:
        stop_unless_it_compiles()
        super().run()


class BuildExt(BuildCommand):
    def run(self) -> None:
        stop_unless_it_compiles()
        super().run()


VERSION = re.findall(r'^__version__ = "(.+)"$', Path("bce_ext/__init__.py").read_text(), re.M)[0]
IS_RELEASE = os.environ.get("BCE_EXT_RELEASE") == "1"

setup(
    version=f"{VERSION}+{torch_tag()}" if IS_RELEASE else VERSION,
    install_requires=[f"torch=={torch_minor()}.*" if IS_RELEASE else "torch>=2.11"],
    ext_modules=[Extension("bce_ext.libbce_ext", []), Extension("bce_ext._C", [])],  # BuildCommand fills them in
    cmdclass={"build": Build, "build_ext": BuildExt},
)
