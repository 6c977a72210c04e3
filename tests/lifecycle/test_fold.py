"""Batch norm folded into the layers around it: the same outputs, whatever the layers are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import batchnorm as bn
from batchnorm.lifecycle.folding.modules import ResidualActivation, ScaleShift
from folding import assert_folded_alike, assert_no_worse_than_unfolded, fold, outputs, randomized, went
from tolerances import assert_not_worse_than_torch, to_float64

often = settings(max_examples=40, deadline=None, derandomize=True, database=None)

CONVS: dict[bool, list[Callable[..., nn.Module]]] = {
    False: [nn.Conv1d, nn.Conv2d, nn.Conv3d],
    True: [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d],
}
NORMS: dict[str, list[Callable[..., nn.Module]]] = {
    "torch": [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d],
    "ours": [bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d],
    "ours of any rank": [bn.BatchNorm] * 3,
    "sync": [nn.SyncBatchNorm] * 3,
}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, int, int]:
    """A convolution of any kind, its number of spatial dimensions and of input channels."""
    dims, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.sampled_from([1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    size, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    options: dict[str, Any] = {
        "stride": stride,
        "dilation": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 1)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        options["output_padding"] = draw(st.integers(0, stride - 1))
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
        assume(options["padding_mode"] != "reflect" or dims < 3)  # torch has none for float64 and deterministic mode
        # torch warns where "same" needs more padding on one side than on the other.
        if stride == 1 and size % 2 and draw(st.booleans()):
            options["padding"] = "same"
    return CONVS[transposed][dims - 1](inputs, outputs, size, **options), dims, inputs


@st.composite
def norms(draw: st.DrawFn, channels: int, dims: int) -> nn.Module:
    kind = draw(st.sampled_from(sorted(NORMS)))
    options: dict[str, Any] = {"eps": draw(st.sampled_from([1e-5, 1e-3, 0.5])), "affine": draw(st.booleans())}
    if kind.startswith("ours"):
        options["activation"] = draw(st.sampled_from([None, "relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh"]))
        options["negative_slope"] = 0.3
    return NORMS[kind][dims - 1](channels, **options)


@often
@given(st.data())
def test_any_convolution_takes_the_norm_after_it(data: st.DataObject) -> None:
    conv, dims, channels = data.draw(convolutions())
    norm: Any = data.draw(norms(conv.out_channels, dims))  # type: ignore[arg-type]
    model = randomized(nn.Sequential(conv, norm))
    x = torch.randn(2, channels, *[6] * dims)
    for dtype in (torch.float32, torch.float64):
        model, x = model.to(dtype), x.to(dtype)
        folded = fold(model, x)
        assert went(folded) == {"1": ("layer before", "0")}
        assert type(folded[0]) is type(conv)
        assert isinstance(folded[1], nn.Identity) == (getattr(norm, "activation", None) is None)
        assert not any(isinstance(m, (nn.modules.batchnorm._BatchNorm, ScaleShift)) for m in folded.modules())
        assert_folded_alike(model, folded, x)


@often
@given(st.data())
def test_any_convolution_takes_the_norm_before_it_where_that_is_exact(data: st.DataObject) -> None:
    conv, dims, channels = data.draw(convolutions())
    norm: Any = NORMS["torch"][dims - 1](channels, affine=data.draw(st.booleans()))
    model = randomized(nn.Sequential(norm, conv))
    shifted = data.draw(st.booleans())
    if not shifted:
        norm.running_mean.zero_()
        if norm.affine:
            nn.init.zeros_(norm.bias)
    x = torch.randn(2, channels, *[6] * dims)
    for dtype in (torch.float32, torch.float64):
        model, x = model.to(dtype), x.to(dtype)
        folded = fold(model, x)
        c: Any = conv
        sizes = zip(c.kernel_size, c.stride, strict=True)
        if isinstance(c, nn.modules.conv._ConvTransposeNd):
            even = all(k == s == 1 for k, s in sizes) and not any(c.padding)
        else:
            padded = any(k > 1 for k, _ in sizes) if c.padding == "same" else any(c.padding)
            even = not padded or c.padding_mode != "zeros"
        taken = even or not shifted
        assert went(folded) == {"0": ("layer after", "1") if taken else ("scale and shift", "0")}
        assert isinstance(folded[0], nn.Identity if taken else ScaleShift)
        assert_folded_alike(model, folded, x)


def test_zero_padding_is_why_a_shift_cannot_go_forward() -> None:
    """The border is what would be wrong: there the unfolded convolution sees 0, not the folded shift's image."""
    model = randomized(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1))).eval()
    norm: Any = model[0]
    x = torch.randn(1, 2, 7, 7)
    folded = fold(model, x)
    assert folded.fold_report.decisions[0].why == (
        "its input is the model's own, or a constant; "
        "1 after it does not see a shift alike at the border (zero padding, or transposed)"
    )
    wrong = copy.deepcopy(model[1])
    assert isinstance(wrong, nn.Conv2d) and wrong.bias is not None
    with torch.no_grad():
        a = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        c = norm.bias - norm.running_mean * a
        wrong.bias += (wrong.weight * c.view(1, -1, 1, 1)).sum((1, 2, 3))
        wrong.weight *= a.view(1, -1, 1, 1)
        error = (wrong(x) - model(x)).abs().amax((0, 1))
    assert error[1:-1, 1:-1].max() < 1e-5
    assert error[0].max() > 0.01 and error[:, -1].max() > 0.01


def script(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it announces its end
        return torch.jit.script(model)


def both() -> list[Any]:
    return [nn.BatchNorm1d, bn.BatchNorm1d]


@pytest.mark.parametrize("kind", both())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_takes_norms_on_both_sides(kind: Any, dtype: torch.dtype) -> None:
    model = randomized(nn.Sequential(kind(5), nn.Linear(5, 7, bias=False), nn.Dropout(0.5), nn.Identity(), kind(7)))
    x = torch.randn(4, 5, dtype=dtype)
    model = model.to(dtype)
    folded = fold(model, x)
    assert went(folded) == {"0": ("layer after", "1"), "4": ("layer before", "1")}
    assert folded[1].bias is not None
    assert_folded_alike(model, folded, x)


class Pair(nn.Module):
    """Bilinear takes two inputs, so that only a norm after it can go in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.bilinear = nn.Bilinear(3, 4, 5, bias=False)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.norm(self.bilinear(self.first(x), y))
        return result


def test_bilinear_takes_the_norm_after_it() -> None:
    model, args = randomized(Pair()), (torch.randn(6, 3), torch.randn(6, 4))
    folded = fold(model, *args)
    assert went(folded) == {"first": ("scale and shift", "first"), "norm": ("layer before", "bilinear")}
    assert folded.fold_report.decisions[0].why.endswith("; bilinear after it: it has two inputs")
    assert_folded_alike(model, folded, *args)


def test_norm_before_flatten_goes_into_the_linear_after_it() -> None:
    """A channel is then 12 columns of the weight."""
    model = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(36, 4)))
    x = torch.randn(5, 3, 4, 3)
    folded = fold(model, x)
    assert went(folded) == {"1": ("layer after", "3")}
    assert_folded_alike(model, folded, x)
    last = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(36, 4))).eval()
    channels_last = x.to(memory_format=torch.channels_last)
    assert_folded_alike(last, fold(last, channels_last), channels_last)


def test_norms_in_a_row_become_one() -> None:
    model = randomized(nn.Sequential(nn.Conv1d(2, 3, 1), *[nn.BatchNorm1d(3) for _ in range(3)]))
    x = torch.randn(4, 2, 5)
    folded = fold(model, x)
    assert went(folded) == dict.fromkeys("123", ("layer before", "0"))
    assert_folded_alike(model, folded, x)
    alone = randomized(nn.Sequential(nn.Tanh(), *[nn.BatchNorm1d(3) for _ in range(3)], nn.Tanh()))
    x = torch.randn(4, 3, 5)
    folded = fold(alone, x)
    assert went(folded) == {
        "1": ("norm after", "2"), "2": ("norm after", "3"), "3": ("scale and shift", "3"),
    }  # fmt: skip
    assert [type(m).__name__ for m in folded] == ["Tanh", "Identity", "Identity", "ScaleShift", "Tanh"]
    assert_folded_alike(alone, folded, x)
    forward = randomized(nn.Sequential(nn.Tanh(), nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Conv1d(3, 2, 2)))
    folded = fold(forward, x)
    assert went(folded) == {"1": ("norm after", "2"), "2": ("layer after", "3")}
    assert_folded_alike(forward, folded, x)


def test_relu_before_a_norm_leaves_only_the_way_forward() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)))
    x = torch.randn(2, 2, 6, 6)
    folded = fold(model, x)
    assert went(folded) == {"2": ("layer after", "3")}
    assert_folded_alike(model, folded, x)


class Residual(nn.Module):
    """Our layers, with the residual and the activation inside."""

    def __init__(self, activation: str | None, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.pool = nn.AvgPool2d(1) if pool else nn.Identity()
        self.norm = bn.BatchNorm2d(3, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.pool(self.conv(x)), residual=x)
        return result


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("pool", [False, True], ids=["folded", "scale and shift"])
def test_a_residual_stays(activation: str | None, pool: bool) -> None:
    model, x = randomized(Residual(activation, pool)), torch.randn(2, 3, 5, 5)
    folded = fold(model, x)
    assert went(folded) == {"norm": ("scale and shift", "norm") if pool else ("layer before", "conv")}
    assert isinstance(folded.norm, ResidualActivation)
    assert_folded_alike(model, folded, x)
    scripted = script(folded)
    assert torch.equal(scripted(x), folded(x))


def test_the_norm_inside_batch_norm_linear_goes_into_its_projection() -> None:
    block = bn.BatchNormLinear(4, 6, affine=True)
    model = randomized(nn.Sequential(nn.BatchNorm1d(4), block, nn.BatchNorm1d(6)))
    x = torch.randn(5, 4)
    folded = fold(model, x)
    assert went(folded) == {
        "1.norm": ("inside", "1"), "0": ("layer after", "1"), "2": ("layer before", "1"),
    }  # fmt: skip
    assert type(folded[1]) is nn.Linear
    assert_folded_alike(model, folded, x)
    assert isinstance(fold(block, x), nn.Linear)


class Frozen(nn.Module):
    """As torchvision and detectron2 have it."""

    def __init__(self, channels: int, eps: float = 1e-5, twist: float = 0.0) -> None:
        super().__init__()
        self.eps, self.twist = eps, twist
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        w, b, m, v = (t.view(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var))
        scale = w * (v + self.eps).rsqrt()
        return x * scale + (b - m * scale) + self.twist


class WithAct(nn.BatchNorm2d):
    """As timm has it."""

    def __init__(self, channels: int, twist: float = 0.0) -> None:
        super().__init__(channels)
        self.drop, self.act, self.twist = nn.Identity(), nn.ReLU(inplace=True), twist

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.drop(super().forward(x) + self.twist))
        return result


@pytest.mark.parametrize("kind", [Frozen, WithAct])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_of_others_are_known_by_what_they_do(kind: Any, dtype: torch.dtype) -> None:
    model, x = randomized(nn.Sequential(nn.Conv2d(2, 3, 1), kind(3), nn.Tanh(), kind(3))), torch.randn(2, 2, 4, 4)
    model, x = model.to(dtype), x.to(dtype)
    folded = fold(model, x)
    assert went(folded) == {"1": ("layer before", "0"), "3": ("scale and shift", "3")}
    assert isinstance(folded[1], nn.ReLU if kind is WithAct else nn.Identity)
    assert_folded_alike(model, folded, x)
    other = randomized(nn.Sequential(nn.Conv2d(2, 3, 1), kind(3, twist=0.1))).to(dtype)
    left = fold(other, x)
    assert dict(left.fold_report.left) == {
        "1": f"{kind.__name__} gives something other than batch norm and then its children"
    }
    assert_folded_alike(other, left, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_unfolded(dtype: torch.dtype) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), bn.BatchNorm2d(16, activation="relu"), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(256, 9)
    )
    model, x = randomized(model).to(dtype), torch.randn(4, 3, 6, 6, dtype=dtype)
    folded = fold(model, x)
    assert {p.dtype for p in folded[0].parameters()} == {dtype}
    assert_no_worse_than_unfolded(model, folded, x)


def test_a_scale_and_shift_keeps_float32_beside_half_precision() -> None:
    model = randomized(nn.Sequential(nn.Tanh(), bn.BatchNorm2d(4), nn.Tanh())).to(torch.bfloat16)
    x = torch.randn(3, 4, 5, 5, dtype=torch.bfloat16)
    folded = fold(model, x)
    assert folded[1].scale.dtype == torch.float32
    assert folded(x).dtype == torch.bfloat16
    assert_no_worse_than_unfolded(model, folded, x)


@pytest.mark.parametrize("transposed", [False, True])
def test_torchs_own_fusion_is_no_closer(transposed: bool) -> None:
    """It computes in float32."""
    conv: Any = CONVS[transposed][1](6, 8, 3, bias=False)
    model = randomized(nn.Sequential(conv, nn.BatchNorm2d(8))).eval()
    x = torch.randn(4, 6, 9, 9)
    folded = fold(model, x)
    theirs: Any = fuse_conv_bn_eval(model[0], model[1], transpose=transposed)  # type: ignore[arg-type,type-var]
    with torch.no_grad():
        truth = to_float64(copy.deepcopy(model).double()(x.double()))
        assert_not_worse_than_torch(folded(x), theirs(x), truth, dtype=torch.float32)


def test_weights_are_computed_in_float64_and_rounded_once() -> None:
    model = randomized(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    linear: Any = model[0]
    norm: Any = model[1]
    folded = fold(model, torch.randn(2, 3))
    a = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    assert torch.equal(folded[0].weight, (linear.weight.double() * a[:, None]).float())
    bias = (linear.bias.double() - norm.running_mean.double()) * a + norm.bias.double()
    assert torch.equal(folded[0].bias, bias.float())


def test_the_folded_model_is_an_ordinary_module(tmp_path: Any) -> None:
    first, last = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 2, 3, padding=1)
    model = randomized(nn.Sequential(first, bn.BatchNorm2d(4, activation="relu"), nn.BatchNorm2d(4), last))
    x = torch.randn(2, 3, 8, 8)
    folded = fold(model, x)
    expected = outputs(folded, x)[0]
    assert torch.equal(script(folded)(x), expected)
    with torch.no_grad():
        assert torch.equal(torch.export.export(folded, (x,)).module()(x), expected)
    torch.save(folded, tmp_path / "folded.pt")
    loaded = torch.load(tmp_path / "folded.pt", weights_only=False)
    assert torch.equal(loaded(x), expected)
    assert str(loaded.fold_report) == str(folded.fold_report)
    assert torch.equal(copy.deepcopy(folded)(x), expected)
    assert set(folded.state_dict()) == {"0.weight", "0.bias", "2.scale", "2.shift", "3.weight", "3.bias"}
    folded(x).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())


def test_memory_format_freezing_and_modes_of_the_other_modules_stay() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model[0].weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    folded = fold(model, torch.randn(2, 3, 8, 8))
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded[0].weight.requires_grad and folded[0].bias.requires_grad
    assert not any(m.training for m in folded.modules())


def test_a_model_that_is_a_norm_comes_back_as_scale_and_shift() -> None:
    norm, x = randomized(nn.BatchNorm1d(3)), torch.randn(4, 3)
    folded = fold(norm, x)
    assert isinstance(folded, ScaleShift)
    assert_folded_alike(norm, folded, x)
    assert "(the model)" in str(folded.fold_report)
