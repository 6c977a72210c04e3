"""A layer that could depend on another is never taken for parallel to it, whatever way the values go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.lifecycle.recalibration.dependence import Dependence, tensors_in


class Pair(nn.Module):
    """Two layers; the second gets what ``way`` makes of the input and of what the first gave."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.way = bn.BatchNorm1d(2), nn.BatchNorm1d(2), way
        self.register_buffer("scale", torch.ones(2))
        self.constant = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.way(x, self.first(x)))
        return result


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return 2 * y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


def in_place_on_a_view(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    z[1:].add_(y[1:])
    return z


def by_out(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    torch.add(x, y, out=z)
    return z


def by_setting_items(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z[:, 0] = y[:, 0]
    return z


def by_foreach(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    torch._foreach_add_([z, torch.zeros(1, dtype=x.dtype)], [y, torch.ones(1, dtype=x.dtype)])
    return z


def branching(x: Tensor, y: Tensor) -> Tensor:
    return x + 1 if y.sum() > 0 else x - 1


def by_shape(x: Tensor, y: Tensor) -> Tensor:
    return x + y[y[:, 0] > 0].shape[0]


def by_data(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    z.data.copy_(y.detach())
    return z


def through_lent_memory(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    z.numpy()[:] = y.numpy()
    return z


def unobserved(x: Tensor, y: Tensor) -> Tensor:
    """As compiled code would make it."""
    with torch._C.DisableTorchFunction():
        return y + y


DEPENDENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "arithmetic": lambda x, y: x + y,
    "a view": lambda x, y: y.view(-1).view(x.shape),
    "lists": lambda x, y: torch.stack([x, y]).sum(0),
    "in place on a view": in_place_on_a_view,
    "out=": by_out,
    "setting items": by_setting_items,
    "foreach": by_foreach,
    "an autograd function": lambda x, y: Double.apply(y),
    "torch.ops": lambda x, y: torch.ops.aten.relu(y),
    "an item": lambda x, y: x + y.sum().item(),
    "a branch": branching,
    "a shape": by_shape,
    "a list of numbers": lambda x, y: torch.tensor(y.tolist(), dtype=x.dtype),
    "NumPy": lambda x, y: torch.from_numpy(y.numpy() + 1.0),
    "data": by_data,
    "lent memory": through_lent_memory,
    "an operation that nothing observes": unobserved,
}


INDEPENDENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the input": lambda x, y: x,
    "a function of it": lambda x, y: torch.tanh(x * 2)[:, [1, 0]],
    "in place": lambda x, y: x.clone().mul_(3),
    "the shape of the other": lambda x, y: x + y.shape[0] + y.dim() + y.numel(),
    "its dtype and device": lambda x, y: x.to(y.dtype).to(y.device) if y.is_floating_point() else x,
    "a value of the input": lambda x, y: x + x.sum().item(),
}


@pytest.mark.parametrize("way", DEPENDENT)
def test_what_may_depend_is_measured_after(way: str) -> None:
    model = Pair(DEPENDENT[way]).double()
    batches = list(torch.randn(30, 2, dtype=torch.float64).split(10))
    report = bn.recalibrate(model, batches, order="sequential")
    assert report.passes == 2
    model.eval()
    with torch.no_grad():
        inputs = torch.cat([model.way(b, model.first(b)) for b in batches])
    torch.testing.assert_close(model.second.running_mean, inputs.mean(0))
    torch.testing.assert_close(model.second.running_var, inputs.var(0))


@pytest.mark.parametrize("way", INDEPENDENT)
def test_what_cannot_depend_shares_a_pass(way: str) -> None:
    model = Pair(INDEPENDENT[way]).double()
    report = bn.recalibrate(model, list(torch.randn(30, 2, dtype=torch.float64).split(10)), order="sequential")
    assert report.passes == 1


def test_parameters_and_buffers_depend_on_nothing_a_constant_seen_late_on_all_before() -> None:
    batches = list(torch.randn(30, 2).split(10))
    model = Pair(lambda x, y: x)
    model.way = lambda x, y: x * model.scale
    assert bn.recalibrate(model, batches, order="sequential").passes == 1
    model.way = lambda x, y: x * model.constant
    assert bn.recalibrate(model, batches, order="sequential").passes == 2


def test_memory_that_is_used_again_forgets_what_lay_there() -> None:
    follow = Dependence(nn.Identity())
    x = torch.randn(3)
    follow.start([x])
    y = torch.randn(3)
    follow.ran("layer", x, y)
    assert follow.of(y, x) == {"layer"}
    del y
    assert len(follow._known) == 1
    assert follow.of(x) == frozenset()


def test_tensors_are_found_in_nested_containers() -> None:
    a, b, c = (torch.zeros(1) for _ in range(3))
    found = list(tensors_in({"x": [a, (b, None, "text")], "y": {"z": c}}))
    assert [id(t) for t in found] == [id(a), id(b), id(c)]
