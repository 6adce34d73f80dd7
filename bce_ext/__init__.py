"""Binary cross entropy and its gradient in one pass: drop-in for :class:`torch.nn.BCEWithLogitsLoss` and :class:`torch.nn.BCELoss`."""

from bce_ext import _ops as _ops  # first: the operators must be there for the rest
from bce_ext import distributed, functional
from bce_ext._C import build_info
from bce_ext.autograd import BCEWithLogitsFunction
from bce_ext.errors import ArgumentTypeError
from bce_ext.memory import empty_cache
from bce_ext.modules import AsymmetricLoss, BCELoss, BCEWithLogitsLoss, LinearBCEWithLogitsLoss, SigmoidFocalLoss
from bce_ext.override import disable, enable, fused, is_enabled

__version__ = "0.1.0"

__all__ = [
    "ArgumentTypeError",
    "AsymmetricLoss",
    "BCELoss",
    "BCEWithLogitsFunction",
    "BCEWithLogitsLoss",
    "LinearBCEWithLogitsLoss",
    "SigmoidFocalLoss",
    "build_info",
    "disable",
    "empty_cache",
    "enable",
    "functional",
    "fused",
    "is_enabled",
]

distributed.register_when_imported()
