"""Large pages are asked for inside large tensors, and for nothing else."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from batchnorm.kernels.cpu import pages


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda *call: calls.append(call))
    return calls


def test_small_tensors_are_left_alone(asked: list[tuple[int, int, int]]) -> None:
    tensor = torch.empty(pages.LARGE // 4)
    assert pages.prefer_large(tensor) is tensor
    assert asked == []


def test_only_whole_pages_of_the_tensor_are_meant(asked: list[tuple[int, int, int]]) -> None:
    tensor = torch.empty(pages.LARGE // 4 + 12345)[7:]
    assert pages.prefer_large(tensor) is tensor
    ((start, size, _),) = asked
    assert start % mmap.PAGESIZE == 0 and size % mmap.PAGESIZE == 0
    assert tensor.data_ptr() <= start < tensor.data_ptr() + mmap.PAGESIZE
    end = tensor.data_ptr() + 4 * tensor.numel()
    assert end - mmap.PAGESIZE < start + size <= end


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has this advice")
def test_what_is_written_stays() -> None:
    values = torch.arange(pages.LARGE // 4 + 999, dtype=torch.float32)
    assert torch.equal(pages.prefer_large(torch.empty_like(values)).copy_(values), values)
