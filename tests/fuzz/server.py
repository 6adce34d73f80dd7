"""Runs cases in child processes that may die, and says which case killed them."""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from .cases import Case, make_case
from .execute import Outcome, Stage, run
from .schemas import operators, scripted
from .shrink import shrink

BATCH = 500  # cases in a process before a fresh one takes over
TIME_LIMIT = 60  # seconds for a case
SHRUNK = 10  # kinds of failures of which a server makes the program small: each takes some seconds


class Board:
    """Numbers in shared memory: how far a server is, and how many cases of each operator came out how."""

    HEAD = 3  # index of the case under way, its stage, cases done

    def __init__(self, path: Path) -> None:
        size = 8 * (self.HEAD + len(operators()) * len(Outcome))
        if not path.exists():
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self.numbers = memoryview(mmap.mmap(file.fileno(), size)).cast("q")
        self.names = [operator.name for operator in operators()]

    def begin(self, index: int) -> None:
        self.numbers[0] = index

    def at(self, stage: Stage) -> None:
        self.numbers[1] = stage

    def count(self, operator: str, outcome: Outcome) -> None:
        self.numbers[self.HEAD + self.names.index(operator) * len(Outcome) + outcome] += 1
        self.numbers[2] += 1

    def counts(self) -> dict[str, list[int]]:
        width = len(Outcome)
        starts = (self.HEAD + i * width for i in range(len(self.names)))
        return {name: list(self.numbers[start : start + width]) for name, start in zip(self.names, starts, strict=True)}


@dataclass
class Failure:
    number: int
    operator: str
    what: str  # the same for failures of one kind
    details: str
    program: str


def in_child(work: Callable[[], None], log: Path) -> int:
    """Calls `work` in a forked process with its output in `log`. Returns what waitpid says of its end; 0 is well."""
    pid = os.fork()
    if pid == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.disable()  # of pytest, which would tell of a death at length
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the end, also where no Python code gets to run
        try:
            work()
        except BaseException as error:
            os.write(2, f"the fuzz itself raised {error!r}\n".encode())
            os._exit(70)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def death(status: int, log: str) -> tuple[str, str]:
    """What killed a process and in which of our functions, the same for all deaths of one kind; and where in detail."""
    frames = symbolized(log)
    own = next((frame for frame in frames if "csrc/" in frame), "")
    place = f" in {_without_template(own)}" if own else ""
    message = re.search(r".*(?:runtime error: |ERROR: AddressSanitizer: )(.*)", log)
    if message:
        # Types, addresses and numbers are those of one case.
        what = re.sub(r"(of type|for type|on unknown address|on address).*|0x\w+|-?\d+", "", message[1]).strip()
        what = re.sub(r"\s+", " ", f"{what}{place}")
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        what = f"did not return within {TIME_LIMIT} s"
    elif os.WIFSIGNALED(status):
        what = f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    else:
        what = f"exited with status {os.waitstatus_to_exitcode(status)}"
    told = [message[0][:240]] if message else [log[-2000:]]
    return what, "\n".join([*told, *(f"    {frame}" for frame in frames[:8])])


def _without_template(frame: str) -> str:
    """The function and file of a frame "type name<...>(...) at file:line", for all instruction sets the same."""
    function, _, place = frame.rpartition(" at ")
    plain = re.sub(
        r"[<(].*", "", re.sub(r"\(anonymous namespace\)::|bce_ext::|baseline::|avx2::|avx512::", "", function)
    )
    return f"{plain.split()[-1] if plain.split() else function} at {place.partition(':')[0]}"


def symbolized(log: str) -> list[str]:
    """Our own frames of a sanitizer's report, the innermost first, as "name at csrc/file:line"."""
    found = re.findall(r"#\d+ 0x\w+ .*?\((/\S+/libbce_ext\.so)\+(0x\w+)\)", log)
    return _lines_of(found[0][0], tuple(address for _, address in found[:6])) if found else []


@cache
def _lines_of(library: str, addresses: tuple[str, ...]) -> list[str]:
    # The sanitizer's own symbolizer would read the symbols of all of torch each time.
    command = ["addr2line", "-e", library, "-f", "-C", "-i", "-p", *addresses]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    lines = [line.removeprefix(" (inlined by) ") for line in output.splitlines()]
    return [re.sub(r" at \S*/(csrc/\S+).*", r" at \1", line)[:240] for line in lines if "/csrc/" in line]


class Server:
    """Every so-manieth case, one after another."""

    def __init__(self, seed: int, numbers: Sequence[int], directory: Path) -> None:
        self.seed = seed
        self.numbers = numbers
        self.directory = directory
        self.board = Board(directory / "board")
        self.seen: set[str] = set()

    def serve(self) -> None:
        warm_up()
        position = 0
        while position < len(self.numbers):
            end = min(position + BATCH, len(self.numbers))
            log = self.directory / "log"
            status = in_child(lambda start=position, end=end: self._batch(start, end), log)
            for failure in self._left_behind():
                self._report(failure)
            if status == 0:
                position = end
                continue
            position = self.board.numbers[0]
            case = make_case(self.seed, self.numbers[position])
            what, details = death(status, log.read_text(errors="replace"))
            self.board.count(case.operator, Outcome.FAILED)
            stage = Stage(self.board.numbers[1]).name.lower()
            self._report(Failure(case.number, case.operator, what, f"in {stage}: {details}", str(case)))
            position += 1

    def _batch(self, start: int, end: int) -> None:
        torch.set_num_threads(2)
        with (self.directory / "failures").open("a", buffering=1) as failures:
            for position in range(start, end):
                self.board.begin(position)
                case = make_case(self.seed, self.numbers[position])
                signal.alarm(TIME_LIMIT)
                verdict = run(case, self.board.at)
                signal.alarm(0)
                self.board.count(case.operator, verdict.outcome)
                if verdict.outcome == Outcome.FAILED:
                    failure = Failure(case.number, case.operator, verdict.failure, verdict.details, str(case))
                    failures.write(json.dumps(asdict(failure)) + "\n")

    def _left_behind(self) -> list[Failure]:
        """The failures that the last batch lived through."""
        path = self.directory / "failures"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [Failure(**json.loads(line)) for line in lines]

    def _report(self, failure: Failure) -> None:
        """Writes a failure down, the first of its kind with the smallest program that shows it."""
        if failure.what not in self.seen:
            self.seen.add(failure.what)
            case = make_case(self.seed, failure.number)
            if failure_of(case, self.directory)[0] == failure.what:
                if len(self.seen) <= SHRUNK:
                    smallest = shrink(case, lambda other: failure_of(other, self.directory)[0] == failure.what)
                    failure.program = str(smallest)
            else:
                failure.details += (
                    "\nThe case alone does not fail: what fails is the process after the cases before it."
                )
        with (self.directory / "reports").open("a") as reports:
            reports.write(json.dumps(asdict(failure)) + "\n")


def warm_up() -> None:
    """What takes long the first time is done before the processes fork; no threads may be started here."""
    with FakeTensorMode():
        torch.ones(2) + 1
    for operator in operators():
        scripted(operator.name)


def failure_of(case: Case, directory: Path) -> tuple[str, str]:
    """What goes wrong with a case that runs alone, and the details; empty if nothing does."""
    answer = directory / "answer"
    answer.unlink(missing_ok=True)

    def alone() -> None:
        torch.set_num_threads(2)
        signal.alarm(TIME_LIMIT)
        verdict = run(case)
        answer.write_text(json.dumps([verdict.failure, verdict.details]))

    log = directory / "log-alone"
    status = in_child(alone, log)
    if status != 0:
        return death(status, log.read_text(errors="replace"))
    what, details = json.loads(answer.read_text())
    return what, details
