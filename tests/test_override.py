"""enable(), disable() and fused(): torch's own functions and modules use ours, everywhere in the process, and it is undone exactly."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import inspect
import io
import itertools
import pickle
import shutil
import subprocess
import sys
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from types import FrameType, FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch._dynamo.utils import counters
from torch.nn.functional import binary_cross_entropy as imported_early
from torch.nn.functional import binary_cross_entropy_with_logits as imported_early_with_logits
from torch.overrides import TorchFunctionMode

import bce_ext

FUNCTIONS = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)


def state() -> list[object]:
    """Everything of torch that could have been changed."""
    methods = [m.__dict__["forward"] for m in (torch.nn.BCELoss, torch.nn.BCEWithLogitsLoss)]
    attributes = [
        (f, f.__code__, f.__module__, f.__name__, f.__qualname__, f.__defaults__, f.__doc__, dict(f.__dict__))
        for f in FUNCTIONS
    ]
    return [
        attributes,
        dict(vars(F)),
        [(method, method.__code__) for method in methods],
        dict(get_torch_obj_rule_map()),
        bce_ext.is_enabled(),
    ]


@pytest.fixture(autouse=True)
def _undone_exactly() -> Iterator[None]:
    before = state()
    yield
    bce_ext.disable()
    assert state() == before
    assert not bce_ext.is_enabled()


TAIL = torch.tensor([-20.0]), torch.tensor([0.0])  # native's loss is 0 there
LARGE = torch.tensor([1e-30], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)


def is_ours(with_logits: Callable[..., Tensor] = F.binary_cross_entropy_with_logits) -> bool:
    return bool(with_logits(*TAIL) > 0)


def operators_of(function: Callable[..., Tensor], *arguments: Tensor) -> set[str]:
    with torch.profiler.profile() as profiler:
        function(*arguments)
    return {event.key for event in profiler.key_averages()}


EXISTING = torch.nn.BCEWithLogitsLoss()

CALLERS: dict[str, Callable[..., Tensor]] = {
    "functional": lambda *a: F.binary_cross_entropy(*a),
    "functional_with_logits": lambda *a: F.binary_cross_entropy_with_logits(*a),
    "imported_early": imported_early,
    "imported_early_with_logits": imported_early_with_logits,
    "existing_module": EXISTING,
    "new_module": lambda *a: torch.nn.BCELoss()(*a),
    "new_module_with_logits": lambda *a: torch.nn.BCEWithLogitsLoss(reduction="sum")(*a),
    "subclass": lambda *a: type("Custom", (torch.nn.BCEWithLogitsLoss,), {})()(*a),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_every_caller_is_routed_and_back(caller: str) -> None:
    input, target = torch.rand(4, 5), torch.rand(4, 5)
    call = CALLERS[caller]
    native = operators_of(call, input, target)
    with bce_ext.fused():
        routed = operators_of(call, input, target)
    assert any(name.startswith("bce_ext::") for name in routed)
    assert not any(name.startswith("aten::binary_cross_entropy") for name in routed)
    assert operators_of(call, input, target) == native
    assert not any(name.startswith("bce_ext") for name in native)


def test_same_losses_and_gradients_with_all_arguments() -> None:
    weight, pos_weight = torch.rand(4, 1), torch.rand(5)
    for reduction in ("none", "mean", "sum"):
        for function, extra in ((FUNCTIONS[0], {}), (FUNCTIONS[1], {"pos_weight": pos_weight})):
            results = []
            for route in (None, bce_ext.fused()):
                torch.manual_seed(0)
                input = torch.rand(4, 5, requires_grad=True)
                target = torch.rand(4, 5, requires_grad=True)
                if route is not None:
                    route.__enter__()
                loss = function(input, target, weight, reduction=reduction, **extra)
                loss.sum().backward()
                if route is not None:
                    route.__exit__(None, None, None)
                results.append((loss, input.grad, target.grad))
            torch.testing.assert_close(*results)


def test_deprecated_arguments_and_errors() -> None:
    with bce_ext.fused():
        with pytest.warns(UserWarning, match="reduction='sum'"):
            F.binary_cross_entropy_with_logits(*TAIL, size_average=False)
        with pytest.raises(ValueError, match="Target size"):
            F.binary_cross_entropy_with_logits(torch.zeros(3), torch.zeros(4))
        with pytest.raises(ValueError, match="not a valid value for reduction"):
            F.binary_cross_entropy(torch.zeros(3), torch.zeros(3), reduction="average")


def test_enable_and_disable_are_idempotent() -> None:
    bce_ext.disable()
    assert not is_ours()
    for _ in range(2):
        bce_ext.enable()
        assert is_ours()
    bce_ext.disable()
    assert not is_ours()


def test_blocks_nest_and_survive_exceptions() -> None:
    with bce_ext.fused():
        with bce_ext.fused():
            assert is_ours()
        assert is_ours()
        with pytest.raises(KeyError), bce_ext.fused():
            raise KeyError
        assert is_ours()
    assert not is_ours()
    with pytest.raises(KeyError), bce_ext.fused():
        raise KeyError
    assert not is_ours()


def test_blocks_and_enable_are_independent() -> None:
    with bce_ext.fused():
        bce_ext.disable()  # nothing had been enabled
        assert is_ours()
        bce_ext.enable()
    assert is_ours()
    with bce_ext.fused():
        bce_ext.disable()
        assert is_ours()
    assert not is_ours()


def test_as_a_decorator() -> None:
    @bce_ext.fused()
    def inside() -> bool:
        return is_ours()

    assert inside()
    assert inside()
    assert not is_ours()


def test_all_threads_are_routed() -> None:
    seen: list[bool] = []
    entered, go_on = threading.Event(), threading.Event()

    def work() -> None:
        seen.append(is_ours())
        entered.set()
        go_on.wait(10)
        seen.append(is_ours())

    bce_ext.enable()
    thread = threading.Thread(target=work)
    thread.start()
    entered.wait(10)
    bce_ext.disable()
    go_on.set()
    thread.join()
    assert seen == [True, False]


def test_overlapping_blocks_of_many_threads() -> None:
    wrong: list[bool] = []

    def work() -> None:
        for _ in range(100):
            with bce_ext.fused():
                if not is_ours():
                    wrong.append(True)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not is_ours()


def test_torch_functions_see_torchs_own_function() -> None:
    seen: list[object] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with bce_ext.fused(), Mode():
        F.binary_cross_entropy_with_logits(*TAIL)
        F.binary_cross_entropy(*LARGE)
    assert F.binary_cross_entropy_with_logits in seen
    assert F.binary_cross_entropy in seen


def test_torch_functions_are_told_all_arguments() -> None:
    """As torch tells them: what handles the function may count on each keyword."""
    told: list[object] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in FUNCTIONS:
                told.append((func, args, kwargs))
            return func(*args, **(kwargs or {}))

    with Mode():
        for function in FUNCTIONS:
            for keywords in ({}, {"reduction": "sum"}, {"weight": LARGE[1]}):
                native = function(*LARGE, **keywords)
                with bce_ext.fused():
                    torch.testing.assert_close(function(*LARGE, **keywords), native)
                assert len(told) == 2
                assert told.pop() == told.pop()


def test_is_enabled() -> None:
    assert not bce_ext.is_enabled()
    with bce_ext.fused():
        assert bce_ext.is_enabled()
        bce_ext.enable()
    assert bce_ext.is_enabled()
    bce_ext.disable()
    assert not bce_ext.is_enabled()


def test_an_exception_leaves_the_route_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """One function is switched already when the other cannot be."""

    def refuse(on: bool) -> None:
        if on:
            raise KeyError

    before = state()
    with monkeypatch.context() as patch:
        patch.setattr(bce_ext.override.ROUTE.probabilities, "switch", refuse)
        with pytest.raises(KeyError):
            bce_ext.enable()
        assert state() == before
        with pytest.raises(KeyError), bce_ext.fused():
            pass
        assert state() == before
    bce_ext.enable()
    assert is_ours()
    bce_ext.disable()
    with bce_ext.fused():
        assert is_ours()
    assert not is_ours()


def interrupted(call: Callable[[], object], place: int) -> bool:
    """Whether KeyboardInterrupt came, in this place of those where Python looks for signals: where functions of our module begin, and after what they call."""
    places = itertools.count()

    def is_ours(frame: FrameType | None) -> bool:
        return frame is not None and frame.f_code.co_filename == bce_ext.override.__file__

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "c_call" or (event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR):
            return  # an error here would end a generator of Python 3.10 without its finally, as no signal does
        if is_ours(frame.f_back if event == "return" else frame) and next(places) == place:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.parametrize("function", ["enable", "disable"])
def test_an_interrupt_leaves_nothing_broken(function: str) -> None:
    """Wherever it comes, all is on or all is off, and the next call works."""
    before = state()
    own_codes = [(f, f.__code__) for f in FUNCTIONS]
    for place in itertools.count():
        if function == "disable":
            bce_ext.enable()
        came = interrupted(getattr(bce_ext, function), place)
        assert [f.__code__ is not code for f, code in own_codes] == [bce_ext.is_enabled()] * 2
        bce_ext.disable()
        assert state() == before
        if not came:
            break
    assert place > 20


def test_an_interrupt_ends_a_block() -> None:
    before = state()

    def block() -> None:
        with bce_ext.fused():
            pass

    for place in itertools.count():
        came = interrupted(block, place)
        gc.collect()  # contextlib may have been left before it went into our function
        assert state() == before
        if not came:
            break
    assert place > 40


def test_a_request_within_another() -> None:
    """The collector may run a finalizer anywhere, and a signal its handler: they must not wait for what they interrupt."""
    seen: list[int] = []
    for request, is_on in ((bce_ext.enable, True), (bce_ext.disable, False)):

        def interrupt(frame: FrameType, event: str, argument: object) -> Any:
            if frame.f_code is bce_ext.override._Routed.switch.__code__ and not seen:
                seen.append(1)
                request()  # noqa: B023
            return None

        seen.clear()
        bce_ext.disable()
        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            bce_ext.enable()
        finally:
            sys.settrace(before)
        assert seen
        assert is_ours() == bce_ext.is_enabled() == is_on


@pytest.mark.parametrize("within", ["enable", "fused"])
def test_a_reload_finds_the_route(within: str) -> None:
    with bce_ext.fused() if within == "fused" else contextlib.nullcontext(bce_ext.enable()):
        importlib.reload(bce_ext.override)
        assert bce_ext.is_enabled()
        assert is_ours()
    bce_ext.disable()
    assert not bce_ext.is_enabled()
    assert not is_ours()
    with bce_ext.fused():
        assert is_ours()
    assert not is_ours()


class Callee:
    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)


def closure(function: Callable[..., Tensor], factor: float = 1.0) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs) * factor

    return wrapper


def without_free_variables(*args: Any, **kwargs: Any) -> Tensor:
    return imported_early_with_logits(*args, **kwargs)


WRAPPERS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "partial": functools.partial,
    "closure": closure,
    "mock": lambda function: unittest.mock.Mock(wraps=function),
    "specified_mock": lambda function: unittest.mock.create_autospec(function, side_effect=function),
    "object": Callee,
    "function_of_another_module": lambda function: without_free_variables,
    "c_function": lambda function: torch.binary_cross_entropy_with_logits,
}


@pytest.fixture
def imported_anew() -> Iterator[Callable[[], None]]:
    """What bce_ext does when it is imported, done in the test; and once more without what the test changed."""
    yield lambda: importlib.reload(bce_ext.override) and None
    importlib.reload(bce_ext.override)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped_before_the_import(kind: str, imported_anew: Callable[[], None]) -> None:
    """The wrapper stays, and torch's function behind it is routed."""
    wrapper = WRAPPERS[kind](imported_early_with_logits)
    with unittest.mock.patch.object(F, "binary_cross_entropy_with_logits", wrapper):
        imported_anew()
        for _ in range(2):
            with bce_ext.fused():
                assert F.binary_cross_entropy_with_logits is wrapper
                assert is_ours(imported_early_with_logits)
                assert is_ours(wrapper) == (kind != "c_function")
                assert "bce_ext::_bce" in operators_of(F.binary_cross_entropy, torch.rand(3), torch.rand(3))
            assert not is_ours(imported_early_with_logits)
            assert not is_ours(wrapper)


COPIES: dict[str, Callable[[FunctionType], FunctionType]] = {
    "bare": lambda function: FunctionType(function.__code__, function.__globals__),
    "updated": lambda function: functools.update_wrapper(COPIES["bare"](function), function),
}


@pytest.mark.parametrize("kind", COPIES)
def test_wrapped_before_the_import_beside_a_copy(kind: str, imported_anew: Callable[[], None]) -> None:
    """Tools that trace or test functions make copies, which nothing but their age tells from torch's own one."""
    function: Any = imported_early_with_logits
    a_copy = COPIES[kind](function)
    with unittest.mock.patch.object(F, function.__name__, closure(function)):
        imported_anew()
        for _ in range(2):
            with bce_ext.fused():
                assert is_ours(imported_early_with_logits)
                assert is_ours(lambda *operands: a_copy(*operands, None, None, None, "mean", None))
            assert not is_ours(imported_early_with_logits)
            assert a_copy.__code__ is function.__code__


def test_wrapped_before_the_import_where_the_collector_knows_no_functions(
    imported_anew: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in free-threaded Python 3.13 after the first start of a thread."""
    objects = gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: [o for o in objects() if type(o) is not FunctionType])
    monkeypatch.setattr(gc, "get_referrers", lambda *objects: [])
    with unittest.mock.patch.object(F, "binary_cross_entropy_with_logits", closure(imported_early_with_logits)):
        imported_anew()
        with bce_ext.fused():
            assert is_ours(imported_early_with_logits)
        assert not is_ours(imported_early_with_logits)


def test_a_function_that_is_gone_is_named(imported_anew: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", without_free_variables)
    monkeypatch.setattr(gc, "get_referrers", lambda *objects: [])
    monkeypatch.setattr(gc, "get_referents", lambda *objects: [])
    imported_anew()
    with pytest.warns(RuntimeWarning, match="binary_cross_entropy_with_logits was replaced") as warned:
        bce_ext.enable()
    assert warned[0].filename == __file__
    assert "bce_ext::_bce" in operators_of(F.binary_cross_entropy, torch.rand(3), torch.rand(3))
    assert not is_ours()
    bce_ext.disable()


def test_pickle_and_deepcopy_while_enabled() -> None:
    """What is saved then can be loaded where bce_ext is not known."""

    bce_ext.enable()
    for function in FUNCTIONS:
        assert copy.deepcopy(function) is function
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            saved = pickle.dumps(function, protocol)
            assert b"torch.nn.functional" in saved
            assert b"bce_ext" not in saved
            assert pickle.loads(saved) is function
    loss = pickle.loads(pickle.dumps(torch.nn.BCEWithLogitsLoss(pos_weight=torch.ones(1))))
    assert type(loss) is torch.nn.BCEWithLogitsLoss
    assert is_ours(loss)
    graph = torch.fx.symbolic_trace(
        lambda x, y: F.binary_cross_entropy_with_logits(x, y) + F.binary_cross_entropy(x, y)
    )
    assert "torch.nn.functional.binary_cross_entropy_with_logits" in graph.code
    checkpoint = io.BytesIO()
    torch.save({"graph": graph, "loss": loss, "functions": FUNCTIONS}, checkpoint)
    assert b"bce_ext" not in checkpoint.getvalue()
    checkpoint.seek(0)
    assert torch.load(checkpoint, weights_only=False)["functions"] == FUNCTIONS


@pytest.mark.parametrize("subject", ["user_function", "module", "function"])
def test_compiled_code_follows(subject: str) -> None:
    """Recompiled when it is switched, and never answered from a cache that was filled in the other state."""
    torch._dynamo.reset()

    def user_function(input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(input, target)

    callee = {"user_function": user_function, "module": EXISTING, "function": F.binary_cross_entropy_with_logits}[
        subject
    ]
    compiled = torch.compile(callee, fullgraph=True, backend="aot_eager")
    for on in (False, True, False, True):
        (bce_ext.enable if on else bce_ext.disable)()
        assert is_ours(compiled) == on
    torch._dynamo.reset()


def test_compiled_wrappers_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper that Dynamo takes for torch's function, as it does when it is there first; one that is made while routed; a transform."""
    torch._dynamo.reset()
    native = imported_early_with_logits
    in_its_place = closure(native, 2.0)
    rules = get_torch_obj_rule_map()
    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", in_its_place)
    monkeypatch.setitem(rules, in_its_place, rules[native])
    monkeypatch.delitem(rules, native)
    with bce_ext.fused():
        made_while_routed = closure(native, 3.0)
        batched = torch.func.vmap(native)
    for callee in (lambda *args: F.binary_cross_entropy_with_logits(*args), made_while_routed, batched):
        arguments = tuple(t.expand(4, 1) for t in TAIL) if callee is batched else TAIL
        compiled = torch.compile(callee, fullgraph=True, backend="aot_eager")
        for on in (False, True, False, True):
            (bce_ext.enable if on else bce_ext.disable)()
            torch.testing.assert_close(compiled(*arguments), callee(*arguments), rtol=0, atol=0)
            assert bool((callee(*arguments) > 0).all()) == on
    bce_ext.disable()
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_compile_cache_on_disk_keeps_them_apart() -> None:
    """That cache knows functions of torch.nn.functional by their name alone, and answers when Dynamo starts anew, as it would in another process."""
    for on in (False, True, False, True):
        torch._dynamo.reset()
        (bce_ext.enable if on else bce_ext.disable)()
        counters.clear()
        compiled = torch.compile(lambda x, y: F.binary_cross_entropy_with_logits(x, y), fullgraph=True)
        assert is_ours(compiled) == on
        assert not counters["aot_autograd"]["autograd_cache_bypass"]  # both are cached
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_keeps_what_it_was_compiled_into() -> None:
    """Script compiles torch's own source, whichever code is switched on, so that nothing of ours stays behind in its caches. Trace records what runs."""

    def user_function(input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(input, target)

    with bce_ext.fused():
        assert not is_ours(torch.jit.script(user_function))
        assert not is_ours(torch.jit.script(torch.nn.BCEWithLogitsLoss()))
        traced = torch.jit.trace(user_function, TAIL)
    assert not is_ours(torch.jit.script(user_function))
    assert is_ours(traced)


def test_export_within_a_block() -> None:
    with bce_ext.fused():
        program = torch.export.export(EXISTING, TAIL)
    assert is_ours(program.module())


def test_transforms_are_routed() -> None:
    input = TAIL[0]
    with bce_ext.fused():
        assert torch.func.grad(lambda x: F.binary_cross_entropy_with_logits(x, TAIL[1]))(input) > 0
        batched = torch.func.vmap(F.binary_cross_entropy_with_logits)(input.expand(3, 1), TAIL[1].expand(3, 1))
    assert (batched > 0).all()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_targets_are_taken_as_by_our_own_function(layout: torch.layout) -> None:
    logits, target = torch.linspace(-1, 1, 6).view(2, 3), torch.eye(2, 3)
    expected = bce_ext.functional.binary_cross_entropy_with_logits(logits, target)
    with bce_ext.fused():
        assert torch.equal(F.binary_cross_entropy_with_logits(logits, target.to_sparse(layout=layout)), expected)


def test_a_process_that_is_forked_has_the_blocks_of_its_thread() -> None:
    """Another thread may hold the lock at that time, and be anywhere in a block of its own."""
    program = """if True:
        import contextlib, os, signal, sys, threading, bce_ext

        ended = threading.Event()

        def enter_and_leave():
            while not ended.is_set():
                with bce_ext.fused():
                    pass

        def states():
            yield bce_ext.is_enabled()
            with bce_ext.fused():
                yield bce_ext.is_enabled()
            yield bce_ext.is_enabled()

        with bce_ext.fused():  # what it imports is there
            pass
        other = threading.Thread(target=enter_and_leave)
        other.start()
        statuses = []
        for attempt in range(30):
            is_within = bool(attempt % 2)
            with bce_ext.fused() if is_within else contextlib.nullcontext():
                process = os.fork()
                if process == 0:
                    signal.alarm(60)  # ends it where it waits for the lock
                    os._exit(list(states()) != [is_within, True, is_within])
            statuses.append(os.waitpid(process, 0)[1])
        ended.set()
        other.join()
        sys.exit(any(statuses) and f"{statuses}")
    """
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_process_that_is_forked_during_the_first_request_of_all() -> None:
    """Which imports torch._dynamo: a lock that nobody gives back in the new process."""
    program = """if True:
        import os, signal, sys, threading, time, bce_ext

        def is_being_imported():
            spec = getattr(sys.modules.get("torch._dynamo"), "__spec__", None)
            return getattr(spec, "_initializing", False)

        request = threading.Thread(target=bce_ext.enable)
        request.start()
        while not is_being_imported():
            assert request.is_alive()
            time.sleep(0.001)
        process = os.fork()
        if process == 0:
            os._exit(int(bce_ext.is_enabled()))
        for _ in range(600):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                break
            time.sleep(0.1)
        else:
            os.kill(process, signal.SIGKILL)
            sys.exit("the new process hangs")
        request.join()
        sys.exit(status or not bce_ext.is_enabled())
    """
    subprocess.run([sys.executable, "-c", program], check=True)
