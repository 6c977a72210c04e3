"""A process group together with every other option of a layer: the same state as one process on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.nn.options import OPTIONS, REFUSED
from tolerances import assert_close, to_float64

OnRanks = Callable[..., list[Any]]
CHANNELS, STEPS = 3, 3
SIZES = (4, 1, 2)

EXTRAS: dict[str, dict[str, Any]] = {
    "renorm": {"renorm": bn.Renorm(r_max=2.0, d_max=1.0, warmup=(1, 2, 2))},
    "activation": {"activation": "gelu"},
    "nonfinite": {"nonfinite": "skip"},
    'too_few="running"': {"too_few": "running"},
    "track_running_stats=False": {"track_running_stats": False},
    "momentum=None": {"momentum": None},
}
CALLS = ("mask", "sample_weight", "residual")
AROUND = ("domains", "defer_updates", "accumulate_statistics", "freeze")


def trained(
    option: str, rows: slice, process_group: str | None
) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """State, outputs and input gradients of some steps."""
    torch.manual_seed(1)
    layer = bn.BatchNorm1d(CHANNELS, process_group=process_group, dtype=torch.float64, **EXTRAS.get(option, {}))
    model = nn.Sequential(layer)
    if option == "domains":
        bn.domains(model, ["source", "target"])
    if option == "freeze":
        bn.freeze(model)
    outputs, gradients = [], []

    def step() -> None:
        whole = {"x": torch.randn(sum(SIZES), CHANNELS, 5, dtype=torch.float64) * 2 + 1}
        whole["dy"], whole["residual"] = (torch.randn_like(whole["x"]) for _ in range(2))
        whole["mask"] = torch.rand(sum(SIZES), 5) < 0.7
        whole["sample_weight"] = torch.rand(sum(SIZES), dtype=torch.float64)
        mine = {name: t[rows].clone() for name, t in whole.items()}
        x = mine["x"].requires_grad_()
        y = layer(x, **({option: mine[option]} if option in CALLS else {}))
        y.backward(mine["dy"])
        assert x.grad is not None
        outputs.append(y.detach())
        gradients.append(x.grad)

    if option == "domains":
        for name in ("source", "target", "target"):
            with bn.use_domain(model, name):
                step()
    elif option == "defer_updates":
        with bn.defer_updates(model) as updates:
            for _ in range(STEPS):
                step()
        assert int(layer.num_batches_tracked) == 0
        updates.commit()
    elif option == "accumulate_statistics":
        with bn.accumulate_statistics(model):
            for _ in range(STEPS):
                step()
        assert int(layer.num_batches_tracked) == 1
    else:
        for _ in range(STEPS):
            step()
    return model.state_dict(), outputs, gradients


def every_option() -> dict[str, tuple[dict[str, Tensor], list[Tensor], list[Tensor]]]:
    rank = torch.distributed.get_rank()
    rows = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    return {option: trained(option, rows, "world") for option in (*EXTRAS, *CALLS, *AROUND)}


def test_every_option_works_across_ranks_or_is_refused(on_ranks: OnRanks) -> None:
    found = on_ranks(3, every_option)
    refused = {b if a == "process_group" else a for a, b in REFUSED if "process_group" in (a, b)}
    assert {*found[0], *refused, "process_group"} == set(OPTIONS)
    for option in found[0]:
        with bn.use_backend("eager"):
            state, outputs, gradients = trained(option, slice(None), None)
        parts = [each[option] for each in found]
        for name, value in state.items():
            assert all(torch.equal(part[0][name], parts[0][0][name]) for part in parts), f"{option}: {name} by rank"
            got = parts[0][0][name].double()
            assert_close(got, to_float64(value), dtype="float64", quantity="y", what=f"{option}: {name}")
        for at, (y, dx) in enumerate(zip(outputs, gradients, strict=True)):
            joined = torch.cat([part[1][at] for part in parts])
            assert_close(joined, to_float64(y), dtype="float64", quantity="y", what=option)
            joined = torch.cat([part[2][at] for part in parts])
            assert_close(joined, to_float64(dx), dtype="float64", quantity="dx", what=option)


def transformed() -> list[str]:
    """Function transforms over a layer that exchanges."""
    with bn.use_backend("composite"):
        return _transformed()


def _transformed() -> list[str]:
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    layer = bn.BatchNorm1d(CHANNELS, process_group="world", track_running_stats=False, dtype=torch.float64)
    x = torch.randn(4, CHANNELS, dtype=torch.float64)
    (right,) = torch.autograd.grad(layer(x.requires_grad_()).pow(3).sum(), x)
    got = torch.func.grad(lambda x: layer(x).pow(3).sum())(x.detach())
    assert torch.allclose(got, right, rtol=1e-10)
    try:
        torch.func.vmap(layer)(torch.randn(2, 4, CHANNELS, dtype=torch.float64))
    except RuntimeError as error:
        return [type(error).__name__, str(error)]
    return []


def test_a_transform_gives_the_gradient_or_says_why_not(on_ranks: OnRanks) -> None:
    for kind, message in on_ranks(2, transformed):
        assert kind == "AutogradError"
        assert message == (
            "BatchNorm1d: expected an exchange outside of vmap, got a batched tensor. Call the layer outside of vmap, "
            "or in eval mode."
        )
