"""What is compiled, and how: the operator library `libbce_ext.so`, which needs no Python, and the small Python module `_C` beside it.

setup.py imports this where torch can be imported; its text lists the environment variables.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import torch
from setuptools import Extension

CSRC = str(Path("csrc").resolve())  # absolute: ninja runs in the build directory
FACTS = Path("bce_ext", "_build.py")
DEFAULT_CUDA_ARCHS = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")


def output_of(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def compiler_command() -> list[str]:
    """That of the C++ compiler, which may have arguments."""
    return shlex.split(os.environ.get("CXX") or "c++")


def is_clang() -> bool:
    compiler = compiler_command()
    return shutil.which(compiler[0]) is not None and "clang" in output_of(*compiler, "--version").lower()


def find_cuda_home() -> str | None:
    """The CUDA toolkit: from the environment, else from the nvcc on PATH (maybe a wrapper), else the usual place."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return home
    if (nvcc := shutil.which("nvcc")) and (
        top := re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "x.cu"), re.M)
    ):
        return str(Path(top[1]).resolve())
    return "/usr/local/cuda" if Path("/usr/local/cuda/bin/nvcc").exists() else None


def why_not_cuda(cuda_home: str | None) -> str | None:
    """The reason why the CUDA kernels cannot be built, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if cuda_home is None or not Path(cuda_home, "bin/nvcc").exists():
        return "nvcc was not found"
    release = re.search(r"release (\d+)\.\d+", output_of(f"{cuda_home}/bin/nvcc", "--version"))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release[1] if release else '?'} and torch of CUDA {torch.version.cuda}"
    return None


def default_arch_list(cuda_home: str) -> str:
    """All of DEFAULT_CUDA_ARCHS that this nvcc knows, and PTX of the last for the GPUs to come."""
    known = output_of(f"{cuda_home}/bin/nvcc", "--list-gpu-arch").split()
    return ";".join(arch for arch in DEFAULT_CUDA_ARCHS if f"compute_{arch.replace('.', '')}" in known) + "+PTX"


def native_arch_list() -> str:
    """The architectures of the GPUs that are present; empty if there are none."""
    devices = range(torch.cuda.device_count())
    return ";".join(sorted({"{}.{}".format(*torch.cuda.get_device_capability(device)) for device in devices}))


def choose_device() -> tuple[str, str]:
    """The device to build for beside the CPU ("cpu": none), and one sentence that says which and why."""
    if torch.version.hip is not None:
        return "rocm", f"building for CPU and ROCm {torch.version.hip}, which torch has"
    force = os.environ.get("BCE_EXT_FORCE_CUDA")
    if force not in (None, "", "0", "1"):
        sys.exit(f"bce_ext: BCE_EXT_FORCE_CUDA must be 0 or 1, but is {force}")
    if force == "0":
        return "cpu", "building for CPU only: BCE_EXT_FORCE_CUDA=0"
    cuda_home = find_cuda_home()
    if reason := why_not_cuda(cuda_home):
        if force == "1":
            sys.exit(f"bce_ext: BCE_EXT_FORCE_CUDA=1, but the CUDA kernels cannot be built: {reason}")
        return "cpu", f"building for CPU only: {reason}"
    assert cuda_home is not None
    os.environ["CUDA_HOME"] = cuda_home
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if archs == "native":
        archs = native_arch_list()
    archs = archs or default_arch_list(cuda_home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    return (
        "cuda",
        f"building for CPU and CUDA {torch.version.cuda} ({archs}): torch has CUDA, and nvcc is in {cuda_home}",
    )


DEVICE, DECISION = choose_device()

# Only now: importing this looks for the CUDA toolkit. And ninja is found even in an environment that is not activated.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

CXX_FLAGS = [
    "-O3",
    "-g0",
    *([] if is_clang() else ["-fopenmp"]),  # of torch's own runtime, so it is not linked: see csrc/cpu/threads.h
    "-ffp-contract=fast",  # a * b + c as one instruction, across the operators of a pack, too: GCC's default, not Clang's
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    *shlex.split(os.environ.get("BCE_EXT_CXX_FLAGS", "")),
]
NVCC_FLAGS = [
    "-O3",
    "--expt-relaxed-constexpr",
    "--threads=2",  # each file is compiled for many architectures
    "-Xcompiler=-fvisibility=hidden,-Wall",
    *shlex.split(os.environ.get("BCE_EXT_NVCC_FLAGS", "")),
]
LINK_FLAGS = shlex.split(os.environ.get("BCE_EXT_LINK_FLAGS", ""))


def torch_minor() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def torch_tag() -> str:
    """The torch and the device of this build, as in pt213cpu and pt214cu130."""
    device = {"cpu": "cpu", "cuda": f"cu{torch.version.cuda}", "rocm": f"rocm{torch.version.hip}"}[DEVICE]
    return f"pt{torch_minor()}{device}".replace(".", "")


def with_system_headers(extension: Extension) -> Extension:
    """Makes all include directories but ours system directories, so that torch's headers raise no warnings."""
    own, *others = extension.include_dirs
    extension.include_dirs = [own]
    for flags in extension.extra_compile_args.values():
        for directory in others:
            flags += ["-isystem", directory]
    return extension


def operator_library() -> Extension:
    sources = [*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")]
    sources.remove("csrc/module.cpp")
    if DEVICE != "cpu":
        sources += [*glob("csrc/cuda/*.cpp"), *glob("csrc/cuda/*.cu")]
    make = CppExtension if DEVICE == "cpu" else CUDAExtension
    library = make(
        "bce_ext.libbce_ext",
        sorted(sources),
        include_dirs=[CSRC],
        define_macros=[] if DEVICE == "cpu" else [("BCE_EXT_WITH_CUDA", None)],
        extra_compile_args={"cxx": [*CXX_FLAGS], "nvcc": [*NVCC_FLAGS]},
        extra_link_args=["-Wl,-soname,libbce_ext.so", *LINK_FLAGS],
    )
    library.libraries.remove("torch_python")
    return with_system_headers(library)


def python_module(version: str) -> Extension:
    facts = {"BCE_EXT_VERSION": version, "BCE_EXT_CXX_FLAGS": " ".join(CXX_FLAGS)}
    if DEVICE == "cuda":
        facts |= {
            "BCE_EXT_CUDA_VERSION": torch.version.cuda,
            "BCE_EXT_CUDA_ARCHS": os.environ["TORCH_CUDA_ARCH_LIST"],
            "BCE_EXT_NVCC_FLAGS": " ".join(NVCC_FLAGS),
        }
    module = CppExtension(
        "bce_ext._C",
        ["csrc/module.cpp"],
        include_dirs=[CSRC],
        define_macros=[(name, f'"{value}"') for name, value in facts.items()],
        extra_compile_args={"cxx": [*CXX_FLAGS]},
        extra_link_args=[*LINK_FLAGS],
    )
    return with_system_headers(module)


def why_nothing_compiles() -> str | None:
    """The reason why nothing can be compiled, or None."""
    compiler = compiler_command()[0]
    if shutil.which(compiler) is None:
        return (
            f"a C++ compiler is needed, but there is no {compiler} on PATH: "
            "install one, for example by `apt-get install g++`, or name one in the variable CXX"
        )
    return None


class BuildCommand(BuildExtension):
    """Keeps the objects in a lasting place for each torch and device; editable installs would take a temporary one."""

    def finalize_options(self) -> None:
        self.distribution.ext_modules = [operator_library(), python_module(self.distribution.get_version())]
        super().finalize_options()

    def build_extensions(self) -> None:
        count = sum(len(extension.sources) for extension in self.extensions)
        print(f"bce_ext: {DECISION}; {count} files for Python {platform.python_version()}", flush=True)
        super().build_extensions()
        self.write_facts(Path(self.build_lib, FACTS))

    def build_extension(self, extension: Extension) -> None:
        build = f"{sys.implementation.cache_tag}-torch{torch.__version__}-{DEVICE}-{platform.machine()}"
        self.build_temp = str(Path("build", build, extension.name.split(".")[-1]).resolve())
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        super().build_extension(extension)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.write_facts(FACTS)

    def get_ext_filename(self, fullname: str) -> str:
        # The operator library is no Python module, so no Python ABI belongs into its name.
        if fullname.split(".")[-1] == "libbce_ext":
            return str(Path(*fullname.split("."))) + ".so"
        return str(super().get_ext_filename(fullname))

    @staticmethod
    def write_facts(path: Path) -> None:
        """What the package must know of its binaries before it loads them."""
        facts = {
            "TORCH": str(torch.__version__),
            "CUDA": torch.version.cuda if DEVICE == "cuda" else None,
            "PYTHON": sysconfig.get_config_var("SOABI"),
        }
        lines = ["# What the binaries beside this file were built for. Written by setup.py."]
        path.write_text("\n".join([*lines, *(f"{name} = {value!r}" for name, value in facts.items())]) + "\n")
