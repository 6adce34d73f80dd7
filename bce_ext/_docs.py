"""The arguments that the losses share, described in one place."""

from __future__ import annotations

import inspect
from string import Template
from typing import TypeVar

__all__ = ["with_shared_arguments"]

Documented = TypeVar("Documented")

WEIGHT = """\
weight: rescales the loss of each element; broadcasts to the shape of these losses. A tensor of any real dtype, or a number."""
POS_WEIGHT = """\
pos_weight: rescales the positive part of the loss; broadcasts as ``weight`` does. A tensor of any real dtype, or a number."""
REDUCTION = """\
reduction: ``'none'`` | ``'mean'`` | ``'sum'``."""
DEPRECATED = """\
size_average: deprecated, see ``reduction``.
    reduce: deprecated, see ``reduction``."""
OPTIONS = """\
label_smoothing: pulls targets towards one half: :math:`y` becomes :math:`y (1 - s) + s / 2`, with :math:`s` in :math:`[0, 1]`.
    ignore_index: elements whose target, as given, equals this number have loss 0 and gradient 0, whatever their other operands are.
        ``'mean'`` divides by the number of the others.
    normalizer: what ``'mean'`` divides by instead of the number of elements: a 0-d tensor, which is read on its device, or a number."""
MODULE_OPTIONS = f"""\
{OPTIONS}
        One that changes from call to call is an argument of ``forward``. Tensors are buffers; numbers are not, so that
        ``module.half()`` does not round them."""
FOCAL = """\
alpha: the weight of the positive class, in :math:`[0, 1]`; -1 leaves it out.
    gamma: the exponent of the focusing factor, at least 0."""
ASYMMETRIC = """\
gamma_neg: the exponent of the focusing factor of negatives, at least 0.
    gamma_pos: the exponent of the focusing factor of positives, at least 0.
    clip: the margin by which probabilities of negatives are shifted, in :math:`[0, 1)`. Easier negatives have no loss."""
FOCUSING = """\
detach_focusing: whether the focusing factor is taken for a constant in the gradients.
    eps: the smallest probability in a logarithm."""
RAISES = """\
ValueError: input and target differ in size, ``reduction`` is unknown or not ``'mean'`` with a ``normalizer``, or a number is out of its range.
    RuntimeError: a weight does not broadcast, the devices differ, a target or a weight is complex, or, on the CPU, an integer target is neither 0 nor 1
        nor ``ignore_index``. On CUDA such a target is a device-side assertion.
    NotImplementedError: the input is not of a floating dtype.
    ArgumentTypeError: an argument is neither the tensor nor the number that is expected."""

SHARED = {
    "weight": WEIGHT,
    "pos_weight": POS_WEIGHT,
    "reduction": REDUCTION,
    "deprecated": DEPRECATED,
    "options": OPTIONS,
    "module_options": MODULE_OPTIONS,
    "focal": FOCAL,
    "asymmetric": ASYMMETRIC,
    "focusing": FOCUSING,
    "raises": RAISES,
}


def with_shared_arguments(documented: Documented) -> Documented:
    """Writes what is said of the shared arguments into a docstring, each in the place of its ``$name``."""
    if documented.__doc__:  # python -OO drops docstrings
        documented.__doc__ = Template(inspect.cleandoc(documented.__doc__)).substitute(SHARED)
    return documented
