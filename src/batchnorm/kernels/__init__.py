"""Which kernel runs: ``choose`` takes the fastest that can, ``explain`` says why each of the others does not.

A backend is a module with the functions of ``contract.Kernel``. It is imported on first use and may be missing. It is
never replaced silently: naming a backend that cannot serve a call raises an error. Backends run on plain tensors only
(``plain``); every other call is made of ordinary PyTorch operations (``composite``).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import BackendError, DtypeError, expected
from batchnorm.kernels import plain
from batchnorm.kernels.activations import IDENTITY, Activation
from batchnorm.kernels.activations import activation as activation_by_name
from batchnorm.kernels.contract import Groups, Kernel

# Fastest first. The last one serves all plain tensors.
BACKENDS: dict[str, str] = {
    "cpu": "batchnorm.kernels.cpu",
    "gpu": "batchnorm.kernels.gpu",
    "eager": "batchnorm.kernels.eager",
}

COMPOSITE = "composite"
"""The name of ordinary PyTorch operations, which serve where no backend may run."""

_named: ContextVar[str | None] = ContextVar("batchnorm_backend", default=None)


@dataclass(frozen=True)
class Explanation:
    """The result of ``explain``: the backend that runs, and why each of the others does not.

    Arguments:
        backend: name of the kernel that runs, or "composite"
        reasons: for each known backend, in order of preference, why it does not run; None for the one that does
        named: True if it was named by ``use_backend`` or BATCHNORM_BACKEND rather than chosen
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
    *beside: Tensor | None,
    activation: Activation = IDENTITY,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    groups: Groups | None = None,
) -> Kernel | None:
    """The fastest backend that serves this call; None if it has to be made of ordinary operations.

    ``beside`` are the other tensors of the call: parameters, statistics, residual, gradients.

    Raises:
        BackendError: a backend was named outright that is unknown or cannot serve; the message names those that can
    """
    if ENVIRONMENT is not None or _named.get() is not None:
        return _named_backend(_named.get() or _from_environment(), x, beside, activation, mask, sample_weight, groups)
    if not plain.is_plain(x, mask, sample_weight, *beside):
        return None
    for kernel in _importable():
        if kernel.supports(x, activation=activation, mask=mask, sample_weight=sample_weight, groups=groups) is None:
            return kernel
    raise AssertionError("the last backend serves every plain tensor")


def _named_backend(
    name: str | None,
    x: Tensor,
    beside: tuple[Tensor | None, ...],
    activation: Activation,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    groups: Groups | None,
) -> Kernel | None:
    assert name is not None
    if name == COMPOSITE:
        return None
    others = {f"tensor {i} beside it": t for i, t in enumerate(beside)}
    reasons = _reasons(x, activation, mask, sample_weight, others, groups)
    if reasons[name] is not None:
        able = [n for n, reason in reasons.items() if reason is None]
        todo = f"Name one of {able}, or none to let the library choose."
        raise BackendError(expected("choose", "a backend that serves this input", f"{name!r}: {reasons[name]}", todo))
    return cast(Kernel, _load(name))


def explain(
    x: Tensor,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Explanation:
    """Which backend runs for such a call, and why each of the others does not.

    "composite" is no kernel: the call is made of ordinary PyTorch operations, because the input is not a plain tensor
    (meta, DTensor, mkldnn, ...) or because a mode, tracer or function transform has to see them.

    >>> import torch
    >>> print(explain(torch.randn(8, 3)).backend in BACKENDS)
    True
    >>> print(explain(torch.empty(8, 3, device="meta")))
    composite: runs
    cpu: the input is on the meta device
    gpu: the input is on the meta device
    eager: the input is on the meta device
    """
    act = activation_by_name(activation, negative_slope)
    everywhere = mask is None and sample_weight is None
    named = _named.get() or _from_environment()
    kernel = choose(x, activation=act, mask=mask, sample_weight=sample_weight)
    chosen = COMPOSITE if kernel is None else kernel.NAME
    reasons = _reasons(x, act, mask, sample_weight, {})
    if chosen == "eager" and everywhere and left_to_torch(x):
        chosen = COMPOSITE
        reasons["eager"] = f"serves, but without a kernel for {x.device.type} PyTorch's own operator is faster"
    if chosen != COMPOSITE:
        del reasons[COMPOSITE]
    for name, why in reasons.items():
        if why is None and name != chosen:
            reasons[name] = f"serves, but {'another was named' if named is not None else chosen + ' is preferred'}"
    return Explanation(chosen, reasons, named is not None)


def left_to_torch(x: Tensor) -> bool:
    """Whether a plain call is better left to PyTorch's own operator: on a device that no kernel was written for.

    There ``eager`` would take several times as long. It still serves what PyTorch's operator cannot do: masks, weights
    and whatever comes between statistics and use.
    """
    if x.is_cpu or x.numel() == 0 or ENVIRONMENT is not None or _named.get() is not None or not plain.is_plain(x):
        return False
    gpu = _load("gpu")
    return isinstance(gpu, str) or gpu.no_kernels_on(x.device)  # type: ignore[attr-defined]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Name the backend for every call inside the block, in this thread or task only.

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

    Otherwise each kernel is compiled at its first use. The machine code is cached on disk (beside the package, in the
    user's cache folder, or in ``NUMBA_CACHE_DIR``), so it is enough to do this once, where a model is installed.

    Arguments:
        what: the dtypes of the inputs, among float32, float64, bfloat16 and float16; or a model, whose batch
            normalization layers are then taken to get inputs of their own dtype (not so under autocast)
        masks: include the kernels for masks and sample weights

    Raises:
        DtypeError: there are no kernels for a dtype
        BackendError: the CPU kernels cannot be imported

    >>> import batchnorm as bn
    >>> warmup(torch.nn.Sequential(torch.nn.Linear(2, 3), bn.BatchNorm1d(3).double()))  # doctest: +SKIP
    19
    """
    dtypes = _dtypes_in(what) if isinstance(what, nn.Module) else what
    why = _load("cpu")
    if isinstance(why, str):
        todo = "Install it, or go on without: the plain PyTorch kernel needs no warming up."
        raise BackendError(expected("warmup", "the CPU kernels", why, todo))
    from batchnorm.kernels import cpu

    known = list(cpu.plan.DTYPES)
    for dtype in dtypes:
        if dtype not in known:
            raise DtypeError(expected("warmup", f"dtypes among {known}", dtype, "Leave it away."))
    return sum(cpu.plan.compile_all(dtype, masks) for dtype in dtypes)


def _dtypes_in(model: nn.Module) -> list[torch.dtype]:
    """The dtypes of the parameters of its batch normalization layers; float32 for layers without any."""
    layers = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return list(dict.fromkeys(torch.float32 if p.weight is None else p.weight.dtype for p in layers))


def _reasons(
    x: Tensor,
    activation: Activation,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    others: dict[str, Tensor | None],
    groups: Groups | None = None,
) -> dict[str, str | None]:
    """Why each backend cannot serve the call, None for those that can."""
    not_plain = plain.why_not(**{"the input": x, "the mask": mask, "sample_weight": sample_weight, **others})
    reasons: dict[str, str | None] = {}
    for name in BACKENDS:
        kernel = _load(name)
        if isinstance(kernel, str):
            reasons[name] = kernel
        else:
            reasons[name] = not_plain or kernel.supports(
                x, activation=activation, mask=mask, sample_weight=sample_weight, groups=groups
            )
    return reasons | {COMPOSITE: None}


def _from_environment() -> str | None:
    if ENVIRONMENT is not None:
        _known("BATCHNORM_BACKEND", ENVIRONMENT)
    return ENVIRONMENT


def _known(function: str, name: str) -> None:
    known = [*BACKENDS, COMPOSITE]
    if name not in known:
        raise BackendError(expected(function, f"one of {known}", repr(name), "Correct the name."))


@lru_cache(maxsize=1)
def _importable() -> tuple[Kernel, ...]:
    """The backends that can be imported, fastest first."""
    return tuple(kernel for kernel in map(_load, BACKENDS) if not isinstance(kernel, str))


_loaded: dict[str, Kernel | str] = {}


def _load(name: str) -> Kernel | str:
    """The backend's module, or why it cannot be imported (it may be missing or broken)."""
    if name not in _loaded:
        try:
            _loaded[name] = cast(Kernel, importlib.import_module(BACKENDS[name]))
        except (ImportError, OSError) as error:
            _loaded[name] = f"cannot be imported: {error}"
    return _loaded[name]


# Read once: looking it up in the environment takes as long as a small kernel.
ENVIRONMENT: str | None = os.environ.get("BATCHNORM_BACKEND") or None
