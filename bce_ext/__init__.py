"""Binary cross entropy and its gradient in one pass: drop-in for :class:`torch.nn.BCEWithLogitsLoss` and :class:`torch.nn.BCELoss`."""

from bce_ext import _ops as _ops  # first: the operators must be there for the rest
from bce_ext import distributed, functional
from bce_ext._C import build_info
from bce_ext.autograd import BCEWithLogitsFunction
from bce_ext.linear import LinearBCEWithLogitsLoss
from bce_ext.modules import BCELoss, BCEWithLogitsLoss
from bce_ext.override import disable, enable, fused

__version__ = "0.1.0"

__all__ = [
    "BCELoss",
    "BCEWithLogitsFunction",
    "BCEWithLogitsLoss",
    "LinearBCEWithLogitsLoss",
    "build_info",
    "disable",
    "enable",
    "functional",
    "fused",
]

distributed.register_when_imported()
