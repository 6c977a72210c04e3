"""Interrupted at any point, the model is as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.lifecycle import recalibrate as module
from model_state import everything

ORDERS: list[Any] = ["joint", "sequential"]
OURS = {str(path) for path in Path(module.__file__).parent.rglob("*.py")}


class Net(nn.Module):
    """Layers of three kinds, one of them with statistics in half precision, two of them side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.BatchNorm1d(3), bn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.last = nn.SyncBatchNorm(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        result: Tensor = self.last(self.drop(self.b(x) + self.c(x)))
        return result


def fresh() -> Net:
    torch.manual_seed(0)
    model = Net()
    model.b.eval()
    model(torch.randn(8, 3) * 3 + 7)
    return model


BATCHES = [torch.randn(n, 3) for n in (6, 4, 1)]
LAYERS = ("a", "b", "c", "last")


@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("order", ORDERS)
def test_at_every_batch_and_layer(order: Any, error: BaseException) -> None:
    uses = 0

    def run(stop: int | None) -> None:
        """Raise at the use number ``stop`` of any layer, before it or after it."""
        nonlocal uses
        model = fresh()
        uses = 0

        def raising(*_: Any) -> None:
            nonlocal uses
            uses += 1
            if uses == stop:
                raise error

        for name in LAYERS:
            model.get_submodule(name).register_forward_pre_hook(raising)
            model.get_submodule(name).register_forward_hook(raising)
        before = everything(model)
        if stop is None:
            bn.recalibrate(model, BATCHES, order=order, gap_batches=1)
            return
        with pytest.raises(type(error)):
            bn.recalibrate(model, BATCHES, order=order, gap_batches=1)
        assert everything(model) == before, f"use {stop}"

    run(None)
    total = uses
    assert total > 40
    for stop in range(1, total + 1):
        run(stop)


def interrupted(at: int, run: Callable[[], None]) -> tuple[int, bool]:
    """Raise KeyboardInterrupt before the line number ``at`` that the package's files execute; how many there were."""
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in OURS:
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
        return lines, False
    except KeyboardInterrupt:
        return lines, True
    finally:
        sys.settrace(previous)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("apart", "last"), [(1009, 40), pytest.param(23, 250, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_before_any_line_of_the_code_that_does_it(order: Any, apart: int, last: int) -> None:
    """Ctrl-C comes between any two lines: at some of them, and at each of the last, where results are written."""

    def run(model: nn.Module) -> None:
        bn.recalibrate(model, BATCHES, order=order)

    total, _ = interrupted(0, lambda: run(fresh()))
    assert total > 500
    for at in [*range(1, total - last, apart), *range(total - last, total + 1)]:
        model = fresh()
        before = everything(model)
        _, raised = interrupted(at, lambda model=model: run(model))  # type: ignore[misc]
        assert raised, f"line {at} of {total}"
        assert everything(model) == before, f"line {at} of {total}"
        assert torch._C._len_torch_function_stack() == 0
        assert torch.is_grad_enabled()
