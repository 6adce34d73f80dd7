"""What is printed on PyTorch's pages and in the usual tutorials comes out of ours; the modules look, copy and save like native's."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bce_ext
import bce_ext.functional as F

MODULES = [(bce_ext.BCEWithLogitsLoss, nn.BCEWithLogitsLoss), (bce_ext.BCELoss, nn.BCELoss)]
FUNCTIONS = [
    (F.binary_cross_entropy_with_logits, nn.functional.binary_cross_entropy_with_logits),
    (F.binary_cross_entropy, nn.functional.binary_cross_entropy),
]

LOGITS, TARGETS = [8.0, -3.0, 0.0, 1.0, 5.0, -2.0], [-3.0, 7.0, 4.0, -2.0, -9.0, 6.0]
PROBABILITIES, LABELS = [0.4, 0.8, 0.6, 0.3, 0.0, 0.5], [0.2, 0.9, 0.4, 0.1, 0.8, 0.5]

# Arguments of the modules as tutorials give them: of every dtype and dimension, used with the six elements above, flat
# or in two rows.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "float_weight": {"weight": torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])},
    "int_weight": {"weight": torch.tensor([0, 1, 2, 3, 4, 5])},
    "bool_weight": {"weight": torch.tensor([True, False, True, False, True, False])},
    "weight_0d": {"weight": torch.tensor(0.5)},
    "int_weight_0d": {"weight": torch.tensor(7)},
    "bool_weight_0d": {"weight": torch.tensor(True)},
    "weight_of_one": {"weight": torch.tensor([0.25])},
    "pos_weight": {"pos_weight": torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])},
    "int_pos_weight": {"pos_weight": torch.tensor([0, 1, 2, 3, 4, 5])},
    "pos_weight_0d": {"pos_weight": torch.tensor(3.0)},
    "int_pos_weight_0d": {"pos_weight": torch.tensor(3)},
    "both": {
        "weight": torch.tensor([0, 1, 2, 3, 4, 5]),
        "pos_weight": torch.tensor([5, 4, 3, 2, 1, 0]),
        "reduction": "sum",
    },
}


def test_the_example_of_the_documentation_page() -> None:
    target, output = torch.ones([10, 64]), torch.full([10, 64], 1.5)
    criterion = bce_ext.BCEWithLogitsLoss(pos_weight=torch.ones([64]))
    assert str(criterion(output, target)) == "tensor(0.2014)"


@pytest.mark.parametrize(("reduction", "printed"), [("mean", "tensor(19.8648)"), ("sum", "tensor(119.1890)")])
def test_targets_outside_of_their_range_as_printed_in_a_tutorial(reduction: str, printed: str) -> None:
    loss = bce_ext.BCEWithLogitsLoss(reduction=reduction)(torch.tensor(LOGITS), torch.tensor(TARGETS))
    assert str(loss) == printed


def test_a_pair_of_rows_as_printed_in_a_tutorial() -> None:
    # Three images, three labels each: printed as 0.7194 from probabilities of four digits.
    probabilities = torch.tensor([[0.3992, 0.2232, 0.6435], [0.3800, 0.3044, 0.3241], [0.6281, 0.4689, 0.3834]])
    labels = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(bce_ext.BCELoss()(probabilities, labels), nn.BCELoss()(probabilities, labels))
    torch.testing.assert_close(
        bce_ext.BCEWithLogitsLoss()(probabilities.logit(), labels), nn.BCELoss()(probabilities, labels)
    )


@pytest.mark.parametrize("rows", [None, 2], ids=["flat", "two_rows"])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_of_tutorials(arguments: str, rows: int | None, device: str) -> None:
    def shaped(tensor: Tensor) -> Tensor:
        return (tensor.view(rows, -1) if rows and tensor.numel() == 6 else tensor).to(device)

    keywords = {k: shaped(v) if isinstance(v, Tensor) else v for k, v in ARGUMENTS[arguments].items()}
    input, target = shaped(torch.tensor(LOGITS)), shaped(torch.tensor(TARGETS))
    ours, native = bce_ext.BCEWithLogitsLoss(**keywords)(input, target), nn.BCEWithLogitsLoss(**keywords)(input, target)
    assert ours.dtype == native.dtype
    torch.testing.assert_close(ours, native)
    if "pos_weight" not in keywords:
        input, target = shaped(torch.tensor(PROBABILITIES)), shaped(torch.tensor(LABELS))
        ours, native = bce_ext.BCELoss(**keywords)(input, target), nn.BCELoss(**keywords)(input, target)
        assert ours.dtype == native.dtype
        torch.testing.assert_close(ours, native)


@pytest.mark.parametrize(("ours", "native"), MODULES, ids=["BCEWithLogitsLoss", "BCELoss"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4)], ids=str)
def test_scalars_and_empty_tensors(shape: tuple[int, ...], reduction: str, ours: Any, native: Any, device: str) -> None:
    input, target = torch.full(shape, 0.25, device=device), torch.ones(shape, device=device)
    actual, expected = ours(reduction=reduction)(input, target), native(reduction=reduction)(input, target)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("with_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradients_are_native_s(reduction: str, with_logits: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # float64, since a float32 gradient of native is off by more than the tolerance where its terms cancel
    values, target = (f(64, 37, generator=generator, dtype=torch.float64).to(device) for f in (torch.randn, torch.rand))
    weight = torch.rand(37, generator=generator).to(device, torch.float64)
    gradients = []
    for module in MODULES[0] if with_logits else MODULES[1]:
        input = (values if with_logits else values.sigmoid()).detach().requires_grad_()
        loss = module(weight=weight, reduction=reduction)(input, target)
        gradients += [torch.autograd.grad(loss.square().sum(), input)[0]]  # so that grad_output is not 1
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_bounded_gradient_of_a_sure_probability(dtype: torch.dtype, create_graph: bool, device: str) -> None:
    """Its denominator is at least 1e-12 as a float32, for float64 too, in a pass and in a differentiable gradient."""
    input = torch.tensor([0.0, 1.0, 1e-13], dtype=dtype, device=device, requires_grad=True)
    target = torch.tensor([0.25, 0.5, 1.0], dtype=dtype, device=device)
    ours, native = (
        torch.autograd.grad(module(reduction="sum")(input, target), input, create_graph=create_graph)[0].detach()
        for module in MODULES[1]
    )
    torch.testing.assert_close(ours, native, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.parametrize("which", [0, 1], ids=["logits", "probabilities"])
def test_legacy_arguments_warn_as_native_does(size_average: bool | None, reduce: bool | None, which: int) -> None:
    input, target = torch.tensor(PROBABILITIES), torch.tensor(LABELS)
    results = []
    for module, function in zip(MODULES[which], FUNCTIONS[which], strict=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made: Any = module(size_average=size_average, reduce=reduce)
            losses = [made(input, target), function(input, target, size_average=size_average, reduce=reduce)]
        results.append((losses, made.reduction, [(w.category, str(w.message)) for w in caught]))
    (ours, our_reduction, our_warnings), (natives, native_reduction, native_warnings) = results
    assert our_reduction == native_reduction
    assert our_warnings == native_warnings
    assert bool(our_warnings) == (size_average is not None or reduce is not None)
    for actual, expected in zip(ours, natives, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("ours", "native"), FUNCTIONS, ids=["with_logits", "probabilities"])
def test_functions_have_native_s_signature(ours: Any, native: Any) -> None:
    ours, native = inspect.signature(ours), inspect.signature(native)
    assert list(ours.parameters)[: len(native.parameters)] == list(native.parameters)
    # What native does not have comes after it. It is no keyword-only argument, since TorchScript takes none with a default.
    assert list(ours.parameters)[len(native.parameters) :] == ["label_smoothing", "ignore_index", "normalizer"]
    for name, parameter in native.parameters.items():
        assert ours.parameters[name].default == parameter.default
        assert ours.parameters[name].kind == parameter.kind


@pytest.mark.parametrize(("ours", "native"), MODULES, ids=["BCEWithLogitsLoss", "BCELoss"])
def test_modules_have_native_s_signature(ours: Any, native: Any) -> None:
    own = list(inspect.signature(ours).parameters.values())
    theirs = list(inspect.signature(native).parameters.values())
    assert [(p.name, p.default) for p in own[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in own[len(theirs) :])


@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "binary_cross_entropy"])
def test_operators_have_native_s_schema(name: str) -> None:
    ours = getattr(torch.ops.bce_ext, name).default._schema.arguments
    native = getattr(torch.ops.aten, name).default._schema.arguments
    assert [(str(a.type), a.default_value) for a in ours] == [(str(a.type), a.default_value) for a in native]
    assert [a.name for a in ours[1:]] == [a.name for a in native[1:]]  # the first is `self` in ATen


def make(module: Any) -> Any:
    buffers = {"weight": torch.tensor([1.0, 2.0, 3.0])}
    if issubclass(module, nn.BCEWithLogitsLoss):
        buffers["pos_weight"] = torch.tensor([3.0, 2.0, 1.0])
    return module(**buffers, reduction="sum")


@pytest.mark.parametrize(("ours", "native"), MODULES, ids=["BCEWithLogitsLoss", "BCELoss"])
def test_modules_look_like_native_s(ours: Any, native: Any) -> None:
    assert issubclass(ours, native)
    assert ours.__name__ == native.__name__
    for mine, theirs in ((ours(), native()), (make(ours), make(native))):
        assert repr(mine) == repr(theirs)
        assert mine.reduction == theirs.reduction
        assert [name for name, _ in mine.named_buffers()] == [name for name, _ in theirs.named_buffers()]
        assert list(mine.state_dict()) == list(theirs.state_dict())
        assert getattr(mine, "__constants__", None) == getattr(theirs, "__constants__", None)
        assert not list(mine.parameters())
    nested, native_nested = nn.Sequential(ours()), nn.Sequential(native())
    assert repr(nested) == repr(native_nested)


@pytest.mark.parametrize(("ours", "native"), MODULES, ids=["BCEWithLogitsLoss", "BCELoss"])
def test_state_is_exchanged_with_native(ours: Any, native: Any) -> None:
    for source, destination in ((make(native), make(ours)), (make(ours), make(native))):
        for buffer in destination.buffers():
            buffer.zero_()
        destination.load_state_dict(source.state_dict())
        for mine, theirs in zip(destination.buffers(), source.buffers(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("ours", "native"), MODULES, ids=["BCEWithLogitsLoss", "BCELoss"])
def test_modules_are_copied_and_saved(ours: Any, native: Any) -> None:
    module = make(ours)
    input, target = torch.full((2, 3), 0.3), torch.ones(2, 3)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(twin) is ours
        assert repr(twin) == repr(module)
        assert torch.equal(twin(input, target), module(input, target))
    deep = copy.deepcopy(module)
    deep.weight.zero_()
    assert (deep(input, target) == 0).all()
    assert module(input, target) > 0


@pytest.mark.parametrize(("ours", "native"), MODULES, ids=["BCEWithLogitsLoss", "BCELoss"])
def test_buffers_follow_the_module(ours: Any, native: Any, device: str) -> None:
    module = make(ours).to(device, torch.float64)
    assert all(buffer.dtype == torch.float64 and buffer.device.type == device for buffer in module.buffers())
    module.weight = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=device)  # an attribute like native's
    input = torch.full((2, 3), 0.3, dtype=torch.float64, device=device)
    native_module = make(native).to(device, torch.float64)
    native_module.weight = module.weight
    torch.testing.assert_close(module(input, input), native_module(input, input))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrize_weight(module: Any, weight: Tensor) -> None:
    module.weight = weight / 2
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


def make_parameter_of_weight(module: Any, weight: Tensor) -> None:
    del module.weight
    module.weight = nn.Parameter(weight, requires_grad=False)


def add_property(module: Any, weight: Tensor) -> None:
    module.half_of_weight = weight / 2
    module.__class__ = type("Subclass", (type(module),), {"weight": property(lambda self: 2 * self.half_of_weight)})


def move_weight_to_instance(module: Any, weight: Tensor) -> None:
    vars(module)["weight"] = weight


def move_weight_to_class(module: Any, weight: Tensor) -> None:
    del module.weight
    module.__class__ = type("Subclass", (type(module),), {"weight": weight})


@pytest.mark.parametrize(("ours", "native"), MODULES, ids=["BCEWithLogitsLoss", "BCELoss"])
@pytest.mark.parametrize(
    "replace",
    [
        lambda module, weight: setattr(module, "weight", weight),
        lambda module, weight: module.load_state_dict({"weight": weight}),
        lambda module, weight: module.register_buffer("weight", weight),
        make_parameter_of_weight,
        parametrize_weight,
        add_property,
        move_weight_to_instance,
        move_weight_to_class,
    ],
    ids=["attribute", "state", "buffer", "parameter", "parametrization", "property", "instance", "class"],
)
def test_weights_that_are_replaced(ours: Any, native: Any, replace: Callable[[Any, Tensor], None]) -> None:
    input, weight = torch.linspace(0.1, 0.9, 6), torch.linspace(0, 2, 6)
    modules = [cls(torch.ones(6)) for cls in (ours, native)]
    for module in modules:
        replace(module, weight)
    torch.testing.assert_close(*(module(input, input) for module in modules))


@pytest.mark.parametrize(("ours", "native"), MODULES, ids=["BCEWithLogitsLoss", "BCELoss"])
def test_functional_calls(ours: Any, native: Any) -> None:
    input, weight = torch.linspace(0.1, 0.9, 6), torch.linspace(0, 2, 6)
    actual = torch.func.functional_call(ours(torch.ones(6)), {"weight": weight}, (input, input))
    torch.testing.assert_close(actual, native(weight)(input, input))


@pytest.mark.parametrize(("ours", "native"), MODULES, ids=["BCEWithLogitsLoss", "BCELoss"])
def test_hooks_run(ours: Any, native: Any) -> None:
    module, seen = ours(), []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    module(torch.full((3,), 0.3, requires_grad=True), torch.ones(3)).backward()
    assert seen == ["forward", "backward"]


def test_training_gives_native_s_parameters(device: str) -> None:
    models = []
    for criterion in (bce_ext.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(13, 31), nn.ReLU(), nn.Linear(31, 7)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        features = torch.randn(67, 13).to(device)
        target = (torch.randn(67, 7) > 0.5).float().to(device)
        for _ in range(20):
            optimizer.zero_grad()
            criterion(model(features), target).backward()
            optimizer.step()
        models.append(model)
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
