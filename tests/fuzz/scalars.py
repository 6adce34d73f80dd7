"""Expressions for arguments that are no tensors, by the type in the schema. Most are in range, some are far out of it."""

from __future__ import annotations

import torch

from .draw import Draw
from .schemas import Argument, Operator

DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)
LOSS_DTYPES = ("torch.float32", "torch.float64", "torch.bfloat16", "torch.float16")

EXTREME_INTS = (
    -(2**63),
    -(2**63) + 1,
    -(2**31),
    -255,
    -100,
    -2,
    -1,
    4,
    7,
    100,
    127,
    255,
    999,
    2**31,
    2**53 + 1,
    2**63 - 1,
)
EXTREME_FLOATS = (
    -1e308,
    -1.0,
    -1e-320,
    -0.0,
    1e-320,
    1e-8,
    1.5,
    5.0,
    1e38,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)
WRONG_TYPES = (
    "None",
    "1",
    "0.5",
    "'a string'",
    "[1]",
    "[]",
    "True",
    "torch.rand(2)",
    "torch.float32",
    "object()",
    "2j",
    "10**30",
)


# Arguments that few of the values of their type are right for, by name; each expression as likely as the others.
OPTIONS_OF_LOGITS = ("[0.0, float('nan')]", "[0.25, -100.0]", "[0.0, 1.0]", "[]")  # of an operator without a formula
PARAMETERS = "[[], [], [0.25, 2.0], [4.0, 1.0, 0.05, 1e-8, 0.0]][formula % 4]"
TYPICAL = {
    "reduction": ("0", "1", "2"),
    "formula": ("0", "1", "2", "3"),
    # Smoothing and the ignored label, then the parameters of the formula.
    "options": (
        f"[0.0, float('nan')] + {PARAMETERS}",
        f"[0.25, -100.0] + {PARAMETERS}",
        f"[0.0, 1.0] + {PARAMETERS}",
        f"[0.0, 1.0] + {PARAMETERS}[1:]",
        "[]",
    ),
    "label_smoothing": ("0.0", "0.25", "1.0"),
    "ignore_index": ("0.0", "1.0", "-100.0", "0.5"),
    "divisor": ("1", "2", "12", "8192"),
    "eps": ("1e-8", "1e-3"),
    "clip": ("0.0", "0.05", "0.5"),
}


def _int(draw: Draw) -> str:
    # Reductions are 0 to 2, divisors any positive number; what is out of range for one is in range for the other.
    return str(draw.pick(EXTREME_INTS) if draw.chance(0.15) else draw.pick((0, 1, 1, 2, 2, 3, 12)))


def _float(draw: Draw) -> str:
    value = draw.pick(EXTREME_FLOATS) if draw.chance(0.15) else draw.pick((0.0, 0.0, 0.25, 0.5, 1.0, 2.0))
    return f"float('{value}')" if value != value or abs(value) == float("inf") else repr(value)


def _bool(draw: Draw) -> str:
    return draw.pick(("True", "False"))


def _scalar_type(draw: Draw) -> str:
    if draw.chance(0.75):
        return draw.pick(LOSS_DTYPES)
    return str(draw.pick(DTYPES)) if draw.chance(0.7) else _int(draw)


PLAIN = {
    "int": _int,
    "SymInt": _int,
    "float": _float,
    "bool": _bool,
    "ScalarType": _scalar_type,
    "number": lambda draw: draw.pick((_int, _float, _bool, lambda _: "2j"))(draw),
    "Scalar": lambda draw: draw.pick((_int, _float, _bool, lambda _: "2j"))(draw),
    "str": lambda draw: draw.pick(("''", "'none'", "'mean'", "'sum'", "'\\0'", "'ä' * 1000", "'%s%n'")),
    "Device": lambda draw: draw.pick(("'cpu'", "'meta'", "'cuda'")),
    "Layout": lambda draw: draw.pick(("torch.strided", "torch.sparse_coo", "torch.sparse_csr")),
    "MemoryFormat": lambda draw: draw.pick(("torch.contiguous_format", "torch.preserve_format", "torch.channels_last")),
}


def _list_size(draw: Draw, argument: Argument) -> int:
    if argument.size is not None and draw.chance(0.9):
        return argument.size
    return draw.pick((0, 1, 2, 2, 3, 3, 4, 5, 8, 100))


def _typical(operator: Operator, argument: Argument) -> tuple[str, ...]:
    if argument.name == "options" and not operator.takes("formula"):
        return OPTIONS_OF_LOGITS
    return TYPICAL.get(argument.name, ())


def expression(draw: Draw, operator: Operator, argument: Argument) -> str:
    type_ = argument.type
    if type_.startswith("Optional["):
        if draw.chance(0.6):
            return "None"
        type_ = type_.removeprefix("Optional[").removesuffix("]")
    typical = _typical(operator, argument)
    if typical and draw.chance(0.85):
        return draw.pick(typical)
    if type_.startswith("List["):
        inner = type_.removeprefix("List[").removesuffix("]")
        return f"[{', '.join(_plain(draw, argument, inner) for _ in range(_list_size(draw, argument)))}]"
    return _plain(draw, argument, type_)


def _plain(draw: Draw, argument: Argument, type_: str) -> str:
    if type_ not in PLAIN:
        raise NotImplementedError(f"{argument.name}: no values for the schema type {type_}; add them to scalars.py")
    return PLAIN[type_](draw)


def of_wrong_type(draw: Draw) -> str:
    return draw.pick(WRONG_TYPES)
