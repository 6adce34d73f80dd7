"""The exception of bce_ext's own."""

from __future__ import annotations

__all__ = ["ArgumentTypeError"]


class ArgumentTypeError(TypeError, AttributeError):
    """An argument is not a tensor. torch raises :class:`TypeError` or :class:`AttributeError`, as it happens to fail: this is both."""


ArgumentTypeError.__module__ = "bce_ext"  # where users find it
