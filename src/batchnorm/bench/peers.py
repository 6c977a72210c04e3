"""What is measured: ours, PyTorch in three ways, and copies as the yardstick.

Each is built for a problem as its user would write it, and gives a function of no arguments, which is what is timed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.bench.cases import Case
from batchnorm.bench.problem import EPS, MOMENTUM, Problem

OURS = "ours"
COPIES = ("copy", "clone", "memmove")

Result = tuple[Any, ...]


class Unavailable(Exception):
    """Why a peer cannot take part in a case: shown, never swallowed."""


@dataclass
class Program:
    """A peer, ready for one problem.

    Arguments:
        run: what is timed; returns y and then, after a backward pass, dx, dweight, dbias and d residual
        read: its result as dense tensors on the CPU
        layer: where running statistics are found
        input: what the layer is given, for the measurements of memory
        checked: whether there is a right answer
    """

    run: Callable[[], Result]
    read: Callable[[Result], Sequence[Tensor]] = field(default=lambda result: result)
    layer: nn.Module | None = None
    checked: bool = True

    def running(self) -> tuple[Tensor, Tensor] | None:
        if self.layer is None:
            return None
        mean, var = self.layer.running_mean, self.layer.running_var
        assert isinstance(mean, Tensor) and isinstance(var, Tensor)
        return mean, var


class Block(nn.Module):
    """PyTorch's layers one after the other, with everything in place that may be, as in torchvision's ResNet."""

    def __init__(self, norm: nn.Module, extra: str) -> None:
        super().__init__()
        self.norm, self.extra = norm, extra
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = self.norm(x)
        if self.extra == "plain":
            return y
        if residual is not None:
            y += residual
        y = self.relu(y)
        return y


def ours(problem: Problem) -> Program:
    """Our layer, with ReLU and residual in the same kernel."""
    case = problem.case
    kind = (bn.BatchNorm1d, bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d)[len(case.shape) - 2]
    activation = None if case.extra == "plain" else "relu"
    layer = kind(case.channels, eps=EPS, momentum=MOMENTUM, activation=activation)
    _prepare(layer, problem)

    if problem.residual is None:
        return Program(_step(lambda x, _: layer(x), problem, layer), layer=layer)
    return Program(_step(lambda x, residual: layer(x, residual=residual), problem, layer), layer=layer)


def torch_eager(problem: Problem) -> Program:
    layer = _torch_layer(problem)
    call = layer if problem.case.extra == "plain" else Block(layer, problem.case.extra)
    return Program(_step(_one_or_two(call), problem, layer), layer=layer)


def torch_compiled(problem: Problem) -> Program:
    """The same layers through torch.compile with its own settings; compiled for exactly this shape."""
    layer = _torch_layer(problem)
    # Each problem is a new specialization: without this the limit of recompilations is soon reached.
    torch.compiler.reset()
    compiled = torch.compile(Block(layer, problem.case.extra), fullgraph=True, dynamic=False)
    return Program(_step(lambda x, residual: compiled(x, residual), problem, layer), layer=layer)


def onednn(problem: Problem) -> Program:
    """PyTorch's layers on tensors of oneDNN's own kind; the conversion is done beforehand and not counted."""
    case = problem.case
    if not torch.backends.mkldnn.is_available():
        raise Unavailable("PyTorch was built without oneDNN")
    if case.dtype not in ("float32", "bfloat16"):
        raise Unavailable(f"oneDNN's batch normalization does not take {case.dtype}")
    if case.training and len(case.shape) != 4:
        raise Unavailable("oneDNN trains on 4 dimensions only")
    if len(case.shape) not in (4, 5):
        raise Unavailable("oneDNN takes 4 or 5 dimensions only")
    layer = _torch_layer(problem)
    block = Block(layer, case.extra)
    return Program(_step(block, problem, layer, Tensor.to_mkldnn), read=_dense, layer=layer)


def copy(problem: Problem) -> Program:
    """PyTorch's copy into memory that exists: no page is touched for the first time."""
    out, x = torch.empty_like(problem.x), problem.x
    return Program(lambda: (out.copy_(x),), checked=False)


def clone(problem: Problem) -> Program:
    """A copy with the same allocation as a layer's: fresh memory at each call."""
    x = problem.x
    return Program(lambda: (x.clone(),), checked=False)


def memmove(problem: Problem) -> Program:
    """The C library's copy, which may pass the cache by; it has one thread."""
    if torch.get_num_threads() > 1:
        raise Unavailable("memmove has one thread")
    out = torch.empty_like(problem.x)
    to, source, size = out.data_ptr(), problem.x.data_ptr(), problem.case.bytes
    move = ctypes.memmove
    return Program(lambda: (move(to, source, size), out), checked=False)


# ``benchmarks`` adds peers that users of the library need not have.
PEERS: dict[str, Callable[[Problem], Program]] = {
    OURS: ours,
    "torch": torch_eager,
    "compile": torch_compiled,
    "onednn": onednn,
    "copy": copy,
    "clone": clone,
    "memmove": memmove,
}
# What each is called in a table.
TITLES = {
    OURS: "batchnorm",
    "torch": "torch",
    "compile": "torch.compile",
    "onednn": "oneDNN",
    "flax": "Flax",
    "copy": "copy",
    "clone": "copy to fresh memory",
    "memmove": "memmove",
}


def backend_of(case: Case, problem: Problem) -> str:
    """Which of our kernels runs."""
    return bn.explain(problem.x, activation=None if case.extra == "plain" else "relu").backend


def _torch_layer(problem: Problem) -> nn.Module:
    case = problem.case
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(case.shape) - 2]
    layer = kind(case.channels, eps=EPS, momentum=MOMENTUM)
    _prepare(layer, problem)
    return layer


def _prepare(layer: Any, problem: Problem) -> None:
    layer.to(problem.weight.dtype).train(problem.case.training)
    with torch.no_grad():
        layer.weight.copy_(problem.weight)
        layer.bias.copy_(problem.bias)
        layer.running_mean.copy_(problem.running_mean)
        layer.running_var.copy_(problem.running_var)


def _one_or_two(call: nn.Module) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A plain layer is called as itself: the wrapper's own call would count in small cases."""
    return call if isinstance(call, Block) else lambda x, _: call(x)


def _step(
    call: Callable[[Tensor, Tensor | None], Tensor],
    problem: Problem,
    layer: nn.Module,
    converted: Callable[[Tensor], Tensor] = lambda t: t,
) -> Callable[[], Result]:
    """One step of the case's mode. Gradients are returned, as inside a network, and not added to ``.grad``.

    Inference must be called where no graph is recorded.
    """
    case = problem.case
    x = converted(problem.x)
    residual = None if problem.residual is None else converted(problem.residual)
    if case.mode == "inference":
        return lambda: (call(x, residual),)
    x = x.detach().requires_grad_()
    wanted: list[Tensor] = [x, *layer.parameters()]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        wanted.append(residual)
    if case.mode == "forward":
        return lambda: (call(x, residual),)
    assert problem.dy is not None
    dy = converted(problem.dy)
    gradient = torch.autograd.grad

    def step() -> Result:
        y = call(x, residual)
        return (y, *gradient(y, wanted, dy))

    return step


def _dense(result: Result) -> Sequence[Tensor]:
    return [t.to_dense() if t.layout != torch.strided else t for t in result]
