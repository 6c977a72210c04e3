"""On a GPU without kernels PyTorch's own operator runs where it can do what is asked, and ``explain`` says so.

There need be no GPU: the CPU stands in for one that has no kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import batchnorm as bn
from batchnorm import kernels
from batchnorm.kernels import eager, gpu


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_importable", lambda: (eager,))
    monkeypatch.setattr(kernels, "left_to_torch", lambda x: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran, in order."""
    seen: list[str] = []
    for where, name in ((torch.nn.functional, "batch_norm"), (eager, "forward"), (eager, "normalize")):
        original = getattr(where, name)

        def record(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            seen.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(where, name, record)
    return seen


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_calls_are_pytorchs_bit_for_bit(
    no_kernels: None, calls: list[str], dtype: torch.dtype, activation: str | None
) -> None:
    ours, torchs = bn.BatchNorm2d(3, activation=activation), torch.nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, dtype=dtype)
    for training in (True, False):
        results = []
        for layer in (ours.train(training), torchs.train(training)):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            if layer is torchs and activation is not None:
                y = getattr(torch.nn.functional, activation)(y)
            y.backward(torch.ones_like(y) * x)
            results.append((y.detach(), leaf.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
    assert calls == ["batch_norm"] * 4
    for key, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_what_pytorchs_operator_cannot_do_is_eagers(no_kernels: None, calls: list[str]) -> None:
    x, mask = torch.randn(6, 3, 4), torch.ones(6, 1, 4, dtype=torch.bool)
    layer = bn.BatchNorm1d(3)
    layer(x, mask=mask)
    layer.eval()(x, mask=mask)
    bn.BatchNorm1d(3, momentum=None)(x)
    assert calls == ["forward", "normalize", "normalize", "batch_norm"]


def test_explain_says_so(monkeypatch: pytest.MonkeyPatch, no_kernels: None) -> None:
    x = torch.randn(6, 3)
    found = bn.explain(x)
    assert found.backend == "composite"
    assert found.reasons["eager"] == "serves, but without a kernel for cpu PyTorch's own operator is faster"
    masked = bn.explain(x, mask=torch.ones(6, 1, dtype=torch.bool))
    assert masked.backend == "eager"
    assert "composite" not in masked.reasons


@pytest.mark.parametrize(
    ("device", "why_no_triton", "too_old", "expected"),
    [
        ("mps", None, None, True),
        ("cuda", "Triton cannot be imported", None, True),
        ("cuda", None, "needs compute capability (7, 0)", True),
        ("cuda", None, None, False),
        ("xpu", None, None, False),
    ],
)
def test_which_devices_have_no_kernels(
    monkeypatch: pytest.MonkeyPatch, device: str, why_no_triton: str | None, too_old: str | None, expected: bool
) -> None:
    monkeypatch.setattr(gpu, "unavailable", lambda: why_no_triton)
    monkeypatch.setattr(gpu, "_too_old", lambda device, dtype: too_old)
    assert gpu.no_kernels_on(torch.device(device)) is expected


def test_the_cpu_is_never_left_to_pytorch() -> None:
    assert not kernels.left_to_torch(torch.randn(4, 3))
