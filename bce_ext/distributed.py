"""How the operators act on shards of a :class:`torch.distributed.tensor.DTensor`.

The loss of a sharded batch is the sum of the losses of its shards, and the gradient of a shard needs that shard only: the operators are linear in
shards, since the divisor of a mean is an argument of theirs. So logits, targets and gradients that are sharded on any dimension, evenly or not, stay
where they are; a reduced loss comes out as ``Partial("sum")``, everything else sharded as the input. Weights that have the sharded dimension are sharded
along with it.

DTensor is imported by those who use it, not by this package: the rules are registered when that happens.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

__all__ = ["is_dtensor", "register_when_imported"]

_DTENSOR = "torch.distributed.tensor"
_MEAN = 1  # at::Reduction


def is_dtensor(tensor: object) -> bool:
    module = sys.modules.get(_DTENSOR)
    return module is not None and isinstance(tensor, module.DTensor)


def register_when_imported() -> None:
    """Registers the rules now if DTensor has been imported, and otherwise right after its import."""
    if _DTENSOR in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder, Loader):
    """Finds the one module as if this finder were not there, and registers the rules when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _DTENSOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()


def _register() -> None:
    # The public register_sharding would cache decisions without regard to the arguments that are no tensors, and gather the logits where a shard is empty.
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo
    from torch.distributed.tensor._ops.utils import generate_redistribute_costs

    ops = torch.ops.bce_ext

    def outputs_of(op: Any, arguments: Mapping[str, Any], shard: Any) -> list[Any]:
        """The placements of the outputs where the input is placed as `shard`, which may be Replicate()."""
        reduced: Any = Partial() if shard.is_shard() else shard
        if op is ops._bce_loss_and_grad.default:
            return [reduced, shard]
        if op is ops._bce_backward.default:
            return [shard if wanted else Replicate() for wanted in arguments["output_mask"]]
        if op is ops._bce_loss.default:
            return [reduced if arguments["reduce"] else shard]
        if op is ops._count_valid.default:
            return [reduced]
        if shard.is_shard() and averages(op, arguments):
            return [Partial("avg")]
        return [reduced if arguments["reduction"] else shard]

    def averages(op: Any, arguments: Mapping[str, Any]) -> bool:
        """Whether the divisor is the number of elements."""
        return op is ops._bce.default and arguments["reduction"] == _MEAN and arguments["normalizer"] is None

    def strategy(schema: OpSchema) -> OpStrategy:
        op = schema.op
        defaults: dict[str, Any] = {each.name: each.default_value for each in op._schema.arguments}
        arguments = defaults | dict(zip(defaults, schema.args_schema, strict=False))  # the given ones are the first
        strategies = schema.args_strategy
        operands = [each.strategies[0].output_spec for each in strategies]
        input, target = operands[0], operands[0 if op is ops._count_valid.default else 1]
        mesh = input.mesh
        # _bce reaches DTensor where autograd is off altogether, as in inference mode. It has no divisor, so that the mean of uneven shards, or of those
        # that ignore different numbers of elements, takes the whole input.
        takes_whole = averages(op, arguments)
        options: Sequence[float] = arguments["options"] if takes_whole else ()
        ignores = len(options) > 1 and not math.isnan(options[1])

        columns = []  # for each dimension of the mesh: the placements of the outputs, then those of the operands
        for of_input, of_target in zip(input.placements, target.placements, strict=True):
            shard: Any = next((each for each in (of_input, of_target) if each.is_shard()), None)
            if shard is None or (takes_whole and (ignores or input.shape[shard.dim] % mesh.size() != 0)):
                columns.append(outputs_of(op, arguments, Replicate()) + [Replicate()] * len(operands))
                continue
            along: list[Any] = []
            for operand in operands:
                own = shard.dim - (len(input.shape) - len(operand.shape))
                if own < 0 or operand.shape[own] != input.shape[shard.dim]:
                    along.append(Replicate())  # broadcasts
                else:
                    along.append(shard if own == shard.dim else Shard(own))
            columns.append(outputs_of(op, arguments, shard) + along)

        specs = [DTensorSpec(mesh, placements) for placements in zip(*columns, strict=True)]
        returns = len(op._schema.returns)
        outputs, inputs = specs[:returns], specs[returns:]
        for spec, operand in zip(inputs, operands, strict=True):
            spec.tensor_meta = operand.tensor_meta
        costs = [generate_redistribute_costs(*each) for each in zip(strategies, inputs, strict=True)]
        return OpStrategy([OpSpec(outputs[0] if returns == 1 else tuple(outputs), inputs, costs)])

    first_without_tensors = {
        ops._bce.default: 5,
        ops._bce_loss.default: 5,
        ops._bce_loss_and_grad.default: 5,
        ops._bce_backward.default: 5,
        ops._count_valid.default: 1,
    }
    for op, static_argnum in first_without_tensors.items():
        DTensor._op_dispatcher.sharding_propagator.register_op_strategy(op, strategy, RuntimeSchemaInfo(static_argnum))
