"""python -m fuzz: calls every operator with random and hostile arguments."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

import bce_ext

from .cases import make_case
from .execute import Outcome
from .schemas import operators
from .server import Board, Failure, Server, failure_of

# What the CPU kernels are compiled for, from the best on. A case runs on the one that its number gives.
CAPABILITIES = ("AVX512", "AVX2", "DEFAULT")


def capabilities() -> list[str]:
    best = torch.backends.cpu.get_cpu_capability()
    return list(CAPABILITIES[CAPABILITIES.index(best) :]) if best in CAPABILITIES else [best]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="how many to run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all choices (default: %(default)s)")
    parser.add_argument("--case", type=int, help="run this case alone, and print its program")
    parser.add_argument("--show", action="store_true", help="with --case: print the program without running it")
    parser.add_argument("--expect-sanitizers", action="store_true", help="fail if the build has none")
    parser.add_argument("--serve", type=int, nargs=2, metavar=("SHARE", "SHARES"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_one(options: argparse.Namespace) -> int:
    case = make_case(options.seed, options.case)
    print(case)
    if options.show:
        return 0
    with tempfile.TemporaryDirectory() as directory:
        what, details = failure_of(case, Path(directory))
    print(f"\n{case.operator}: {what or 'nothing goes wrong'}\n{details}")
    return 1 if what else 0


def run_all(options: argparse.Namespace) -> int:
    names = capabilities()
    # A multiple of their number, so that a case has the same capability on every machine that has them.
    shares = len(names) * -(-(os.cpu_count() or 1) // len(names))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as top:
        directories = [Path(top, str(share)) for share in range(shares)]
        servers = []
        for share, directory in enumerate(directories):
            directory.mkdir()
            command = [sys.executable, "-m", "fuzz", "--serve", str(share), str(shares), "--directory", str(directory)]
            command += ["--cases", str(options.cases), "--seed", str(options.seed)]
            environment = os.environ | {
                "ATEN_CPU_CAPABILITY": names[share % len(names)].lower(),
                "OMP_WAIT_POLICY": "passive",
            }
            servers.append(subprocess.Popen(command, env=environment))
        boards = [Board(directory / "board") for directory in directories]
        with tqdm(
            total=options.cases, unit=" cases", mininterval=2 if sys.stderr.isatty() else 30, dynamic_ncols=True
        ) as bar:
            while any(server.poll() is None for server in servers):
                time.sleep(0.5)
                bar.update(sum(board.numbers[2] for board in boards) - bar.n)
            bar.update(sum(board.numbers[2] for board in boards) - bar.n)
        failures = [
            Failure(**json.loads(line))
            for directory in directories
            if (directory / "reports").exists()
            for line in (directory / "reports").read_text().splitlines()
        ]
        counts = {
            o.name: [sum(column) for column in zip(*(b.counts()[o.name] for b in boards), strict=True)]
            for o in operators()
        }
        done = sum(board.numbers[2] for board in boards)
    print_failures(failures)
    print_counts(counts)
    problems = problems_of(counts, [server.returncode for server in servers], done, options.cases)
    print("\n".join(problems))
    print(
        f"{done} cases of seed {options.seed} on {', '.join(names)} in {time.monotonic() - start:.0f} s: {len(failures)} failed."
    )
    return 1 if failures or problems else 0


def print_failures(failures: list[Failure]) -> None:
    kinds = defaultdict(list)
    for failure in failures:
        kinds[failure.what].append(failure)
    for what, alike in sorted(kinds.items()):
        first = min(alike, key=lambda failure: len(failure.program))
        numbers = sorted(failure.number for failure in alike)
        names = sorted({failure.operator for failure in alike})
        print(f"\n--- {what}\n{len(alike)} times, in {', '.join(names)}")
        print(f"--case {', '.join(map(str, numbers[:8]))}{' ...' if len(numbers) > 8 else ''}")
        print(f"{first.details.strip()}\n\n{first.program}")


def print_counts(counts: dict[str, list[int]]) -> None:
    print(f"\n{'':36}" + "".join(f"{outcome.name.lower():>12}" for outcome in Outcome))
    for name, numbers in counts.items():
        print(f"{name:36}" + "".join(f"{number:12}" for number in numbers))


def problems_of(counts: dict[str, list[int]], codes: list[int], done: int, cases: int) -> list[str]:
    """What makes the run worth nothing, though no case failed."""
    problems = [f"A server ended with status {code}." for code in codes if code != 0]
    if done != cases:
        problems.append(f"{done} of {cases} cases ran.")
    for operator in operators():
        numbers = counts[operator.name]
        if sum(numbers) < 50:
            continue
        if numbers[Outcome.RETURNED] + numbers[Outcome.COMPARED] == 0:
            problems.append(f"{operator.name} never returned: its checks let no case pass. See the shapes in cases.py.")
        if operator.is_loss and numbers[Outcome.COMPARED] == 0:
            problems.append(f"{operator.name}: no answer was compared. See the formulas in answers.py.")
        if numbers[Outcome.NOT_BUILT] > 0.3 * sum(numbers):
            problems.append(f"{operator.name}: the arguments of over 30% of its cases cannot be made.")
    return problems


def main() -> int:
    options = parse()
    if options.expect_sanitizers and "-fsanitize" not in bce_ext.build_info()["cxx_flags"]:
        print(f"{bce_ext.__file__} was built without sanitizers.")
        return 2
    if options.serve:
        share, shares = options.serve
        Server(options.seed, range(share, options.cases, shares), options.directory).serve()
        return 0
    return run_one(options) if options.case is not None else run_all(options)


if __name__ == "__main__":
    sys.exit(main())
