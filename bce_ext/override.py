"""Routes torch's own binary cross entropy functions and modules here, and undoes it exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from types import CodeType, FunctionType
from typing import cast

from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits
from torch.overrides import handle_torch_function, has_torch_function_variadic

__all__ = ["disable", "enable", "fused"]


def enable() -> None:
    """Makes torch's own binary cross entropy use the fused one, everywhere in the process, until :func:`disable`.

    :func:`torch.nn.functional.binary_cross_entropy`, :func:`torch.nn.functional.binary_cross_entropy_with_logits` and with them
    :class:`torch.nn.BCELoss` and :class:`torch.nn.BCEWithLogitsLoss` compute with :mod:`bce_ext.functional`: existing and new modules, names imported from
    torch earlier, third-party code, all threads. Compiled code is recompiled. Enabling twice is the same as enabling once.

    Note:
        The two function objects stay what they are; only the code that they run is exchanged, which is atomic: a call that another thread is in the middle
        of ends as it began. What does not run the code of these functions is not routed: direct calls of ``torch.binary_cross_entropy_with_logits`` or
        ``torch.ops.aten``, programs in TorchScript (``torch.jit.trace`` records the fused operators, ``torch.jit.script`` native ones), exported and
        serialized programs. May be called from any thread.

    Example::

        >>> bce_ext.enable()
        >>> torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor([-20.0]), torch.tensor([0.0]))  # 0 without
        tensor(2.0612e-09)
        >>> bce_ext.disable()
    """
    _ROUTE.set_enabled(True)


def disable() -> None:
    """Undoes :func:`enable`: torch's functions run their own code again, once all :func:`fused` blocks have ended. Without effect when not enabled.

    Example::

        >>> bce_ext.disable()
        >>> torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor([-20.0]), torch.tensor([0.0]))
        tensor(0.)
    """
    _ROUTE.set_enabled(False)


@contextmanager
def fused() -> Iterator[None]:
    """Makes torch's own binary cross entropy use the fused one within a ``with`` block or a decorated function: :func:`enable` for a while.

    Blocks may be nested, may overlap in several threads, and are undone by exceptions too. The route is that of the process, not of a thread: while any
    thread is in a block, all threads take it.

    Example::

        >>> with bce_ext.fused():
        ...     torch.nn.BCEWithLogitsLoss()(torch.tensor([-20.0]), torch.tensor([0.0]))
        tensor(2.0612e-09)
    """
    _ROUTE.add_blocks(1)
    try:
        yield
    finally:
        _ROUTE.add_blocks(-1)


def _fused_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    # Runs with the globals of torch.nn.functional: a __torch_function__ sees torch's function, whose name this is there.
    if has_torch_function_variadic(input, target, weight, pos_weight):
        return handle_torch_function(
            binary_cross_entropy_with_logits,
            (input, target, weight, pos_weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            pos_weight=pos_weight,
        )
    import bce_ext

    return bce_ext.functional.binary_cross_entropy_with_logits(
        input, target, weight, size_average, reduce, reduction, pos_weight
    )


def _fused(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            binary_cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
        )
    import bce_ext

    return bce_ext.functional.binary_cross_entropy(input, target, weight, size_average, reduce, reduction)


class _Routed:
    """One function of torch, its own code and the code that stands in for it."""

    def __init__(self, function: Callable[..., Tensor], stand_in: Callable[..., Tensor]) -> None:
        self.function = cast(FunctionType, function)
        self.own_code = self.function.__code__
        self.own_module = self.function.__module__
        # The position stays torch's: torch.jit.script compiles the source that stands there, so that what it compiles and caches is native always.
        self.code: CodeType = cast(FunctionType, stand_in).__code__.replace(
            co_name=self.own_code.co_name,
            co_filename=self.own_code.co_filename,
            co_firstlineno=self.own_code.co_firstlineno,
        )

    def switch(self, on: bool) -> None:
        self.function.__code__ = self.code if on else self.own_code
        # torch.compile guards on __code__, but keeps the function as one node of the graph, and its cache on disk knows functions of torch.nn.functional
        # by their name alone. From another module, it asks and fills that cache no more.
        self.function.__module__ = __name__ if on else self.own_module


class _Route:
    def __init__(self, *routed: _Routed) -> None:
        self.routed = routed
        self.lock = Lock()
        self.enabled = False
        self.blocks = 0
        self.on = False

    def set_enabled(self, enabled: bool) -> None:
        with self.lock:
            self.enabled = enabled
            self.update()

    def add_blocks(self, count: int) -> None:
        with self.lock:
            self.blocks += count
            self.update()

    def update(self) -> None:
        on = self.enabled or self.blocks > 0
        if on != self.on:
            for each in self.routed:
                each.switch(on)
            self.on = on


_ROUTE = _Route(_Routed(binary_cross_entropy_with_logits, _fused_with_logits), _Routed(binary_cross_entropy, _fused))
