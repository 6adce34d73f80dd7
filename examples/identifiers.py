"""Which identifiers does a function use? Predicts them from the words of its name and its docstring.

The data is the source of Python's own standard library: each function is an example, each identifier in its body a label, so that there are tens of thousands
of labels and a few of them are positive. The same model is trained with `F.linear` and torch's loss, which need a dense target and all logits, and with
`bce_ext.LinearBCEWithLogitsLoss`, which takes the sparse target as it is. Each training runs in a process of its own, so that its peak memory is its own.
The program exits with 1 if the losses of the two differ by more than rounding.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import re
import resource
import sys
import sysconfig
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import bce_ext

LOSS_TOLERANCE = 1e-4  # relative; rounding differs, and each step of the optimizer feeds that back
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


@dataclass
class Function:
    words: list[str]
    identifiers: set[str]


def read_functions(path: Path) -> list[Function]:
    """The functions of a file that have a docstring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some files test warnings
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some files test those
            return []
    functions = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node, clean=False) or ""
        words = [word.lower() for word in WORD.findall(f"{path.stem} {node.name} {docstring}")]
        inside = [part for statement in node.body for part in ast.walk(statement)]
        identifiers = {part.id for part in inside if isinstance(part, ast.Name)}
        identifiers |= {part.attr for part in inside if isinstance(part, ast.Attribute)}
        if identifiers:
            functions.append(Function(words, identifiers))
    return functions


def read_library(max_files: int) -> list[Function]:
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)[:max_files]
    return [function for path in tqdm(paths, "read", unit="file") for function in read_functions(path)]


@dataclass
class Data:
    """Examples as lists of numbers: of the words, and of the identifiers."""

    num_words: int
    num_labels: int
    words: list[list[int]]
    labels: list[list[int]]
    frequency: list[float]  # of each label
    num_train: int  # the others are held out

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The words of all examples one after the other, where each begins, and the sparse target."""
        words = [self.words[i] for i in chosen.tolist()]
        labels = [self.labels[i] for i in chosen.tolist()]
        begin = torch.tensor([0, *(len(each) for each in words)]).cumsum(0)[:-1]
        crow = torch.tensor([0, *(len(each) for each in labels)]).cumsum(0)
        columns = torch.tensor([label for each in labels for label in each], dtype=torch.int64)
        size = (len(chosen), self.num_labels)
        target = torch.sparse_csr_tensor(crow, columns, torch.ones(len(columns)), size, check_invariants=True)
        return torch.tensor([word for each in words for word in each]), begin, target


def make_data(functions: list[Function]) -> Data:
    order = torch.randperm(len(functions), generator=torch.Generator().manual_seed(0)).tolist()
    functions = [functions[i] for i in order]
    num_train = len(functions) * 9 // 10
    words = sorted({word for function in functions[:num_train] for word in function.words})
    counts = Counter(name for function in functions[:num_train] for name in function.identifiers)
    labels = sorted(counts)
    word_number = {word: i for i, word in enumerate(words, start=1)}  # 0 stands for the words of no training example
    label_number = {label: i for i, label in enumerate(labels)}
    return Data(
        num_words=len(words) + 1,
        num_labels=len(labels),
        words=[[word_number.get(word, 0) for word in each.words] for each in functions],
        labels=[sorted(label_number[name] for name in each.identifiers if name in label_number) for each in functions],
        frequency=[counts[label] / num_train for label in labels],
        num_train=num_train,
    )


class Model(nn.Module):
    """The mean of word embeddings, and a linear layer that knows how frequent each label is."""

    def __init__(self, data: Data, features: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(data.num_words, features)
        self.loss = bce_ext.LinearBCEWithLogitsLoss(features, data.num_labels, reduction="sum")
        with torch.no_grad():
            self.loss.linear.bias.copy_(torch.tensor(data.frequency).logit(1e-6))

    def native_loss(self, features: Tensor, target: Tensor) -> Tensor:
        logits = nn.functional.linear(features, self.loss.linear.weight, self.loss.linear.bias)
        return nn.functional.binary_cross_entropy_with_logits(logits, target.to_dense(), reduction="sum")


def precision_at_5(predictions: list[list[int]], labels: list[list[int]]) -> float:
    hits = sum(len(set(best) & set(own)) for best, own in zip(predictions, labels, strict=True))
    return hits / (5 * len(labels))


@dataclass
class Result:
    losses: list[float]  # of each step, for each function
    step_seconds: float
    peak_bytes: int
    precision: float


def train(data: Data, fused: bool, steps: int, batch: int, features: int, threads: int) -> Result:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "Sparse CSR")
    model = Model(data, features)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses, seconds = [], []
    name = "bce_ext" if fused else "torch"
    for _ in tqdm(range(steps), name, unit="step"):
        words, begin, target = data.batch(torch.randint(data.num_train, (batch,)))
        start = perf_counter()
        optimizer.zero_grad()
        embedded = model.embedding(words, begin)
        loss = (model.loss(embedded, target) if fused else model.native_loss(embedded, target)) / batch
        loss.backward()
        optimizer.step()
        seconds.append(perf_counter() - start)
        losses.append(loss.item())
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024

    predictions: list[list[int]] = []
    held_out = torch.arange(data.num_train, len(data.words))
    with torch.no_grad():
        for chosen in held_out.split(256):
            words, begin, _ = data.batch(chosen)
            predictions += model.loss.linear(model.embedding(words, begin)).topk(5).indices.tolist()
    precision = precision_at_5(predictions, data.labels[data.num_train :])
    return Result(losses, median(seconds), peak, precision)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--files", type=int, default=10_000, help="at most so many files of the library")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    console = Console()
    data = make_data(read_library(arguments.files))
    console.print(
        f"{len(data.words):,} functions, {data.num_words:,} words, {data.num_labels:,} identifiers as labels, "
        f"{sum(map(len, data.labels)) / len(data.labels):.1f} of them in a function"
    )
    most_frequent = torch.tensor(data.frequency).topk(5).indices.tolist()
    held_out = data.labels[data.num_train :]
    baseline = precision_at_5([most_frequent] * len(held_out), held_out)

    results = []
    for fused in (False, True):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            work = process.submit(
                train, data, fused, arguments.steps, arguments.batch, arguments.features, arguments.threads
            )
            results.append(work.result())
    native, ours = results

    table = Table("", "F.linear and torch's loss", "LinearBCEWithLogitsLoss")
    table.add_row("loss of the first step", *(f"{each.losses[0]:.5f}" for each in results))
    table.add_row("loss of the last step", *(f"{each.losses[-1]:.5f}" for each in results))
    table.add_row("time a step, ms", *(f"{1e3 * each.step_seconds:.1f}" for each in results))
    table.add_row("peak memory beyond the model, MiB", *(f"{each.peak_bytes / 2**20:.0f}" for each in results))
    table.add_row("held-out precision@5", *(f"{each.precision:.3f}" for each in results))
    console.print(table)
    console.print(f"precision@5 of the most frequent identifiers: {baseline:.3f}")
    pairs = zip(native.losses, ours.losses, strict=True)
    difference = max(abs(a - b) / abs(a) for a, b in pairs)
    is_same = difference < LOSS_TOLERANCE
    console.print(
        f"largest relative difference of the losses: {difference:.1e}, {'rounding' if is_same else 'TOO MUCH'}"
    )
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
