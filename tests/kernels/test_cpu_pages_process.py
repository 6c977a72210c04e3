"""The pool in processes of their own: limits on memory, forks, signals, the end of the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from batchnorm.kernels.cpu import pages

pytestmark = pytest.mark.skipif(pages.pool is None, reason="no pool of large pages on this platform")


def run(code: str, **environment: str) -> str:
    """What ``code`` prints in a process of its own, which has to end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


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


def test_the_fields_are_found_whatever_the_default_device() -> None:
    code = """
        import torch
        torch.set_default_device("meta")
        from batchnorm.kernels.cpu import pages
        print(pages.pool is not None)
    """
    assert run(code) == "True\n"


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
