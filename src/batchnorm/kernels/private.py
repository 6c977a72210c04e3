"""The private functions of PyTorch that this library cannot do without, checked once at import.

No public name says whether a dispatch mode, a transform, a tracer or a backward is active, and a kernel must not run
unseen by them (``kernels.plain``). These names have been the same from torch 2.6 to 2.13. Should a later torch drop
one, the import fails here and says what to do, rather than later and in the middle of a training step.
"""

from __future__ import annotations

from operator import attrgetter

import torch

NAMES = (
    "_C._are_functorch_transforms_active",
    "_C._current_graph_task_id",
    "_C._functorch.TransformType",
    "_C._functorch.peek_interpreter_stack",
    "_C._get_dispatch_mode",
    "_C._get_tracing_state",
    "_C._increment_version",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "_C._TorchDispatchModeKey",
    "autograd.forward_ad._current_level",
    "overrides._get_current_function_mode_stack",
)
"""Dotted paths under ``torch``."""


def require_private(names: tuple[str, ...] = NAMES) -> None:
    """Do nothing where this PyTorch has them all.

    Raises:
        ImportError: names the first that is absent, this PyTorch's version, and what to install
    """
    for name in names:
        try:
            attrgetter(name)(torch)
        except AttributeError:
            raise ImportError(
                f"batchnorm: expected a PyTorch with torch.{name}, got torch {torch.__version__} without it. "
                "Install torch 2.6 to 2.13, or a newer batchnorm."
            ) from None
