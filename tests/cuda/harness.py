"""Builds and runs ``run_kernels.cpp``: the CUDA kernels as plain C++, under the shim."""

import dataclasses
import os
import pathlib
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

HERE = pathlib.Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"

# In the order of the enumeration of problem.h.
INTEGRAL = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
FLOATING = ["half", "bfloat16", "float", "double"]
DTYPES = ["bool", *INTEGRAL, *FLOATING]
STORAGE = {name: name for name in INTEGRAL}
STORAGE |= {"bool": "uint8", "half": "float16", "bfloat16": "uint16", "float": "float32", "double": "float64"}
EPS = {"half": 2.0**-11, "bfloat16": 2.0**-8, "float": 2.0**-24, "double": 2.0**-53}  # of rounding to nearest

ABSENT, SCALAR, FLAT, STRIDED = range(4)
FORWARD, REVERSE, RANDOM = range(3)
LOGITS, PROBABILITIES, FOCAL, ASYMMETRIC = range(4)
SOLVE, SCALE, COUNT = range(3)
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

Array = NDArray[Any]
Key = TypeVar("Key")


def itemsize(dtype: str) -> int:
    return np.dtype(STORAGE[dtype]).itemsize


def encode(values: Array, dtype: str) -> bytes:
    """The values as they lie in memory."""
    if dtype == "bfloat16":
        bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
        return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16).tobytes()
    return np.asarray(values).astype(STORAGE[dtype]).tobytes()


def decode(data: bytes, dtype: str) -> Array:
    stored: Array = np.frombuffer(data, STORAGE[dtype])
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "bool":
        stored = stored != 0
    decoded: Array = stored.astype(np.float64)
    return decoded


@dataclasses.dataclass
class Operand:
    """An operand of a Problem: ``values`` is the whole array behind it, ``first`` where the walk starts."""

    dtype: str = "float"
    layout: int = ABSENT
    values: Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    strides: tuple[int, ...] = ()
    first: int = 0
    misaligned: bool = False

    def gather(self, sizes: Sequence[int]) -> Array:
        """What a kernel reads, in float64 and in the order of the walk."""
        numel = int(np.prod(sizes))
        if self.layout == ABSENT:
            return np.ones(numel)
        stored: Array = decode(encode(self.values, self.dtype), self.dtype)
        if self.layout == SCALAR:
            return np.full(numel, stored[0])
        if self.layout == FLAT:
            return stored[:numel]
        grid = np.indices(sizes).reshape(len(sizes), -1)
        gathered: Array = stored[self.first + np.tensordot(np.array(self.strides), grid, 1)]
        return gathered

    def pack(self) -> bytes:
        strides = (*self.strides, *[0] * (8 - len(self.strides)))
        data = encode(self.values, self.dtype)
        shift = itemsize(self.dtype) if self.misaligned else 0
        header = (DTYPES.index(self.dtype), self.layout, *strides, self.first * itemsize(self.dtype), shift, len(data))
        return struct.pack("<13q", *header) + data


@dataclasses.dataclass
class Case:
    """A Problem, or the scaling of the gradient ``input`` by ``grad_output``, or the count of elements of ``target`` that
    are not ``ignore_index``, as ``total``; and how the launch is scheduled."""

    sizes: tuple[int, ...]
    input: Operand
    target: Operand = dataclasses.field(default_factory=Operand)
    weight: Operand = dataclasses.field(default_factory=Operand)
    pos_weight: Operand = dataclasses.field(default_factory=Operand)
    grad_output: Operand = dataclasses.field(default_factory=Operand)
    formula: int = LOGITS
    normalizer: Operand = dataclasses.field(default_factory=Operand)
    parameters: tuple[float, ...] = ()  # of the formula
    label_smoothing: float = 0.0
    ignore_index: float | None = None
    reduce: bool = True
    divisor: float = 1.0
    compute_in_double: bool | None = None  # None: as the host code decides, from the types
    loss: str | None = None  # dtypes of the outputs; None: not wanted
    grad_input: str | None = None
    grad_target: str | None = None
    total: str = "float"
    misaligned_outputs: bool = False
    task: int = SOLVE
    max_blocks: int = 8192
    order: int = FORWARD
    seed: int = 0

    @property
    def numel(self) -> int:
        return int(np.prod(self.sizes))

    @property
    def in_double(self) -> bool:
        if self.compute_in_double is not None:
            return self.compute_in_double
        return "double" in (self.input.dtype, self.target.dtype, self.loss)

    def outputs(self) -> list[tuple[str, str, int]]:
        """Name, dtype and number of elements of the outputs that are wanted, in the order in which they are written."""
        wanted = [(name, getattr(self, name), self.numel) for name in ("loss", "grad_input", "grad_target")]
        wanted.append(("total", self.total if self.reduce and self.task != SCALE else None, 1))
        return [(name, dtype, numel) for name, dtype, numel in wanted if dtype is not None]

    def pack(self) -> bytes:
        sizes = (*self.sizes, *[0] * (8 - len(self.sizes)))
        hard_labels = "int" in self.target.dtype
        ignores = self.ignore_index is not None
        packed = struct.pack("<6q", self.task, self.formula, self.in_double, self.reduce, ignores, hard_labels)
        packed += struct.pack("<3d", self.divisor, self.label_smoothing, self.ignore_index or 0.0)
        packed += struct.pack("<5d", *self.parameters, *[0.0] * (5 - len(self.parameters)))
        packed += struct.pack("<3q", self.max_blocks, self.order, self.seed)
        packed += struct.pack("<10q", self.numel, len(self.sizes), *sizes)
        for operand in (self.input, self.target, self.weight, self.pos_weight, self.grad_output, self.normalizer):
            packed += operand.pack()
        wanted = {name: (dtype, numel) for name, dtype, numel in self.outputs()}
        for name in ("loss", "grad_input", "grad_target", "total"):
            dtype, numel = wanted.get(name, ("float", 0))
            shift = itemsize(dtype) if self.misaligned_outputs else 0
            packed += struct.pack("<4q", name in wanted, DTYPES.index(dtype), shift, numel * itemsize(dtype))
        return packed


@dataclasses.dataclass
class Result:
    vectorized: bool
    raw: dict[str, bytes]
    dtypes: dict[str, str]

    def __getitem__(self, name: str) -> Array:
        return decode(self.raw[name], self.dtypes[name])


def build(
    directory: pathlib.Path, flags: Sequence[str] = (), csrc: pathlib.Path = CSRC, source: str = "run_kernels.cpp"
) -> pathlib.Path:
    """Compiles a program of this folder against the kernels in ``csrc``."""
    program = directory / pathlib.Path(source).stem
    compiler = os.environ.get("CXX", "g++")
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        *flags,
        "-include",
        "shim.h",
    ]
    command += ["-I", str(HERE / "shim"), "-I", str(csrc), str(HERE / source), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def build_all(builds: Mapping[Key, tuple[Any, ...]]) -> dict[Key, pathlib.Path]:
    """As many at a time as there are cores. The values are the arguments of build."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(builds, pool.map(lambda arguments: build(*arguments), builds.values()), strict=True))


def has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


class KernelError(Exception):
    """The program ended with an error: its message, or the report of a sanitizer."""


def run(program: pathlib.Path, cases: Sequence[Case]) -> list[Result]:
    """Runs all cases in one process."""
    cases_path = program.with_suffix(".cases")
    results_path = program.with_suffix(".results")
    cases_path.write_bytes(b"".join(case.pack() for case in cases))
    done = subprocess.run([program, cases_path, results_path], capture_output=True, text=True)
    if done.returncode != 0:
        raise KernelError(done.stderr)
    data = results_path.read_bytes()
    results = []
    position = 0
    for case in cases:
        result = Result(data[position] != 0, {}, {})
        position += 1
        for name, dtype, numel in case.outputs():
            size = numel * itemsize(dtype)
            result.raw[name] = data[position : position + size]
            result.dtypes[name] = dtype
            position += size
        results.append(result)
    assert position == len(data)
    return results
