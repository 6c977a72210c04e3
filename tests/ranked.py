"""Run a function on several ranks at once: processes that are forked for it and end with it.

One helper process, started on first use, imports everything and then forks the ranks of each call. A fork takes
milliseconds, so every call has a default group of its own, and nothing is left over from the call before.

Everything ends by itself: a rank by an alarm, the helper when the pipe to the tests closes.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

TESTS = Path(__file__).resolve().parent
PATIENCE = 60.0  # seconds for one call


@dataclass(frozen=True)
class Died:
    """In place of the result of a rank that ended without one: its exit code, negative for a signal."""

    code: int


@dataclass(frozen=True)
class Failed:
    """In place of the result of a rank that raised."""

    text: str


@dataclass(frozen=True)
class Request:
    path: str
    name: str
    size: int
    arguments: tuple[Any, ...]
    timeout: float
    patience: float
    before: str | None


class Helper:
    """The process that forks the ranks."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def run(
        self,
        size: int,
        program: Callable[..., Any],
        *arguments: Any,
        timeout: float = 20,
        patience: float = PATIENCE,
        before: Callable[[], object] | None = None,
    ) -> list[Any]:
        """``program(*arguments)`` on ``size`` ranks of a default gloo group; the results in the order of the ranks.

        Args:
            program: a function at the top of its module.
            timeout: of the group, in seconds.
            patience: how long the ranks may take, in seconds; then they are killed.
            before: a function of the same module that the helper calls once before it forks, to compile what all need.

        Raises:
            AssertionError: a rank raised, with the tracebacks of all. A rank that exits gives ``Died``.
        """
        pipe = self._started()
        code = program.__code__
        name = None if before is None else before.__name__
        request = Request(code.co_filename, code.co_name, size, arguments, timeout, patience, name)
        pipe.send_bytes(pickle.dumps(request))
        results: list[Any] = pickle.loads(pipe.recv_bytes())
        failed = [f"rank {rank}: {each.text}" for rank, each in enumerate(results) if isinstance(each, Failed)]
        assert not failed, "\n".join(failed)
        return results

    def _started(self) -> Connection:
        if self._pipe is None:
            self._pipe, theirs = multiprocessing.Pipe()
            # The kernels that need no compiling, unless a program names others.
            environment = {**os.environ, "BATCHNORM_BACKEND": "eager", "GLOO_SOCKET_IFNAME": _loopback()}
            # As an imported module, so that what is pickled here is found by its name there.
            start = f"import sys; sys.path[:0] = {[str(TESTS), str(TESTS.parent)]}; import ranked; ranked.serve()"
            self._process = subprocess.Popen(
                [sys.executable, "-c", start, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment,
                stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            theirs.close()
        return self._pipe

    def end(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.wait(10)


def _loopback() -> str:
    """The name of the interface of 127.0.0.1, so that gloo needs neither a network nor a host name."""
    import socket

    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])


def serve() -> None:
    """The helper process: answers requests until the pipe closes."""
    import torch

    import batchnorm  # noqa: F401  (before the first fork, so that no rank spends time on it)

    torch.set_num_threads(1)  # it forks, so no thread of its own may run
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    pipe, modules = Connection(int(sys.argv[1])), dict[str, ModuleType]()
    while True:
        try:
            request: Request = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send_bytes(pickle.dumps(_call(request, modules)))


def _call(request: Request, modules: dict[str, ModuleType]) -> list[Any]:
    try:
        if request.path not in modules:
            modules[request.path] = _loaded(request.path)
        program = getattr(modules[request.path], request.name)
        if request.before is not None:
            getattr(modules[request.path], request.before)()
    except Exception:
        return [Failed(traceback.format_exc())]
    folder = tempfile.mkdtemp()
    ranks: dict[int, tuple[int, Connection]] = {}
    try:
        for rank in range(request.size):
            ours, theirs = multiprocessing.Pipe()
            pid = os.fork()
            if pid == 0:
                _be(rank, request, program, f"file://{folder}/rendezvous", theirs)
            theirs.close()
            ranks[rank] = (pid, ours)
        return _results(ranks, time.monotonic() + request.patience)
    finally:
        for pid, pipe in ranks.values():
            pipe.close()
            os.kill(pid, signal.SIGKILL)  # waited for nowhere yet, so it is still ours
            os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)


def _results(ranks: dict[int, tuple[int, Connection]], deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(ranks):
        open_pipes = {pipe: rank for rank, (_, pipe) in ranks.items() if rank not in found}
        ready = wait(list(open_pipes), max(0.0, deadline - time.monotonic()))
        if not ready:
            return [found.get(rank, Failed("did not end in time")) for rank in ranks]
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes[pipe]
            try:
                found[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                info = os.waitid(os.P_PID, ranks[rank][0], os.WEXITED | os.WNOWAIT)
                assert info is not None
                found[rank] = Died(info.si_status if info.si_code == os.CLD_EXITED else -info.si_status)
    return [found[rank] for rank in ranks]


def _be(rank: int, request: Request, program: Callable[..., Any], rendezvous: str, pipe: Connection) -> None:
    """One rank, from the fork to its end."""
    import torch

    signal.alarm(int(request.patience) + 10)
    try:
        torch.manual_seed(0)
        torch.distributed.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=request.size,
            timeout=timedelta(seconds=request.timeout),
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for announced in (DeprecationWarning, PendingDeprecationWarning):
                warnings.simplefilter("default", announced)
            result: Any = program(*request.arguments)
        payload = pickle.dumps(result)
    except BaseException:
        payload = pickle.dumps(Failed(traceback.format_exc()))
    pipe.send_bytes(payload)
    # The tests kill this process once every rank has answered: until then its connections stay open, so that the
    # other ranks do not lose a peer in the midst of their last exchange.
    signal.pause()
    os._exit(0)


def _loaded(path: str) -> ModuleType:
    name = f"ranked_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
