"""Trains two classifiers on real data, each with `torch.nn.BCEWithLogitsLoss` and with `bce_ext.BCEWithLogitsLoss`.

Both trainings start from the same seed, see the same batches and go on step by step beside each other. Their losses may
differ by rounding only; the program exits with 1 if they differ by more.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

import bce_ext

# The two losses round differently, by about 1e-7 of a float32, and each optimizer step feeds that difference back. This
# allows it to grow a hundredfold over the training; a wrong gradient is orders of magnitude outside.
LOSS_TOLERANCE = 1e-5  # relative, in each epoch
PARAMETER_TOLERANCE = 1e-5  # absolute, of parameters whose size is about 0.1 to 1
EPOCHS = 30
BATCH = 128


@dataclass
class Task:
    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    pos_weight: Tensor | None


def make_task(name: str, features: np.ndarray, labels: np.ndarray, pos_weight: Tensor | None = None) -> Task:
    x_train, x_test, y_train, y_test = train_test_split(features, labels, test_size=0.25, random_state=0)
    scaler = StandardScaler().fit(x_train)
    x_train, x_test = (torch.tensor(scaler.transform(x), dtype=torch.float32) for x in (x_train, x_test))
    y_train, y_test = (torch.tensor(y, dtype=torch.float32) for y in (y_train, y_test))
    return Task(name, (x_train, y_train), (x_test, y_test), pos_weight)


def make_tasks() -> list[Task]:
    digits, digit = load_digits(return_X_y=True)
    cancer, benign = load_breast_cancer(return_X_y=True)
    return [
        # Ten labels, each against the rest: nine of ten targets are negative, which pos_weight balances.
        make_task("digits, 10 labels", digits, np.eye(10)[digit], pos_weight=torch.full((10,), 9.0)),
        make_task("breast cancer, binary", cancer, benign[:, None]),
    ]


class Training:
    """A model, its loss and its optimizer, with a record of the losses and of the time that the loss took."""

    def __init__(self, task: Task, loss_type: type[nn.Module]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(task.train[0].shape[1], 64), nn.ReLU(), nn.Linear(64, task.train[1].shape[1])
        )
        self.criterion = loss_type(pos_weight=task.pos_weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.losses = [0.0] * EPOCHS
        self.seconds: list[float] = []

    def step(self, x: Tensor, y: Tensor, epoch: int, share: float) -> None:
        logits = self.model(x)
        # The loss alone is timed, forward and backward; the model's backward goes on from the gradient of the logits.
        leaf = logits.detach().requires_grad_()
        start = perf_counter()
        loss = self.criterion(leaf, y)
        loss.backward()
        self.seconds.append(perf_counter() - start)
        self.optimizer.zero_grad()
        logits.backward(leaf.grad)
        self.optimizer.step()
        self.losses[epoch] += share * float(loss.detach())

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """The share of right classes: the largest logit of several, the sign of a single one."""
        with torch.no_grad():
            logits = self.model(x)
        right = (logits > 0) == (y > 0.5) if y.shape[1] == 1 else logits.argmax(1) == y.argmax(1)
        return float(right.double().mean())

    def parameters(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()


def compare(task: Task, console: Console) -> bool:
    native, ours = Training(task, nn.BCEWithLogitsLoss), Training(task, bce_ext.BCEWithLogitsLoss)
    x, y = task.train
    for epoch in tqdm(range(EPOCHS), desc=task.name, unit="epoch"):
        for rows in torch.randperm(len(x)).split(BATCH):
            for training in (native, ours):
                training.step(x[rows], y[rows], epoch, len(rows) / len(x))

    table = Table(title=f"{task.name}: loss per epoch")
    for heading in ("epoch", "torch.nn", "bce_ext", "relative difference"):
        table.add_column(heading, justify="right")
    differences = []
    for epoch, (expected, got) in enumerate(zip(native.losses, ours.losses, strict=True), 1):
        differences.append(abs(got - expected) / expected)
        table.add_row(str(epoch), f"{expected:.7f}", f"{got:.7f}", f"{differences[-1]:.1e}")
    table.add_section()
    table.add_row("test accuracy", *(f"{training.accuracy(*task.test):.4f}" for training in (native, ours)))
    table.add_row("loss, µs per step", *(f"{1e6 * np.median(training.seconds):.1f}" for training in (native, ours)))
    console.print(table)
    parameter_difference = float((ours.parameters() - native.parameters()).abs().max())
    console.print(f"Largest difference of the loss, relative: {max(differences):.1e} (at most {LOSS_TOLERANCE:.0e})")
    console.print(
        f"Largest difference of a parameter: {parameter_difference:.1e} (at most {PARAMETER_TOLERANCE:.0e})\n"
    )
    return max(differences) <= LOSS_TOLERANCE and parameter_difference <= PARAMETER_TOLERANCE


def main() -> int:
    console = Console()
    agree = [compare(task, console) for task in make_tasks()]
    if not all(agree):
        console.print("[bold red]The two losses disagree.[/]")
        return 1
    console.print("Both losses train the same models.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
