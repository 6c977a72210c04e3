"""The errors of the library.

Each is a ``BatchNormError`` and also the built-in error that PyTorch raises in the same place, so ``except ValueError``
written for ``torch.nn.BatchNorm2d`` still works.
"""

from __future__ import annotations


class BatchNormError(Exception):
    """Base of every error that the library raises on purpose."""


class ArgumentError(BatchNormError, ValueError):
    """An argument or a shape outside what a function takes."""


class MismatchError(BatchNormError, RuntimeError):
    """Tensors that do not fit together: sizes, devices, missing statistics."""


class DtypeError(BatchNormError, RuntimeError):
    """A dtype that cannot be normalized, or dtypes that cannot be combined."""


class AutogradError(BatchNormError, RuntimeError):
    """An operation that autograd or a function transform cannot do here."""


class BackendError(BatchNormError, RuntimeError):
    """A backend that was asked for by name and cannot run the call."""


class NonFiniteError(BatchNormError, RuntimeError):
    """An Inf or a NaN where ``nonfinite="raise"`` forbids it."""


class StateError(BatchNormError, RuntimeError):
    """A call that came too late, twice, or out of order."""


class ExchangeError(BatchNormError, RuntimeError):
    """An exchange between the ranks of a process group that did not complete."""


class DataError(BatchNormError, ValueError):
    """A data file that is missing, truncated or in another format than its name or header says."""


def expected(function: str, invariant: str, got: object, todo: str) -> str:
    """The form of all error messages.

    >>> expected("fold", "a model in eval mode", "one in training mode", "Call model.eval() first.")
    'fold: expected a model in eval mode, got one in training mode. Call model.eval() first.'
    """
    return f"{function}: expected {invariant}, got {got}. {todo}"
