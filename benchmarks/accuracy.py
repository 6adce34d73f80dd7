"""Measures the errors of the loss and its gradient in ULP against float64, ours beside native, and writes docs/accuracy.md.

python benchmarks/accuracy.py           writes the file
python benchmarks/accuracy.py --check   compares with it: exit status 1 where ours has become worse
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from family import timm_asymmetric, torchvision_focal
from torch import Tensor

import bce_ext

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import reference  # noqa: E402  # the formulas in float64

DOCUMENT = ROOT / "docs" / "accuracy.md"
COUNT = 200_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Function = Callable[..., Tensor]


@dataclass
class Range:
    """Logits, or probabilities, with their labels."""

    name: str
    make: Callable[[torch.Generator], tuple[Tensor, Tensor]]


def uniform(
    low: float, high: float, label: Callable[[Tensor], Tensor]
) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def make(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        values = low + (high - low) * torch.rand(COUNT, generator=generator, dtype=torch.float64)
        return values, label(values)

    return make


def normal(mean: float, label: float) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def make(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        values = mean + torch.randn(COUNT, generator=generator, dtype=torch.float64)
        return values, torch.full_like(values, label)

    return make


def right(values: Tensor) -> Tensor:
    return (values > 0).double()


def wrong(values: Tensor) -> Tensor:
    return (values <= 0).double()


LOGITS = [
    Range("x in [-1, 1], label right", uniform(-1, 1, right)),
    Range("x in [-1, 1], label wrong", uniform(-1, 1, wrong)),
    Range("x in [-8, 8], label right", uniform(-8, 8, right)),
    Range("x in [-8, 8], label wrong", uniform(-8, 8, wrong)),
    Range("N(-8, 1), negatives", normal(-8, 0.0)),
    Range("x in [-20, -10], negatives", uniform(-20, -10, right)),
    Range("x in [-50, -20], negatives", uniform(-50, -20, right)),
    Range("x in [-88, -50], negatives", uniform(-88, -50, right)),
    Range("x in [-104, -88], negatives", uniform(-104, -88, right)),
    Range("x in [20, 88], positives", uniform(20, 88, right)),
    Range("x in [-1e4, 1e4], label wrong", uniform(-1e4, 1e4, wrong)),
]
PROBABILITIES = [
    Range("q in (0, 1), positives", uniform(1e-6, 1, torch.ones_like)),
    Range("q in (0, 1), negatives", uniform(1e-6, 1 - 1e-3, torch.zeros_like)),
    Range("q in (0, 0.01), negatives", uniform(1e-6, 1e-2, torch.zeros_like)),
    Range("q in (0, 1e-4), negatives", uniform(1e-9, 1e-4, torch.zeros_like)),
]
FOCUSED = LOGITS[:6]  # beyond them the losses that are right underflow
CLIP = 0.05
_AT_CLIP = math.log(CLIP / (1 - CLIP))  # the logit whose probability is the clip
BESIDE_CLIP = [
    Range(f"x within {width:g} above the clip, negatives", uniform(_AT_CLIP, _AT_CLIP + width, torch.zeros_like))
    for width in (1.0, 0.1, 0.01)
]
TAILS = [20.0, 50.0, 88.0, 100.0]


def loss_and_gradient(function: Function, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = input.clone().requires_grad_()
    loss = function(leaf, target, reduction="none")
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach(), gradient


def number(value: float) -> str:
    if math.isnan(value) or math.isinf(value):
        return str(value)
    if value < 1000:
        return f"{value:.2f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def table(
    ranges: list[Range],
    exact: Callable[..., reference.Terms],
    ours: Function,
    native: Function,
) -> Iterator[str]:
    yield "| dtype | range | loss, ours | loss, native | gradient, ours | gradient, native |"
    yield "|---|---|---|---|---|---|"
    for dtype_name, dtype in DTYPES.items():
        for each in ranges:
            generator = torch.Generator().manual_seed(0)
            values, labels = each.make(generator)
            input, target = values.to(dtype), labels.to(dtype)
            keep = input.isfinite() & ((input < 1) | (labels > 0) if exact is reference.probabilities else True)
            input, target = input[keep], target[keep]
            terms = exact(input, target)
            expected = (terms.loss, terms.grad_input)
            cells = []
            results = [loss_and_gradient(function, input, target) for function in (ours, native)]
            for index in range(2):
                for result in results:
                    error = reference.ulp_error(result[index], expected[index])
                    cells.append(f"{number(error.max().item())} ({number(error.mean().item())})")
            yield f"| {dtype_name} | {each.name} | {' | '.join(cells)} |"


def examples() -> Iterator[str]:
    ours, native = bce_ext.functional.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits

    yield "| case | truth | ours | native |"
    yield "|---|---|---|---|"
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(COUNT, generator=generator, dtype=torch.float64) - 8).bfloat16()
    zeros = torch.zeros_like(logits)
    truth = F.softplus(logits.double()).mean().item()
    cells = [f"{function(logits, zeros).item():.4g}" for function in (ours, native)]
    yield f"| bfloat16, N(-8, 1) negatives, mean | {truth:.4g} | {' | '.join(cells)} |"

    half = torch.full((2**20,), 3.0, dtype=torch.float16)
    for reduction in ("mean", "sum"):
        cells = [
            f"{function(half, torch.zeros_like(half), reduction=reduction).item():.5g}" for function in (ours, native)
        ]
        truth = F.softplus(torch.tensor(3.0, dtype=torch.float64)).item() * (2**20 if reduction == "sum" else 1)
        shown = f"{truth:.5g}" if truth < 65520 else f"{truth:.5g} (above float16: inf)"
        yield f"| float16, 2^20 elements of loss 3.05, {reduction} | {shown} | {' | '.join(cells)} |"

    for magnitude in TAILS:
        x, y = torch.tensor([-magnitude]), torch.tensor([0.0])
        exact = reference.with_logits(x, y)
        results = [loss_and_gradient(function, x, y) for function in (ours, native)]
        cells = [f"{result[0].item():.4g}" for result in results]
        yield f"| float32, x = {-magnitude:g}, y = 0: loss | {exact.loss.item():.4g} | {' | '.join(cells)} |"
        x, y = torch.tensor([magnitude]), torch.tensor([1.0])
        exact = reference.with_logits(x, y)
        results = [loss_and_gradient(function, x, y) for function in (ours, native)]
        cells = [f"{result[1].item():.4g}" for result in results]
        yield f"| float32, x = {magnitude:g}, y = 1: gradient | {exact.grad_input.item():.4g} | {' | '.join(cells)} |"
    for infinity, label, limit in ((-math.inf, 1.0, math.inf), (math.inf, 1.0, 0.0)):
        cells = [f"{function(torch.tensor([infinity]), torch.tensor([label])).item():g}" for function in (ours, native)]
        yield f"| float32, x = {infinity:g}, y = {label:g}: loss | {limit:g} | {' | '.join(cells)} |"


PREFACE = """\
# Accuracy

Written by `benchmarks/accuracy.py`; do not edit.

Errors of single elements against float64, in ULP (units in the last place) of the dtype: **max (mean)**. Rounding to
the dtype itself costs half a ULP at most, and about a quarter of one on average. Truth is the formula in float64 on the
same, already rounded inputs.
"""


def document() -> str:
    functional = bce_ext.functional
    lines = [
        PREFACE,
        f"Each row has {COUNT:,} elements with hard labels. Native is `torch.nn.functional` of torch {torch.__version__.split('+')[0]} on the CPU.",
        "",
        "## Examples",
        "",
        *examples(),
        "",
        "## binary_cross_entropy_with_logits",
        "",
        *table(
            LOGITS,
            reference.with_logits,
            functional.binary_cross_entropy_with_logits,
            F.binary_cross_entropy_with_logits,
        ),
        "",
        "## binary_cross_entropy",
        "",
        *table(PROBABILITIES, reference.probabilities, functional.binary_cross_entropy, F.binary_cross_entropy),
        "",
        "## sigmoid_focal_loss",
        "",
        "alpha 0.25, gamma 2. Native is torchvision's formula in the dtype of the row.",
        "",
        *table(
            FOCUSED, partial(reference.focal, alpha=0.25, gamma=2.0), functional.sigmoid_focal_loss, torchvision_focal
        ),
        "",
        "## asymmetric_loss",
        "",
        "gamma_neg 4, gamma_pos 1, clip 0.05. Native is timm's formula in the dtype of the row. Where the probability of a",
        "negative is near clip, their difference has few places, and so have loss and gradient.",
        "",
        *table(FOCUSED + BESIDE_CLIP, reference.asymmetric, functional.asymmetric_loss, timm_asymmetric),
        "",
    ]
    return "\n".join(lines)


def our_maxima(text: str) -> dict[tuple[str, str, str, int], float]:
    """By section, dtype, range and column."""
    maxima: dict[tuple[str, str, str, int], float] = {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        title = section.splitlines()[0]
        rows = re.findall(r"^\| (\w+) \| ([^|]+) \| ([\d.e+]+) \([^|]+\| [^|]+\| ([\d.e+]+) \(", section, re.M)
        for dtype, name, *values in rows:
            maxima |= {(title, dtype, name, index): float(value) for index, value in enumerate(values)}
    return maxima


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    arguments = parser.parse_args()
    text = document()
    if not arguments.check:
        DOCUMENT.write_text(text)
        print(f"wrote {DOCUMENT}")
        return 0
    before, now = our_maxima(DOCUMENT.read_text()), our_maxima(text)
    # Instruction sets with and without fused multiply-add round a little differently.
    worse = [key for key, value in now.items() if value > before.get(key, 0.0) + 0.5]
    for key in worse:
        print(f"{key}: max {before.get(key)} ULP in the document, now {now[key]}")
    return 1 if worse or not now else 0


if __name__ == "__main__":
    sys.exit(main())
