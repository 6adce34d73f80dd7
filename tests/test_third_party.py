"""Packages from PyPI that call BCE by themselves, unchanged, under bce_ext.fused(): the same losses, gradients and trained parameters."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import bce_ext


@pytest.fixture(scope="module", autouse=True)
def _torchvision() -> Iterator[None]:
    """timm and segmentation-models-pytorch need torchvision. Its operators load only beside the torch that it was built for (not beside a CPU build of torch,
    where it comes from PyPI), and its import stumbles over those that it registers fakes for. Nothing here calls them, so they are declared in its place."""
    library = None
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
    yield
    del library


def operators_of(function: Callable[[], object]) -> set[str]:
    with torch.profiler.profile() as profiler:
        function()
    return {event.key for event in profiler.key_averages()}


def assert_same_training(make: Callable[[], tuple[torch.nn.Module, Callable[[], Tensor]]], steps: int = 4) -> None:
    """`make` returns a model and what computes its loss. Trained natively and under fused(), from the same start."""
    histories = []
    for context in (nullcontext(), bce_ext.fused()):
        torch.manual_seed(0)
        model, objective = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        history: list[Any] = []
        with context:
            for _ in range(steps):
                loss = objective()
                optimizer.zero_grad()
                loss.backward()
                gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
                optimizer.step()
                history.append((loss.detach(), [gradient for gradient in gradients if gradient is not None]))
            if isinstance(context, nullcontext):
                assert not any(name.startswith("bce_ext") for name in operators_of(objective))
            else:
                names = operators_of(objective)
                assert any(name.startswith("bce_ext::") for name in names)
                assert not any(name.startswith("aten::binary_cross_entropy") for name in names)
        histories.append((history, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(*histories, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_transformers_multi_label_head(labels: str, device: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=5,
        problem_type="multi_label_classification",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    def make() -> tuple[torch.nn.Module, Callable[[], Tensor]]:
        model = transformers.BertForSequenceClassification(config).to(device).train()
        tokens = torch.randint(50, (6, 12), device=device)
        target = torch.rand(6, 5, device=device)
        target = target.round() if labels == "hard" else target
        return model, lambda: model(input_ids=tokens, labels=target).loss

    assert_same_training(make)


TIMM_OPTIONS = [
    {},
    {"smoothing": 0.0},
    {"target_threshold": 0.2},
    {"sum_classes": True},
    {"reduction": "sum"},
    {"pos_weight": 2.0},
]


@pytest.mark.parametrize("targets", ["classes", "dense"])
@pytest.mark.parametrize("options", TIMM_OPTIONS, ids=lambda options: next(iter(options), "default"))
def test_timm_binary_cross_entropy(options: dict[str, Any], targets: str, device: str) -> None:
    timm_loss = pytest.importorskip(
        "timm.loss", reason="timm and the torchvision that it needs are not installed", exc_type=ImportError
    )

    def make() -> tuple[torch.nn.Module, Callable[[], Tensor]]:
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)).to(device)
        loss = timm_loss.BinaryCrossEntropy(**options).to(device)
        input = torch.randn(7, 8, device=device)
        target = torch.randint(5, (7,), device=device) if targets == "classes" else torch.rand(7, 5, device=device)
        return model, lambda: loss(model(input), target)

    assert_same_training(make)


SMP_OPTIONS: list[dict[str, Any]] = [
    {},
    {"smooth_factor": 0.1},
    {"ignore_index": None},
    {"reduction": "sum"},
    {"pos_weight": torch.tensor([0.5, 2.0, 1.0]).view(3, 1, 1)},
    {"weight": torch.tensor([0.5, 2.0, 1.0]).view(3, 1, 1)},
]


@pytest.mark.parametrize("options", SMP_OPTIONS, ids=lambda options: next(iter(options), "default"))
def test_segmentation_models_soft_bce(options: dict[str, Any], device: str) -> None:
    smp_losses = pytest.importorskip(
        "segmentation_models_pytorch.losses",
        reason="segmentation-models-pytorch and the torchvision that it needs are not installed",
        exc_type=ImportError,
    )

    def make() -> tuple[torch.nn.Module, Callable[[], Tensor]]:
        model = torch.nn.Conv2d(2, 3, 3, padding=1).to(device)
        loss = smp_losses.SoftBCEWithLogitsLoss(**options).to(device)
        input = torch.randn(2, 2, 9, 9, device=device)
        target = torch.rand(2, 3, 9, 9, device=device).round()
        if options.get("ignore_index", -100) is not None:
            target[0, 0, :3] = -100
        return model, lambda: loss(model(input), target)

    assert_same_training(make)


def test_segmentation_model_from_the_library(device: str) -> None:
    """A whole network of the library, in channels_last."""
    smp = pytest.importorskip(
        "segmentation_models_pytorch",
        reason="segmentation-models-pytorch and the torchvision that it needs are not installed",
        exc_type=ImportError,
    )

    def make() -> tuple[torch.nn.Module, Callable[[], Tensor]]:
        model = smp.Unet("resnet18", encoder_weights=None, classes=2, decoder_channels=(16, 8, 8, 8, 8)).to(device)
        model = model.to(memory_format=torch.channels_last).eval()  # no batch statistics: they amplify rounding
        loss = smp.losses.SoftBCEWithLogitsLoss(smooth_factor=0.1)
        input = torch.randn(1, 3, 64, 64, device=device).to(memory_format=torch.channels_last)
        target = torch.rand(1, 2, 64, 64, device=device).round()
        return model, lambda: loss(model(input), target)

    assert_same_training(make, steps=2)


# ---- the focal and the asymmetric loss beside those of the libraries ----


def assert_same_values(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], target: Tensor) -> None:
    """Loss and gradient, in float64 so that both formulas are exact, and away from where they saturate."""
    logits = torch.linspace(-9, 9, target.numel(), dtype=torch.float64, device=target.device).view_as(target)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    losses = [function(leaf, target) for function, leaf in zip((ours, theirs), leaves, strict=True)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss.sum(), leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def labels(kind: str, device: str, shape: tuple[int, ...] = (6, 7)) -> Tensor:
    values = torch.rand(shape, dtype=torch.float64, device=device)
    return values.round() if kind == "hard" else values


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (-1, 2.0), (0.6, 1.0), (0.25, 0.0), (0.25, 3.7)])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_torchvision_focal_loss(kind: str, alpha: float, gamma: float, reduction: str, device: str) -> None:
    ops = pytest.importorskip(
        "torchvision.ops", reason="torchvision does not load beside this torch", exc_type=Exception
    )
    assert_same_values(
        lambda x, y: bce_ext.functional.sigmoid_focal_loss(x, y, alpha, gamma, reduction),
        lambda x, y: ops.sigmoid_focal_loss(x, y, alpha, gamma, reduction),
        labels(kind, device),
    )


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), [(4.0, 1.0, 0.05), (2.0, 2.0, 0.0), (3.7, 0.5, 0.2)])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_timm_asymmetric_loss(
    kind: str, gamma_neg: float, gamma_pos: float, clip: float, detach: bool, reduction: str, device: str
) -> None:
    timm_loss = pytest.importorskip(
        "timm.loss", reason="timm and the torchvision that it needs are not installed", exc_type=ImportError
    )
    parameters = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
    try:
        theirs = timm_loss.AsymmetricLossMultiLabel(
            **parameters, disable_torch_grad_focal_loss=detach, smoothing=0.1, reduction=reduction
        )
    except TypeError:
        pytest.skip("this timm's asymmetric loss has no smoothing and no reduction")
    target = labels(kind, device)
    options = {"normalizer": len(target)} if reduction == "batchmean" else {"reduction": reduction}

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return bce_ext.functional.asymmetric_loss(
            x.float(), y.float(), **parameters, detach_focusing=detach, label_smoothing=0.1, **options
        )

    logits = torch.linspace(-9, 9, target.numel(), device=device).view_as(target)  # timm computes in float32
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    losses = [ours(leaves[0], target), theirs(leaves[1], target.float())]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def segmentation_models_losses() -> Any:
    return pytest.importorskip(
        "segmentation_models_pytorch.losses",
        reason="segmentation-models-pytorch and the torchvision that it needs are not installed",
        exc_type=ImportError,
    )


def test_segmentation_models_focal_loss(device: str) -> None:
    smp_losses = segmentation_models_losses()
    target = labels("hard", device)
    target[0] = -100
    theirs = smp_losses.FocalLoss("binary", alpha=0.25, gamma=2.0, ignore_index=-100)
    assert_same_values(
        lambda x, y: bce_ext.functional.sigmoid_focal_loss(x, y, reduction="mean", ignore_index=-100), theirs, target
    )


@pytest.mark.parametrize("smooth_factor", [None, 0.1])
def test_segmentation_models_ignored_and_smoothed(smooth_factor: float | None, device: str) -> None:
    smp_losses = segmentation_models_losses()
    target = labels("hard", device)
    target[0] = -100
    theirs = smp_losses.SoftBCEWithLogitsLoss(ignore_index=-100, smooth_factor=smooth_factor)
    assert_same_values(
        lambda x, y: bce_ext.functional.binary_cross_entropy_with_logits(
            x, y, ignore_index=-100, label_smoothing=2 * (smooth_factor or 0.0), normalizer=target.numel()
        ),
        theirs,
        target,
    )
