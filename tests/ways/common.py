"""What the tests of the ways of running share: a layer of ours beside torch's, comparison, processes of their own.

A scenario is a function of a layer. ``agree`` runs it on torch's layer (with the activation after it) and on ours,
both with the same state, and compares all that it gives and the state afterwards; so each scenario is also a test
that torch's own layer can be run that way.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from tolerances import assert_close, dtype_name, to_float64

SIZES = {1: (4, 3), 2: (4, 3, 5, 2), 3: (4, 3, 2, 3, 2)}
TORCHS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OURS = {1: bn.BatchNorm1d, 2: bn.BatchNorm2d, 3: bn.BatchNorm3d}
AFTER: dict[str | None, Callable[[], nn.Module]] = {
    None: nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}

# Every way is tried with one activation and without in each run, with more of them in `make test-all`.
MORE = pytest.mark.slow


def more(*values: Any) -> list[Any]:
    """Values of a parameter for `make test-all` only."""
    return [pytest.param(value, marks=MORE) for value in values]


ACTIVATIONS = (None, "relu", *more("leaky_relu", "gelu"))
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])

Scenario = Callable[[nn.Module], Any]
Test = TypeVar("Test", bound=Callable[..., None])


def pair(
    activation: str | None = None,
    *,
    training: bool = True,
    rank: int = 2,
    channels: int = 3,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[nn.Sequential, nn.Sequential]:
    """Ours and torch's, of one state that is not the one they begin with. The norm is child ``0`` in both."""
    torchs = nn.Sequential(TORCHS[rank](channels, dtype=dtype, **options), AFTER[activation]())
    ours = nn.Sequential(OURS[rank](channels, dtype=dtype, activation=activation, **options))
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, t in torchs.state_dict().items():
            if name.endswith("num_batches_tracked"):
                t.fill_(3)
            else:
                # Drawn in float64: tensors of another dtype then hold the same numbers, rounded.
                t.copy_(torch.rand(t.shape, generator=draw, dtype=torch.float64) + 0.5)
    ours.load_state_dict(torchs.state_dict())
    return ours.train(training), torchs.train(training)


def data(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or SIZES[2], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def agree(scenario: Scenario, activation: str | None = None, quantity: str = "y", **options: Any) -> None:
    """``scenario`` gives the same on ours as on torch's layer, and leaves the same state."""
    ours, torchs = pair(activation, **options)
    expected = scenario(torchs)
    same(scenario(ours), expected, quantity)
    same(dict(ours.state_dict()), dict(torchs.state_dict()), quantity, "state")


def same(actual: Any, expected: Any, quantity: str = "y", what: str = "result") -> None:
    """Tensors are close in their dtype, everything else is equal, in any nesting."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{what}: {type(actual).__name__} for a tensor"
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
        actual, expected = (
            torch.zeros(t.shape, dtype=t.dtype) if t._is_zerotensor() else t for t in (actual, expected)
        )
        if not expected.is_floating_point():
            assert torch.equal(actual, expected), what
            return
        scale = max(1.0, float(expected.detach().double().abs().max())) if expected.numel() else 1.0
        reference = to_float64(expected)
        assert_close(actual, reference, dtype=dtype_name(expected.dtype), quantity=quantity, scale=scale, what=what)
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected), what
        for key in expected:
            same(actual[key], expected[key], quantity, f"{what}[{key!r}]")
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), what
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            same(a, b, quantity, f"{what}[{i}]")
    else:
        assert actual == expected, what


def _dense(t: Tensor) -> Tensor:
    """A tensor without memory of its own that stands for zeros, as zeros."""
    return torch.zeros(t.shape, dtype=t.dtype) if t._is_zerotensor() else t


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The result and every gradient."""
    leaf = x.detach().clone().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)]


@functools.cache
def _kernels_loaded() -> None:
    """Once, in the process that forks: else each fork would load the compiled kernels for itself."""
    for training in (True, False):
        for activation in (None, "relu"):
            step(pair(activation, training=training)[0], data(), data(seed=3))


def in_a_fork(test: Test) -> Test:
    """Run the test in a forked process, whose death is a failed test and no more.

    A kernel that is given an address that is none ends the process.
    """

    @functools.wraps(test)
    def forked(*args: Any, **kwargs: Any) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("no os.fork here")
        _kernels_loaded()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(120)
            said = b""
            try:
                test(*args, **kwargs)
            except pytest.skip.Exception as skipped:
                said = b"S" + str(skipped).encode()
            except BaseException:
                said = b"F" + traceback.format_exc().encode()
            # Its reader may be gone, its buffers are the parent's: nothing is flushed or closed here.
            os.write(writing, said[-60_000:] if said[:1] == b"F" else said)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            pytest.fail(f"the process was ended by {signal.Signals(os.WTERMSIG(status)).name}")
        if said[:1] == b"S":
            pytest.skip(said[1:].decode())
        if said:
            pytest.fail(said.decode(errors="replace"))

    return cast(Test, forked)


_START = """
import sys, warnings
sys.path.insert(0, {tests!r})
import torch
from torch import nn
torch.set_num_threads(1)
"""
_LIBRARY = """
import batchnorm as bn
from ways.common import agree, data, pair, same, step
"""


def alone(code: str, *, library: bool = True, timeout: int = 120, **environment: str) -> str:
    """Run ``code`` in a new process, which must exit with 0, and return what it printed."""
    source = _START.format(tests=str(Path(__file__).parents[1])) + _LIBRARY * library + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", source],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
