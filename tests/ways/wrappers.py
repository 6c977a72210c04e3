"""Tensor subclasses of the kinds that libraries make, for the tests of strange tensors and the fuzz."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Plain(Tensor):
    """A subclass in name only: PyTorch keeps the type through operations."""


class Wrapper(Tensor):
    """Holds a tensor and has no memory of its own, as DTensor and quantized weights do; sees every operation."""

    inner: Tensor
    seen: list[str] = []

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Wrapper.seen.append(str(func))
        return _through(Wrapper, func, args, kwargs)


class Logging(Tensor):
    """Has the memory of the tensor it is made of, and sees every operation."""

    inner: Tensor
    seen: list[str] = []

    @staticmethod
    def __new__(cls, inner: Tensor) -> Logging:
        made: Logging = torch.Tensor._make_subclass(cls, inner.detach(), inner.requires_grad)
        made.inner = inner.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Logging.seen.append(str(func))
        return _through(Logging, func, args, kwargs)


def _through(kind: type[Any], func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the tensors inside, its results wrapped again."""
    bare = [tree_map_only(kind, lambda t: t.inner, a) for a in (args, kwargs or {})]
    result = func(*bare[0], **bare[1])
    if func._schema.name.endswith("_") and isinstance(args[0], kind):
        return args[0]  # in place: what was given comes back
    return tree_map_only(Tensor, kind, result)
