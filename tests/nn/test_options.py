"""Options together: each pair works or is refused when the layer is built, and the documentation says which."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import batchnorm as bn
import options_page
from batchnorm.errors import ArgumentError
from batchnorm.nn.options import NOTES, OPTIONS, REFUSED, check_options, pairs
from tolerances import assert_close, to_float64

EPS = 1e-3
MOMENTUM = 0.3
SIZE = 4
LIMITS = (1.3, 0.2)
OF_LAYERS: dict[str, dict[str, Any]] = {
    "process_group": {"process_group": "world"},
    "virtual_batch_size": {"virtual_batch_size": SIZE},
    "renorm": {"renorm": bn.Renorm(*LIMITS, (0, 0, 0))},
    'too_few="running"': {"too_few": "running"},
    "nonfinite": {"nonfinite": "skip"},
    "activation": {"activation": "relu"},
    "track_running_stats=False": {"track_running_stats": False},
    "momentum=None": {"momentum": None},
    "mask": {},
    "sample_weight": {},
    "residual": {},
}
"""The options of a layer or its call, with the arguments that switch them on when it is built."""
AROUND = ("domains", "defer_updates", "accumulate_statistics", "freeze")
"""The options around a model."""


class Outcome(NamedTuple):
    y: Tensor
    dx: Tensor
    mean: Tensor | None
    var: Tensor | None
    batches: int | None


def arguments_of(on: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for option in on for name, value in OF_LAYERS.get(option, {}).items()}


def inputs_of(on: tuple[str, ...], samples: int, seed: int) -> dict[str, Tensor | None]:
    draw = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(samples, 3, 5, generator=draw, dtype=torch.float64) * 2 + 1 for _ in range(2))
    mask = torch.rand(samples, 5, generator=draw) > 0.4
    mask[:, :2] = True
    weight = torch.rand(samples, generator=draw, dtype=torch.float64) + 0.6
    if "mask" in on:
        x = x.masked_fill(~mask[:, None], torch.nan)
    return {
        "input": x,
        "residual": residual if "residual" in on else None,
        "mask": mask if "mask" in on else None,
        "sample_weight": weight if "sample_weight" in on else None,
    }


def run(on: tuple[str, ...], layer: bn.BatchNorm1d, inputs: dict[str, Any], dy: Tensor) -> Outcome:
    model = nn.Sequential(layer, bn.BatchNorm1d(3))  # the second is not used
    domain: Any = nullcontext
    if "freeze" in on:
        bn.freeze(model)
    if "domains" in on:
        bn.domains(model, ["source", "target"])
        domain = functools.partial(bn.use_domain, model, "target")
    leaf = inputs["input"].clone().requires_grad_()
    with domain():
        updates = bn.defer_updates(model) if "defer_updates" in on else nullcontext()
        accumulating = bn.accumulate_statistics(model) if "accumulate_statistics" in on else nullcontext()
        with updates, accumulating:
            y = layer(**{**inputs, "input": leaf})
            (dx,) = torch.autograd.grad(y, leaf, dy)
        if "defer_updates" in on:
            updates.commit()  # type: ignore[union-attr]
        batches = layer.num_batches_tracked
        return outcome(layer, y, dx, batches)


def outcome(layer: bn.BatchNorm1d, y: Tensor, dx: Tensor, batches: Tensor | None) -> Outcome:
    return Outcome(
        y.detach(), dx, layer.running_mean, layer.running_var, None if batches is None else int(batches)
    )  # fmt: skip


def simply(on: tuple[str, ...], layer: bn.BatchNorm1d, inputs: dict[str, Any], dy: Tensor) -> Outcome:
    """What the options say, by plain operations and a loop over the virtual batches, before the layer has run."""
    if "freeze" in on and layer.running_mean is not None:
        twin = copy.deepcopy(layer).eval()
        leaf = inputs["input"].clone().requires_grad_()
        y = twin(**{**inputs, "input": leaf})
        return outcome(twin, y, torch.autograd.grad(y, leaf, dy)[0], twin.num_batches_tracked)
    x = inputs["input"].clone().requires_grad_()
    samples = x.shape[0]
    present = torch.ones(x.shape, dtype=torch.bool)
    if inputs["mask"] is not None:
        present = inputs["mask"][:, None].expand(x.shape)
    w = present.double()
    if inputs["sample_weight"] is not None:
        w = w * inputs["sample_weight"].view(-1, 1, 1)
    clean = torch.where(present, x, 0.0)
    size = SIZE if "virtual_batch_size" in on else samples
    parts = []
    for start in range(0, samples, size):
        rows = slice(start, min(start + size, samples))
        n = w[rows].sum((0, 2))
        mean = (clean[rows] * w[rows]).sum((0, 2)) / n
        var = ((clean[rows] - mean[:, None]).square() * w[rows]).sum((0, 2)) / n
        z = (clean[rows] - mean[:, None]) / (var + EPS).sqrt()[:, None]
        if "renorm" in on:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            std = (layer.running_var + EPS).sqrt()
            r = ((var + EPS).sqrt() / std).clamp(1 / LIMITS[0], LIMITS[0]).detach()
            d = ((mean - layer.running_mean) / std).clamp(-LIMITS[1], LIMITS[1]).detach()
            z = z * r[:, None] + d[:, None]
        parts.append(z)
    z = torch.cat(parts) * layer.weight.detach()[:, None] + layer.bias.detach()[:, None]
    if inputs["residual"] is not None:
        z = z + inputs["residual"]
    y = torch.where(present, torch.relu(z) if "activation" in on else z, 0.0)
    (dx,) = torch.autograd.grad(y, x, dy)
    if layer.running_mean is None or layer.running_var is None:
        return Outcome(y.detach(), dx, None, None, None)
    n = w.sum((0, 2))
    mean = (clean * w).sum((0, 2)) / n
    var = ((clean - mean[:, None]).square() * w).sum((0, 2)) / (n - 1)
    factor = MOMENTUM if "momentum=None" not in on else 1.0
    return Outcome(
        y.detach(), dx, torch.lerp(layer.running_mean, mean.detach(), factor),
        torch.lerp(layer.running_var, var.detach(), factor), 1,
    )  # fmt: skip


def check_together(on: tuple[str, ...], samples: int = 10, seed: int = 0) -> None:
    layer = bn.BatchNorm1d(3, EPS, **{"momentum": MOMENTUM, "dtype": torch.float64, **arguments_of(on)})
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            if t is not None:
                t.copy_(torch.rand(3, generator=draw, dtype=torch.float64) + 0.5)
    inputs, dy = inputs_of(on, samples, seed), torch.randn(samples, 3, 5, generator=draw, dtype=torch.float64)
    expected = simply(on, layer, inputs, dy)
    found = run(on, layer, inputs, dy)
    assert_close(found.y, to_float64(expected.y), dtype="float64", quantity="y")
    assert_close(found.dx, to_float64(expected.dx), dtype="float64", quantity="dx")
    assert found.batches == expected.batches
    for a, b in ((found.mean, expected.mean), (found.var, expected.var)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_close(a, to_float64(b), dtype="float64", quantity="y")


def goes_together(on: tuple[str, ...]) -> bool:
    ordered = [option for option in OPTIONS if option in on]
    return not any(pair in REFUSED for pair in combinations(ordered, 2))


@pytest.mark.parametrize("on", [pair for pair in pairs() if pair not in REFUSED], ids=" and ".join)
def test_a_pair_that_works_gives_what_both_say(on: tuple[str, str]) -> None:
    check_together(on)


@settings(deadline=None, max_examples=60)
@given(
    on=st.sets(st.sampled_from(list(OPTIONS))).map(lambda chosen: tuple(sorted(chosen))).filter(goes_together),
    samples=st.integers(5, 13),
    seed=st.integers(0, 2**16),
)
def test_any_options_that_work_in_pairs_work_together(on: tuple[str, ...], samples: int, seed: int) -> None:
    check_together(on, samples, seed)


@pytest.mark.parametrize("pair", REFUSED, ids=" and ".join)
def test_a_pair_that_does_not_is_refused_when_the_layer_is_built(pair: tuple[str, str]) -> None:
    invariant, got, todo = REFUSED[pair]
    with pytest.raises(ArgumentError) as caught:
        bn.BatchNorm2d(3, **arguments_of(pair))
    assert str(caught.value) == f"BatchNorm2d: expected {invariant}, got {got}. {todo}"


def test_every_option_is_tried() -> None:
    assert {*OF_LAYERS, *AROUND} == set(OPTIONS)


def test_a_process_group_given_later_is_refused_too() -> None:
    refusal = (
        "expected one of process_group and virtual_batch_size, got both. A virtual batch is smaller than the batch of "
        "a rank, a process group's larger: leave one of them away."
    )
    model = nn.Sequential(bn.BatchNorm2d(3, virtual_batch_size=4))
    with pytest.raises(ArgumentError) as caught:
        model[0].process_group = "world"
    assert str(caught.value) == f"BatchNorm2d: {refusal}"
    with pytest.raises(ArgumentError) as caught:
        bn.convert(model, process_group="world")
    assert str(caught.value) == f"convert: {refusal}"


def test_the_tables_name_pairs_in_order() -> None:
    assert set(REFUSED) | set(NOTES) <= set(pairs())
    assert not set(REFUSED) & set(NOTES)
    check_options("test", ["mask", "residual"])


def test_the_page_is_up_to_date() -> None:
    written = options_page.PAGE.read_text(encoding="utf-8")
    assert written == options_page.page(written), "run: python tests/options_page.py"
