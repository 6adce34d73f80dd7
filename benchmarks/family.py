"""The losses that people wrap around binary cross entropy: the functions of other libraries, torch.compile of them, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from report import Row
from terminal import print_table, track
from timing import Timing, measure, repeat
from torch import Tensor

import bce_ext.functional as ours

SIZES = {"4M": 1 << 22, "1,000": 1000}
Loss = Callable[[Tensor, Tensor], Tensor]


def torchvision_focal(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "mean"
) -> Tensor:
    """torchvision/ops/focal_loss.py of 0.29."""
    p = torch.sigmoid(inputs)
    ce_loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce_loss * ((1 - p_t) ** gamma)
    if alpha >= 0:
        alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
        loss = alpha_t * loss
    return loss if reduction == "none" else loss.mean()


def timm_asymmetric(x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """AsymmetricLossMultiLabel of timm/loss/asymmetric_loss.py of 1.0.31, with its defaults."""
    gamma_neg, gamma_pos, clip, eps = 4.0, 1.0, 0.05, 1e-8
    x_sigmoid = torch.sigmoid(x)
    xs_pos, xs_neg = x_sigmoid, 1 - x_sigmoid
    xs_neg = (xs_neg + clip).clamp(max=1)
    loss = y * torch.log(xs_pos.clamp(min=eps)) + (1 - y) * torch.log(xs_neg.clamp(min=eps))
    pt = xs_pos * y + xs_neg * (1 - y)
    one_sided_gamma = gamma_pos * y + gamma_neg * (1 - y)
    loss = -loss * torch.pow(1 - pt, one_sided_gamma)
    return loss if reduction == "none" else loss.mean()


def torch_ignoring(x: Tensor, y: Tensor) -> Tensor:
    """What takes the place of ignore_index in torch."""
    valid = y != -100
    loss = F.binary_cross_entropy_with_logits(x, torch.where(valid, y, 0).to(x.dtype), reduction="none")
    return torch.where(valid, loss, 0).sum() / valid.sum()


@dataclass(frozen=True)
class Comparison:
    """Our loss against others."""

    name: str
    ours: Loss
    rivals: dict[str, Loss]
    target: torch.dtype = torch.float32


def focal(x: Tensor, y: Tensor) -> Tensor:
    return ours.sigmoid_focal_loss(x, y, reduction="mean")


def compiled(function: Loss) -> Loss:
    return torch.compile(function, fullgraph=True, dynamic=False)


PLAIN = ours.binary_cross_entropy_with_logits


def comparisons() -> Iterator[Comparison]:
    torchvision: dict[str, Loss] = {"eager": torchvision_focal}
    timm: dict[str, Loss] = {"eager": timm_asymmetric}
    yield Comparison("focal", focal, {f"torchvision, {k}": v for k, v in _with_compiled(torchvision).items()})
    yield Comparison("focal", focal, {"plain": PLAIN})
    yield Comparison("asymmetric", ours.asymmetric_loss, {f"timm, {k}": v for k, v in _with_compiled(timm).items()})
    ignoring = partial(PLAIN, ignore_index=-100)
    yield Comparison("ignore_index", ignoring, {"plain": PLAIN})
    masked = {f"torch, {k}": v for k, v in _with_compiled({"eager": torch_ignoring}).items()}
    yield Comparison("ignore_index, int64 target", ignoring, {"plain": PLAIN, **masked}, torch.int64)
    yield Comparison("ignore_index, uint8 target", partial(PLAIN, ignore_index=255), {"plain": PLAIN}, torch.uint8)
    yield Comparison("label_smoothing", partial(PLAIN, label_smoothing=0.1), {"plain": PLAIN})
    normalizer = torch.tensor(1000.0)
    yield Comparison("normalizer", partial(PLAIN, normalizer=normalizer), {"plain": PLAIN})


def _with_compiled(losses: dict[str, Loss]) -> dict[str, Loss]:
    return losses | {"torch.compile": compiled(losses["eager"])}


def _step(function: Loss, input: Tensor, target: Tensor) -> Callable[[], None]:
    leaf = input.clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        function(leaf, target).backward()

    return step


def run_family(device: str, threads: int, seconds: float, min_rounds: int, sizes: dict[str, int] = SIZES) -> list[Row]:
    """mean, forward and backward, float32 logits and hard labels."""
    rows: list[Row] = []
    cases = [(size, numel, case) for size, numel in sizes.items() for case in comparisons()]
    for size, numel, case in track(cases, "family", len(cases)):
        torch.manual_seed(0)
        torch._dynamo.reset()
        input = torch.randn(numel, device=device)
        target = (torch.rand(numel, device=device) < 0.5).to(case.target)
        losses = {"ours": case.ours, **case.rivals}
        steps = {name: repeat(_step(loss, input, target), device) for name, loss in losses.items()}
        timings: dict[str, Timing] = measure(steps, seconds, min_rounds)
        for name in case.rivals:
            mine, theirs = timings["ours"], timings[name]
            ratio = {"speedup": theirs.median / mine.median, "relative_time": mine.median / theirs.median}
            sides = {"ours": str(mine), "theirs": str(theirs)}
            rows.append({"loss": case.name, "elements": size, "against": name, **sides, **ratio, "threads": threads})
    columns = ("loss", "elements", "against", "ours", "theirs", "speedup", "relative_time")
    print_table("Family: mean, forward and backward", columns, ([row[column] for column in columns] for row in rows))
    return rows
