"""The operators of the library and their arguments, as their schemas say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import bce_ext  # noqa: F401  (registers the operators)

NAMESPACE = "bce_ext"


@dataclass(frozen=True)
class Argument:
    name: str
    type: str  # of the schema, where a ScalarType is no int: "Tensor", "Optional[Tensor]", "int", "ScalarType", "List[bool]"
    size: int | None  # of a list, where the schema states it
    has_default: bool
    default: Any
    is_keyword_only: bool


@dataclass(frozen=True)
class Operator:
    name: str  # with the overload, if it has one: "add.out"
    arguments: tuple[Argument, ...]

    def takes(self, name: str) -> bool:
        return any(a.name == name for a in self.arguments)

    @property
    def is_public(self) -> bool:
        return not self.name.startswith("_")

    @property
    def is_loss(self) -> bool:
        """Whether it is a public function of tensors, whose answers a formula gives."""
        return self.is_public and any("Tensor" in a.type for a in self.arguments)

    @property
    def path(self) -> str:
        """How Python calls it."""
        packet, _, overload = self.name.partition(".")
        return f"torch.ops.{NAMESPACE}.{packet}" + (f".{overload}" if overload else "")

    @property
    def script(self) -> str:
        """A TorchScript function `call` that takes what the operator takes and hands it on."""
        # An integer of TorchScript is what becomes a ScalarType; an overload is chosen by its arguments.
        parameters = ", ".join(f"{a.name}: {a.type.replace('ScalarType', 'int')}" for a in self.arguments)
        passed = ", ".join(f"{a.name}={a.name}" if a.is_keyword_only else a.name for a in self.arguments)
        packet = self.name.partition(".")[0]
        return f"def call({parameters}):\n    return torch.ops.{NAMESPACE}.{packet}({passed})\n"


def _operator(schema: Any) -> Operator:
    name = schema.name.removeprefix(f"{NAMESPACE}::")
    return Operator(
        f"{name}.{schema.overload_name}" if schema.overload_name else name,
        tuple(
            Argument(a.name, str(a.real_type), a.N, a.has_default_value(), a.default_value, a.kwarg_only)
            for a in schema.arguments
        ),
    )


@cache
def operators() -> tuple[Operator, ...]:
    """All that are registered, in the order of their names."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{NAMESPACE}::")]
    return tuple(sorted(map(_operator, schemas), key=lambda operator: operator.name))


@cache
def scripted(name: str) -> Any:
    """The compiled `script` of an operator."""
    (operator,) = (o for o in operators() if o.name == name)
    return torch.jit.CompilationUnit(operator.script).call
