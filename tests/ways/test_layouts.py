"""Strides of results and gradients are torch's, so that what follows (``view``, channels_last kernels) works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ways.common import OURS, TORCHS, both_modes, data, same

way = pytest.mark.way
WHERE = "memory layouts"

LAST, LAST3 = torch.channels_last, torch.channels_last_3d
FORMS: dict[str, Callable[[], Tensor]] = {
    "(N, C)": lambda: data(6, 3),
    "(N, C) transposed": lambda: data(3, 6).t(),
    "(N, C) sliced": lambda: data(6, 7)[:, ::2][:, :3],
    "(N, C) rows sliced": lambda: data(12, 3)[::2],
    "(N, C) expanded over N": lambda: data(1, 3).expand(6, 3),
    "(N, C) expanded over C": lambda: data(6, 1).expand(6, 3),
    "(N, 1)": lambda: data(6, 1),
    "(N, 1) transposed": lambda: data(1, 6).t(),
    "(N, C, L)": lambda: data(4, 3, 5),
    "(N, L, C) transposed": lambda: data(4, 5, 3).transpose(1, 2),
    "(L, N, C) permuted": lambda: data(5, 4, 3).permute(1, 2, 0),
    "(C, N, L) permuted": lambda: data(3, 4, 5).transpose(0, 1),
    "(N, C, L) sliced": lambda: data(4, 3, 10)[..., ::2],
    "(N, C, L) channels sliced": lambda: data(4, 6, 5)[:, ::2],
    "(N, C, L) expanded": lambda: data(4, 3, 1).expand(4, 3, 5),
    "(N, C, 1)": lambda: data(4, 3, 1),
    "(N, 1, L)": lambda: data(4, 1, 5),
    "(1, C, L)": lambda: data(1, 3, 5),
    "(1, L, C) transposed": lambda: data(1, 5, 3).transpose(1, 2),
    "(N, C, H, W)": lambda: data(4, 3, 5, 2),
    "(N, C, H, W) channels_last": lambda: data(4, 3, 5, 2).contiguous(memory_format=LAST),
    "(N, C, H, W) permuted": lambda: data(5, 2, 3, 4).permute(3, 2, 0, 1),
    "(N, C, H, W) H and W exchanged": lambda: data(4, 3, 2, 5).transpose(2, 3),
    "(C, N, H, W) permuted": lambda: data(3, 4, 5, 2).transpose(0, 1),
    "(N, C, H, W) sliced": lambda: data(4, 3, 5, 4)[..., ::2],
    "(N, C, H, W) cropped": lambda: data(4, 3, 7, 4)[:, :, 1:6, 1:3],
    "channels_last cropped": lambda: data(4, 3, 7, 4).contiguous(memory_format=LAST)[:, :, 1:6, 1:3],
    "channels_last, channels sliced": lambda: data(4, 6, 5, 2).contiguous(memory_format=LAST)[:, :3],
    "channels_last, every other sample": lambda: data(8, 3, 5, 2).contiguous(memory_format=LAST)[::2],
    "(N, C, H, W) expanded": lambda: data(4, 3, 1, 1).expand(4, 3, 5, 2),
    "(N, C, H, W) expanded over N": lambda: data(1, 3, 5, 2).expand(4, 3, 5, 2),
    "(N, C, 1, 1)": lambda: data(4, 3, 1, 1),
    "(N, C, 1, 1) channels_last": lambda: data(4, 3, 1, 1).contiguous(memory_format=LAST),
    "(N, 1, H, W)": lambda: data(4, 1, 5, 2),
    "(N, 1, H, W) channels_last": lambda: data(4, 1, 5, 2).contiguous(memory_format=LAST),
    "(1, C, H, W) channels_last": lambda: data(1, 3, 5, 2).contiguous(memory_format=LAST),
    "(N, C, H, 1) channels_last": lambda: data(4, 3, 5, 1).contiguous(memory_format=LAST),
    "(N, C, 1, W) channels_last": lambda: data(4, 3, 1, 5).contiguous(memory_format=LAST),
    "(N, C, D, H, W)": lambda: data(4, 3, 2, 3, 2),
    "(N, C, D, H, W) channels_last_3d": lambda: data(4, 3, 2, 3, 2).contiguous(memory_format=LAST3),
    "(N, C, D, H, W) permuted": lambda: data(2, 3, 2, 3, 4).permute(4, 3, 0, 1, 2),
    "(N, C, D, H, W) sliced": lambda: data(4, 3, 2, 3, 4)[..., ::2],
    "(N, C, D, H, W) expanded": lambda: data(4, 3, 1, 3, 1).expand(4, 3, 2, 3, 2),
    "channels_last_3d cropped": lambda: data(4, 3, 4, 3, 2).contiguous(memory_format=LAST3)[:, :, 1:3],
    "(N, C, 1, 1, 1) channels_last_3d": lambda: data(4, 3, 1, 1, 1).contiguous(memory_format=LAST3),
    "(0, C)": lambda: data(0, 3),
    "(0, C, H, W)": lambda: data(0, 3, 5, 2),
    "(N, C, 0, W)": lambda: data(4, 3, 0, 2),
}
RANKS = {2: 1, 3: 1, 4: 2, 5: 3}


def layers(x: Tensor, training: bool, **options: Any) -> tuple[nn.Module, nn.Module]:
    rank = RANKS[x.dim()]
    made = OURS[rank](x.shape[1], dtype=x.dtype, **options), TORCHS[rank](x.shape[1], dtype=x.dtype)
    return made[0].train(training), made[1].train(training)


@way(WHERE, "contiguous, channels_last, permuted, transposed, sliced, expanded, with dimensions of size 1",
     "the result's strides are torch's, with and without grad")  # fmt: skip
@both_modes
@pytest.mark.parametrize("form", FORMS)
def test_strides_of_the_result(form: str, training: bool) -> None:
    x = FORMS[form]()
    for requires_grad in (False, True):
        results = [layer(x.detach().requires_grad_(requires_grad)) for layer in layers(x, training)]
        assert results[0].stride() == results[1].stride()
        assert results[0].is_contiguous() == results[1].is_contiguous()
        same(results[0].detach(), results[1].detach())
    for activation in ("relu", "gelu"):
        ours, torchs = layers(x, training, activation=activation)
        assert ours(x).stride() == nn.functional.relu(torchs(x)).stride(), activation


GIVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "like y": torch.rand_like,
    "contiguous": lambda y: data(*y.shape, seed=5),
    "channels_last": lambda y: data(*y.shape, seed=5).contiguous(
        memory_format={4: LAST, 5: LAST3}.get(y.dim(), torch.contiguous_format)
    ),
    "expanded": lambda y: torch.full((), 0.5, dtype=y.dtype).expand(y.shape),
    "reversed dimensions": lambda y: data(*y.shape[::-1], seed=5).permute(*range(y.dim() - 1, -1, -1)),
}


@way(WHERE, "the same, whatever form dy has", "dx's strides are torch's, or those of the result")
@both_modes
@pytest.mark.parametrize("form", FORMS)
def test_strides_of_the_gradient(form: str, training: bool) -> None:
    x = FORMS[form]()
    for name, given in GIVEN.items():
        found = []
        for layer in layers(x, training):
            torch.manual_seed(1)
            leaf = x.detach().requires_grad_()
            y = layer(leaf)
            (dx,) = torch.autograd.grad(y, leaf, given(y.detach()))
            found.append(dx)
        same(found[0], found[1], "dx")
        # The strides of a tensor without values mean nothing.
        assert found[0].stride() == found[1].stride() or not x.numel(), name


@way(WHERE, "(N, L, C) seen as (N, C, L)", "a contiguous result, on which `.view` works")
@both_modes
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_view_after_a_transposed_input(activation: str | None, training: bool) -> None:
    x = data(4, 5, 3).transpose(1, 2)
    for requires_grad in (False, True):
        ours, _ = layers(x, training, activation=activation)
        leaf = x.detach().requires_grad_(requires_grad)
        y = ours(leaf)
        assert y.view(4, -1).shape == (4, 15)
