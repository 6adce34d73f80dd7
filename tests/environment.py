"""Says what an environment lacks for tests and benchmarks: exit status 1 where nothing works without it. Imports none of it.

python tests/environment.py --tag prints what a build depends on, and --distribute the options that give pytest a process for each core.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

NEEDED = ("torch", "setuptools", "pytest", "hypothesis", "numpy")
OPTIONAL = {
    "ninja": "one compiler runs at a time",
    "xdist": "tests run in one process",
    "expecttest": "PyTorch's own test inputs are not run",
    "transformers": "its losses are not run",
    "timm": "its losses are not run",
    "segmentation_models_pytorch": "its losses are not run",
    "rich": "benchmarks print plain tables",
    "matplotlib": "benchmarks draw no plots",
}


# A file stays in one process, since its tests share what it builds; files start in the order of their names, the builds of C++ first.
DISTRIBUTE = "-n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder"


def main() -> str | None:
    if sys.argv[1:] == ["--distribute"]:
        print(DISTRIBUTE if find_spec("xdist") else "")
        return None
    if sys.argv[1:] == ["--tag"]:
        try:
            torch = version("torch")
        except PackageNotFoundError:
            torch = "none"
        print(f"{sysconfig.get_config_var('SOABI')}-torch{torch}")
        return None
    for name, consequence in OPTIONAL.items():
        if find_spec(name) is None:
            print(f"{sys.executable} has no {name}: {consequence}.")
    missing = [name for name in NEEDED if find_spec(name) is None]
    return f"{sys.executable} lacks what is needed: {', '.join(missing)}." if missing else None


if __name__ == "__main__":
    sys.exit(main())
