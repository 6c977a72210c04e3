"""Large outputs live in blocks that are used again, and are tensors like any other."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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


def run(code: str, **environment: str) -> str:
    """What ``code`` prints in a process of its own, which has to end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


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
    blocks = [own._take(size) for size in (2, 4, 2)]
    for block in blocks:
        own.give(block)
    assert own.idle() == 3 * pages.LARGE
    assert own._take(2) is blocks[2]
    assert own._take(4) is blocks[1]
    assert own._take(2) is not blocks[0]


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


def test_sent_to_another_process() -> None:
    """The receiving process sees the same memory, whichever way PyTorch shares it."""
    code = """
        import torch
        from torch import multiprocessing
        from batchnorm.kernels.cpu import pages
        torch.set_num_threads(1)  # PyTorch's own operations hang in a child of a process that used its thread pool

        def work(queue, answers):
            t, storage = queue.get()
            t += 1
            answers.put((t.sum().item(), storage.nbytes()))

        if __name__ == "__main__":
            for strategy in sorted(multiprocessing.get_all_sharing_strategies()):
                multiprocessing.set_sharing_strategy(strategy)
                context = multiprocessing.get_context("fork")
                queue, answers = context.Queue(), context.Queue()
                other = context.Process(target=work, args=(queue, answers))
                other.start()
                t = pages.large_empty(torch.empty(1 << 20), (1,)).fill_(1)
                queue.put((t, t.untyped_storage()))
                print(answers.get(timeout=60), t[0].item())
                other.join(60)
    """
    lines = run(code).splitlines()
    assert lines
    assert set(lines) == {f"({2.0 * (1 << 20)}, {4 << 20}) 2.0"}


def test_a_forked_child_and_its_parent_have_memory_of_their_own() -> None:
    code = """
        import os, torch
        from batchnorm.kernels.cpu import pages
        torch.set_num_threads(1)  # PyTorch's own operations hang in a child of a process that used its thread pool

        def tensor(value):
            return pages.large_empty(torch.empty(1 << 20), (1,)).fill_(value)

        tensor(0)
        kept = tensor(1)
        idle = tensor(2)
        del idle
        child = os.fork()
        if child == 0:
            mine = [tensor(3) for _ in range(3)]
            kept += 1
            ok = all(bool((t == 3).all()) for t in mine) and bool((kept == 2).all())
            del mine, kept
            os._exit(0 if ok else 1)
        mine = [tensor(4) for _ in range(3)]
        print(os.waitpid(child, 0)[1], all(bool((t == 4).all()) for t in mine), bool((kept == 1).all()))
    """
    assert run(code) == "0 True True\n"


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


def test_the_fields_are_found_whatever_the_default_device() -> None:
    code = """
        import torch
        torch.set_default_device("meta")
        from batchnorm.kernels.cpu import pages
        print(pages.pool is not None)
    """
    assert run(code) == "True\n"


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


def test_ctrl_c_at_any_moment() -> None:
    code = """
        import os, signal, threading, time, torch
        from batchnorm.kernels.cpu import pages
        import sys
        sys.unraisablehook = lambda _: None  # where it comes while a block is given back, Python drops it

        done = threading.Event()

        def interrupt():
            while not done.wait(0.001):
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        source = torch.empty(1 << 20)
        interrupted = 0
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        thread.start()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        end = time.monotonic() + 1
        while True:
            try:
                while time.monotonic() < end:
                    t = pages.large_empty(source, (1,))
                    t = None
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                break
            except KeyboardInterrupt:
                interrupted += 1
        done.set()
        thread.join()
        print(interrupted > 10, pages.pool.leased(), pages.pool.idle() <= 4 << 20)
    """
    assert run(code) == "True 0 True\n"


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


def test_tensors_that_outlive_the_interpreter() -> None:
    code = """
        import torch
        from batchnorm.kernels.cpu import pages
        kept = pages.large_empty(torch.empty(1 << 20), (1,))
        torch.kept = pages.large_empty(torch.empty(1 << 20), (1,))
        pages.kept = [pages.large_empty(torch.empty(1 << 20), (1,))]
        pages.kept.append(pages.kept)
        idle = pages.large_empty(torch.empty(1 << 20), (1,))
        del idle
    """
    assert run(code) == ""


@pytest.mark.parametrize(("value", "found"), [("0", "None"), ("5", str(5 << 20))])
def test_the_environment_says_how_much_may_lie_idle(value: str, found: str) -> None:
    code = "from batchnorm.kernels.cpu import pages; print(pages.pool and pages.pool.most_idle)"
    assert run(code, BATCHNORM_IDLE_MIB=value) == found + "\n"


def test_an_environment_that_says_no_number() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from batchnorm.kernels.cpu import pages"],
        env={**os.environ, "BATCHNORM_IDLE_MIB": "much"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == (
        "batchnorm.errors.ArgumentError: BATCHNORM_IDLE_MIB: expected a whole number of MiB, got 'much'. "
        "Correct or unset it."
    )


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


LIMITED = """
    import resource, torch
    from batchnorm.kernels.cpu import pages

    like, strides = torch.empty(16 << 20), (1,)  # 64 MiB

    def mapped():
        return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

    def leave_idle(blocks):
        held = [pages.large_empty(like, strides) for _ in range(blocks)]
        del held
"""


def limited(code: str, **environment: str) -> str:
    return run(textwrap.dedent(LIMITED) + textwrap.dedent(code), **environment)


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_nothing_lies_idle_where_mappings_are_limited(limit: str) -> None:
    code = f"""
        resource.setrlimit(resource.{limit}, (mapped() + (400 << 20),) * 2)
        leave_idle(3)
        print(pages.pool.idle(), pages.pool.leased())
        torch.empty(350 << 20, dtype=torch.uint8)  # would fail beside what a pool keeps
    """
    assert limited(code) == "0 0\n"


def test_a_limit_set_later_empties_the_pool_at_the_next_occasion() -> None:
    code = """
        leave_idle(3)
        print(pages.pool.idle() >> 20)
        resource.setrlimit(resource.RLIMIT_AS, (mapped() + (100 << 20),) * 2)
        t = pages.large_empty(like, strides)
        del t
        print(pages.pool.idle())
    """
    assert limited(code) == "192\n0\n"


def test_what_lies_idle_is_given_back_before_an_output_fails() -> None:
    """Three idle blocks of 64 MiB, room for 20 MiB more, and an output of 150 MiB is asked for."""
    code = """
        leave_idle(3)
        resource.setrlimit(resource.RLIMIT_AS, (mapped() + (20 << 20),) * 2)
        t = pages.large_empty(torch.empty(150 << 18, device="meta"), strides)
        print(t.nbytes >> 20, t.data_ptr() % pages.PAGE, pages.pool.idle())
        try:
            pages.large_empty(torch.empty(1 << 30, device="meta"), strides)
        except RuntimeError as error:
            print("allocate memory" in str(error))
    """
    assert limited(code) == "150 0 0\nTrue\n"


def test_the_system_takes_idle_pages_where_a_cgroup_is_full() -> None:
    """A process that may have 256 MiB more, of which 192 lie idle, and that writes to another 200."""
    groups = "/sys/fs/cgroup/memory"
    if not os.access(f"{groups}/memory.limit_in_bytes", os.W_OK):
        pytest.skip("needs the right to make a cgroup (version 1)")
    code = f"""
        import os
        group = "{groups}/batchnorm-%d" % os.getpid()
        like.fill_(0)
        try:
            os.mkdir(group)
        except OSError:
            print("skip")
            raise SystemExit
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            open(group + "/cgroup.procs", "w").write(str(os.getpid()))
            open(group + "/memory.limit_in_bytes", "w").write(str(256 << 20))
            held = [pages.large_empty(like, strides).fill_(1) for _ in range(3)]
            del held
            print(pages.pool.idle() >> 20, flush=True)
            torch.ones(50 << 20)
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        os.rmdir(group)
    """
    found = limited(code, BATCHNORM_IDLE_MIB="256", OMP_NUM_THREADS="1")
    if found == "skip\n":
        pytest.skip("needs the right to make a cgroup (version 1)")
    assert found == "192\n0\n"
