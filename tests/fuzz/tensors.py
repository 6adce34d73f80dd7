"""The lines of a program that make a tensor of ordinary kind: strided, real, in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .draw import Draw

Shape = tuple[int, ...]

FLOATS = ("float32", "float64", "bfloat16", "float16")
INTEGERS = ("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64")

# Around the sizes of the CPU kernel: lanes, a block, a chunk of elements; and enough for an output of over 1 MiB.
LENGTHS = (15, 16, 17, 31, 64, 1023, 1024, 1025, 8191, 8192, 8193, 20_000)
LARGE = (300_007, 2, 150_001, 600_000)
SPECIAL = "torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, 1e-40, 17.0, 88.8, -88.8, 104.0, -1e4, 3e38, -3e38, float('inf'), float('-inf'), float('nan')])"


@dataclass
class TensorSource:
    """A tensor as the lines that make it."""

    name: str
    shape: Shape
    dtype: str
    lines: list[str] = field(default_factory=list)
    is_final: bool = False  # torch itself must not touch it any more

    def do(self, line: str) -> None:
        """Adds a line, in which {x} stands for the tensor and {shape} for its shape."""
        self.lines.append(line.format(x=self.name, shape=self.shape))


def any_shape(draw: Draw) -> Shape:
    kind = draw.weighted({"small": 60, "long": 12, "matrix": 12, "deep": 10, "large": 1.5})
    if kind == "long":
        return (draw.pick(LENGTHS),)
    if kind == "matrix":
        return (draw.pick((1, 2, 3, 7, 33)), draw.pick((1, 5, 16, 100, 300, 1025)))
    if kind == "deep":
        # At most 2**10 elements, in up to 30 dimensions.
        sizes = [1] * draw.randint(5, 30)
        for _ in range(draw.randint(0, 10)):
            sizes[draw.randrange(len(sizes))] = 2
        if draw.chance(0.1):
            sizes[draw.randrange(len(sizes))] = 0
        return tuple(sizes)
    if kind == "large":
        # In another order of the dimensions, the last three are read as rectangles.
        return draw.pick(((LARGE[0],), (2, 150_001), (600, 500), (5, 21, 11, 13), (3, 130, 65)))
    return tuple(draw.pick((0, 1, 1, 2, 3, 5, 8, 17)) for _ in range(draw.randint(0, 4)))


def broadcasting_to(draw: Draw, shape: Shape) -> Shape:
    kept = draw.randint(0, len(shape))
    return tuple(draw.pick((size, size, 1)) for size in shape[len(shape) - kept :])


def tensor(draw: Draw, name: str, shape: Shape, dtype: str) -> TensorSource:
    source = TensorSource(name, shape, dtype)
    values = draw.weighted({"unit": 45, "labels": 20, "normal": 20, "special": 10, "integers": 5})
    if values == "unit":
        source.do(f"{{x}} = torch.rand({{shape}}).to(torch.{dtype})")
    elif values == "labels":
        source.do(f"{{x}} = torch.randint(2, {{shape}}).to(torch.{dtype})")
    elif values == "normal" and dtype in FLOATS:  # of integers few are labels
        source.do(f"{{x}} = (4 * torch.randn({{shape}})).to(torch.{dtype})")
    elif values == "special" and dtype in FLOATS:
        source.do(f"{{x}} = {SPECIAL}[torch.randint(16, {{shape}})].to(torch.{dtype})")
    elif values != "integers":
        source.do(f"{{x}} = (torch.rand({{shape}}) < 0.1).to(torch.{dtype})")
    else:
        low, high = draw.pick(((-100, 3), (0, 256), (-(2**63), 2**63 - 1)))
        source.do(f"{{x}} = torch.randint({low}, {high}, {{shape}}).to(torch.{dtype})")
    for _ in range(draw.weighted({0: 60, 1: 30, 2: 10})):
        lay_out(draw, source)
    return source


def lay_out(draw: Draw, source: TensorSource) -> None:
    """The same values, elsewhere in memory."""
    ndim = len(source.shape)
    kind = draw.weighted({"permuted": 3, "stepped": 2, "offset": 2, "expanded": 2, "negated": 1, "view": 1})
    if kind == "permuted" and ndim > 1:
        order = draw.sample(range(ndim), ndim)
        inverse = sorted(range(ndim), key=order.__getitem__)
        source.do(f"{{x}} = {{x}}.permute({order}).contiguous().permute({inverse})")
    elif kind == "stepped":
        source.do("{x} = torch.stack([{x}, {x}], -1)[..., 0]")
    elif kind == "offset":
        source.do("{x} = torch.cat([{x}.new_zeros(3), {x}.flatten()])[3:].view({shape})")
    elif kind == "expanded" and math.prod(source.shape) > 0 and ndim > 0:
        dim = draw.randrange(ndim)
        source.do(f"{{x}} = {{x}}.narrow({dim}, 0, 1).expand({{shape}})")
    elif kind == "negated" and source.dtype in FLOATS:
        source.do("{x} = torch._neg_view(-{x})")  # a view that says "take the negative of this memory"
    else:
        source.do("{x} = {x}.view({x}.shape)")
