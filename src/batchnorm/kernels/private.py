"""The private names of PyTorch that this library needs, checked once at import.

No public function says whether a dispatch mode, a transform, a tracer or a backward pass is active, and no kernel may
run unseen by them (``kernels.plain``). Torch 2.6 to 2.13 have all of these names. If a later torch drops one, the
import fails here with advice, rather than in the middle of a training step.
"""

from __future__ import annotations

from importlib import import_module

import torch

NAMES = (
    "torch._C._are_functorch_transforms_active",
    "torch._C._current_graph_task_id",
    "torch._C._functorch.TransformType",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._get_dispatch_mode",
    "torch._C._get_tracing_state",
    "torch._C._increment_version",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._len_torch_function_stack",
    "torch._C._TorchDispatchModeKey",
    "torch.autograd.forward_ad._current_level",
    "torch.overrides._get_current_function_mode_stack",
    "torch.overrides._pop_mode",
    "torch.overrides._push_mode",
    "torch.utils._device.DeviceContext",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.utils._python_dispatch._get_current_dispatch_mode",
    "torch.utils._pytree",
)
"""Modules, and names in modules."""


def require_private(names: tuple[str, ...] = NAMES) -> None:
    """Check that this PyTorch has them all.

    Raises:
        ImportError: one is absent; the message names it, this PyTorch's version, and what to install
    """
    for name in names:
        place, _, attribute = name.rpartition(".")
        try:
            getattr(import_module(place), attribute)
        except (ImportError, AttributeError):
            raise ImportError(
                f"batchnorm: expected a PyTorch with {name}, got torch {torch.__version__} without it. "
                "Install torch 2.6 to 2.13, or a newer batchnorm."
            ) from None
