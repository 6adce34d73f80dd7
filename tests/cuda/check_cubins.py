"""Inspects what nvcc made of the kernels: ``python check_cubins.py [--library LIBRARY] [--write PAGE]``.

No GPU is needed. Fails unless every kernel keeps out of local memory (no stack, no spills), every vector kernel moves
16 bytes in one access, and every internal operator with a kernel for the CPU has one for CUDA. Prints the registers and
the theoretical occupancy of every kernel, as the table that docs/cuda-tables.md shows; ``--write`` puts it into that page.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

REQUIRED_ARCHS = ("sm_75", "sm_90")

# Of an SM: 32-bit registers, threads, blocks (CUDA C++ Programming Guide, "Technical Specifications").
SM_LIMITS = {
    "sm_75": (65536, 1024, 16),
    "sm_80": (65536, 2048, 32),
    "sm_86": (65536, 1536, 16),
    "sm_90": (65536, 2048, 32),
    "sm_100": (65536, 2048, 32),
    "sm_120": (65536, 1536, 24),
}

SIZES = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2, "Boolean": 1}
SIZES |= {"signed char": 1, "short": 2, "int": 4, "long": 8}
SIZES |= {f"unsigned {name.removeprefix('signed ')}": SIZES[name] for name in ("signed char", "short", "int", "long")}
DISPLAYED = {
    "__half": "half",
    "__nv_bfloat16": "bfloat16",
    "Boolean": "bool",
    "signed char": "int8",
    "unsigned char": "uint8",
    "short": "int16",
    "unsigned short": "uint16",
    "int": "int32",
    "unsigned int": "uint32",
    "long": "int64",
    "unsigned long": "uint64",
}


@dataclasses.dataclass
class Kernel:
    name: str
    registers: int
    stack: int
    local: int
    opcodes: list[str]

    @property
    def parameters(self) -> list[str]:
        """The template arguments, without namespaces."""
        name = re.sub(r"(\w+)<(float|double)>,", r"\1,", self.name)  # a formula's own argument is that of the kernel
        match = re.search(r"<(.*?)>", name)
        return [re.sub(r".*::", "", parameter.strip()) for parameter in match[1].split(",")] if match else []

    @property
    def base(self) -> str:
        match = re.search(r"(\w+)(<|\()", self.name)
        return match[1] if match else self.name

    @property
    def title(self) -> str:
        parameters = ", ".join(DISPLAYED.get(parameter, parameter) for parameter in self.parameters)
        return f"{self.base}<{parameters}>" if parameters else self.base

    @property
    def threads(self) -> int:
        return 512 if self.base == "final_sum_kernel" else 256

    @property
    def computed_size(self) -> int:
        """Bytes of the type that a vector kernel computes in."""
        return 8 if self.parameters[1] == "double" else 4

    @property
    def vector_size(self) -> int:
        """Elements per thread at a time, as kVectorSize in vector_kernel.cuh."""
        if self.base == "vector_kernel":
            return 16 // max(SIZES[parameter] for parameter in self.parameters[1:3])
        return 16 // SIZES[self.parameters[0]] if self.base in ("scale_kernel", "count_valid_kernel") else 1

    def has(self, opcode: str) -> bool:
        return any(name.startswith(opcode) for name in self.opcodes)

    def occupancy(self, arch: str) -> float:
        """The share of an SM's threads that the registers have room for; warps get them 256 at a time."""
        registers, threads, blocks = SM_LIMITS[arch]
        per_block = -(-self.registers // 8) * 8 * self.threads
        return min(registers // per_block, threads // self.threads, blocks) * self.threads / threads


@functools.cache
def tool(name: str) -> str:
    """A program of the CUDA toolkit: on PATH, in the toolkit, or in the packages beside torch."""
    packages = pathlib.Path(sysconfig.get_path("purelib"))
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [f"{home}/bin", packages / "triton/backends/nvidia/bin", *packages.glob("nvidia/*/bin")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(
            f"{name} was not found: it comes with the CUDA toolkit and with the PyPI package nvidia-cuda-{name}"
        )
    return found


def run(name: str, *arguments: str) -> str:
    # cuobjdump looks for nvdisasm on PATH.
    path = os.pathsep.join([str(pathlib.Path(tool("nvdisasm")).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    return subprocess.run([tool(name), *arguments], env=environment, check=True, capture_output=True, text=True).stdout


def demangle(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout


def architectures(library: pathlib.Path) -> list[str]:
    found = set(re.findall(r"\.(sm_\d+)\.cubin", run("cuobjdump", "-lelf", str(library))))
    return sorted(found, key=lambda arch: int(arch[3:]))


def read_kernels(library: pathlib.Path, arch: str | None = None) -> list[Kernel]:
    """The kernels in a library, an object or a cubin."""
    select = ["-arch", arch] if arch else []
    kernels = {}
    usage = demangle(run("cuobjdump", *select, "-res-usage", str(library)))
    for name, registers, stack, local in re.findall(r"Function (.+):\n\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage):
        kernels[name] = Kernel(name, int(registers), int(stack), int(local), [])
    sass = demangle(run("cuobjdump", *select, "-sass", str(library)))
    for function in re.split(r"\n\s*Function : ", sass)[1:]:
        name, _, body = function.partition("\n")
        kernels[name].opcodes += re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([\w.]+)", body)
    return list(kernels.values())


def violations(kernel: Kernel) -> list[str]:
    found = []
    if kernel.stack or kernel.local:
        found.append(f"{kernel.stack + kernel.local} bytes of stack or local memory")
    found += [f"accesses local memory ({opcode})" for opcode in ("LDL", "STL") if kernel.has(opcode)]
    if kernel.base in ("vector_kernel", "scale_kernel", "count_valid_kernel") and not kernel.has("LDG.E.128"):
        found.append("no load of 16 bytes (LDG.E.128)")
    if kernel.base in ("vector_kernel", "scale_kernel"):
        stored = kernel.computed_size if kernel.base == "vector_kernel" else SIZES[kernel.parameters[0]]
        if kernel.vector_size * stored >= 16 and not kernel.has("STG.E.128"):
            found.append("no store of 16 bytes (STG.E.128)")
    return found


# What only the CPU does in one operator: kernel_counts_valid() in csrc/ops.cpp keeps other devices from it.
CPU_ALONE = {"bce_ext::_bce_mean_of_valid"}


def operators_without_cuda() -> list[str]:
    """The operators with a kernel for the CPU and none for CUDA."""
    import torch

    import bce_ext  # noqa: F401

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bce_ext::")]
    assert any(has_kernel(name, "CPU") for name in names)
    without = {name for name in names if has_kernel(name, "CPU") and not has_kernel(name, "CUDA")}
    return sorted(without - CPU_ALONE)


def make_table(kernels: dict[str, list[Kernel]]) -> str:
    """Registers per thread and occupancy on every architecture."""
    rows: dict[str, dict[str, Kernel]] = {}
    for arch, of_arch in kernels.items():
        for kernel in of_arch:
            rows.setdefault(kernel.title, {})[arch] = kernel
    lines = ["| kernel | " + " | ".join(kernels) + " |", "|---" * (len(kernels) + 1) + "|"]
    for title in sorted(rows):
        cells = [f"{rows[title][arch].registers} ({rows[title][arch].occupancy(arch):.0%})" for arch in kernels]
        lines.append(f"| `{title}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_section(page: pathlib.Path, name: str, content: str) -> None:
    begin, end = f"<!-- begin {name}: check_cubins.py --write -->", f"<!-- end {name} -->"
    before, _, rest = page.read_text().partition(begin)
    assert end in rest
    page.write_text(f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", type=pathlib.Path, help="default: that of the installed bce_ext")
    parser.add_argument("--write", type=pathlib.Path, help="a page with the markers of the table")
    arguments = parser.parse_args()
    failures = []
    library = arguments.library
    if library is None:
        import bce_ext

        library = pathlib.Path(bce_ext.__file__).parent / "libbce_ext.so"
        failures += [f"{name}: no kernel for CUDA" for name in operators_without_cuda()]
    archs = [arch for arch in architectures(library) if arch in SM_LIMITS]
    failures += [f"{library.name}: no code for {arch}" for arch in REQUIRED_ARCHS if arch not in archs]
    kernels = {arch: read_kernels(library, arch) for arch in archs}
    for arch, of_arch in kernels.items():
        if not of_arch:
            failures.append(f"{arch}: no kernels")
        failures += [f"{arch}: {kernel.title}: {violation}" for kernel in of_arch for violation in violations(kernel)]
    if not failures:
        table = make_table(kernels)
        print(table)
        if arguments.write:
            write_section(arguments.write, "registers", table)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if not failures:
        print(
            f"{sum(map(len, kernels.values()))} kernels on {', '.join(archs)}: no local memory, no spills",
            file=sys.stderr,
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
