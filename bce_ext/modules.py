"""The losses as modules; two of them are drop-in for :class:`torch.nn.BCEWithLogitsLoss` and :class:`torch.nn.BCELoss`."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch  # TorchScript reads the annotations of modules, so they are no strings here: no `from __future__ import annotations`
from torch import Tensor
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.nn.modules.module import _has_any_global_hook

from bce_ext import functional as F
from bce_ext._call import as_tensor
from bce_ext._docs import with_shared_arguments
from bce_ext.linear import loss_of_logits

__all__ = ["AsymmetricLoss", "BCELoss", "BCEWithLogitsLoss", "LinearBCEWithLogitsLoss", "SigmoidFocalLoss"]


def _either(given: Tensor | float | None, own: Tensor | None) -> Any:
    return own if given is None else given


torch.fx.wrap("_either")  # a symbolic trace does not know yet what will be given


class _Options(torch.nn.Module):
    """What every loss of the package offers beyond torch's. The defaults are for instances that another class has initialised."""

    label_smoothing: float = 0.0
    ignore_index: float | None = None
    weight: Tensor | None
    pos_weight: Tensor | None
    normalizer: Tensor | None

    def _set_options(
        self, label_smoothing: float, ignore_index: float | None, normalizer: Tensor | float | None
    ) -> None:
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = None if ignore_index is None else float(ignore_index)
        _hold(self, "normalizer", normalizer)

    def _tensors(self, normalizer: Tensor | float | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Weight and pos_weight, and the normalizer of the call, or else of the module."""
        if is_scripting():
            given = as_tensor(normalizer)
            return self.weight, self.pos_weight, self.normalizer if given is None else given
        find = _finder(self)
        return find(self, "weight"), find(self, "pos_weight"), _either(normalizer, find(self, "normalizer"))

    def extra_repr(self) -> str:
        options = {"label_smoothing": self.label_smoothing or None, "ignore_index": self.ignore_index}
        number = vars(self).get("normalizer")  # a tensor is a buffer
        if number is not None:
            options["normalizer"] = float(number)
        texts = (f"{name}={_text(value)}" for name, value in options.items() if value is not None)
        return ", ".join(filter(None, [super().extra_repr(), *texts]))


class _Weighted(torch.nn.Module):
    """Buffers and reduction of a loss that torch does not have, as torch's own losses hold them."""

    def __init__(
        self, weight: Tensor | float | None, pos_weight: Tensor | float | None, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.reduction = reduction
        _hold(self, "weight", weight)
        _hold(self, "pos_weight", pos_weight)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


@with_shared_arguments
class BCEWithLogitsLoss(_Options, torch.nn.BCEWithLogitsLoss):
    r"""Binary cross entropy between logits and targets: :func:`bce_ext.functional.binary_cross_entropy_with_logits` as a module.

    A subclass of :class:`torch.nn.BCEWithLogitsLoss`: the same arguments, buffers (``weight``, ``pos_weight``), ``state_dict`` and ``repr``, and
    ``isinstance`` checks hold.

    Args:
        $weight
        $deprecated
        $reduction
        $pos_weight
        $module_options

    Shape:
        Input and target: :math:`(*)`. Output: a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Example::

        >>> loss = bce_ext.BCEWithLogitsLoss()
        >>> input = torch.randn(3, requires_grad=True)
        >>> target = torch.empty(3).random_(2)
        >>> loss(input, target).backward()
    """

    def __init__(
        self,
        weight: Tensor | float | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | float | None = None,
        *,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        normalizer: Tensor | float | None = None,
    ) -> None:
        super().__init__(None, size_average, reduce, reduction)
        _hold(self, "weight", weight)
        _hold(self, "pos_weight", pos_weight)
        self._set_options(label_smoothing, ignore_index, normalizer)

    def forward(self, input: Tensor, target: Tensor, normalizer: Tensor | float | None = None) -> Tensor:
        weight, pos_weight, divisor = self._tensors(normalizer)
        return F.binary_cross_entropy_with_logits(
            input,
            target,
            weight,
            pos_weight=pos_weight,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            normalizer=divisor,
        )


@with_shared_arguments
class BCELoss(_Options, torch.nn.BCELoss):
    r"""Binary cross entropy between probabilities and targets: :func:`bce_ext.functional.binary_cross_entropy` as a module.

    A subclass of :class:`torch.nn.BCELoss`: the same arguments, buffer (``weight``), ``state_dict`` and ``repr``, and ``isinstance`` checks hold.

    Args:
        $weight
        $deprecated
        $reduction
        $module_options

    Shape:
        Input and target: :math:`(*)`. Output: a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Example::

        >>> loss = bce_ext.BCELoss()
        >>> input = torch.rand(3, requires_grad=True)
        >>> target = torch.empty(3).random_(2)
        >>> loss(input, target).backward()
    """

    def __init__(
        self,
        weight: Tensor | float | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        normalizer: Tensor | float | None = None,
    ) -> None:
        super().__init__(None, size_average, reduce, reduction)
        _hold(self, "weight", weight)
        self._set_options(label_smoothing, ignore_index, normalizer)

    def _tensors(self, normalizer: Tensor | float | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if is_scripting():
            given = as_tensor(normalizer)
            return self.weight, None, self.normalizer if given is None else given
        find = _finder(self)
        return find(self, "weight"), None, _either(normalizer, find(self, "normalizer"))

    def forward(self, input: Tensor, target: Tensor, normalizer: Tensor | float | None = None) -> Tensor:
        weight, _, divisor = self._tensors(normalizer)
        return F.binary_cross_entropy(
            input,
            target,
            weight=weight,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            normalizer=divisor,
        )


@with_shared_arguments
class SigmoidFocalLoss(_Options, _Weighted):
    r"""Focal loss of logits: :func:`bce_ext.functional.sigmoid_focal_loss` as a module.

    As for every module, ``reduction`` is ``'mean'`` where nothing is said; for the function it is ``'none'``, as in torchvision.

    Args:
        $focal
        $reduction
        $weight
        $pos_weight
        $module_options

    Shape:
        Input and target: :math:`(*)`. Output: a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Example::

        >>> loss = bce_ext.SigmoidFocalLoss(gamma=1.5)
        >>> input = torch.randn(3, requires_grad=True)
        >>> target = torch.empty(3).random_(2)
        >>> loss(input, target).backward()
    """

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        weight: Tensor | float | None = None,
        pos_weight: Tensor | float | None = None,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        normalizer: Tensor | float | None = None,
    ) -> None:
        super().__init__(weight, pos_weight, reduction)
        self._set_options(label_smoothing, ignore_index, normalizer)
        self.alpha, self.gamma = float(alpha), float(gamma)

    def forward(self, input: Tensor, target: Tensor, normalizer: Tensor | float | None = None) -> Tensor:
        weight, pos_weight, divisor = self._tensors(normalizer)
        return F.sigmoid_focal_loss(
            input,
            target,
            self.alpha,
            self.gamma,
            self.reduction,
            weight,
            pos_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            normalizer=divisor,
        )

    def extra_repr(self) -> str:
        numbers = f"alpha={_text(self.alpha)}, gamma={_text(self.gamma)}"
        return ", ".join(filter(None, [numbers, super().extra_repr()]))


@with_shared_arguments
class AsymmetricLoss(_Options, _Weighted):
    r"""Asymmetric loss of logits (ASL) for many labels: :func:`bce_ext.functional.asymmetric_loss` as a module.

    Args:
        $asymmetric
        $reduction
        $weight
        $pos_weight
        $module_options
        $focusing

    Shape:
        Input and target: :math:`(*)`. Output: a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Example::

        >>> loss = bce_ext.AsymmetricLoss()
        >>> input = torch.randn(2, 3, requires_grad=True)
        >>> target = torch.empty(2, 3).random_(2)
        >>> loss(input, target).backward()
    """

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        reduction: str = "mean",
        *,
        weight: Tensor | float | None = None,
        pos_weight: Tensor | float | None = None,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        normalizer: Tensor | float | None = None,
        detach_focusing: bool = False,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(weight, pos_weight, reduction)
        self._set_options(label_smoothing, ignore_index, normalizer)
        self.gamma_neg, self.gamma_pos, self.clip = float(gamma_neg), float(gamma_pos), float(clip)
        self.detach_focusing, self.eps = bool(detach_focusing), float(eps)

    def forward(self, input: Tensor, target: Tensor, normalizer: Tensor | float | None = None) -> Tensor:
        weight, pos_weight, divisor = self._tensors(normalizer)
        return F.asymmetric_loss(
            input,
            target,
            self.gamma_neg,
            self.gamma_pos,
            self.clip,
            weight,
            pos_weight,
            self.reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            normalizer=divisor,
            detach_focusing=self.detach_focusing,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        numbers = f"gamma_neg={_text(self.gamma_neg)}, gamma_pos={_text(self.gamma_pos)}, clip={_text(self.clip)}"
        focusing = "detach_focusing=True" if self.detach_focusing else ""
        eps = f"eps={self.eps}" if self.eps != 1e-8 else ""
        return ", ".join(filter(None, [numbers, super().extra_repr(), focusing, eps]))


@with_shared_arguments
class LinearBCEWithLogitsLoss(_Options, _Weighted):
    r"""A linear layer and the binary cross entropy of its logits: :func:`bce_ext.functional.linear_binary_cross_entropy_with_logits` as a module.

    It takes the place of the last layer and the loss. The layer is ``loss.linear``, a :class:`torch.nn.Linear`: call it for logits, for example to predict.
    Where something has changed what a call of it computes (hooks, ``spectral_norm``, an adapter in its place), the loss calls it, too, and has all logits in
    memory.

    Args:
        in_features: the number of features :math:`D`.
        num_labels: the number of labels :math:`C`.
        bias: whether the layer has a bias.
        $weight
        $pos_weight
        $reduction
        $module_options
        device: of the layer.
        dtype: of the layer.

    Shape:
        Input: :math:`(*, D)`. Target: :math:`(*, C)`, dense or sparse, or :math:`(*)` for class indices. Output: a scalar for ``'mean'`` and ``'sum'``,
        :math:`(*, C)` for ``'none'``.

    Example::

        >>> loss = bce_ext.LinearBCEWithLogitsLoss(64, 100_000)
        >>> features = torch.randn(8, 64, requires_grad=True)
        >>> target = torch.randint(100_000, (8,))
        >>> loss(features, target).backward()
        >>> best = loss.linear(features).topk(5)
    """

    def __init__(
        self,
        in_features: int,
        num_labels: int,
        *,
        bias: bool = True,
        weight: Tensor | float | None = None,
        pos_weight: Tensor | float | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        normalizer: Tensor | float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, pos_weight, reduction)
        self._set_options(label_smoothing, ignore_index, normalizer)
        self.linear = torch.nn.Linear(in_features, num_labels, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor, normalizer: Tensor | float | None = None) -> Tensor:
        weight, pos_weight, divisor = self._tensors(normalizer)
        options: dict[str, Any] = {
            "weight": weight,
            "pos_weight": pos_weight,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "normalizer": divisor,
        }
        if not _is_product(self.linear):
            return loss_of_logits(self.linear(input), target, **options)
        return F.linear_binary_cross_entropy_with_logits(
            input, self.linear.weight, target, linear_bias=self.linear.bias, **options
        )


def _is_product(layer: torch.nn.Module) -> bool:
    """Whether a call of the layer is ``F.linear`` of its parameters and nothing else.

    Subclasses, adapters and hooks may compute the parameters at that time, as FSDP does, or change input or output. Not called are the hooks of DTensor's
    parallel styles, which make the input whole and the logits local: the loss divides the labels by itself, for an input that is whole on each process.
    """
    is_linear = type(layer).forward is torch.nn.Linear.forward and "forward" not in layer.__dict__
    kinds = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    if not any(kinds):
        return is_linear and not _has_any_global_hook()
    hooks = [hook for kind in kinds for hook in kind.values()]
    of_styles = [getattr(hook, "__module__", "").startswith("torch.distributed.tensor") for hook in hooks]
    if any(of_styles) and not (is_linear and all(of_styles)):
        raise RuntimeError(
            "LinearBCEWithLogitsLoss: expected a layer with a parallel style to be a torch.nn.Linear with no other hooks, "
            f"but got {layer} with {hooks}"
        )
    return all(of_styles)


def _hold(module: torch.nn.Module, name: str, value: Tensor | float | None) -> None:
    """Tensors are buffers. A number is none, so that ``module.half()`` does not round it: a 0-d float64 tensor, which goes with any device."""
    module._buffers.pop(name, None)
    if isinstance(value, (int, float, Real)):
        with torch.inference_mode(False):  # a tensor of that mode could not be kept for backward
            setattr(module, name, as_tensor(value))
    else:
        module.register_buffer(name, value)


def _finder(module: torch.nn.Module) -> Callable[[torch.nn.Module, str], Tensor | None]:
    """``getattr`` or, since that takes 0.6 µs to find a buffer and a small loss no more than a few, what does the same for the classes of this file."""
    return _find if type(module).__module__ == __name__ else _get


def _find(module: torch.nn.Module, name: str) -> Tensor | None:
    buffers = module._buffers
    return buffers[name] if name in buffers and name not in module.__dict__ else _get(module, name)


def _get(module: torch.nn.Module, name: str) -> Tensor | None:
    return getattr(module, name, None) if name == "normalizer" else getattr(module, name)


def _text(number: float) -> str:
    return repr(number).removesuffix(".0")
