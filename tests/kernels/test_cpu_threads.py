"""How kernels are run: thread counts, forks, Python threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from batchnorm.functional import batch_norm
from batchnorm.kernels import use_backend
from batchnorm.kernels.cpu import outside, plan, threads
from conformance import arrange
from kernels.cpu_call import outside_forward, pack
from kernels.cpu_process import in_a_new_process

FAMILIES = ["contiguous", "channels_last"]


def tensors_of(shape: tuple[int, ...], family: str) -> list[torch.Tensor]:
    """x, a residual and dy, (N, C, H, W), in the layout of one of the families."""
    return [arrange(torch.randn(shape), family) for _ in range(3)]


def step(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Forward and backward."""
    x, residual, dy = tensors
    x.requires_grad_(), residual.requires_grad_()
    with use_backend("cpu"):
        y = batch_norm(x, None, None, training=True, residual=residual, activation="relu")
        return [y.detach(), *torch.autograd.grad(y, [x, residual], dy)]


def test_small_tensors_run_alone() -> None:
    torch.set_num_threads(2)
    assert threads.threads_for(threads.ALONE_BELOW - 1) == 1
    assert threads.threads_for(threads.ALONE_BELOW) == 2
    torch.set_num_threads(1)
    assert threads.threads_for(1 << 30) == 1


def test_explain_names_the_pool() -> None:
    torch.set_num_threads(2)
    pool = (
        "PyTorch's OpenMP pool" if threads.openmp() else "a pool of Python threads (PyTorch has no OpenMP pool to call)"
    )
    assert threads.explain() == f"{pool}, 2 thread(s); one below {threads.ALONE_BELOW} elements"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_threads_is_torchs_at_each_call(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def launch(kernel: Any, block: bytes, count: int) -> None:
        asked.append(count)
        threads.launch(kernel, block, count)

    monkeypatch.setattr(plan, "launch", launch)
    tensors = tensors_of((4, 3, 80, 80), family)
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        asked.clear()
        step(tensors)
        assert set(asked) == {count}


def test_without_openmp_python_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 7, 3000)
    expected = outside_forward(x)
    monkeypatch.setattr(threads, "_parallel", None)
    for count in (2, 5):
        for split in (False, True):
            got = outside_forward(x, threads=count, split=split)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])


def test_fewer_threads_than_asked_for_are_enough() -> None:
    """A pool may hand out fewer than the block says: here the kernel is asked to share with 6 and runs with 2."""
    if threads.openmp() is None:
        pytest.skip("PyTorch has no OpenMP pool to call")
    torch.set_num_threads(2)
    x = torch.randn(8, 7, 3000)
    expected = outside_forward(x)[0]
    y, stats = torch.empty_like(x), torch.empty(2, 7, dtype=torch.float64)
    kernel = outside.family(8, 3000).FORWARD["float32"]
    threads.launch(kernel, pack(x, threads=6, y=y, stats=stats), 2)
    assert torch.equal(y, expected)


def test_several_python_threads_at_once() -> None:
    tensors = [torch.randn(6, 5, 2000 + i) for i in range(8)]
    expected = [outside_forward(x)[0] for x in tensors]

    def work(i: int) -> bool:
        return all(torch.equal(outside_forward(tensors[i], threads=2)[0], expected[i]) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_several_python_threads_at_once_give_the_same_bits(family: str) -> None:
    torch.set_num_threads(2)
    tensors = [tensors_of((4, 3 + i, 70, 70), family) for i in range(6)]
    expected = [step(given) for given in tensors]

    def work(i: int) -> bool:
        torch.set_num_threads(2)  # OpenMP keeps this number for each thread
        steps = [step(tensors[i]) for _ in range(10)]
        return all(torch.equal(a, b) for got in steps for a, b in zip(got, expected[i], strict=True))

    with ThreadPoolExecutor(len(tensors)) as pool:
        assert all(pool.map(work, range(len(tensors))))


@pytest.mark.parametrize("count", [1, 2])
def test_the_interpreter_is_free_while_a_kernel_runs(count: int) -> None:
    """With a switch interval without end, nobody else runs unless the thread of the kernel lets go."""
    x = torch.randn(16, 8, 90000)
    stats = torch.empty(3, 8, dtype=torch.float64)
    kernel, block = outside.family(16, 90000).MOMENTS["float32"], pack(x, threads=count, stats=stats)
    threads.launch(kernel, block, count)
    counted, stop, interval = 0, False, sys.getswitchinterval()

    def tick() -> None:
        nonlocal counted
        while not stop:
            counted += 1
            time.sleep(0)  # lets go of the interpreter

    other = threading.Thread(target=tick, daemon=True)
    try:
        sys.setswitchinterval(1000.0)
        other.start()
        for _ in range(100):
            before = counted
            threads.launch(kernel, block, count)
            if counted > before:
                break
        else:
            pytest.fail("no other thread came to run during 100 launches")
    finally:
        stop = True
        sys.setswitchinterval(interval)
        other.join(60)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forked_child_takes_a_step_after_its_parent_used_the_pool(family: str) -> None:
    """PyTorch's own parallel loops hang in such a child, so all that it needs from torch is made before."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    code = f"""
        import os, signal
        from kernels.test_cpu_threads import step, tensors_of
        torch.set_num_threads(2)
        tensors = tensors_of((4, 3, 80, 80), {family!r})
        expected = [t.numpy().tobytes() for t in step(tensors)]
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            got = [t.numpy().tobytes() for t in step(tensors)]
            print(threads.threads_for(1 << 30), got == expected, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print("child", status, "parent", threads.threads_for(1 << 30))
    """
    done = in_a_new_process(code)
    assert done.stdout == "1 True\nchild 0 parent 2\n", done.stderr


def test_a_forked_child_runs_on_one_thread() -> None:
    """PyTorch's own parallel loops hang in such a child, so all that it needs from torch is made before."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    code = """
        import os, signal
        torch.set_num_threads(2)
        x = torch.randn(4, 3, 5000)
        y, stats = outside_forward(x, threads=2)
        expected = y.tolist()
        y.zero_()
        kernel = outside.family(4, 5000).FORWARD["float32"]
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            count = threads.threads_for(1 << 30)
            threads.launch(kernel, pack(x, threads=count, y=y, stats=stats), count)
            print(threads.explain(), count, y.tolist() == expected, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print("child", status, "parent", threads.threads_for(1 << 30))
    """
    done = in_a_new_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "one thread (this process is a forked child) 1 True\nchild 0 parent 2\n"


def test_every_python_thread_and_any_torch_setting_gives_the_same() -> None:
    """Each Python thread has an OpenMP team of its own, and its size may change from call to call."""
    x = torch.randn(4, 6, 5000)
    expected = outside_forward(x)[0]
    results: list[Any] = []
    with ThreadPoolExecutor(1) as pool:
        for count in (1, 2, 1, 3):
            torch.set_num_threads(count)
            results.append(pool.submit(lambda n=count: outside_forward(x, threads=n)[0]).result())
    assert all(torch.equal(y, expected) for y in results)


def test_nothing_is_compiled_at_import() -> None:
    code = (
        "import sys, batchnorm.kernels.cpu.outside as o\n"
        "print({k.address for f in (o.outside_long, o.outside_short) for k in f.FORWARD.values()})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{0}\n", done.stderr
