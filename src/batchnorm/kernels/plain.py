"""Which calls a kernel may take: those on plain tensors that nothing else has to observe.

A compiled kernel reads and writes memory by address, and the autograd function around every kernel hides what happens
inside. Both are correct only for plain strided tensors with memory of their own. Wrapper subclasses (DTensor), meta and
fake tensors, ZeroTensors, negated views, mkldnn and sparse tensors, and the wrappers of function transforms have no
such memory, or their memory does not hold their values. A dispatch mode, a tracer, a transform or a forward-mode level
has to see ordinary operations. All of these calls go through ``composite``.

Do not call this in code that torch.compile traces, which cannot evaluate these checks. Call
``torch.compiler.is_compiling()`` first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from batchnorm.kernels.private import require_private

require_private()
_function_mode_stack: Callable[[], list[object]] = torch.overrides._get_current_function_mode_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_in_transform = torch._C._are_functorch_transforms_active
_tracer = torch._C._get_tracing_state

_PLAIN_TYPES = {Tensor, Parameter}


def is_plain(*tensors: Tensor | None) -> bool:
    """True if kernels may run on these tensors now; None stands for a tensor that is absent.

    >>> is_plain(torch.ones(2), None), is_plain(torch.ones(2, device="meta"))
    (True, False)
    """
    if _dispatch_modes() or _in_transform() or _tracer() is not None or forward_ad._current_level >= 0:
        return False
    if _function_modes() and not _only_default_devices():
        return False
    try:
        for t in tensors:
            if t is not None and (
                type(t) not in _PLAIN_TYPES or (t.data_ptr() == 0 and (t.numel() or t.is_meta)) or t.is_neg()
            ):
                return False
    except RuntimeError:  # a tensor without a data pointer
        return False
    return True


def why_not(**tensors: Tensor | None) -> str | None:
    """Why ``is_plain`` is False, in words, or None if it is True. Keywords are the names of the arguments."""
    if is_plain(*tensors.values()):
        return None
    if _in_transform():
        return "a function transform (torch.func) is active"
    if _tracer() is not None:
        return "torch.jit.trace is recording"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if _dispatch_modes():
        return f"{type(torch.utils._python_dispatch._get_current_dispatch_mode()).__name__} is active"
    if _function_modes() and not _only_default_devices():
        return f"{type(_function_mode_stack()[-1]).__name__} is active"
    name, t = next((name, t) for name, t in tensors.items() if not is_plain(t))
    assert t is not None
    if type(t) not in _PLAIN_TYPES:
        return f"{name} is a {type(t).__name__}"
    if t.layout is not torch.strided:
        return f"{name} has the layout {t.layout}"
    if t.is_meta:
        return f"{name} is on the meta device"
    return f"{name} is a view that negates" if t.is_neg() else f"{name} has no memory of its own"


def _only_default_devices() -> bool:
    """True if the only active function modes are ``with torch.device(...)`` or ``torch.set_default_device``."""
    return all(type(mode) is torch.utils._device.DeviceContext for mode in _function_mode_stack())
