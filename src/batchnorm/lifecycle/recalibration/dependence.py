"""Which layers a tensor depends on, followed through every operation of a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Names = frozenset[str]
NONE: Names = frozenset()

# What these say of a tensor does not hang on its values.
_METADATA = frozenset({
    "__get__", "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
    "is_floating_point", "is_inference", "is_pinned", "is_same_size", "is_shared", "is_signed", "ndimension",
    "nelement", "numel", "result_type", "size", "storage_offset", "stride", "type",
})  # fmt: skip
# These lend out the memory itself: what is written there from then on is not seen.
_LENDING = frozenset({"__array__", "__dlpack__", "data_ptr", "numpy", "storage", "untyped_storage"})
# The shape of their result hangs on the values, and Python can read a shape.
_SHAPED_BY_VALUES = frozenset({
    "argwhere", "bincount", "combinations", "masked_select", "nonzero", "nonzero_numpy", "repeat_interleave", "unique",
    "unique_consecutive", "unique_dim",
})  # fmt: skip


class Dependence:
    """Follows, operation by operation, which of the layers that ran a tensor was computed from.

    Conservative in every case of doubt, so that "does not depend" is a proof for the forward that was run:

    - Dependence is kept by storage, so views and in-place writes are followed.
    - A tensor that no observed operation made (by compiled code, from NumPy) depends on all that ran before it
      was first seen. Parameters, buffers and the batch's own tensors depend on nothing.
    - Once Python has read values (``item``, ``if tensor:``, a shape that hangs on values), everything after
      depends on what those values depended on: the program itself may.

    Not followed: what a model carries from one batch to the next outside of tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        # None: the memory was lent out.
        self._known: WeakKeyDictionary[Any, Names | None] = WeakKeyDictionary()
        self._ran = NONE
        self._control = NONE
        self.values_were_read = False
        for t in (*model.parameters(), *model.buffers()):
            self._mark(t, NONE)

    def start(self, batch: object) -> None:
        """A forward begins: nothing has run."""
        self._ran = self._control = NONE
        self.values_were_read = False
        for t in tensors_in(batch):
            self._mark(t, NONE)

    def of(self, *values: object) -> Names:
        """The layers that the tensors in ``values`` depend on."""
        return self._of(tensors_in(values))

    def ran(self, name: str, inputs: object, output: object) -> None:
        """The layer ``name`` made ``output`` of ``inputs``."""
        self._ran |= {name}
        self.made(inputs, output, frozenset({name}))

    def made(self, inputs: object, output: object, by: Names = NONE) -> None:
        """``output`` was made of ``inputs`` by something that is not followed."""
        depends = self.of(inputs) | by
        for t in tensors_in(output):
            self._mark(t, depends)

    def follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation and note what its results depend on."""
        inputs = list(tensors_in((args, kwargs)))
        depends = self._of(inputs)
        versions = [_version(t) for t in inputs] if depends else []
        result = func(*args, **kwargs)
        for t, version in zip(inputs, versions, strict=False):
            if _version(t) != version:
                self._mark(t, depends)
        outputs = list(tensors_in(result))
        for t in outputs:
            self._mark(t, depends)
        name = getattr(func, "__name__", "")
        if name in _LENDING:
            for t in inputs:
                self._lend(t)
        if inputs and _reads(func, name, args, result, outputs):
            self.values_were_read = True
            self._control |= depends
        return result

    def _of(self, tensors: Iterable[Tensor]) -> Names:
        found = self._control
        for t in tensors:
            storage = _storage(t)
            known = self._ran if storage is None else self._known.get(storage, self._ran)
            known = self._ran if known is None else known
            if storage is not None and storage not in self._known:
                self._known[storage] = known
            found |= known
        return found

    def _mark(self, t: Tensor, depends: Names) -> None:
        storage = _storage(t)
        if storage is None:
            return
        known = self._known.get(storage, NONE)
        if known is not None:
            self._known[storage] = known | depends

    def _lend(self, t: Tensor) -> None:
        storage = _storage(t)
        if storage is not None:
            self._known[storage] = None


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)


def _reads(func: Callable[..., Any], name: str, args: tuple[Any, ...], result: object, outputs: list[Tensor]) -> bool:
    """Whether Python learns something of the values from this operation."""
    if name in _SHAPED_BY_VALUES or (name == "where" and len(args) == 1):
        return True
    if name == "__getitem__" and any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1:])):
        return True
    module = getattr(func, "__module__", None) or ""
    if module.startswith("torch._ops.") and module != "torch._ops.aten":
        return True  # another library's operator: what it does with shapes is not known
    return result is not None and not outputs and name not in _METADATA


def _storage(t: Tensor) -> Any:
    """The memory that a tensor lies in; None where it has none of its own to ask for."""
    try:
        return t.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None


def _version(t: Tensor) -> int | None:
    try:
        return t._version
    except RuntimeError:  # made under inference_mode, and so not written to outside of it
        return None
