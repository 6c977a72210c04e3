"""How kernels are compiled, kept and run: thread counts, forks, Python threads, caches that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.kernels.cpu import outside, threads
from kernels.cpu_call import outside_forward, pack


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code after a small kernel was defined as `measure()`."""
    program = """
        import sys
        sys.path.insert(0, {tests!r})
        import torch
        from kernels.cpu_call import call, outside_forward, pack
        from batchnorm.kernels.cpu import outside, threads

        def measure(outer=4, inner=300):
            x = torch.arange(3.0 * outer * inner).reshape(outer, 3, inner) % 7
            moments = torch.empty(3, 3, dtype=torch.float64)
            call(outside.family(outer, inner), "MOMENTS", x, stats=moments)
            assert torch.allclose(moments[1], x.double().mean((0, 2))), "wrong result"
    """
    source = textwrap.dedent(program.format(tests=str(Path(__file__).parents[1]))) + textwrap.dedent(code)
    variables = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=variables, timeout=100)


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


def test_a_second_process_takes_kernels_from_the_cache(tmp_path: Path) -> None:
    code = """
        kernel = outside.family(4, 300).MOMENTS["float32"]
        assert repr(kernel).endswith("not compiled>")
        measure()
        print(kernel._compiled.cache_hits)
    """
    first, second = (in_a_new_process(code, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert (first.stdout, second.stdout) == ("0\n", "1\n"), first.stderr + second.stderr


def test_without_a_cache_folder_kernels_work_and_one_warning_says_so(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    code = """
        import warnings
        from numba.core import caching
        caching.CacheImpl._locator_classes = [caching.UserProvidedCacheLocator]  # no other folder to go to
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            measure()
            measure(20)
        print([str(w.message) for w in caught])
    """
    done = in_a_new_process(code, NUMBA_CACHE_DIR=str(blocked))
    message = (
        "batchnorm: no folder for compiled kernels can be written, so each process compiles them anew. "
        "Set NUMBA_CACHE_DIR to a folder that can be."
    )
    assert done.stdout == f"[{message!r}]\n", done.stderr


def test_kernels_of_one_file_change_when_another_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of all sources is in the key of the cache."""
    from batchnorm.kernels.cpu import compiling

    kernel = outside.family(4, 5000).FORWARD["float32"]
    before = [cell.cell_contents for cell in compiling._entry("name", kernel._body, kernel.element).__closure__ or ()]
    monkeypatch.setattr(compiling, "_digest", lambda: "another")
    after = [cell.cell_contents for cell in compiling._entry("name", kernel._body, kernel.element).__closure__ or ()]
    assert before != after


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
