"""A planted gap between training and eval is measured, and closed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import ArgumentError
from model_state import everything

ORDERS: list[Any] = ["joint", "sequential"]


class Digits(nn.Module):
    """Dropout before batch norm: in training the layer sees a larger variance than in eval (Li et al. 2018)."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 64), kind(64), nn.ReLU(), nn.Dropout(0.7),
            nn.Linear(64, 64), kind(64), nn.ReLU(), nn.Dropout(0.7),
            nn.Linear(64, 64), kind(64),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return result


def data(batches: int) -> list[Tensor]:
    return list((torch.randn(batches * 1024, 6) * 2 + 1).split(1024))


def gap_by_hand(model: nn.Module, batches: list[Tensor]) -> float:
    """The definition, with nothing of ours: norms in training mode without updates, dropout off."""
    difference = size = 0.0
    with torch.no_grad():
        for x in batches:
            evaluated = model.eval()(x)
            for m in model.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.training, m.track_running_stats = True, False
            trained = model(x)
            for m in model.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.track_running_stats = True
            difference += float((evaluated - trained).double().square().sum())
            size += float(trained.double().square().sum())
    return math.sqrt(difference / size)


def plant(kind: str, model: nn.Module) -> None:
    if kind == "dropout":
        for x in data(200):
            model.train()(x)
    else:
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.add_(3 * torch.randn_like(m.running_mean))
                m.running_var.mul_(torch.rand_like(m.running_var) * 9 + 0.1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [bn.BatchNorm1d, nn.BatchNorm1d], ids=["ours", "torch's"])
@pytest.mark.parametrize("planted", ["dropout", "corrupted"])
def test_a_planted_gap_is_measured_and_closed(planted: str, kind: Any, order: Any) -> None:
    model = Digits(kind)
    plant(planted, model)
    batches = data(20)
    by_hand = gap_by_hand(model, batches[:4])
    report = bn.recalibrate(model, batches, order=order, gap_batches=4)
    assert report.gap_before is not None and report.gap_after is not None
    assert math.isclose(report.gap_before, by_hand, rel_tol=1e-4)
    assert math.isclose(report.gap_after, gap_by_hand(model, batches[:4]), rel_tol=1e-4)
    # What is left is the noise of one batch's statistics, some 1/sqrt(1024) a layer.
    assert report.gap_before > 0.3
    assert report.gap_after < 0.12
    assert report.gap_after < report.gap_before / 4
    for name in ("body.1", "body.5", "body.9"):
        layer = report.layers[name]
        assert layer.gap_after is not None and layer.gap_after < 0.06
    assert f"train/eval gap of the output: {100 * report.gap_before:.3g} % before" in str(report)
    assert str(report).endswith("note: train/eval gaps were measured on 4 batches")


def test_the_gap_of_a_layer_is_the_distance_of_its_normalized_values() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, eps=0.5)).double()
    x = torch.randn(40, 2, dtype=torch.float64) * 3 + 1
    with torch.no_grad():
        model[0].running_mean.copy_(torch.tensor([2.0, -1.0]))
        model[0].running_var.copy_(torch.tensor([5.0, 20.0]))
        now = (x - model[0].running_mean) / (model[0].running_var + 0.5).sqrt()
        # Values whose variance is the unbiased one that running statistics hold.
        own = (x - x.mean(0)) / (x.var(0) + 0.5).sqrt()
    shift = (now - own).mean(0).square()
    stretch = (now.std(0) - own.std(0)).square()
    report = bn.recalibrate(model, x.split(10), gap_batches=4)
    assert report.layers["0"].gap_before == pytest.approx(float((shift + stretch).mean().sqrt()), rel=1e-12)
    assert report.layers["0"].gap_after == pytest.approx(0, abs=1e-12)


def test_without_being_asked_for_no_gap_is_measured() -> None:
    calls = []
    model = nn.Sequential(nn.BatchNorm1d(2))
    model.register_forward_hook(lambda *_: calls.append(1))
    report = bn.recalibrate(model, [torch.randn(8, 2)] * 3)
    assert (report.gap_before, report.gap_after, report.layers["0"].gap_before) == (None, None, None)
    assert len(calls) == 3
    assert "gap" not in str(report)


def test_a_generator_is_still_gone_through_once_and_whole() -> None:
    report = bn.recalibrate(nn.Sequential(nn.BatchNorm1d(2)), (torch.randn(8, 2) for _ in range(5)), gap_batches=2)
    assert (report.batches, report.layers["0"].count) == (5, 40)


def test_outputs_in_containers_are_compared_and_integers_are_not() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.norm(x)
            return {"y": (y, [x]), "class": y.argmax(1)}

    batches = data(1)[0][:, :2].split(64)
    report = bn.recalibrate(Many(), batches, gap_batches=1)
    trained = nn.functional.batch_norm(batches[0], None, None, training=True)
    difference = (batches[0] / math.sqrt(1 + 1e-5) - trained).norm()
    expected = difference / math.hypot(float(trained.norm()), float(batches[0].norm()))
    assert report.gap_before == pytest.approx(float(expected), rel=1e-5)


ERRORS: dict[str, tuple[dict[str, Any], list[Tensor], str]] = {
    "nothing returned": (
        {"forward": lambda m, x: (m(x), None)[1]},
        [torch.randn(8, 2)],
        "recalibrate: expected floating-point output to compare, got NoneType. "
        "Return the model's output from forward=, or leave gap_batches=0.",
    ),
    "single values": (
        {"order": "sequential"},
        [torch.randn(1, 2), torch.randn(8, 2)],
        "recalibrate: expected a batch to measure the train/eval gap on, got none that can be normalized by itself. "
        "Give larger batches, or gap_batches=0.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_gap_that_cannot_be_measured_is_an_error_and_nothing_is_changed(case: str) -> None:
    options, batches, message = ERRORS[case]
    model = nn.Sequential(nn.BatchNorm1d(2))
    before = everything(model)
    with pytest.raises(ArgumentError) as caught:
        bn.recalibrate(model, batches, gap_batches=1, **options)
    assert str(caught.value) == message
    assert everything(model) == before


def test_the_report_reads_well() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Tanh(), nn.BatchNorm1d(2)).double()
    x = torch.randn(9, 2, dtype=torch.float64)
    with torch.no_grad():
        x = (x - x.mean(0)) / x.std(0)
    model[0].running_mean.fill_(2.0)
    report = bn.recalibrate(model, x.split([8, 1]), gap_batches=1)
    lines = str(report).splitlines()
    assert lines[0] == "recalibrated 2 of 2 layers on 2 batches in 1 pass, order 'joint', estimator 'pooled'"
    assert lines[1] == "layer        values   mean moved by  variance times        gap before       after"
    assert lines[2].startswith("0                 9           2 std  1 to 1 ")
    assert lines[4].startswith("train/eval gap of the output: ")
    assert lines[5:] == [
        "note: batch 2, of one value a channel, cannot be normalized by itself: counted at 0, "
        "unseen by the layers after it",
        "note: train/eval gaps were measured on 1 batch",
    ]
