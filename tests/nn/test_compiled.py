"""Under a compiler's eyes the layers give what they give without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import batchnorm as bn
from tolerances import assert_close, to_float64

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "cumulative": {"momentum": None},
    "relu": {"activation": "relu"},
    "skip": {"nonfinite": "skip"},
    "raise": {"nonfinite": "raise", "activation": "tanh"},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_results_gradients_and_statistics_are_the_same(options: str, training: bool) -> None:
    layer = bn.BatchNorm2d(3, **OPTIONS[options], dtype=torch.float64)
    layer(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    layer.train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager")
    for _ in range(2):
        x, dy = (torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(2))
        results = []
        for run, module in ((layer, layer), (compiled, twin)):
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            results.append([y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], dy)])
        for quantity, a, b in zip(("y", "dx", "dx", "dx"), *results, strict=True):
            assert_close(b, to_float64(a), dtype="float64", quantity=quantity)
        for name, t in layer.state_dict().items():
            assert_close(twin.state_dict()[name].double(), to_float64(t), dtype="float64", quantity="y", what=name)
