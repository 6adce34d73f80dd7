"""The lines of a program that spoil a tensor: other dtypes and layouts, freed and short storages, no memory at all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from .draw import Draw
from .scalars import DTYPES, of_wrong_type
from .tensors import FLOATS, Shape, TensorSource, any_shape

# Dtypes that nothing can be converted to: they have names and sizes only.
NARROW = re.compile(r"bits|int[1-7]$|float4|int4x2|int2x4")

Spoil = Callable[[Draw, TensorSource], None]


def retype(draw: Draw, x: TensorSource) -> None:
    dtype = draw.pick(DTYPES)
    numel = math.prod(x.shape)
    if str(dtype).startswith("torch.q"):
        x.do(f"{{x}} = torch.quantize_per_tensor({{x}}.float(), 0.1, 3, {dtype})")
    elif draw.chance(0.5) and NARROW.search(str(dtype)) is None:
        x.do(f"{{x}} = {{x}}.to({dtype})")
    else:  # any bits: a bool that is neither 0 nor 1, every NaN
        x.do(
            f"{{x}} = torch.randint(256, ({numel * dtype.itemsize},), dtype=torch.uint8).view({dtype}).view({{shape}})"
        )


def other_layout(draw: Draw, x: TensorSource) -> None:
    x.do(
        draw.pick(
            (
                "{x} = {x}.to_sparse()",
                "{x} = {x}.to_sparse(1)",
                "{x} = {x}.to_sparse_csr()",
                "{x} = {x}.to_sparse_csc()",
                "{x} = {x}.to_sparse_bsr((1, 1))",
                "{x} = {x}.to_sparse_bsc((1, 1))",
                "{x} = {x}.float().to_mkldnn()",
                "{x} = torch.nested.nested_tensor([{x}, {x}])",
                "{x} = torch.nested.nested_tensor([{x}, {x}], layout=torch.jagged)",
                "{x} = torch.quantize_per_channel({x}.float(), torch.ones({x}.shape[0]), torch.zeros({x}.shape[0]), 0, torch.qint8)",
            )
        )
    )


def invalid_sparse(draw: Draw, x: TensorSource) -> None:
    """Sparse tensors that torch makes when it is told not to look at the indices."""
    rows, columns = (*x.shape, 3, 4)[:2] if len(x.shape) > 1 else (3, 4)
    low, high = draw.pick(((0, max(columns, 1)), (-5, 2 * columns + 5), (-(2**62), 2**62)))
    count = draw.randint(0, 6)
    x.is_final = True
    index = draw.pick(("int64", "int32"))
    if draw.chance(0.5):
        x.do(
            f"{{x}} = torch.sparse_coo_tensor(torch.randint({low}, {high}, (2, {count})), torch.rand({count}), "
            f"({rows}, {columns}), check_invariants=False, is_coalesced={draw.pick((True, False))})"
        )
        if draw.chance(0.2):
            x.do(f"{{x}}._{draw.pick(('indices', 'values'))}().untyped_storage().resize_({draw.pick((0, 8))})")
        return
    if high > 2**31:
        index = "int64"
    # Offsets of rows that rise as they should, or are as random as the columns.
    offsets = f"torch.arange({rows + 1})" if draw.chance(0.5) else f"torch.randint({low}, {high}, ({rows + 1},))"
    x.do(
        f"{{x}} = torch.sparse_csr_tensor({offsets}.to(torch.{index}), torch.randint({low}, {high}, ({count},)).to(torch.{index}), "
        f"torch.rand({count}), ({rows}, {columns}), check_invariants=False)"
    )


def reshape(draw: Draw, x: TensorSource) -> None:
    if draw.chance(0.3):
        x.do("{x} = {x}" + draw.pick((".flatten()", "[None]", "[..., None]", ".flatten()[:0]", ".flatten()[:-1]")))
        return
    shape = any_shape(draw) if draw.chance(0.7) else tuple(reversed(x.shape))
    if math.prod(shape) < 100_000:
        x.do(f"{{x}} = torch.rand({shape}).to({{x}}.dtype)")


def _shorten(x: TensorSource, nbytes: str) -> None:
    if any("_neg_view" in line for line in x.lines):
        return  # the dispatcher itself reads such a tensor before it calls the operator
    x.do(f"{{x}}.untyped_storage().resize_({nbytes})")
    x.is_final = True


def shorten_storage(draw: Draw, x: TensorSource) -> None:
    """What FSDP does to a parameter whose shards are elsewhere; and to less than nothing."""
    _shorten(x, draw.pick(("0", "0", "{x}.untyped_storage().nbytes() // 2")))


def stride(draw: Draw, x: TensorSource) -> None:
    """Strides of any kind, which end exactly where the storage does."""
    strides = [draw.pick((0, 0, 1, 1, 2, 3, 5)) for _ in x.shape]
    offset = draw.randint(0, 5)
    needed = offset + 1 + sum((size - 1) * step for size, step in zip(x.shape, strides, strict=True) if size > 0)
    x.do(f"{{x}} = torch.rand({needed}).to({{x}}.dtype).as_strided({{shape}}, {strides}, {offset})")
    if draw.chance(0.3):
        _shorten(x, "max(0, {x}.untyped_storage().nbytes() - {x}.element_size())")


def far_strides(draw: Draw, x: TensorSource) -> None:
    """set_ makes the storage long enough; then it is made short again."""
    if any("_efficientzerotensor" in line for line in x.lines):
        return  # which has no storage: set_ itself crashes on it
    strides = [draw.pick((1, 1000, 2**20)) for _ in x.shape]
    if sum(size * step for size, step in zip(x.shape, strides, strict=True)) > 2**22:
        return
    x.do(f"{{x}} = {{x}}.clone().detach().set_({{x}}.untyped_storage(), 0, {{shape}}, {strides})")
    _shorten(x, "64")


def misalign(draw: Draw, x: TensorSource) -> None:
    numel = math.prod(x.shape)
    dtype = x.dtype if x.dtype in FLOATS else "float32"
    if numel > 0:
        x.do(
            f"{{x}} = torch.frombuffer(bytearray({numel * 8 + 3}), dtype=torch.{dtype}, count={numel}, offset={draw.randint(1, 3)}).view({{shape}})"
        )


def without_memory(draw: Draw, x: TensorSource) -> None:
    x.do(
        draw.pick(
            (
                "{x} = {x}.to('meta')",
                "{x} = {x}.to('meta')",
                "{x} = torch._efficientzerotensor({shape}, dtype={x}.dtype)",
                "{x} = torch.empty(0).to({x}.dtype)",
                "{x} = {x}.new_empty({shape}, device='meta').expand({shape})",
            )
        )
    )


def wrap(draw: Draw, x: TensorSource) -> None:
    x.is_final = True
    x.do(
        draw.pick(
            (
                "{x} = torch._to_functional_tensor({x})",
                "{x} = torch.inference_mode()(torch.clone)({x})",
                "{x} = torch.nn.Parameter({x})",
                "{x} = torch.view_as_complex(torch.stack([{x}.float()] * 2, -1)).conj()",
                "{x} = torch.view_as_complex(torch.stack([{x}.float()] * 2, -1)).conj().imag",
                "{x} = torch.masked.masked_tensor({x}, {x} > 0)",
            )
        )
    )


def require_grad(draw: Draw, x: TensorSource) -> None:
    # Of a leaf, or of what was computed from one. Only numbers with a point can require it.
    x.do("{x} = {x}.detach().requires_grad_({x}.is_floating_point())" + draw.pick(("", "", ".mul(1)")))


def wrong_type(draw: Draw, x: TensorSource) -> None:
    x.do(f"{{x}} = {of_wrong_type(draw)}")
    x.is_final = True


SPOILS: dict[Spoil, float] = {
    retype: 20,
    other_layout: 8,
    invalid_sparse: 5,
    reshape: 14,
    shorten_storage: 14,
    stride: 14,
    far_strides: 5,
    misalign: 3,
    without_memory: 7,
    wrap: 5,
    require_grad: 12,
    wrong_type: 4,
}


def spoil(draw: Draw, x: TensorSource) -> None:
    if not x.is_final:
        draw.weighted(SPOILS)(draw, x)


VAST: tuple[Shape, ...] = ((2**31, 2**29), (2**62,), (2**20, 2**20, 2**20))
