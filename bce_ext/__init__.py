from bce_ext import _ops as _ops
from bce_ext import functional as functional
