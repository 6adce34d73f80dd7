"""The program of a case: arguments, a call, maybe its derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from . import hostile, scalars, tensors
from .draw import Draw
from .schemas import Argument, Operator, operators
from .tensors import Shape, TensorSource

HEADER = """import torch
import bce_ext
from fuzz.helpers import *
"""


@dataclass(frozen=True)
class Case:
    """`setup` makes the arguments and may fail; `call` and what follows are under test, inside of the contexts `modes`."""

    number: int
    operator: str
    setup: tuple[str, ...]
    modes: tuple[str, ...]
    call: tuple[str, ...]
    has_answer: bool  # nothing but a plain call: what it returns can be compared

    @property
    def body(self) -> str:
        if not self.modes:
            return "\n".join(self.call)
        return "\n".join([f"with {', '.join(self.modes)}:", *(f"    {line}" for line in self.call)])

    def __str__(self) -> str:
        return HEADER + "\n".join([*self.setup, self.body])


# ---- shapes ----

# What an argument of this name is in the linear form, where logits are input @ linear_weight.T + linear_bias: rows,
# features and labels. A name that does not stand here has the shape of the logits, or, if optional, one that broadcasts.
LINEAR_SHAPES = {
    "input": ("rows", "features"),
    "linear_weight": ("labels", "features"),
    "linear_bias": ("labels",),
}
ALWAYS_SCALAR = ("normalizer", "divisor")
LEFT_OUT = {"weight": 0.5, "linear_weight": 0.25, "linear_bias": 0.5, "grad_output": 0.4}  # how often; others: 0.65


class Shapes:
    """Which tensors a call is given, and shapes for them that go together."""

    def __init__(self, draw: Draw, operator: Operator) -> None:
        self.draw = draw
        self.given = {a.name for a in operator.arguments if is_tensor(a)}
        for argument in operator.arguments:
            if argument.name == "linear_weight" and operator.is_public:
                continue  # without a layer, the public operator is an internal one
            if argument.type == "Optional[Tensor]" and draw.chance(LEFT_OUT.get(argument.name, 0.65)):
                self.given.discard(argument.name)
        self.is_linear = operator.takes("linear_weight")
        self.has_class_indices = False
        self.common: Shape = tensors.any_shape(draw)
        if not self.is_linear:
            return
        if "linear_weight" not in self.given and draw.chance(0.9):
            self.given.discard("linear_bias")
        self.sizes = {
            "rows": draw.pick((0, 1, 2, 5, 5, 33)),
            "features": draw.pick((0, 1, 3, 8, 16)),
            "labels": draw.pick((0, 1, 4, 5, 17, 1025, 5000)),
        }
        if draw.chance(0.03):
            self.sizes |= {"rows": 261, "labels": 16_100}  # enough for several blocks
        self.common = (self.sizes["rows"], self.sizes["labels"])
        self.num_values = draw.pick((0, 1, 5, 40))  # of a sparse target
        self.has_class_indices = "indices" not in self.given and draw.chance(0.2)

    def takes_part_in_layer(self, name: str) -> bool:
        return self.is_linear and name in LINEAR_SHAPES

    def of(self, argument: Argument) -> Shape:
        if argument.name in ALWAYS_SCALAR or (self.is_linear and argument.name == "grad_output"):
            return ()
        if self.takes_part_in_layer(argument.name):
            if "linear_weight" not in self.given and argument.name == "input":
                return self.common
            return tuple(self.sizes[size] for size in LINEAR_SHAPES[argument.name])
        if argument.name == "indices":
            return (2, self.num_values)
        if argument.name == "target" and "indices" in self.given:
            return (self.num_values,)
        if argument.name == "target" and self.is_linear and self.has_class_indices:
            return (self.sizes["rows"],)
        if argument.type.startswith("Optional"):
            return tensors.broadcasting_to(self.draw, self.common)
        # A loss that is reduced has a gradient without dimensions.
        return () if argument.name == "grad_output" and self.draw.chance(0.5) else self.common

    def places(self) -> str:
        """The rows and labels of the values of a sparse target; a few are not inside of the logits."""
        low = -3 if self.draw.chance(0.1) else 0
        highs = [max(1, self.sizes[size]) - low for size in ("rows", "labels")]
        each = (f"torch.randint({low}, {high}, ({self.num_values},))" for high in highs)
        return f"torch.stack([{', '.join(each)}])"


# ---- arguments ----


def tensor_arguments(draw: Draw, operator: Operator) -> list[TensorSource]:
    shapes = Shapes(draw, operator)
    dtype = draw.pick(tensors.FLOATS)
    # The layer goes through rows in blocks, and would not come to an end; others ask for memory that nobody has.
    vast_shapes = hostile.VAST[1:2] if operator.takes("linear_weight") else hostile.VAST
    vast = draw.pick(vast_shapes) if draw.chance(0.005) else None
    sources = []
    for argument in operator.arguments:
        if argument.name not in shapes.given:
            continue
        # Few operands may be of any dtype: the target and what is optional, but not what is multiplied with the input.
        is_free = argument.name == "target" or argument.type.startswith("Optional")
        is_free &= not shapes.takes_part_in_layer(argument.name)
        own = dtype if draw.chance(0.6 if is_free else 0.95) else draw.pick(tensors.FLOATS + tensors.INTEGERS)
        if argument.name == "target" and shapes.has_class_indices and draw.chance(0.9):
            own = draw.pick(tensors.INTEGERS)
        if argument.name == "indices":
            own = "int64"
        if vast is None and argument.name == "indices":
            source = TensorSource(argument.name, shapes.of(argument), own, [f"indices = {shapes.places()}"])
        elif vast is not None:
            source = TensorSource(
                argument.name, vast, own, [f"{argument.name} = torch.rand(()).to(torch.{own}).expand({vast})"]
            )
        else:
            source = tensors.tensor(draw, argument.name, shapes.of(argument), own)
        if draw.chance(0.25) and own in tensors.FLOATS:
            hostile.require_grad(draw, source)
        sources.append(source)
    if vast is None:
        for _ in range(draw.weighted({0: 45, 1: 35, 2: 12, 3: 5, 4: 3})):
            if sources:
                hostile.spoil(draw, draw.pick(sources))
        if len(sources) > 1 and draw.chance(0.03):  # the same memory twice
            one, other = draw.sample(sources, 2)
            one.do(f"{{x}} = {other.name}" + draw.pick(("", "", ".detach()", "[..., :1]")))
            sources.sort(key=lambda source: source is one)
    return sources


def is_tensor(argument: Argument) -> bool:
    return "Tensor" in argument.type and not argument.type.startswith("List")


def tensor_list(draw: Draw, argument: Argument) -> str:
    shapes = [tensors.any_shape(draw) for _ in range(draw.randint(0, 3))]
    return f"[{', '.join(f'torch.rand({shape})' for shape in shapes)}]"


def arguments(draw: Draw, operator: Operator) -> tuple[list[str], list[str], list[TensorSource]]:
    """The lines that make the arguments, the names of those that are given, and the floating tensors among them."""
    sources = tensor_arguments(draw, operator)
    lines = [line for source in sources for line in source.lines]
    made = {source.name for source in sources}
    given = []
    for argument in operator.arguments:
        if argument.name not in made:
            if argument.has_default and draw.chance(0.5):
                continue
            if is_tensor(argument):
                lines.append(f"{argument.name} = None")
            elif draw.chance(0.01):
                lines.append(f"{argument.name} = {scalars.of_wrong_type(draw)}")
            elif "Tensor" in argument.type:
                lines.append(f"{argument.name} = {tensor_list(draw, argument)}")
            else:
                lines.append(f"{argument.name} = {scalars.expression(draw, operator, argument)}")
        given.append(argument.name)
    return lines, given, [source for source in sources if source.dtype in tensors.FLOATS]


# ---- calls ----


def passed(draw: Draw, operator: Operator, given: list[str]) -> str:
    """The arguments of a call, by position as long as nothing was left out."""
    parts = []
    by_name = draw.chance(0.2)
    for argument in operator.arguments:
        if argument.name not in given:
            by_name = True
            continue
        by_name |= argument.is_keyword_only
        parts.append(f"{argument.name}={argument.name}" if by_name else argument.name)
    return ", ".join(parts)


def through_transform(draw: Draw, floating: list[TensorSource], call: str) -> str:
    """A call under one of the transforms of torch.func with respect to some of its tensors."""
    mapped = [source.name for source in floating if draw.chance(0.7)]
    # vmap of an operator without a batching rule is a loop, slow under a mode.
    if not mapped or any(math.prod(source.shape) > 2000 for source in floating):
        return f"result = {call}"
    names = ", ".join(mapped)
    of = f"lambda {names}: {call}"
    kind = draw.weighted({"vmap": 3, "grad": 2, "jvp": 2, "functionalize": 1, "vmap of grad": 1, "jacrev": 1})
    if kind == "vmap":
        dims = [draw.pick((0, 0, -1, None)) for _ in mapped]
        return f"result = torch.vmap({of}, in_dims=({', '.join(map(str, dims))},))({names})"
    if kind == "jvp":
        return f"result = torch.func.jvp({of}, ({names},), tuple(torch.ones_like(x) for x in ({names},)))"
    if kind == "functionalize":
        return f"result = torch.func.functionalize({of})({names})"
    if kind == "jacrev":  # of a few outputs: a Jacobian has as many rows as there are
        return f"result = torch.func.jacrev(lambda {names}: first({call}).flatten()[:4])({names})"
    gradient = f"torch.func.grad(lambda {names}: first({call}).sum())"
    return f"result = torch.vmap({gradient})({names})" if kind == "vmap of grad" else f"result = {gradient}({names})"


MODES = {
    "torch.no_grad()": 4,
    "torch.inference_mode()": 3,
    "torch.autocast('cpu')": 3,
    "torch.autocast('cpu', torch.float16)": 1,
    "torch.autocast('meta')": 0.3,
    "FakeTensorMode(allow_non_fake_inputs=True)": 1,
    "torch.autograd.graph.save_on_cpu()": 0.5,
    "torch.autograd.detect_anomaly(check_nan=False)": 0.5,
}


def derivatives(draw: Draw, operator: Operator) -> list[str]:
    """Backward of what was returned: once, twice, differentiably, with gradients of all kinds."""
    names = ", ".join(a.name for a in operator.arguments if is_tensor(a))
    lines = [f"inputs = requiring_grad(locals(), {names.split(', ')})", "outputs = requiring_grad_of(result)"]
    if draw.chance(0.15):
        # Between forward and backward, as FSDP does. Only where the node is the library's: ATen's nodes crash on freed
        # storages whoever made them.
        action = draw.pick(
            ("x.untyped_storage().resize_(0)", "x.data.zero_()", "x.detach_()", "x.data = x.data[..., :1]")
        )
        lines.append(f"for x in own_saved(outputs, inputs): {action}")
    gradient = draw.weighted(
        {
            "torch.rand_like(x)": 4,
            "torch.ones_like(x)": 4,
            "torch.ones(()).to(x).expand(x.shape)": 2,
            "torch.full_like(x, float('nan'))": 1,
            "torch.rand_like(x).requires_grad_()": 1,
            "torch.rand(x.shape)": 1,
            "torch.rand_like(x).to('meta')": 1,
            "torch.rand_like(x).to_sparse()": 1,
            "torch._efficientzerotensor(x.shape, dtype=x.dtype)": 1,
            "torch.rand(2, 3)": 0.5,
        }
    )
    create_graph = draw.chance(0.3)
    lines.append(f"grad_outputs = [{gradient} for x in outputs]")
    if gradient == "torch.rand_like(x)" and draw.chance(0.2):
        lines.append("for x in own_saved(outputs, grad_outputs): x.untyped_storage().resize_(0)")
    call = f"torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True, create_graph={create_graph}, retain_graph=True)"
    lines.append(f"if inputs and outputs: grads = {call}")
    if create_graph:
        lines.append("second = [x.sum() for x in requiring_grad_of(grads)] if inputs and outputs else []")
        lines.append("if second: torch.autograd.grad(second, inputs, allow_unused=True)")
    elif draw.chance(0.3):
        lines.append(f"if inputs and outputs: grads = {call}")
    return lines


def make_case(seed: int, number: int) -> Case:
    draw = Draw(seed, number)
    operator = draw.pick(operators())
    lines, given, floating = arguments(draw, operator)
    setup = [f"torch.manual_seed({number})", *lines]
    route = draw.weighted({"torch.ops": 50, "script": 30, "transform": 12, "dual": 8})
    function = operator.path
    if route == "script":
        given = [a.name for a in operator.arguments]  # a function of TorchScript without defaults
        setup += [
            f"{a.name} = {default(a)}"
            for a in operator.arguments
            if not any(x.startswith(f"{a.name} = ") for x in lines)
        ]
        function = f"scripted({operator.name!r})"
    call = f"{function}({passed(draw, operator, given)})"
    modes = [draw.weighted(MODES) for _ in range(draw.weighted({0: 60, 1: 32, 2: 8}))]
    body = [f"result = {call}"]
    if route in ("transform", "dual"):
        # ATen's own operations fail on views that are negated (x.mT under jvp).
        setup = [line for line in setup if "_neg_view" not in line and ".conj().imag" not in line]
    if route == "transform":
        body = [through_transform(draw, floating, call)]
        # functionalize takes no functional tensors; and on the wrappers of a transform it is ATen that reads memory.
        setup = [line for line in setup if "_to_functional_tensor" not in line and ".resize_(" not in line]
    elif route == "dual":
        modes.append("forward_ad.dual_level()")
        dual = [source.name for source in floating if draw.chance(0.6)]
        body = [*(f"{name} = forward_ad.make_dual({name}, torch.ones_like({name}))" for name in dual), *body]
    if draw.chance(0.6):
        body += derivatives(draw, operator)
    has_answer = operator.is_loss and route in ("torch.ops", "script") and "own_saved" not in "".join(body)
    return Case(number, operator.name, tuple(setup), tuple(modes), tuple(body), has_answer)


def default(argument: Argument) -> str:
    """A value where a scripted function wants one and the case left it to the schema."""
    if argument.type.startswith("Optional"):
        return "None"
    return {"int": "1", "float": "0.0", "bool": "False", "ScalarType": "torch.float32", "str": "''"}.get(
        argument.type, "[]"
    )


def without(case: Case, part: str, index: int) -> Case:
    """The case with one line, or one context, taken out."""
    lines = list(getattr(case, part))
    del lines[index]
    return replace(case, **{part: tuple(lines)})
