"""PyTorch storages over memory that a Python object owns, resizable like any other.

``torch.frombuffer`` makes a storage over an object's buffer, and drops its reference to the object when the storage is
freed. But such a storage cannot be resized: ``storage.resize_(0)``, which FSDP uses to free memory for a while, raises,
and so does every ``out=`` that has to grow. It lacks a flag (``resizable``) and the allocator for the new memory. C++
can set both (``at::for_blob(...).allocator(...).resizeable_storage()``); PyTorch's Python interface cannot.

So the two fields are written here, into the C++ object of a storage that nobody else has seen yet. Their offsets are
not assumed: storages that PyTorch allocated are compared with storages over buffers. The flag is the one byte that is 1
in all of the former and 0 in all of the latter; the allocator is the one word that holds the same address in all of the
former and null in all of the latter. ``find`` then tests the result on a storage of its own: it must be resizable and
release its buffer. If anything differs from what is expected, nothing is lent, and callers allocate with PyTorch.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

OBJECT_BYTES = 96
"""Bytes of a C++ storage that are compared: the size of a ``StorageImpl`` in torch 2.6 to 2.13."""

SAMPLES = 8
"""Storages of each kind that are compared, so that no field looks right by chance."""

WORD = 8


class Fields(NamedTuple):
    """Where a C++ storage keeps what resizing needs."""

    resizable: int  # offset of the flag, in bytes
    allocator: int  # offset of the pointer to the allocator, in bytes
    cpu_allocator: int  # address of PyTorch's allocator


def tensor_over(buffer: Any, dtype: torch.dtype, fields: Fields) -> Tensor:
    """A flat tensor over all of ``buffer``; its storage holds the buffer until it is freed, resized or moved.

    Arguments:
        buffer: an object with a writable buffer, whose size is a multiple of ``dtype``'s
        fields: the result of ``find``
    """
    tensor = torch.frombuffer(buffer, dtype=dtype)
    storage = tensor.untyped_storage()._cdata  # the address of the C++ object
    ctypes.c_void_p.from_address(storage + fields.allocator).value = fields.cpu_allocator
    ctypes.c_bool.from_address(storage + fields.resizable).value = True
    return tensor


@lru_cache(maxsize=1)
def find() -> Fields | None:
    """The fields in this version of PyTorch, or None unless they were found beyond doubt."""
    if ctypes.sizeof(ctypes.c_void_p) != WORD:
        return None
    fields = _compare()
    return fields if fields is not None and _works(fields) else None


def _compare() -> Fields | None:
    """The fields by which storages that PyTorch allocated differ from those over buffers."""
    sizes = [64 * (i + 1) for i in range(SAMPLES)]
    own = [torch.empty(size, dtype=torch.uint8, device="cpu").untyped_storage() for size in sizes]
    over = [torch.frombuffer(bytearray(size), dtype=torch.uint8).untyped_storage() for size in sizes]
    own_bytes = [ctypes.string_at(storage._cdata, OBJECT_BYTES) for storage in own]
    over_bytes = [ctypes.string_at(storage._cdata, OBJECT_BYTES) for storage in over]
    pointers = [
        at
        for at in range(0, OBJECT_BYTES, WORD)
        if len({seen[at : at + WORD] for seen in own_bytes}) == 1
        and any(own_bytes[0][at : at + WORD])
        and not any(any(seen[at : at + WORD]) for seen in over_bytes)
        and not _flags_only(own_bytes[0][at : at + WORD])
    ]
    flags = [
        at
        for at in range(OBJECT_BYTES)
        if at - at % WORD not in pointers
        and all(seen[at] == 1 for seen in own_bytes)
        and all(seen[at] == 0 for seen in over_bytes)
    ]
    if len(pointers) != 1 or len(flags) != 1:
        return None
    pointer = pointers[0]
    return Fields(flags[0], pointer, int.from_bytes(own_bytes[0][pointer : pointer + WORD], "little"))


def _flags_only(word: bytes) -> bool:
    """True if these eight bytes are booleans rather than an address."""
    return max(word) <= 1


def _works(fields: Fields) -> bool:
    """True if a storage over a buffer can grow and shrink, and then releases its buffer."""
    buffer = (ctypes.c_char * 64).from_buffer(bytearray(b"x" * 64))
    gone = weakref.ref(buffer)
    storage = tensor_over(buffer, torch.uint8, fields).untyped_storage()
    del buffer
    before = (storage.resizable(), storage.nbytes(), gone() is not None)
    if before != (True, 64, True):
        return False
    storage.resize_(128)
    grown = (storage.nbytes(), bytes(storage.tolist()[:64]), gone() is None)
    storage.resize_(0)
    return grown == (128, b"x" * 64, True) and storage.nbytes() == 0
