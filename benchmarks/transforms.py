"""torch.func and derivatives of second order, against torch's own loss under the same transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from report import Row
from terminal import print_table, track
from timing import measure, repeat
from torch import Tensor
from torch.func import grad, jvp, vmap

import bce_ext

Loss = Callable[..., Tensor]
Step = Callable[[Loss, Tensor, Tensor], object]
EXAMPLE = 8  # elements of one example of a batch


def _losses_one_by_one(loss: Loss, x: Tensor, y: Tensor) -> object:
    return vmap(lambda x, y: loss(x, y, reduction="none"))(x, y)


def _tangent(loss: Loss, x: Tensor, y: Tensor) -> object:
    return jvp(lambda x: loss(x, y), (x,), (y,))


def _second_derivative(loss: Loss, x: Tensor, y: Tensor) -> object:
    """The product of the Hessian with a vector."""
    leaf = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf, y), leaf, create_graph=True)
    return torch.autograd.grad(first, leaf, y)


TRANSFORMS: dict[str, Step] = {
    "vmap": lambda loss, x, y: vmap(loss)(x, y),
    "vmap, reduction none": _losses_one_by_one,
    "vmap of grad": lambda loss, x, y: vmap(grad(loss))(x, y),
    "grad": lambda loss, x, y: grad(loss)(x, y),
    "jvp": _tangent,
    "second derivative": _second_derivative,
}
LOSSES = {
    "with logits": "binary_cross_entropy_with_logits",
    "of probabilities": "binary_cross_entropy",
}


def run_transforms(device: str, sizes: tuple[int, ...], seconds: float, min_rounds: int) -> list[Row]:
    cases = [(size, loss, transform) for size in sizes for loss in LOSSES for transform in TRANSFORMS]
    rows: list[Row] = []
    for size, loss, transform in track(cases, "transforms", len(cases)):
        x = torch.randn(max(size // EXAMPLE, 1), EXAMPLE, device=device)
        y = torch.rand_like(x)
        operands = (x if loss == "with logits" else x.sigmoid(), y)
        step, name = TRANSFORMS[transform], LOSSES[loss]
        sides = {"native": getattr(torch.nn.functional, name), "ours": getattr(bce_ext.functional, name)}
        timings = measure(
            {side: repeat(partial(step, f, *operands), device) for side, f in sides.items()}, seconds, min_rounds
        )
        ours, native = timings["ours"], timings["native"]
        row: Row = {
            "loss": loss,
            "transform": transform,
            "elements": x.numel(),
            "ours": str(ours),
            "native": str(native),
        }
        rows.append({**row, "native / ours": native.median / ours.median, **asdict(ours)})
    columns = ("loss", "transform", "elements", "ours", "native", "native / ours")
    print_table(
        f"Transforms, batches of {EXAMPLE} elements: medians [20 %, 80 % quantiles]",
        columns,
        ([row[column] for column in columns] for row in rows),
    )
    return rows
