"""Routes torch's own binary cross entropy functions and modules here, and undoes it exactly."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from threading import RLock, get_ident
from types import CodeType, FunctionType
from typing import Any, TypeGuard, cast

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function as has_torch_function

from bce_ext import functional
from bce_ext._call import Loss
from bce_ext._call import call as call

__all__ = ["disable", "enable", "fused", "is_enabled"]


def enable() -> None:
    """Makes torch's own binary cross entropy use the fused one, everywhere in the process, until :func:`disable`.

    :func:`torch.nn.functional.binary_cross_entropy`, :func:`torch.nn.functional.binary_cross_entropy_with_logits` and with them
    :class:`torch.nn.BCELoss` and :class:`torch.nn.BCEWithLogitsLoss` compute with :mod:`bce_ext.functional`: existing and new modules, names imported from
    torch earlier, third-party code, all threads. Compiled code is recompiled. Enabling twice is the same as enabling once.

    Note:
        The two function objects stay what they are, so that they pickle as torch's own; only the code that they run is exchanged, which is atomic: a call
        that another thread is in the middle of ends as it began. What does not run the code of these functions is not routed: direct calls of
        ``torch.binary_cross_entropy_with_logits`` or ``torch.ops.aten``, programs in TorchScript (``torch.jit.trace`` records the fused operators,
        ``torch.jit.script`` native ones), exported and serialized programs. A wrapper that somebody put into the place of a function stays, and what it
        calls is routed. The first call imports ``torch._dynamo``, as the first optimizer of :mod:`torch.optim` does. May be called from any thread.

    Example::

        >>> bce_ext.enable()
        >>> torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor([-20.0]), torch.tensor([0.0]))  # 0 without
        tensor(2.0612e-09)
        >>> bce_ext.disable()
    """
    ROUTE.request(ROUTE.ENABLE)


def disable() -> None:
    """Undoes :func:`enable`: torch's functions run their own code again, once all :func:`fused` blocks have ended. Without effect when not enabled.

    Example::

        >>> bce_ext.disable()
        >>> torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor([-20.0]), torch.tensor([0.0]))
        tensor(0.)
    """
    ROUTE.withdraw(ROUTE.ENABLE)


def is_enabled() -> bool:
    """Whether torch's own binary cross entropy uses the fused one: after :func:`enable`, or while any thread is in a :func:`fused` block.

    Example::

        >>> with bce_ext.fused():
        ...     bce_ext.is_enabled()
        True
    """
    return ROUTE.on


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
    block = _Block(get_ident())
    try:
        ROUTE.request(block)
        yield
    finally:
        try:
            ROUTE.withdraw(block)
        except BaseException:  # KeyboardInterrupt, maybe before it began
            ROUTE.withdraw(block)
            raise


@dataclass(eq=False)
class _Block:
    """A block of :func:`fused`."""

    thread: int


class _Route:
    """Whether torch's functions are routed, and the switches that do it. While they are, torch.nn.functional holds it, so that a reloaded bce_ext finds it."""

    KEY = "_bce_ext_route"
    ENABLE = "enable()"

    def __init__(self) -> None:
        self.with_logits = _Routed(functional.WITH_LOGITS, _with_logits)
        self.probabilities = _Routed(functional.PROBABILITIES, _probabilities)
        # The compiler is told first and untold last, so that it never takes a routed function for a node that it knows by name.
        self.switches = (_Inlined(self.with_logits, self.probabilities), self.with_logits, self.probabilities)
        self.requests: set[object] = set()  # ENABLE, and a _Block for each of fused()
        self.on = False
        self.lock = RLock()  # a signal handler or a finalizer of this thread may interrupt it with a request of its own

    def after_fork(self) -> None:
        """The new process has this thread only: a lock that another one held would stay locked, and the blocks of the others never end."""
        was_interrupted = not self.lock.acquire(blocking=False)
        self.lock = RLock()
        self.requests = {by for by in self.requests if not isinstance(by, _Block) or by.thread == get_ident()}
        if was_interrupted and not self.on and _is_being_imported("torch._dynamo"):
            # By the first request of all, which is gone. The import cannot be waited for: its thread is gone, too.
            self.requests.clear()
            self.mark(False)
        elif was_interrupted:
            self.switch(bool(self.requests))
        self.follow_requests()

    def request(self, by: object) -> None:
        with self.lock:
            self.requests.add(by)
            try:
                self.follow_requests()
            except BaseException:
                self.requests.discard(by)
                raise

    def withdraw(self, by: object) -> None:
        with self.lock:
            self.requests.discard(by)
            self.follow_requests()

    def follow_requests(self) -> None:
        while self.on != bool(self.requests):  # again, if it was interrupted by a request
            self.switch(not self.on)

    def switch(self, on: bool) -> None:
        steps = [self.mark, *(each.switch for each in self.switches)]
        try:
            for step in steps if on else reversed(steps):
                step(on)
            self.on = on
        except BaseException:  # KeyboardInterrupt may come anywhere
            for step in reversed(steps):
                step(False)
            self.on = False
            raise

    def mark(self, on: bool) -> None:
        if on:
            setattr(F, self.KEY, self)
        else:
            vars(F).pop(self.KEY, None)


def _is_being_imported(name: str) -> bool:
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


class _Routed:
    """One function of torch, with its copies if there may be some, and the code that stands in for its own."""

    def __init__(self, loss: Loss, stand_in: Callable[..., Tensor]) -> None:
        self.name = loss.function.__name__
        self.own_codes = {each: each.__code__ for each in _as_torch_defined_it(self.name)}
        if not self.own_codes:
            return
        self.loss = loss
        own_code = next(iter(self.own_codes.values()))
        self.own: Callable[..., Tensor] = FunctionType(own_code, vars(F), "own")
        # The position stays torch's: torch.jit.script compiles the source that stands there, so that what it compiles and caches is native always.
        self.code: CodeType = cast(FunctionType, stand_in).__code__.replace(
            co_name=own_code.co_name,
            co_filename=own_code.co_filename,
            co_firstlineno=own_code.co_firstlineno,
        )

    def switch(self, on: bool) -> None:
        for function, own_code in self.own_codes.items():
            function.__code__ = self.code if on else own_code
        if on and not self.own_codes:
            message = f"torch.nn.functional.{self.name} was replaced before bce_ext was imported, and is not routed"
            warnings.warn(message, RuntimeWarning, stacklevel=6)


class _Inlined:
    """torch.compile keeps torch's functions as nodes of its graphs, which its cache on disk knows by their names alone. While on, it looks into them."""

    def __init__(self, *routed: _Routed) -> None:
        self.routed = routed
        self.rules: dict[Any, Any] = {}

    def switch(self, on: bool) -> None:
        try:
            import torch._dynamo
            from torch._dynamo.trace_rules import get_torch_obj_rule_map
        except ImportError:  # a torch that cannot compile
            return
        rules = get_torch_obj_rule_map()
        if not on:
            rules.update(self.rules)
            self.rules.clear()
            return
        functions = {function for each in self.routed for function in each.own_codes}
        wrappers = {getattr(F, each.name) for each in self.routed} - functions
        self.rules.update({each: rules[each] for each in functions | wrappers if each in rules})
        for each in self.rules:
            rules.pop(each, None)
        if wrappers & self.rules.keys():  # compiled code has no guard on what these call
            torch._dynamo.reset()


def _as_torch_defined_it(name: str) -> list[FunctionType]:
    """The function whose globals are torch.nn.functional, also when somebody put something else into its place: then with its copies, which look the same."""

    def is_it(candidate: object) -> TypeGuard[FunctionType]:
        # type() and not isinstance(): that would ask lazy objects, which import something or warn.
        return (
            type(candidate) is FunctionType
            and candidate.__globals__ is vars(F)
            and candidate.__name__ == name
            and candidate.__closure__ is None
        )

    function = getattr(F, name)
    if is_it(function):
        return [function]
    # Free-threaded Python 3.13 hides functions from the collector once a thread was started, but not what refers to them.
    seen = chain(gc.get_referrers(vars(F)), gc.get_referents(*gc.get_objects()))
    return list(set(filter(is_it, seen)))


# What stands in for the codes of torch's functions. It runs with their globals and their defaults. Subclasses and modes are told by torch's own code, which
# gives them all arguments.


def _with_logits(
    input: Any, target: Any, weight: Any, size_average: Any, reduce: Any, reduction: Any, pos_weight: Any
) -> Tensor:
    import bce_ext.override as ours

    operands = (input, target, weight, pos_weight, None)
    if ours.has_torch_function(operands):
        return ours.ROUTE.with_logits.own(input, target, weight, size_average, reduce, reduction, pos_weight)
    return ours.call(ours.ROUTE.with_logits.loss, operands, (), reduction, size_average, reduce)


def _probabilities(input: Any, target: Any, weight: Any, size_average: Any, reduce: Any, reduction: Any) -> Tensor:
    import bce_ext.override as ours

    operands = (input, target, weight, None, None)
    if ours.has_torch_function(operands):
        return ours.ROUTE.probabilities.own(input, target, weight, size_average, reduce, reduction)
    return ours.call(ours.ROUTE.probabilities.loss, operands, (), reduction, size_average, reduce)


ROUTE: _Route = getattr(F, _Route.KEY, None) or _Route()
os.register_at_fork(after_in_child=ROUTE.after_fork)
