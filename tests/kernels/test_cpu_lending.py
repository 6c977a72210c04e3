"""Storages over memory that a Python object owns."""

from __future__ import annotations

import ctypes
import weakref

import pytest
import torch

from batchnorm.kernels.cpu import lending

fields = lending.find()
pytestmark = pytest.mark.skipif(fields is None, reason="the fields of this PyTorch's storages were not found")


def a_buffer() -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * 64).from_buffer(bytearray(range(64)))


def test_the_buffer_is_held_until_the_storage_is_gone() -> None:
    assert fields is not None
    buffer = a_buffer()
    gone = weakref.ref(buffer)
    tensor = lending.tensor_over(buffer, torch.uint8, fields)
    part = tensor[3:5]
    assert tensor.data_ptr() == ctypes.addressof(buffer)
    del buffer, tensor
    assert gone() is not None
    assert part.tolist() == [3, 4]
    del part
    assert gone() is None


@pytest.mark.parametrize("size", [0, 8, 64, 128])
def test_resizing_lets_go_of_the_buffer(size: int) -> None:
    assert fields is not None
    buffer = a_buffer()
    gone = weakref.ref(buffer)
    storage = lending.tensor_over(buffer, torch.uint8, fields).untyped_storage()
    del buffer
    assert storage.resizable()
    storage.resize_(size)
    assert gone() is None
    assert storage.nbytes() == size
    assert storage.tolist()[:64] == list(range(min(size, 64)))


def test_only_that_storage_is_changed() -> None:
    assert fields is not None
    other = torch.frombuffer(a_buffer(), dtype=torch.uint8).untyped_storage()
    own = torch.empty(64, dtype=torch.uint8).untyped_storage()
    before = [ctypes.string_at(storage._cdata, lending.OBJECT_BYTES) for storage in (other, own)]
    lending.tensor_over(a_buffer(), torch.uint8, fields)
    assert [ctypes.string_at(storage._cdata, lending.OBJECT_BYTES) for storage in (other, own)] == before
    assert not other.resizable()


def test_where_nothing_is_found_nothing_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "_compare", lambda: None)
    assert lending.find.__wrapped__() is None


def test_storages_that_all_look_alike_have_no_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if PyTorch's own storages were over buffers too."""

    def over_a_buffer(size: int, **options: object) -> torch.Tensor:
        return torch.frombuffer(bytearray(size), dtype=torch.uint8)

    monkeypatch.setattr(torch, "empty", over_a_buffer)
    assert lending._compare() is None
