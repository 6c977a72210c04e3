"""Large outputs live in blocks that are used again, and are tensors like any other."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from batchnorm import BatchNorm2d
from batchnorm.kernels.cpu import pages

pytestmark = pytest.mark.skipif(pages.pool is None, reason="no pool of large pages on this platform")

ELEMENTS = pages.LARGE // 4


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[pages.Pool]:
    """A pool of the test's own."""
    own = pages.Pool(most_idle=8 * pages.PAGE)
    monkeypatch.setattr(pages, "pool", own)
    yield own
    assert own.leased() == 0


def like(elements: int = ELEMENTS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(elements, dtype=dtype, device="meta")


def test_a_block_is_used_again_when_its_last_tensor_is_gone(pool: pages.Pool) -> None:
    first = pages.large_empty(like(), (1,))
    address = first.data_ptr()
    assert address % pages.PAGE == 0
    assert pool.leased() == pages.LARGE
    part = first[7:9]
    del first
    assert pool.leased() == pages.LARGE, "a view keeps the block"
    second = pages.large_empty(like(), (1,))
    assert second.data_ptr() != address
    del part, second
    assert pool.leased() == 0
    assert pool.idle() == 2 * pages.LARGE
    pages.large_empty(like(), (1,))
    assert pool.idle() == 2 * pages.LARGE


def test_no_more_than_so_much_lies_idle(pool: pages.Pool) -> None:
    several = [pages.large_empty(like(elements), (1,)) for elements in (ELEMENTS, 2 * ELEMENTS, 3 * ELEMENTS)]
    assert pool.leased() == 6 * pages.LARGE
    del several
    assert 0 < pool.idle() <= pool.most_idle


def test_only_so_much_is_kept_from_the_system() -> None:
    own = pages.Pool(most_idle=100 * pages.LARGE, most_kept=2 * pages.LARGE)
    blocks = [own.take(size * pages.LARGE) for size in (1, 1, 1, 3)]
    for block in blocks:
        own.give(block)
    assert own.idle() == 6 * pages.LARGE
    assert sum(len(queue) for queue in own._kept.values()) == 2
    assert sum(len(queue) for queue in own._free.values()) == 2
    again = [own.take(pages.LARGE) for _ in range(3)]
    assert {id(block) for block in again} == {id(block) for block in blocks[:3]}


def test_shape_strides_and_dtype(pool: pages.Pool) -> None:
    t = pages.large_empty(torch.empty(2, 3, 4, 5, dtype=torch.bfloat16), (60, 1, 15, 3))
    assert t.shape == (2, 3, 4, 5)
    assert t.stride() == (60, 1, 15, 3)
    assert t.dtype == torch.bfloat16
    assert t.untyped_storage().nbytes() == 240


def test_a_tensor_like_any_other(pool: pages.Pool) -> None:
    t = pages.large_empty(like(1000), (1,))
    t.copy_(torch.arange(1000.0))
    assert not t._is_view()
    assert torch.equal(pickle.loads(pickle.dumps(t)), t)
    assert torch.equal(copy.deepcopy(t), t)
    assert torch.equal(t.share_memory_(), torch.arange(1000.0))


def test_outputs_can_be_changed_in_place_under_a_graph() -> None:
    x, dy = torch.randn(4, 64, 64, 64).requires_grad_(), torch.randn(4, 64, 64, 64)
    layer = BatchNorm2d(64)
    assert x.nbytes >= pages.LARGE
    y = layer(x)
    assert y.data_ptr() % pages.PAGE == 0
    F.relu_(y).backward(dy)
    assert x.grad is not None
    assert x.grad.data_ptr() % pages.PAGE == 0
    same = x.detach().clone().requires_grad_()
    torch.relu(torch.nn.BatchNorm2d(64)(same)).backward(dy)
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-4, atol=1e-5)
    again = layer(x.detach())
    assert torch.equal(torch.relu(again), y.detach()), "the block of one output is not another's while it lives"


def test_a_block_goes_back_to_the_pool_that_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    own = pages.Pool(most_idle=8 * pages.PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(pages, "pool", own)
        t = pages.large_empty(like(), (1,))
    assert own.leased() == pages.LARGE
    del t
    assert own.leased() == 0
    assert own.idle() == pages.LARGE


def test_small_outputs_are_pytorchs_own() -> None:
    before = pages.pool.leased() if pages.pool is not None else 0
    y = BatchNorm2d(3)(torch.randn(2, 3, 5, 5))
    assert pages.pool is not None
    assert pages.pool.leased() == before
    assert y.isfinite().all()


@pytest.mark.parametrize("fails", ["no pool", "no memory"])
def test_without_a_block_pytorch_allocates(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(size: int) -> None:
        raise OSError("Cannot allocate memory")

    if fails == "no pool":
        monkeypatch.setattr(pages, "pool", None)
    else:
        monkeypatch.setattr(pages.pool, "take", nothing)
    t = pages.large_empty(torch.empty(3, 4), (1, 3))
    assert t.stride() == (1, 3)
    assert t.untyped_storage().resizable()


def test_blocks_of_several_threads_do_not_overlap(pool: pages.Pool) -> None:
    wrong = []

    def work(value: int) -> None:
        for _ in range(30):
            t = pages.large_empty(like(), (1,))
            t.fill_(value)
            if not bool((t == value).all()):
                wrong.append(value)
            del t

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


@pytest.mark.parametrize(
    ("value", "expected"), [("0", "None"), ("5", str(5 << 20)), ("", str(1 << 30)), ("much", "'much'")]
)
def test_the_environment_says_how_much_may_lie_idle(value: str, expected: str) -> None:
    code = "from batchnorm.kernels.cpu import pages; print(pages.pool and pages.pool.most_idle)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BATCHNORM_IDLE_MIB": value},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert expected in (done.stdout if done.returncode == 0 else done.stderr.splitlines()[-1])
    assert (done.returncode == 0) == (value != "much")
