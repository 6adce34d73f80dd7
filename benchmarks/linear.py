"""A linear layer and its loss: time and memory over the number of labels, for torch, torch.compile, F.linear with our plain loss, and ours.

The products alone are the three matrix products that any of them needs, cut into the blocks that ours has. Writes linear_time.csv, linear_memory.csv,
linear_grid.csv and linear.svg.

    python benchmarks/linear.py [--quick] [--only time|memory|grid] [--threads N] [--seconds S] [--output DIRECTORY]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from processes import in_fresh_process, peak_rss
from report import Row, environment, write_csv
from terminal import print_table
from timing import measure, repeat
from torch import Tensor

import bce_ext

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

LABELS_OF_A_ROW = 10
BLOCK_ELEMENTS, FEWEST_LABELS = 2**19, 1024  # of csrc/linear_blocks.cpp
NAMES = ("native", "compile", "plain", "ours", "products")
TITLES = {"native": "torch", "compile": "torch.compile", "plain": "F.linear, bce_ext", "ours": "linear bce_ext"}


@dataclass(frozen=True)
class Problem:
    rows: int
    features: int
    labels: int
    dtype: str = "float32"
    threads: int = 0
    siglip: bool = False

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """input, weight and bias of the layer, and a sparse target."""
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, self.dtype)
        input = torch.randn(self.rows, self.features, generator=generator).to(dtype).requires_grad_()
        weight = (0.1 * torch.randn(self.labels, self.features, generator=generator)).to(dtype).requires_grad_()
        bias = torch.zeros(self.labels, dtype=dtype, requires_grad=True)
        count = min(LABELS_OF_A_ROW, self.labels)
        step = max(self.labels // count, 1)
        columns = (torch.randint(step, (self.rows, 1), generator=generator) + step * torch.arange(count)).flatten()
        crow = count * torch.arange(self.rows + 1)
        values = torch.ones(self.rows * count, dtype=dtype)
        size = (self.rows, self.labels)
        return input, weight, bias, torch.sparse_csr_tensor(crow, columns, values, size, check_invariants=True)


def step(problem: Problem, name: str) -> Callable[[], None]:
    """Forward and backward. A dense target is made beforehand, by those that need one; by "to_dense" in the step."""
    input, weight, bias, target = problem.tensors()
    if problem.siglip:
        scale = torch.tensor(10.0, requires_grad=True)

        def siglip() -> None:
            input.grad = weight.grad = scale.grad = None
            bce_ext.functional.siglip_loss(input, weight, scale).backward()

        return siglip
    if name == "products":
        return lambda: products(input.detach(), weight.detach())
    if name == "ours":

        def loss(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return bce_ext.functional.linear_binary_cross_entropy_with_logits(input, weight, target, linear_bias=bias)

    else:
        dense = target.to_dense()
        module = bce_ext.functional if name in ("plain", "to_dense") else torch.nn.functional

        def loss(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            logits = torch.nn.functional.linear(input, weight, bias)
            labels = target.to_dense() if name == "to_dense" else dense
            return module.binary_cross_entropy_with_logits(logits, labels)  # type: ignore[no-any-return]

    function = torch.compile(loss) if name == "compile" else loss

    def run() -> None:
        input.grad = weight.grad = bias.grad = None
        function(input, weight, bias).backward()

    return run


def products(input: Tensor, weight: Tensor) -> None:
    """The logits, and the gradients of the input and of the weight, for logits that are their own gradient."""
    rows = min(len(input), BLOCK_ELEMENTS // FEWEST_LABELS)
    labels = min(len(weight), BLOCK_ELEMENTS // rows)
    buffer = torch.empty(rows * labels, dtype=input.dtype)
    grad_input, grad_weight = torch.zeros(input.shape), torch.empty_like(weight)
    for of_block, grad_of_block in zip(weight.split(labels), grad_weight.split(labels), strict=True):
        for i, (part, grad_part) in enumerate(zip(input.split(rows), grad_input.split(rows), strict=True)):
            logits = buffer[: len(part) * len(of_block)].view(len(part), -1)
            torch.mm(part, of_block.t(), out=logits)
            if input.dtype == torch.float32:
                grad_part.addmm_(logits, of_block)
            else:
                grad_part.add_(logits @ of_block)
            if i == 0:
                torch.mm(logits.t(), part, out=grad_of_block)
            else:
                grad_of_block.addmm_(logits.t(), part)


def peak(problem: Problem, name: str) -> tuple[int, int]:
    """Peak bytes beyond the inputs of a first step, and the bytes of the gradients. In a fresh process."""
    if problem.threads:
        torch.set_num_threads(problem.threads)
    step(problem if name == "compile" else replace(problem, rows=1024, labels=1024), name)()  # compiles, starts threads
    run = step(problem, name)
    gradients = problem.rows * problem.features + problem.labels * (problem.features + (not problem.siglip))
    return peak_rss(run), gradients * getattr(torch, problem.dtype).itemsize


def memory_rows(problems: list[Problem], names: tuple[str, ...]) -> list[Row]:
    rows = []
    for problem in problems:
        for name in names:
            used, gradients = in_fresh_process(peak, problem, name)
            rows.append(
                {
                    **asdict(problem),
                    "implementation": name,
                    "peak_mib": used / 2**20,
                    "gradients_mib": gradients / 2**20,
                }
            )
    columns = ("rows", "features", "labels", "dtype", "implementation", "peak_mib", "gradients_mib")
    print_table("Peak memory beyond the inputs, MiB", columns, ([row[key] for key in columns] for row in rows))
    return rows


def timing_rows(problems: list[Problem], names: tuple[str, ...], seconds: float) -> list[Row]:
    rows = []
    for problem in problems:
        if problem.threads:
            torch.set_num_threads(problem.threads)
        timings = measure({name: repeat(step(problem, name), "cpu") for name in names}, seconds, min_rounds=5)
        for name, timing in timings.items():
            rows.append(
                {
                    **asdict(problem),
                    "implementation": name,
                    **asdict(timing),
                    "over_ours": timing.median / timings["ours"].median,
                }
            )
    columns = ("rows", "features", "labels", "dtype", "implementation", "low", "median", "high", "over_ours")
    print_table("Seconds for forward and backward", columns, ([row[key] for key in columns] for row in rows))
    return rows


def plot(path: Path, timings: list[Row], memory: list[Row]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, rows, column, label in (
        (left, timings, "median", "seconds a step"),
        (right, memory, "peak_mib", "peak memory, MiB"),
    ):
        for name, title in TITLES.items():
            own = [row for row in rows if row["implementation"] == name]
            axes.plot([row["labels"] for row in own], [row[column] for row in own], marker=".", label=title)
        axes.set(xlabel="labels", ylabel=label, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller problems")
    parser.add_argument("--only", choices=("time", "memory", "grid"), help="one part")
    parser.add_argument("--output", type=Path, default=Path("build/benchmark"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each problem")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    print_table("Environment", ("", ""), environment("cpu").items())

    sizes = (2**14, 2**17) if arguments.quick else (2**12, 2**14, 2**16, 2**18, 2**20)
    sweep = [Problem(256, 64, labels, threads=arguments.threads) for labels in sizes]
    large = [replace(sweep[0], rows=512, features=768, labels=2**16)]
    low = [replace(sweep[0], labels=2**16, dtype="bfloat16")]
    timings, memory = [], []
    if arguments.only in (None, "time"):
        timings = timing_rows(sweep, NAMES, arguments.seconds)
        if not arguments.quick:
            timing_rows(large + low, NAMES, arguments.seconds)
    if arguments.only in (None, "memory"):
        memory = memory_rows(sweep, NAMES[:-1])
        if not arguments.quick:
            memory_rows([replace(sweep[0], labels=2**20), replace(sweep[0], labels=2**17)], ("ours",))
            memory_rows([replace(sweep[0], rows=2**14, features=512, labels=2**14, siglip=True)], ("ours",))
    if arguments.only in (None, "grid"):
        shapes = [(b, d, c) for b in (1, 32, 512, 4096) for d in (16, 256, 1024) for c in (10, 1000, 2**14, 2**18)]
        limit = 2**22 if arguments.quick else 2**27
        grid = [
            replace(sweep[0], rows=b, features=d, labels=c) for b, d, c in shapes if b * c <= limit and d * c <= limit
        ]
        write_csv(
            arguments.output / "linear_grid.csv",
            timing_rows(grid, ("plain", "to_dense", "ours"), arguments.seconds / 10),
        )
    if timings:
        write_csv(arguments.output / "linear_time.csv", timings)
    if memory:
        write_csv(arguments.output / "linear_memory.csv", memory)
    if timings and memory:
        plot(arguments.output / "linear.svg", timings, memory)


if __name__ == "__main__":
    main()
