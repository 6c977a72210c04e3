"""Groups: each kernel's functions on a batch in groups are the float64 reference on each group's samples."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm.kernels.contract import Groups, Needs
from conformance import (
    EPS,
    NAMES,
    Case,
    Expected,
    Inputs,
    _silenced,
    expected_of,
    forward_of,
    inputs_of,
    load,
    skip_unless,
)
from tolerances import assert_close

ALL = Needs(True, True, True, True)

# Sizes of the groups: equal ones, a smaller last one, a larger last one.
SPLITS = {"equal": Groups(4, 3), "smaller": Groups(5, 3), "larger": Groups(4, 2), "one": Groups(12, 1)}
SHAPES = [(12, 65), (12, 3), (12, 5, 7), (12, 3, 5, 4), (12, 17, 7, 7), (12, 2, 33, 31), (12, 3, 2, 3, 2)]
CASES = [
    *(Case(shape=shape) for shape in SHAPES),
    *(Case(shape=shape, layout="channels_last", activation="relu") for shape in SHAPES),
    *(
        Case(shape=(12, 5, 4, 3), layout=layout)
        for layout in ("transposed", "permuted", "sliced", "offset", "repeated")
    ),
    *(
        Case(shape=(12, 5, 4, 3), layout=layout, dtype=dtype, residual="full", activation=activation)
        for layout in ("contiguous", "channels_last")
        for dtype, activation in [
            (torch.bfloat16, "relu"),
            (torch.float64, None),
            (torch.float16, "leaky_relu"),
            (torch.float32, "gelu"),
        ]
    ),
    *(
        Case(shape=shape, layout=layout, places=places, residual="full", activation="relu")
        for shape in [(12, 5, 7, 3), (12, 65, 4)]
        for layout in ("contiguous", "channels_last")
        for places in ("mask of positions", "weights of samples", "mask and weights", "mask of places")
    ),
    *(Case(shape=(12, 6, 7), affine=affine) for affine in ("weight", "bias", "none")),
    *(Case(shape=(12, 6, 7), values=values) for values in ("mean 1e6", "constant channel", "subnormal")),
    Case(shape=(12, 6, 7), dy="broadcast", layout="channels_last"),
    Case(shape=(12, 6, 7), dtype=torch.bfloat16, parameters="float32"),
]

pytestmark = [
    pytest.mark.parametrize("name", NAMES),
    pytest.mark.parametrize("split", SPLITS),
]


def rows_of(groups: Groups, samples: int) -> list[slice]:
    ends = [0]
    for size in groups.sizes(samples):
        ends.append(ends[-1] + size)
    return [slice(a, b) for a, b in pairwise(ends)]


def of_rows(inputs: Inputs, rows: slice) -> Inputs:
    def cut(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.shape[0] == 1 else t[rows]

    x, dy = inputs.x[rows], inputs.dy[rows]
    return replace(
        inputs, x=x, dy=dy, residual=cut(inputs.residual), mask=cut(inputs.mask),
        sample_weight=cut(inputs.sample_weight),
    )  # fmt: skip


def problem(name: str, case: Case, split: str) -> tuple[Any, Inputs, Groups, list[tuple[slice, Expected]]]:
    """The kernel, the inputs, and what the reference says of each group."""
    inputs, groups, kernel = inputs_of(case, name), SPLITS[split], load(name)
    if case.places != "all":
        # Enough for a variance in every group.
        for t in (inputs.mask, inputs.sample_weight):
            if t is not None and t.shape[0] > 1:
                t[::2] = 1
    skip_unless(
        kernel, inputs.x, activation=inputs.activation, mask=inputs.mask, sample_weight=inputs.sample_weight,
        groups=groups,
    )  # fmt: skip
    if inputs.mask is not None and not torch.isfinite(inputs.x[inputs.mask.expand(inputs.x.shape)]).all():
        # What the case held absent is present now.
        inputs = replace(inputs, x=torch.nan_to_num(inputs.x, 0.5), dy=torch.nan_to_num(inputs.dy, 0.25))
        if inputs.residual is not None:
            inputs = replace(inputs, residual=torch.nan_to_num(inputs.residual, 0.75))
    parts = [(rows, of_rows(inputs, rows)) for rows in rows_of(groups, inputs.x.shape[0])]
    if case.activation in ("relu", "leaky_relu"):
        silent = torch.cat([_silenced(part.dy, forward_of(part).z, case.dy) for _, part in parts])
        inputs.dy = torch.empty_like(inputs.dy).copy_(silent)
        parts = [(rows, of_rows(inputs, rows)) for rows, _ in parts]
    return kernel, inputs, groups, [(rows, expected_of(part)) for rows, part in parts]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fused_functions(name: str, split: str, case: Case) -> None:
    kernel, inputs, groups, parts = problem(name, case, split)
    beside = {
        "residual": inputs.residual, "activation": inputs.activation, "mask": inputs.mask,
        "sample_weight": inputs.sample_weight, "groups": groups,
    }  # fmt: skip
    y, stats = kernel.forward(inputs.x, inputs.weight, inputs.bias, EPS, **beside)
    assert stats.shape == (2, groups.number, inputs.x.shape[1])
    assert stats.dtype == torch.float64
    for g, (rows, expected) in enumerate(parts):
        expected.check("y", y[rows], f"group {g}")
        expected.check("mean", stats[0, g], f"group {g}")
        expected.check("var", stats[1, g], f"group {g}")
    by_sign = inputs.residual is not None and inputs.activation.sign_survives
    if by_sign:
        beside["residual"] = None
    found = kernel.backward(
        inputs.dy, inputs.x, stats, EPS, inputs.weight, inputs.bias, training=True, y=y if by_sign else None,
        needs=ALL, **beside,
    )  # fmt: skip
    check_gradients(inputs, parts, *found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_phase(name: str, split: str, case: Case) -> None:
    kernel, inputs, groups, parts = problem(name, case, split)
    counting = {"mask": inputs.mask, "sample_weight": inputs.sample_weight, "groups": groups}
    found = kernel.moments(inputs.x, **counting)
    for g, (_, expected) in enumerate(parts):
        assert torch.equal(found.count[g].cpu(), torch.from_numpy(expected.count))
        expected.check("mean", found.mean[g], f"group {g}")
        expected.check("var", found.variance()[g], f"group {g}")
    pooled = kernel.moments(inputs.x, mask=inputs.mask, sample_weight=inputs.sample_weight)
    whole = expected_of(inputs)
    for moments in (found.pooled(), pooled):
        whole.check("mean", moments.mean, "all groups")
        whole.check("var", moments.variance(), "all groups", torch.float32)
    mean, var = found.mean, found.variance()
    beside = {"activation": inputs.activation, "mask": inputs.mask, "groups": groups}
    # Parameters of each group, as renormalization has them.
    weight, bias = (
        None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)).expand(groups.number, -1)
        for t in (inputs.weight, inputs.bias)
    )
    y = kernel.normalize(inputs.x, mean, var, EPS, weight, bias, residual=inputs.residual, **beside)
    for g, (rows, expected) in enumerate(parts):
        expected.check("y", y[rows], f"group {g}")
    if inputs.residual is not None and inputs.activation.sign_survives:
        beside["y"] = y
    else:
        beside["residual"] = inputs.residual
    sums = kernel.backward_sums(inputs.dy, inputs.x, mean, var, EPS, weight, bias, **beside)
    dx, dresidual = kernel.backward_input(
        inputs.dy, inputs.x, mean, var, EPS, weight, bias, sums, found.count, sample_weight=inputs.sample_weight,
        needs=Needs(True, False, False, True), **beside,
    )  # fmt: skip
    dweight, dbias = (
        None if p is None else t.sum(0).to(p.dtype) for t, p in ((sums[1], inputs.weight), (sums[0], inputs.bias))
    )
    check_gradients(inputs, parts, dx, dweight, dbias, dresidual)


def check_gradients(
    inputs: Inputs,
    parts: list[tuple[slice, Expected]],
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor,
) -> None:
    for g, (rows, expected) in enumerate(parts):
        expected.check("dx", dx[rows], f"group {g}")
        expected.check("dresidual", dresidual[rows], f"group {g}")
    for quantity, got in (("dweight", dweight), ("dbias", dbias)):
        if got is not None:
            right = sum(getattr(expected.gradients, quantity) for _, expected in parts)
            scale = sum(expected.scales[quantity] for _, expected in parts)
            assert_close(got, right, dtype=got.dtype, quantity=quantity, scale=scale)
