"""What folding must not do: each refusal by its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.lifecycle.folding.flow import channels_seen
from batchnorm.lifecycle.folding.record import Place
from folding import Net, assert_folded_alike, fold, randomized, went


def functions_of_its_own(m: Any, x: Tensor) -> Any:
    return m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1)


def in_two_places(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return m.norm(y) + torch.sigmoid(y)


def view_elsewhere(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return m.norm(y).sum() + y.flatten(1)[:, :5].mean()


def changed_before(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y[:, 0] += 1
    return m.norm(y)


def relu_before(m: Any, x: Tensor) -> Any:
    return m.norm(F.relu(m.conv(x), inplace=True))


def returned_too(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return {"features": [y], "logits": m.norm(y)}


def kept_by_the_model(m: Any, x: Tensor) -> Any:
    m.kept = m.conv(x)
    return m.norm(m.kept)


def called_twice(m: Any, x: Tensor) -> Any:
    return m.norm(m.conv(m.conv(x)))


def padded_between(m: Any, x: Tensor) -> Any:
    return m.norm(F.pad(m.conv(x), (1, 1)))


def other_channels(m: Any, x: Tensor) -> Any:
    return m.norm(m.conv(x).transpose(1, 2))


def half_of_it(m: Any, x: Tensor) -> Any:
    return m.norm(m.conv(x)[::2])


# What is done, why the convolution before cannot take the norm. The way forward is barred by the model's end.
BEFORE = {
    functions_of_its_own: "conv before it: its weight is also used by aten.convolution in Net",
    in_two_places: "the output of conv also goes to aten.sigmoid in Net",
    view_elsewhere: "the output of conv also goes to aten.mean in Net",
    changed_before: "the output of conv is changed by aten.add_ in Net",
    relu_before: "the output of conv is changed by aten.relu_ in Net",
    returned_too: "the output of conv outlives the forward: the model returns it or keeps it",
    kept_by_the_model: "the output of conv outlives the forward: the model returns it or keeps it",
    called_twice: "conv before it: it is called 2 times",
    padded_between: "its input comes from aten.constant_pad_nd in Net",
    other_channels: "conv before it has its channels in another dimension",
    half_of_it: "conv before it has its channels in another dimension",
}


@pytest.mark.parametrize("way", BEFORE, ids=lambda way: way.__name__)
def test_a_convolution_whose_result_does_not_go_whole_and_alone_to_the_norm_is_refused(way: Any) -> None:
    model, x = randomized(Net(way)), torch.randn(2, 3, 3, 4)
    folded = fold(model, x)
    assert went(folded) == {"norm": ("scale and shift", "norm")}
    assert folded.fold_report.decisions[0].why.split("; ")[0] == BEFORE[way]
    assert_folded_alike(model, folded, x)


def relu_after(m: Any, x: Tensor) -> Any:
    return m.last(F.relu(m.norm(x)))


def norm_in_two_places(m: Any, x: Tensor) -> Any:
    y = m.norm(x)
    return m.last(y).sum() + y.sigmoid().sum()


def norm_returned_too(m: Any, x: Tensor) -> Any:
    y = m.norm(x)
    return y, m.last(y)


def input_changed_meanwhile(m: Any, x: Tensor) -> Any:
    """After folding the norm's result would be its input, and change with it."""
    x = x + 1
    y = m.norm(x)
    x *= 2
    return m.last(y), x


def result_changed_meanwhile(m: Any, x: Tensor) -> Any:
    y = m.norm(x)
    y[:, 1] *= 2
    return m.last(y)


AFTER = {
    relu_after: "its output goes to aten.relu in Net",
    norm_in_two_places: "its output also goes to aten.sigmoid in Net",
    norm_returned_too: "its output outlives the forward: the model returns it or keeps it",
    input_changed_meanwhile: "its input is changed by aten.mul_ in Net before last has run",
    result_changed_meanwhile: "its output is changed by aten.mul_ in Net",
}


@pytest.mark.parametrize("way", AFTER, ids=lambda way: way.__name__)
def test_a_norm_whose_result_does_not_go_whole_and_alone_to_the_convolution_is_refused(way: Any) -> None:
    model, x = randomized(Net(way)), torch.randn(2, 3, 4, 4)
    folded = fold(model, x)
    assert went(folded) == {"norm": ("scale and shift", "norm")}
    assert folded.fold_report.decisions[0].why.split("; ")[1] == AFTER[way]
    assert_folded_alike(model, folded, x)


def test_an_input_changed_under_two_norms_in_a_row_is_seen() -> None:
    """The first norm hands its input through the second to the convolution, so it must keep until then."""

    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.conv = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            y = self.two(self.one(x))
            x *= 2
            return self.conv(y) + x.sum()

    model, x = randomized(Row()), torch.randn(2, 3, 4, 4)
    folded = fold(model, x)
    assert went(folded) == {"one": ("norm after", "two"), "two": ("scale and shift", "two")}
    assert folded.fold_report.decisions[1].why.split("; ")[1] == (
        "its input is changed by aten.mul_ in Row before conv has run"
    )
    assert_folded_alike(model, folded, x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.one(x))
        return result


def test_a_weight_that_another_module_holds_is_refused() -> None:
    model, x = randomized(Tied()), torch.randn(3, 4)
    folded = fold(model, x)
    assert (
        folded.fold_report.decisions[0].why.split("; ")[0] == "one before it: its weight shares memory with two.weight"
    )
    assert_folded_alike(model, folded, x)


def positions(kind: Any) -> Any:
    """Linear gives (N, L, C): the norm over dimension 1 then normalizes positions, whatever the sizes are."""
    return nn.Sequential(nn.Linear(5, 4), kind(4))


class Turned(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 4), kind(4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.linear(x).transpose(1, 2))
        return result


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
@pytest.mark.parametrize("length", [4])
def test_channels_in_another_dimension_are_refused_and_turned_ones_are_taken(kind: Any, length: int) -> None:
    x = torch.randn(2, length, 5)
    model = randomized(positions(kind))
    folded = fold(model, x)
    assert went(folded) == {"1": ("scale and shift", "1")}
    assert folded.fold_report.decisions[0].why.split("; ")[0] == "0 before it has its channels in another dimension"
    assert_folded_alike(model, folded, x)
    model = randomized(Turned(kind))
    folded = fold(model, x)
    assert went(folded) == {"norm": ("layer before", "linear")}
    assert_folded_alike(model, folded, x)


def test_channels_are_followed_through_views() -> None:
    base = Place(0, (2, 3, 4), (12, 4, 1), 5)
    assert channels_seen(base, base, 1).tolist() == [0, 1, 2]  # type: ignore[union-attr]
    unsqueezed = Place(0, (2, 1, 3, 4), (12, 12, 4, 1), 5)
    assert channels_seen(base, unsqueezed, 2).tolist() == [0, 1, 2]  # type: ignore[union-attr]
    assert channels_seen(base, unsqueezed, 3) is None
    assert channels_seen(base, Place(0, (2, 3, 4), (12, 4, 1), 4), 1) is None  # begins outside
    assert channels_seen(base, Place(0, (2, 2, 4), (12, 4, 1), 9), 1).tolist() == [1, 2]  # type: ignore[union-attr]
    overlapping = Place(0, (2, 3, 4), (4, 0, 1), 0)
    assert channels_seen(overlapping, Place(0, (2, 3, 4), (4, 0, 1), 0), 2) is None


def hooked(m: Any) -> None:
    m.conv.register_forward_hook(lambda *_: None)


def parametrized(m: Any) -> None:
    nn.utils.parametrizations.weight_norm(m.conv)


def patched(m: Any) -> None:
    m.conv.forward = m.conv.forward


CONVS = {
    hooked: "conv before it: it has hooks",
    parametrized: "conv before it: it is parametrized",
    patched: "conv before it: its forward was replaced",
}


@pytest.mark.parametrize("change", CONVS, ids=lambda change: change.__name__)
def test_a_convolution_that_is_more_than_one_is_refused(change: Any) -> None:
    model, x = randomized(Net()), torch.randn(2, 3, 4, 4)
    change(model)
    folded = fold(model, x)
    assert folded.fold_report.decisions[0].why.split("; ")[0] == CONVS[change]
    assert_folded_alike(model, folded, x)


class Standardized(nn.Conv2d):
    """Its weight is normalized on its way, so that a scale put into it would vanish."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


class Same(nn.Conv2d):
    """It pads by itself, which does no harm to what comes after it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def test_subclasses_of_convolutions_are_judged_by_what_they_run() -> None:
    x = torch.randn(2, 3, 4, 4)
    model: Any = randomized(nn.Sequential(Standardized(3, 3, 3), nn.BatchNorm2d(3)))
    folded = fold(model, x)
    why = "0 before it: its weight or bias is changed before the convolution"
    assert folded.fold_report.decisions[0].why.split("; ")[0] == why
    assert_folded_alike(model, folded, x)
    model = randomized(nn.Sequential(nn.BatchNorm2d(3), Same(3, 3, 3, bias=False), nn.BatchNorm2d(3)))
    folded = fold(model, x)
    assert went(folded) == {"0": ("scale and shift", "0"), "2": ("layer before", "1")}
    assert folded.fold_report.decisions[0].why.split("; ")[1] == "1 after it: it pads its input before the convolution"
    assert_folded_alike(model, folded, x)


def untracked(m: Any) -> None:
    m.norm = nn.BatchNorm2d(3, track_running_stats=False)


def norm_hooked(m: Any) -> None:
    m.norm.register_forward_pre_hook(lambda *_: None)


def twice(m: Any) -> None:
    m.way = lambda m, x: m.norm(m.norm(m.conv(x)))


def read_elsewhere(m: Any) -> None:
    m.way = lambda m, x: m.norm(m.conv(x)) + m.norm.running_mean.view(1, -1, 1, 1)


def two_names(m: Any) -> None:
    m.again = m.norm


def bypassed(m: Any) -> None:
    m.way = lambda m, x: m.norm.forward(m.conv(x))


def masked(m: Any) -> None:
    m.norm = bn.BatchNorm2d(3)
    m.way = lambda m, x: m.norm(m.conv(x), mask=torch.ones(2, 4, 4, dtype=torch.bool))


def dead(m: Any) -> None:
    m.norm.running_var[1] = -1.0


def stubborn(m: Any) -> None:
    class Training(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Any:
            return super().train(True)

    m.norm = Training(3)


LEFT = {
    untracked: (
        "it has no running statistics (track_running_stats=False), so eval mode normalizes by the batch too"
    ),
    norm_hooked: "it has hooks",
    twice: "it is called 2 times",
    read_elsewhere: "its running_mean is also used by aten.add in Net",
    two_names: "it is registered in 2 places (norm and again)",
    bypassed: "the example does not call it as a module",
    dead: "its scale or shift is not finite in channel 1",
    stubborn: "it stays in training mode after eval()",
}  # fmt: skip


@pytest.mark.parametrize("change", LEFT, ids=lambda change: change.__name__)
def test_a_norm_that_cannot_be_replaced_is_left_with_the_reason(change: Any) -> None:
    model, x = randomized(Net()), torch.randn(2, 3, 4, 4)
    change(model)
    folded = fold(model, x)
    assert dict(folded.fold_report.left) == {"norm": LEFT[change]}
    assert type(folded.norm) is type(model.norm) or change is stubborn
    assert f"  norm: {LEFT[change]}" in str(folded.fold_report).splitlines()


def test_a_mask_is_more_than_scale_and_shift() -> None:
    model, x = randomized(Net()), torch.randn(2, 3, 4, 4)
    if "mask" not in bn.BatchNorm.forward.__annotations__:
        pytest.skip("the layer takes no mask")
    masked(model)
    assert dict(fold(model, x).fold_report.left) == {"norm": "it is called with mask"}


def test_a_kept_norm_is_left() -> None:
    model, x = randomized(Net()), torch.randn(2, 3, 4, 4)
    folded = fold(model, x, keep=["norm"])
    assert dict(folded.fold_report.left) == {"norm": "it is named in keep"}
    block = nn.Sequential(bn.BatchNormLinear(3, 4), nn.BatchNorm1d(4))
    folded = fold(block, torch.randn(2, 3), keep=["0.norm"])
    assert dict(folded.fold_report.left) == {"0.norm": "it is named in keep"}
    assert folded.fold_report.decisions[0].why.split("; ")[0] == (
        "0 before it: its own norm is left, it is named in keep"
    )


def test_batch_norm_as_a_function_and_values_that_are_looked_at_are_noted() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y = F.batch_norm(x, torch.zeros(3), torch.ones(3))
        return m.norm(m.conv(y)) if float(y.sum()) < 1e9 else y

    model, x = randomized(Net(way)), torch.randn(2, 3, 4, 4)
    assert fold(model, x).fold_report.notes == (
        "batch norm was called as a function, outside any layer, 1 times: left as it was",
        "the model looks at values of its tensors (aten._local_scalar_dense in Net): "
        "if they decide its way, only the example's way is proved",
    )
