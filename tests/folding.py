"""Models to fold: realistic statistics, and the comparison with the unfolded model in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.lifecycle.folding.norms import is_norm
from batchnorm.lifecycle.folding.record import tensors_in
from tolerances import assert_close, assert_not_worse_than_torch


def randomized(model: nn.Module) -> nn.Module:
    """Every norm with statistics and affine parameters as training leaves them: no two channels alike."""
    with torch.no_grad():
        for module in model.modules():
            if is_norm(module) and isinstance(module.running_mean, Tensor) and isinstance(module.running_var, Tensor):
                module.running_mean.normal_(0.2, 0.5)
                module.running_var.uniform_(0.3, 2.0)
                for tensor, mean in ((module.weight, 1.0), (module.bias, 0.1)):
                    if isinstance(tensor, Tensor):
                        tensor.normal_(mean, 0.2)
    return model


def outputs(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """By the kernels that need no compiling: which kernel runs is not the question here."""
    with torch.no_grad(), bn.use_backend("eager"):
        return [t for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point()]


def fold(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Without the measurements, which take time."""
    with bn.use_backend("eager"):
        return bn.fold(model, *args, measure=False, **kwargs)


def assert_folded_alike(model: nn.Module, folded: nn.Module, *args: Any, **kwargs: Any) -> None:
    """``folded`` gives, in its own dtype, what ``model`` gives in eval mode in float64."""
    truth = outputs(copy.deepcopy(model).eval().double(), *map(double, args), **kwargs)
    got = outputs(folded, *args, **kwargs)
    assert len(got) == len(truth) > 0
    for one, reference in zip(got, truth, strict=True):
        assert_close(one, reference, dtype=one.dtype, quantity="folded")


def assert_no_worse_than_unfolded(model: nn.Module, folded: nn.Module, *args: Any) -> None:
    """For half precision, where the unfolded model is far from float64 itself."""
    model = copy.deepcopy(model).eval()
    before, after = outputs(model, *args), outputs(folded, *args)
    truth = outputs(model.double(), *map(double, args))
    for one, other, reference in zip(after, before, truth, strict=True):
        assert one.dtype == other.dtype
        assert_not_worse_than_torch(one, other, reference, dtype=one.dtype)


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def went(folded: Any) -> dict[str, tuple[str, str]]:
    """For each norm where it went, and into what."""
    return {each.norm: (each.where, each.into) for each in folded.fold_report.decisions}


class Net(nn.Module):
    """conv → norm → something, with a way of going through it that each test gives."""

    def __init__(self, way: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 2, 1)
        self.kept: Any = None
        self.way = way

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)) if self.way is None else self.way(self, x)
