"""The linear layer and its loss equal F.linear and native, for every kind of target, in values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import KINDS, Case, make_case, plain
from torch import Tensor

import bce_ext
import bce_ext.functional as F

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")

REDUCTIONS = ("none", "mean", "sum")
# From 2**22 logits on, or with a weight of 2**25 bytes, there are blocks of 2**19: of 1,024 labels, fewer where there are
# not as many, more where there are not enough rows.
SHAPES = {
    "one of each": (1, 1, 1),
    "odd": (7, 5, 13),
    "no rows": (0, 3, 5),
    "no labels": (4, 3, 0),
    "no features": (4, 0, 5),
    "just no blocks": (1023, 2, 4099),
    "one row, many blocks": (1, 2, 2**22 + 3),
    "blocks of labels": (257, 3, 16411),
    "blocks of rows and labels": (1025, 3, 4099),
    "blocks of rows": (65537, 2, 65),
    "one block, a large weight": (2, 2050, 2048),
}
LARGE = tuple(SHAPES)[-5:]


def ours(case: Case, leaves: list[Tensor], **keywords: Any) -> Tensor:
    input, linear_weight, *bias = leaves
    return F.linear_binary_cross_entropy_with_logits(
        input, linear_weight, case.target, linear_bias=bias[0] if bias else None, **keywords
    )


def is_blockwise(loss: Tensor) -> bool:
    return loss.grad_fn is not None and "LinearBCE" in loss.grad_fn.name()


def assert_same(case: Case, tolerance: float, **keywords: Any) -> Tensor:
    """Loss and gradients against float64, relative to the largest of a tensor: a product adds terms of that size."""
    leaves, exact = case.leaves(), case.leaves(torch.float64)
    loss = ours(case, leaves, **keywords)
    named = {key: value.double() if isinstance(value, Tensor) else value for key, value in keywords.items()}
    expected = plain(exact, case.dense, **named)
    factor = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=torch.float64, device=loss.device)[: loss.numel()]
    factor = factor.view(loss.shape)
    actual = (loss.detach(), *torch.autograd.grad(loss, leaves, factor.to(loss.dtype)))
    for got, want in zip(actual, (expected.detach(), *torch.autograd.grad(expected, exact, factor)), strict=True):
        assert got.shape == want.shape
        scale = want.nan_to_num().abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * scale + 1e-300, equal_nan=True)
    return loss


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_target(shape: str, kind: str, reduction: str, device: str) -> None:
    loss = assert_same(make_case(*SHAPES[shape], kind, device=device), 1e-13, reduction=reduction)
    assert is_blockwise(loss) == (shape in LARGE and reduction != "none")


@pytest.mark.parametrize("kind", ["dense", "csr", "class indices"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str
)
@pytest.mark.parametrize("shape", ["odd", "blocks of rows and labels"])
def test_every_dtype(shape: str, dtype: torch.dtype, tolerance: float, kind: str, device: str) -> None:
    """A weight that makes up for the number of elements: without it, gradients of a float16 mean are below its normal numbers, and a sum above them."""
    case = make_case(*SHAPES[shape], kind, dtype, device=device)
    assert_same(case, tolerance, weight=torch.tensor(case.dense.numel() / 1024, device=device))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("weight_shape", [(), (1,), (4099,), (1025, 1), (1, 4099), (1025, 4099)], ids=str)
def test_weights_of_every_shape(weight_shape: tuple[int, ...], bias: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, pos_weight = (torch.rand(weight_shape, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    case = make_case(*SHAPES["blocks of rows and labels"], "coo", bias=bias, device=device)
    loss = assert_same(case, 1e-13, weight=weight.to(device), pos_weight=pos_weight.to(device))
    assert is_blockwise(loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["odd", "blocks of rows and labels"])
def test_options_are_those_of_the_plain_loss(shape: str, kind: str, device: str) -> None:
    case = make_case(*SHAPES[shape], kind, device=device)
    for keywords in (
        {"label_smoothing": 0.2},
        {"ignore_index": 0},
        {"ignore_index": 1},
        {"normalizer": torch.tensor(17.0, device=device)},
    ):
        leaves, others = case.leaves(), case.leaves()
        loss = ours(case, leaves, **keywords)
        expected = torch.ops.bce_ext.binary_cross_entropy_with_logits.options(
            torch.nn.functional.linear(*others), case.dense, **keywords
        )
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, others), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (2, 0, 3), (0,)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_number_of_batch_dimensions(batch: tuple[int, ...], reduction: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(*batch, 4, generator=generator, dtype=torch.float64).to(device)
    linear_weight = torch.randn(5, 4, generator=generator, dtype=torch.float64).to(device)
    indices = torch.randint(-1, 5, batch, generator=generator).to(device)
    one_hot = indices[..., None] == torch.arange(5, device=device)
    weight = torch.rand(*batch, 1, generator=generator, dtype=torch.float64).to(device)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        input @ linear_weight.T, one_hot.double(), weight, reduction=reduction
    )
    targets = [one_hot, one_hot.double(), indices]
    if batch and 0 not in batch:
        targets.append(one_hot.double().to_sparse_coo())
    for target in targets:
        loss = F.linear_binary_cross_entropy_with_logits(
            input, linear_weight, target, weight=weight, reduction=reduction
        )
        torch.testing.assert_close(loss, expected, equal_nan=True)


@pytest.mark.parametrize("index_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_any_dtype_of_indices(index_dtype: torch.dtype, device: str) -> None:
    indices = torch.tensor([0, 4, 2], dtype=index_dtype, device=device)
    input, linear_weight = torch.ones(3, 2, device=device), torch.arange(10.0, device=device).view(5, 2)
    dense = torch.nn.functional.one_hot(indices.long(), 5).float()
    expected = plain([input, linear_weight], dense)
    targets = [indices]
    if index_dtype in (torch.int32, torch.int64):
        crow = torch.arange(4, dtype=index_dtype, device=device)
        targets.append(torch.sparse_csr_tensor(crow, indices, torch.ones(3, device=device), (3, 5)))
    for target in targets:
        loss = F.linear_binary_cross_entropy_with_logits(input, linear_weight, target)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("value_dtype", [torch.bool, torch.uint8, torch.int64, torch.float64], ids=str)
@pytest.mark.parametrize("shape", ["odd", "blocks of labels"])
def test_any_dtype_of_sparse_values(shape: str, value_dtype: torch.dtype, device: str) -> None:
    case = make_case(*SHAPES[shape], "bool", device=device)
    for sparse in (case.dense.to(value_dtype).to_sparse_coo(), case.dense.to(value_dtype).to_sparse_csr()):
        case.target = sparse
        assert_same(case, 1e-13)


def test_ones_of_any_dtype_are_not_taken_for_more_or_less(device: str) -> None:
    """They may be made dense as bool: two in one place are 2, and float64 makes the loss of a float32 input float64."""
    input, linear_weight = torch.ones(3, 2, device=device), torch.arange(10.0, device=device).view(5, 2)
    places = torch.tensor([[0, 2, 2], [1, 0, 4]], device=device)
    twice = torch.tensor([[0, 2, 2], [1, 4, 4]], device=device)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool):
        for indices in (places, twice):
            values = torch.ones(3, dtype=dtype, device=device)
            target = torch.sparse_coo_tensor(indices, values, (3, 5))
            if indices is twice and dtype == torch.int64:
                if device == "cuda":
                    continue  # the assertion of a kernel stops the whole program
                with pytest.raises(RuntimeError, match="to be 0 or 1"):
                    F.linear_binary_cross_entropy_with_logits(input, linear_weight, target)
                continue
            dense = torch.zeros(3, 5, dtype=dtype, device=device).index_put(tuple(indices), values, accumulate=True)
            for reduction in REDUCTIONS:
                actual = F.linear_binary_cross_entropy_with_logits(input, linear_weight, target, reduction=reduction)
                expected = F.linear_binary_cross_entropy_with_logits(input, linear_weight, dense, reduction=reduction)
                assert actual.dtype == torch.promote_types(torch.float32, dtype)
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("labels", [5, 1_400_000], ids=["small", "blocks"])
def test_class_indices_that_are_a_negated_view(labels: int, device: str) -> None:
    indices = torch.tensor([-1, -4, 2], device=device)
    negated = torch._neg_view(indices)
    assert negated.is_neg()
    input, linear_weight = torch.ones(3, 2, device=device), torch.linspace(-1, 1, 2 * labels, device=device).view(-1, 2)
    actual = F.linear_binary_cross_entropy_with_logits(input, linear_weight, negated)
    dense = torch.zeros(3, labels, device=device)
    dense[0, 1] = dense[1, 4] = 1
    torch.testing.assert_close(actual, plain([input, linear_weight], dense))
    if device == "cuda":
        return  # the assertion of a kernel stops the whole program
    with pytest.raises(IndexError, match=f"one is {labels}"):
        F.linear_binary_cross_entropy_with_logits(input, linear_weight, torch._neg_view(indices - labels + 4))


def test_only_the_gradients_that_are_asked_for(device: str) -> None:
    case = make_case(*SHAPES["blocks of labels"], "csr", device=device)
    expected_leaves = case.leaves()
    plain(expected_leaves, case.dense).backward()
    for wanted in range(1, 8):
        leaves = [leaf.requires_grad_(bool(wanted >> i & 1)) for i, leaf in enumerate(case.leaves())]
        loss = ours(case, leaves)
        assert is_blockwise(loss)
        loss.backward()
        for i, (leaf, expected) in enumerate(zip(leaves, expected_leaves, strict=True)):
            if wanted >> i & 1:
                torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-10, atol=1e-13)
            else:
                assert leaf.grad is None
    with torch.no_grad():
        assert not ours(case, expected_leaves).requires_grad


def test_a_large_float16_sum_does_not_overflow_on_the_way(device: str) -> None:
    """2**17 labels that pull the same way: the product alone would be 2**17, which float16 does not hold."""
    input = torch.ones(16, 1, dtype=torch.float16, device=device).requires_grad_()
    linear_weight = torch.full((2**17, 1), 2.0, dtype=torch.float16, device=device)
    target = torch.full((16,), -1, device=device)
    scale = 2.0**15  # of a gradient scaler
    loss = F.linear_binary_cross_entropy_with_logits(input, linear_weight, target)
    assert is_blockwise(loss)
    (loss * scale).backward()
    expected = torch.sigmoid(torch.tensor(2.0, dtype=torch.float64)) * 2 / 16 * scale
    assert input.grad is not None
    torch.testing.assert_close(input.grad.double().cpu(), expected.expand(16, 1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("sparse", [False, True])
def test_large_weights_of_float16_do_not_overflow_on_the_way(sparse: bool, device: str) -> None:
    """In float16 a gradient of 1e6 is infinite; divided by the 2**22 logits, which take blocks, it is not."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(1024, 4, generator=generator).half().to(device).requires_grad_()
    linear_weight = torch.randn(4096, 4, generator=generator).half().to(device).requires_grad_()
    target = (torch.rand(1024, 4096, generator=generator) < 0.01).to(device)
    exact = [tensor.detach().double().requires_grad_() for tensor in (input, linear_weight)]
    logits = torch.nn.functional.linear(*exact)
    F.binary_cross_entropy_with_logits(logits, target, pos_weight=1e6).backward()
    loss = F.linear_binary_cross_entropy_with_logits(
        input, linear_weight, target.half().to_sparse() if sparse else target, pos_weight=1e6
    )
    loss.backward()
    for leaf, expected in zip((input, linear_weight), exact, strict=True):
        torch.testing.assert_close(leaf.grad, expected.grad.half(), rtol=2e-2, atol=2e-3)
    of_logits = logits.detach().half().requires_grad_()
    F.binary_cross_entropy_with_logits(of_logits, target.half().to_sparse(), pos_weight=1e6).backward()
    assert of_logits.grad is not None
    assert of_logits.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_float16_mean_of_a_million_logits_has_gradients(autocast: bool, device: str) -> None:
    """The gradient of a logit is 3e-4 / 2**20, which float16 does not hold; those of the bias are sums of a thousand such."""
    rows, labels = 1024, 1024
    dtype = torch.float32 if autocast else torch.float16
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(rows, 8, generator=generator).to(device, dtype)
    linear_weight = torch.zeros(labels, 8, device=device, dtype=dtype, requires_grad=True)
    bias = torch.full((labels,), -8.0, device=device, dtype=dtype, requires_grad=True)
    target = torch.full((rows,), -1, device=device)
    with torch.autocast(device, torch.float16, enabled=autocast):
        F.linear_binary_cross_entropy_with_logits(input, linear_weight, target, linear_bias=bias).backward()
    expected = torch.sigmoid(torch.tensor(-8.0, dtype=torch.float64)) / labels
    assert bias.grad is not None
    # The nearest multiple of the smallest number of float16.
    torch.testing.assert_close(bias.grad.double().cpu(), expected.expand(labels), rtol=0.0, atol=2**-25)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    features=st.integers(0, 5),
    labels=st.integers(0, 40),
    kind=st.sampled_from(KINDS),
    reduction=st.sampled_from(REDUCTIONS),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_small_problems_of_all_kinds(
    rows: int, features: int, labels: int, kind: str, reduction: str, bias: bool, seed: int
) -> None:
    assert_same(make_case(rows, features, labels, kind, bias=bias, seed=seed), 1e-13, reduction=reduction)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 2100),
    extra=st.integers(1, 1000),
    kind=st.sampled_from(KINDS),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_blocks_of_all_kinds(rows: int, extra: int, kind: str, bias: bool, seed: int) -> None:
    case = make_case(rows, 2, 2**22 // rows + extra, kind, bias=bias, seed=seed)
    assert is_blockwise(assert_same(case, 1e-12, reduction="sum"))


@pytest.mark.parametrize("kind", ["dense", "csr", "class indices"])
def test_the_same_bits_from_run_to_run(kind: str, device: str) -> None:
    case = make_case(*SHAPES["blocks of rows and labels"], kind, torch.float32, device=device)

    def run() -> list[Tensor]:
        leaves = case.leaves()
        loss = ours(case, leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_the_module_owns_the_layer(device: str) -> None:
    torch.manual_seed(0)
    module = bce_ext.LinearBCEWithLogitsLoss(
        4, 6, pos_weight=torch.full((6,), 2.0), weight=0.5, reduction="sum", device=device, dtype=torch.float64
    ).to(device)
    assert isinstance(module.linear, torch.nn.Linear)
    assert [name for name, _ in module.named_parameters()] == ["linear.weight", "linear.bias"]
    assert set(module.state_dict()) == {"pos_weight", "linear.weight", "linear.bias"}
    input = torch.randn(3, 4, dtype=torch.float64, device=device)
    target = torch.tensor([1, -1, 5], device=device)
    dense = (target[:, None] == torch.arange(6, device=device)).double()
    expected = bce_ext.BCEWithLogitsLoss(weight=0.5, pos_weight=torch.full((6,), 2.0, device=device), reduction="sum")(
        module.linear(input), dense
    )
    torch.testing.assert_close(module(input, target), expected)
    without = bce_ext.LinearBCEWithLogitsLoss(4, 6, bias=False)
    assert without.linear.bias is None
    normalized = bce_ext.LinearBCEWithLogitsLoss(4, 6, normalizer=9.0, device=device, dtype=torch.float64)
    summed = bce_ext.BCEWithLogitsLoss(reduction="sum")(normalized.linear(input), dense)
    torch.testing.assert_close(normalized(input, target), summed / 9)
    torch.testing.assert_close(normalized(input, target, torch.tensor(3.0)), summed / 3)
    assert "reduction='mean'" in repr(without)


@pytest.mark.parametrize("num_pairs", [1, 5, 2050], ids=["one", "few", "blocks"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_siglip_loss(num_pairs: int, bias: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(num_pairs, 8, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]
    numbers = [torch.tensor(2.0, dtype=torch.float64, device=device)]
    if bias:
        numbers.append(torch.tensor(-1.5, dtype=torch.float64, device=device))
    leaves = [tensor.requires_grad_() for tensor in (*features, *numbers)]
    loss = F.siglip_loss(*leaves)
    image, text, scale = leaves[:3]
    logits = scale * image @ text.T + (leaves[3] if bias else 0.0)
    signs = 2 * torch.eye(num_pairs, dtype=torch.float64, device=device) - 1
    expected = -torch.nn.functional.logsigmoid(signs * logits).sum() / num_pairs
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want)
