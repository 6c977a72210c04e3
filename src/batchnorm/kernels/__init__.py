"""Which kernel runs: ``choose`` takes the fastest that serves, ``explain`` says why each other one does not.

A backend is a module with the functions that ``eager`` documents. It is imported on first use, may be
missing, and is never replaced silently: a backend that was named and cannot serve raises.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import BackendError, DtypeError, expected
from batchnorm.kernels import eager
from batchnorm.kernels.activations import IDENTITY, Activation
from batchnorm.kernels.activations import activation as activation_by_name

# Fastest first. The last one serves everything.
BACKENDS: dict[str, str] = {"cpu": "batchnorm.kernels.cpu", "eager": "batchnorm.kernels.eager"}

_named: ContextVar[str | None] = ContextVar("batchnorm_backend", default=None)


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found: the backend that runs, and the reason against each other one.

    Arguments:
        backend: name of the kernel that runs
        reasons: for each known backend, in order of preference, why it does not run; None for the one that does
        named: whether it was named by ``use_backend`` or BATCHNORM_BACKEND rather than chosen
    """

    backend: str
    reasons: dict[str, str | None]
    named: bool

    def __str__(self) -> str:
        lines = [f"{self.backend}: runs" + (" (named outright)" if self.named else "")]
        lines += [f"{name}: {why}" for name, why in self.reasons.items() if name != self.backend]
        return "\n".join(lines)


def choose(
    x: Tensor,
    *,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> ModuleType:
    """The fastest backend that serves this call.

    Raises:
        BackendError: a backend was named outright that is unknown or cannot serve; the message names those that can
    """
    name = _named.get() or _from_environment()
    if name is None:
        for candidate in BACKENDS:
            kernel = _load(candidate)
            if isinstance(kernel, ModuleType):
                why = kernel.supports(x, activation=activation, mask=mask, sample_weight=sample_weight)
                if why is None:
                    return kernel
        return eager
    found = _load(name)
    why = found if isinstance(found, str) else found.supports(
        x, activation=activation, mask=mask, sample_weight=sample_weight
    )  # fmt: skip
    if isinstance(found, str) or why is not None:
        able = [n for n, reason in _reasons(x, activation, mask, sample_weight).items() if reason is None]
        todo = f"Name one of {able}, or none to let the library choose."
        raise BackendError(expected("choose", "a backend that serves this input", f"{name!r}: {why}", todo))
    return found


def explain(
    x: Tensor,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Explanation:
    """Which backend runs for such a call, and why each other one does not.

    >>> import torch
    >>> print(explain(torch.randn(8, 3)).backend in BACKENDS)
    True
    """
    act = activation_by_name(activation, negative_slope)
    chosen = choose(x, activation=act, mask=mask, sample_weight=sample_weight).NAME
    reasons = _reasons(x, act, mask, sample_weight)
    named = (_named.get() or _from_environment()) is not None
    for name, why in reasons.items():
        if why is None and name != chosen:
            reasons[name] = "serves, but another was named" if named else f"serves, but {chosen} is preferred"
    return Explanation(chosen, reasons, named)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Names the backend for every call inside the block, in this thread or task only.

    >>> import torch
    >>> with use_backend("eager"):
    ...     explain(torch.randn(8, 3)).backend
    'eager'

    Raises:
        BackendError: there is no backend of that name
    """
    _known("use_backend", name)
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


def warmup(what: nn.Module | Sequence[torch.dtype] = (torch.float32,), *, masks: bool = False) -> int:
    """Compile the CPU kernels ahead of time, or load them from the cache on disk, and return how many.

    Without it each kernel is compiled at its first use. The machine code is kept on disk (beside the package, in the
    user's cache folder, or in ``NUMBA_CACHE_DIR``), so this is worth doing once, where a model is installed.

    Arguments:
        what: a model, for what its batch normalization layers need with inputs of their own dtype; or the dtypes
            of the inputs, among float32, float64, bfloat16 and float16 (under autocast inputs have another dtype than
            parameters)
        masks: also the kernels for masks and sample weights

    Raises:
        DtypeError: there are no kernels for a dtype
        BackendError: the CPU kernels cannot be imported

    >>> import batchnorm as bn
    >>> warmup(torch.nn.Sequential(torch.nn.Linear(2, 3), bn.BatchNorm1d(3).double()))  # doctest: +SKIP
    19
    """
    dtypes = _dtypes_in(what) if isinstance(what, nn.Module) else what
    cpu = _load("cpu")
    if isinstance(cpu, str):
        todo = "Install it, or go on without: the plain PyTorch kernel needs no warming up."
        raise BackendError(expected("warmup", "the CPU kernels", cpu, todo))
    known = list(cpu.plan.DTYPES)
    for dtype in dtypes:
        if dtype not in known:
            raise DtypeError(expected("warmup", f"dtypes among {known}", dtype, "Leave it away."))
    return sum(cpu.plan.compile_all(dtype, masks) for dtype in dtypes)


def _dtypes_in(model: nn.Module) -> list[torch.dtype]:
    """The dtypes of the parameters of its batch normalization layers; float32 of those that have none."""
    layers = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return list(dict.fromkeys(torch.float32 if p.weight is None else p.weight.dtype for p in layers))


def _reasons(
    x: Tensor, activation: Activation, mask: Tensor | None, sample_weight: Tensor | None
) -> dict[str, str | None]:
    reasons: dict[str, str | None] = {}
    for name in BACKENDS:
        kernel = _load(name)
        reasons[name] = kernel if isinstance(kernel, str) else kernel.supports(
            x, activation=activation, mask=mask, sample_weight=sample_weight
        )  # fmt: skip
    return reasons


def _from_environment() -> str | None:
    if ENVIRONMENT is not None:
        _known("BATCHNORM_BACKEND", ENVIRONMENT)
    return ENVIRONMENT


def _known(function: str, name: str) -> None:
    if name not in BACKENDS:
        todo = "Correct the name."
        raise BackendError(expected(function, f"one of {list(BACKENDS)}", repr(name), todo))


_loaded: dict[str, ModuleType | str] = {}


def _load(name: str) -> ModuleType | str:
    """The backend's module, or why it cannot be imported (installed and broken counts)."""
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(BACKENDS[name])
        except (ImportError, OSError) as error:
            _loaded[name] = f"cannot be imported: {error}"
    return _loaded[name]


# Read once: a look-up in the environment costs as much as a small kernel.
ENVIRONMENT: str | None = os.environ.get("BATCHNORM_BACKEND") or None
