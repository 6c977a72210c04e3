"""What holds in every test: memory nobody wrote is NaN, seeds are fixed, one thread, torch's settings are put back."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from compile_once import compiled_once
from ranked import Helper


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """``torch.empty`` and its kin give NaN (integers: their largest value), so what a kernel forgot to write shows.

    torch fills uninitialized memory itself while deterministic algorithms are asked for, from C++ too, and in
    ``empty_like``, ``new_empty``, ``empty_strided`` and ``resize_`` as well. On the CPU that is all the setting does
    to the operations used here; patching ``torch.empty`` would miss most of them and confuse ``torch.compile``.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", help="the kernel to use where a test names none, as BATCHNORM_BACKEND does")


@pytest.fixture(autouse=True)
def named_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    name = request.config.getoption("--backend")
    if name is not None:
        from batchnorm import kernels

        monkeypatch.setattr(kernels, "ENVIRONMENT", name)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for code under test that uses the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def settings_put_back() -> Iterator[None]:
    """One thread to begin with: on small tensors two only wait for each other. A test about threads says how many."""
    threads, dtype, grad = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)


@pytest.fixture(scope="session")
def on_ranks() -> Iterator[Callable[..., list[Any]]]:
    """``on_ranks(3, program, *arguments)``: the program on three gloo ranks, see ``ranked.Helper.run``."""
    helper = Helper()
    yield helper.run
    helper.end()


@pytest.fixture(scope="session", autouse=True)
def kernels_are_compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers of pytest-xdist compile each kernel once between them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    # The parent of a worker's own folder is common to all workers of the run.
    with compiled_once(tmp_path_factory.getbasetemp().parent):
        yield
