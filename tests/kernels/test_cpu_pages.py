"""Large outputs live in blocks that are used again, and are tensors like any other."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm import BatchNorm2d
from batchnorm.kernels.cpu import lending, pages

pytestmark = pytest.mark.skipif(pages.pool is None, reason="no pool of large pages on this platform")

ELEMENTS = pages.LARGE // 4
VALUES = torch.arange(float(ELEMENTS))


def a_pool(most_idle: int = 8 * pages.PAGE) -> pages.Pool:
    fields = lending.find()
    assert fields is not None
    return pages.Pool(most_idle, fields)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[pages.Pool]:
    """A pool of the test's own."""
    own = a_pool()
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


def test_what_has_been_idle_longest_goes_first() -> None:
    own = a_pool(most_idle=3 * pages.LARGE)
    blocks = [own._take(count * pages.PAGE) for count in (2, 4, 2)]
    for block in blocks:
        own.give(block)
    assert own.idle() == 3 * pages.LARGE
    assert own._take(2 * pages.PAGE) is blocks[2]
    assert own._take(4 * pages.PAGE) is blocks[1]
    assert own._take(2 * pages.PAGE) is not blocks[0]


def test_what_is_left_after_the_whole_pages_lies_in_small_ones() -> None:
    """Else an output of 6.1 MiB would occupy 8."""
    size = 3 * pages.PAGE + 5000
    block = a_pool()._take(size)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(block.memory, block.start)), 1, size)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block.memory)) + block.start
    large, resident = huge_and_resident(start, block.pages * pages.PAGE)
    if not large:
        pytest.skip("this system has no large pages to give")
    assert large == 3 * pages.PAGE
    assert resident - large < 64 << 10


def huge_and_resident(start: int, length: int) -> tuple[int, int]:
    """Bytes of these addresses that lie in large pages, and in any, as the system says."""
    found = {"AnonHugePages": 0, "Rss": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            first = int(line.split("-")[0], 16)
            inside = start <= first < start + length
        elif inside and key in found:
            found[key] += int(value.split()[0]) << 10
    return found["AnonHugePages"], found["Rss"]


def test_shape_strides_and_dtype(pool: pages.Pool) -> None:
    t = pages.large_empty(torch.empty(2, 3, 4, 5, dtype=torch.bfloat16), (60, 1, 15, 3))
    assert t.shape == (2, 3, 4, 5)
    assert t.stride() == (60, 1, 15, 3)
    assert t.dtype == torch.bfloat16
    assert t.untyped_storage().nbytes() == 240


@pytest.fixture
def lent(pool: pages.Pool) -> Iterator[Tensor]:
    """A tensor in a block of the test's own pool."""
    t = pages.large_empty(like(), (1,)).copy_(VALUES)
    assert pool.leased() == pages.LARGE
    assert type(t.untyped_storage()) is torch.UntypedStorage
    assert not t._is_view()
    yield t
    t.set_()


def test_emptying_the_storage_gives_the_block_back(pool: pages.Pool, lent: Tensor) -> None:
    part = lent[5:7]
    storage = lent.untyped_storage()
    assert storage.resizable()
    storage.resize_(0)
    assert (pool.leased(), pool.idle()) == (0, pages.LARGE)
    storage.resize_(lent.nbytes)
    lent.copy_(VALUES + 1)
    assert part.tolist() == [6, 7]
    assert pool.leased() == 0, "the memory is PyTorch's own from there on"


@pytest.mark.parametrize("nbytes", [4, pages.LARGE - 4, pages.LARGE + 4, 3 * pages.LARGE])
def test_a_resized_storage_keeps_what_fits(nbytes: int, pool: pages.Pool, lent: Tensor) -> None:
    storage = lent.untyped_storage()
    storage.resize_(nbytes)
    assert storage.nbytes() == nbytes
    kept = min(nbytes // 4, ELEMENTS)
    now = torch.empty(0).set_(storage, 0, (kept,))
    assert torch.equal(now, VALUES[:kept])
    assert pool.leased() == 0


def test_a_tensor_grows(pool: pages.Pool, lent: Tensor) -> None:
    lent.resize_(2 * ELEMENTS)
    assert torch.equal(lent[:ELEMENTS], VALUES)
    assert pool.leased() == 0


def test_as_an_argument_out(pool: pages.Pool, lent: Tensor) -> None:
    with pytest.warns(UserWarning, match="was resized"):
        torch.cat((VALUES, VALUES), out=lent)
    assert torch.equal(lent, torch.cat((VALUES, VALUES)))
    with pytest.warns(UserWarning, match="was resized"):
        torch.add(VALUES[:4], VALUES[:8, None], out=lent)
    assert torch.equal(lent, VALUES[:4] + VALUES[:8, None])
    assert pool.leased() == 0


def test_pickled_saved_copied_and_as_an_array(lent: Tensor) -> None:
    file = io.BytesIO()
    torch.save(lent, file)
    file.seek(0)
    for same in (torch.load(file), pickle.loads(pickle.dumps(lent)), copy.deepcopy(lent), lent.clone()):
        assert torch.equal(same, VALUES)
        assert same.data_ptr() != lent.data_ptr()
    storage = copy.deepcopy(lent.untyped_storage())
    assert type(storage) is torch.UntypedStorage
    assert storage.nbytes() == lent.nbytes
    array = lent.numpy()
    array[3] = -1
    assert lent[3] == -1


def test_an_array_keeps_the_block(pool: pages.Pool) -> None:
    array = pages.large_empty(like(), (1,)).copy_(VALUES).numpy()
    assert pool.leased() == pages.LARGE
    other = pages.large_empty(like(), (1,)).zero_()
    assert array[7] == 7
    del array, other


def test_moved_to_shared_memory(pool: pages.Pool, lent: Tensor) -> None:
    assert torch.equal(lent.share_memory_(), VALUES)
    assert lent.is_shared()
    assert (pool.leased(), pool.idle()) == (0, pages.LARGE)


def test_data_and_set(pool: pages.Pool, lent: Tensor) -> None:
    other = torch.zeros(3)
    other.data = lent.data
    small = torch.zeros(0).set_(lent)
    lent.set_()
    assert torch.equal(other, VALUES)
    assert torch.equal(small, VALUES)
    assert pool.leased() == pages.LARGE
    del other, small


def test_inference_mode(pool: pages.Pool) -> None:
    with torch.inference_mode():
        inside = pages.large_empty(like(), (1,))
    outside = pages.large_empty(like(), (1,))
    assert inside.is_inference()
    assert not outside.is_inference()
    del inside, outside
    again = pages.large_empty(like(), (1,))
    assert not again.is_inference(), "the block remembers nothing"
    del again


@pytest.mark.parametrize("has_pool", [True, False])
def test_a_default_device_does_not_matter(has_pool: bool, pool: pages.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.empty(ELEMENTS)
    if not has_pool:
        monkeypatch.setattr(pages, "pool", None)
    with torch.device("meta"):
        t = pages.large_empty(source, (1,))
    assert t.device.type == "cpu"
    assert t.untyped_storage().nbytes() == pages.LARGE
    del t


def test_ctrl_c_while_a_block_is_lent_leaves_nothing_behind(pool: pages.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> Tensor:
        raise KeyboardInterrupt

    for place in ("tensor_over", "the loan"):
        with monkeypatch.context() as patch:
            if place == "tensor_over":
                patch.setattr(lending, "tensor_over", interrupted)
            else:
                patch.setattr(pages, "_loan_of", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pages.large_empty(like(), (1,))
    assert pool.leased() == 0


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
    own = a_pool()
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
    def nothing(pages: int) -> None:
        raise OSError("Cannot allocate memory")

    if fails == "no pool":
        monkeypatch.setattr(pages, "pool", None)
    else:
        monkeypatch.setattr(pages.pool, "_take", nothing)
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


def test_tensors_freed_in_other_threads_give_their_blocks_back(pool: pages.Pool) -> None:
    tensors = [pages.large_empty(like(), (1,)) for _ in range(4)]
    with ThreadPoolExecutor(4) as workers:
        list(workers.map(lambda _: tensors.pop(), range(4)))
    assert (pool.leased(), pool.idle()) == (0, 4 * pages.LARGE)


def test_gradients_are_freed_in_the_thread_of_the_backward(pool: pages.Pool) -> None:
    x = torch.randn(4, 64, 64, 64, requires_grad=True)
    layer = BatchNorm2d(64)
    for _ in range(3):
        y = layer(layer(x))
        y.backward(torch.ones_like(y))
        x.grad = y = None
    assert pool.leased() == 0
    assert 0 < pool.idle() <= pool.most_idle


@pytest.mark.parametrize(
    ("memory", "found"), [(None, 384 << 20), (1 << 40, 384 << 20), (1 << 30, 64 << 20), (1 << 20, 1 << 16)]
)
def test_a_process_with_little_memory_keeps_little(
    memory: int | None, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages.limits, "memory", lambda: memory)
    monkeypatch.delenv("BATCHNORM_IDLE_MIB", raising=False)
    own = pages._find_pool()
    assert own is not None
    assert own.most_idle == found


@pytest.mark.timeout(60)
def test_a_size_of_which_nothing_lies_idle_does_not_keep_the_others() -> None:
    """The first queue is empty when the limit is reached: the block that lies idle longest still goes."""
    own = a_pool(most_idle=8 * pages.PAGE)
    small = own._take(2 * pages.PAGE)
    own.give(small)
    del small
    taken = own._take(2 * pages.PAGE)  # the queue of this size is there, and empty
    for _ in range(3):
        large = own._take(4 * pages.PAGE)
        another = own._take(4 * pages.PAGE)
        third = own._take(4 * pages.PAGE)
        for block in (large, another, third):
            own.give(block)
        del large, another, third, block
        assert own.idle() <= 8 * pages.PAGE
    del taken
