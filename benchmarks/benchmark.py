"""Times torch's binary cross entropy, torch.compile of it, and bce_ext, and compares their memory.

    python benchmarks/benchmark.py              # the limit, a sweep over the sizes, memory, a grid over everything
    python benchmarks/benchmark.py --quick      # a part of each
    python benchmarks/benchmark.py --aims       # the speed and memory that are aimed at, and the grid
    python benchmarks/benchmark.py --device cuda

Tables go to the terminal, CSV files and plots into the output directory.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from aims import check_aims
from cases import IMPLEMENTATIONS, Case
from family import run_family
from grid import Grid, run_grid
from limit import run_limit
from memory import run_memory
from report import environment, write_csv
from sweep import run_sweep
from terminal import print_table, say
from transforms import run_transforms

HAS_MATPLOTLIB = find_spec("matplotlib") is not None
if HAS_MATPLOTLIB:
    from plots import plot_memory, plot_sweep

WHOLE_GRID = Grid()


@dataclass(frozen=True)
class Plan:
    """How much is measured: everything, unless said otherwise. The sweep fills in its shapes."""

    sweep: tuple[Case, ...] = (Case(()), Case((), weights="pos_weight[C]"), Case((), "bfloat16"))
    exponents: tuple[int, ...] = (0, 10, 14, 16, 18, 20, 22, 24)  # the sizes of the sweep are these powers of two
    compiled: tuple[int, ...] = exponents  # where torch.compile is measured too: every size compiles anew
    memory: tuple[Case, ...] = (
        Case((4096, 4096)),
        Case((4096, 4096), weights="pos_weight[C]"),
        Case((4096, 4096), "bfloat16"),
        Case((4096, 4096), reduction="none"),
        Case((4096, 4096), mode="inference"),
    )
    memory_of: tuple[str, ...] = IMPLEMENTATIONS
    grid: Grid = WHOLE_GRID
    seconds: float = 1.0  # for a case of the sweep; a cell of the grid gets a twentieth
    min_rounds: int = 7


FULL = Plan()
QUICK = Plan(
    sweep=FULL.sweep[:1],
    exponents=(0, 10, 16, 20, 24),
    compiled=(20,),
    memory=FULL.memory[:2],
    memory_of=("native", "ours"),
    grid=Grid(sizes=(1, 1000, 1 << 16), dtypes=("float32", "bfloat16"), layouts=("contiguous", "channels_last")),
    seconds=0.2,
    min_rounds=5,
)
SMOKE = Plan(
    sweep=FULL.sweep[:1],
    exponents=(0, 10),
    compiled=(),
    memory=(Case((256, 256)),),
    memory_of=("ours",),
    grid=Grid(sizes=(1,), dtypes=("float32",), layouts=("sliced",)),
    seconds=0.0,
    min_rounds=2,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="a part, in under 3 minutes")
    how_much.add_argument("--smoke", action="store_true", help="hardly anything: that it runs")
    how_much.add_argument(
        "--aims", action="store_true", help="the speed and memory that are aimed at on a CPU, and the grid"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("aims", "family", "transforms", "limit", "sweep", "memory", "grid"),
        help="only these parts",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="for each of the aims")
    parser.add_argument("--output", type=Path, default=Path("build/benchmark"), help="where CSV files and plots go")
    args = parser.parse_args()
    plan = QUICK if args.quick else SMOKE if args.smoke else FULL
    parts = args.only or (("aims", "grid") if args.aims else ("limit", "sweep", "memory", "grid"))
    if "aims" in parts and args.device != "cpu":
        parser.error("the aims are those of the CPU")

    start = time.monotonic()
    torch.set_num_threads(args.threads)
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    facts = environment(args.device)
    (output / "environment.txt").write_text("".join(f"{name}: {fact}\n" for name, fact in facts.items()))
    print_table("Environment", ("", ""), facts.items())

    where = {"threads": args.threads, "device": args.device}
    if "aims" in parts:
        write_csv(output / "aims.csv", check_aims(args.threads, args.seconds))
    if "family" in parts:
        rows = run_family(args.device, args.threads, plan.seconds, plan.min_rounds)
        write_csv(output / "family.csv", rows)
    if "transforms" in parts:
        sizes = tuple(2**exponent for exponent in plan.exponents if exponent in (10, 16, 20))
        rows = run_transforms(args.device, sizes, plan.seconds, plan.min_rounds)
        write_csv(output / "transforms.csv", rows)
    if "limit" in parts:
        write_csv(output / "limit.csv", run_limit(args.device, args.threads, plan.seconds, plan.min_rounds))
    if "sweep" in parts:
        cases = [replace(case, **where) for case in plan.sweep]
        larger = (28,) if args.device == "cuda" else ()
        sizes = plan.exponents + larger, plan.compiled + larger
        rows = run_sweep(cases, *sizes, plan.seconds, plan.min_rounds)
        write_csv(output / "sweep.csv", rows)
        if HAS_MATPLOTLIB:
            plot_sweep(output, rows)
    if "memory" in parts:
        rows = run_memory([replace(case, **where) for case in plan.memory], plan.memory_of)
        write_csv(output / "memory.csv", rows)
        if HAS_MATPLOTLIB:
            plot_memory(output, rows)
    if "grid" in parts:
        threads = sorted({1, args.threads}) if args.device == "cpu" else [args.threads]
        rows = run_grid(plan.grid, args.device, threads, plan.seconds / 20, plan.min_rounds)
        write_csv(output / "grid.csv", rows)
    drawn = "CSV files and plots" if HAS_MATPLOTLIB else "CSV files, no plots since matplotlib is not installed"
    say(f"{time.monotonic() - start:.0f} s. {drawn}: {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
