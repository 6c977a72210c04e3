"""The layers in the place of torch.nn's: the same state, the same numbers, the same handles for other tools."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from tolerances import assert_close, to_float64

PAIRS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "1d flat": (bn.BatchNorm1d, nn.BatchNorm1d, (8, 3)),
    "1d": (bn.BatchNorm1d, nn.BatchNorm1d, (4, 3, 5)),
    "2d": (bn.BatchNorm2d, nn.BatchNorm2d, (4, 3, 5, 2)),
    "3d": (bn.BatchNorm3d, nn.BatchNorm3d, (2, 3, 3, 2, 2)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "cumulative": {"momentum": None},
    "last batch only": {"momentum": 1.0},
    "never": {"momentum": 0.0},
    "large eps": {"eps": 0.3, "momentum": 0.25},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "no tracking": {"track_running_stats": False},
    "bare": {"affine": False, "track_running_stats": False},
}


def both(pair: str, options: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, tuple[int, ...]]:
    """Our layer and torch's with the same random state."""
    ours_by, theirs_by, shape = PAIRS[pair]
    theirs = theirs_by(3, **OPTIONS[options], dtype=dtype)
    for name, t in theirs.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape) + 0.5 if name != "bias" else torch.randn(t.shape))
    ours = ours_by(3, **OPTIONS[options], dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, shape


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        if name.endswith("num_batches_tracked"):
            assert torch.equal(a[name], b[name])
        else:
            assert_close(a[name], to_float64(b[name]), dtype="float64", quantity="y", what=name)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_same_numbers_in_training_and_after_it(pair: str, options: str) -> None:
    ours, theirs, shape = both(pair, options)
    for step in range(6):
        ours.train(step != 3)
        theirs.train(step != 3)
        x, dy = torch.randn(shape, dtype=torch.float64) * 2 + 3, torch.randn(shape, dtype=torch.float64)
        results = []
        for layer in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            results.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)])
        for quantity, a, b in zip(("y", "dx", "dx", "dx"), *results, strict=False):
            assert_close(a, to_float64(b), dtype="float64", quantity=quantity, scale=10 * dy.numel())
        assert_same_state(ours, theirs)


def test_momentum_written_in_mid_run_counts_from_the_next_batch() -> None:
    ours, theirs, shape = both("2d", "default")
    for momentum in (0.1, None, None, 1.0, 0.25, 0.0, None, 0.5):
        ours.momentum = theirs.momentum = momentum
        x = torch.randn(shape, dtype=torch.float64)
        ours(x)
        theirs(x)
        assert_same_state(ours, theirs)
        assert ours.momentum == momentum


def test_eps_written_in_mid_run_counts_from_the_next_batch() -> None:
    ours, theirs, shape = both("2d", "default")
    x = torch.randn(shape, dtype=torch.float64)
    ours.eps = theirs.eps = 0.7
    assert_close(ours(x), to_float64(theirs(x)), dtype="float64", quantity="y")


@pytest.mark.parametrize("training", [True, False])
def test_buffers_that_are_there_but_not_tracked(training: bool) -> None:
    """In training the batch's own statistics, and no update; in eval mode the buffers."""
    ours, theirs, shape = both("2d", "default")
    for layer in (ours, theirs):
        layer.track_running_stats = False
        layer.train(training)
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    assert_close(ours(x), to_float64(theirs(x)), dtype="float64", quantity="y")
    assert_same_state(ours, theirs)
    assert all(torch.equal(before[name], t) for name, t in ours.state_dict().items())


def test_statistics_follow_under_no_grad_too() -> None:
    ours, theirs, shape = both("2d", "default")
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        ours(x)
        theirs(x)
    assert_same_state(ours, theirs)
    assert int(ours.num_batches_tracked) == 1


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_are_kept_in_a_graph_and_then_followed_are_an_error(name: str) -> None:
    layer = bn.BatchNorm2d(3)
    loss = (getattr(layer, name) * layer.weight).sum()  # backward needs the buffer as it is now
    layer(torch.randn(4, 3, 2, 2))
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):  # torch: silently wrong
        loss.backward()


# State


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pair", PAIRS)
def test_checkpoints_load_strictly_both_ways(pair: str, options: str) -> None:
    ours, theirs, shape = both(pair, options)
    x = torch.randn(shape, dtype=torch.float64)
    ours(x)
    fresh_theirs, fresh_ours = (by(3, **OPTIONS[options], dtype=torch.float64) for by in PAIRS[pair][1::-1])
    assert str(fresh_theirs.load_state_dict(ours.state_dict(), strict=True)) == "<All keys matched successfully>"
    assert str(fresh_ours.load_state_dict(fresh_theirs.state_dict(), strict=True)) == "<All keys matched successfully>"
    for a, b in zip(ours.state_dict().items(), fresh_ours.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    metadata = [m.state_dict()._metadata[""] for m in (ours, theirs)]
    assert metadata == [{"version": 2}, {"version": 2}]


def test_the_keys_are_those_of_torch_and_extras_that_are_off_add_none() -> None:
    keys = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(bn.BatchNorm2d(3).state_dict()) == keys
    assert list(bn.BatchNorm2d(3, activation="relu", too_few="running", nonfinite="skip").state_dict()) == keys
    assert list(bn.BatchNorm2d(3, track_running_stats=False).state_dict()) == keys[:2]
    assert dict(bn.BatchNorm2d(3, track_running_stats=False)._buffers) == dict.fromkeys(keys[2:])
    assert bn.BatchNorm2d(3).num_batches_tracked.dtype == torch.int64
    assert bn.BatchNorm2d(3).num_batches_tracked.shape == ()


@pytest.mark.parametrize("version", [None, 1])
def test_an_old_checkpoint_has_no_counter(version: int | None) -> None:
    old = nn.BatchNorm2d(3).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""] = {} if version is None else {"version": version}
    layer = bn.BatchNorm2d(3)
    layer(torch.randn(4, 3, 2, 2))
    layer.load_state_dict(old, strict=True)
    assert int(layer.num_batches_tracked) == 1
    plain: dict[str, Tensor] = dict(old)  # without any metadata, as tools write it
    assert not bn.BatchNorm2d(3).load_state_dict(plain, strict=True).missing_keys


def test_a_checkpoint_of_this_version_must_have_its_counter() -> None:
    state = nn.BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    messages = []
    for layer in (bn.BatchNorm2d(3), nn.BatchNorm2d(3)):
        with pytest.raises(RuntimeError) as caught:
            layer.load_state_dict(state, strict=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert 'Missing key(s) in state_dict: "num_batches_tracked"' in messages[0]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_on_their_own(how: Any) -> None:
    layer = bn.BatchNorm2d(
        3, momentum=0.3, activation="leaky_relu", negative_slope=0.4, too_few="running", nonfinite="skip"
    )
    layer(torch.randn(4, 3, 2, 2))
    other = how(layer)
    assert repr(other) == repr(layer)
    assert other.__dict__.keys() == layer.__dict__.keys()
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(layer(x), other(x))
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True))
    layer(x)
    assert int(other.num_batches_tracked) == 2
    assert int(layer.num_batches_tracked) == 3


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pair", PAIRS)
def test_shown_as_torch_shows_it(pair: str, options: str) -> None:
    ours, theirs, _ = both(pair, options)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()


def test_extras_that_are_on_are_shown() -> None:
    plain = nn.BatchNorm2d(3).extra_repr()
    assert bn.BatchNorm2d(3, activation="relu").extra_repr() == plain + ", activation='relu'"
    shown = bn.BatchNorm2d(3, activation="leaky_relu", negative_slope=0.2).extra_repr()
    assert shown == plain + ", activation='leaky_relu', negative_slope=0.2"
    shown = bn.BatchNorm2d(3, too_few="running", nonfinite="raise").extra_repr()
    assert shown == plain + ", too_few='running', nonfinite='raise'"


def test_the_activation_may_be_set_later() -> None:
    layer, x = bn.BatchNorm1d(3), torch.randn(8, 3)
    plain = layer(x)
    layer.activation = "relu"
    assert layer.activation == "relu"
    assert torch.equal(layer(x), plain.relu())
    layer.activation = None
    assert layer.activation is None
    assert torch.equal(layer(x), plain)


def test_parameters_and_resets_are_torchs() -> None:
    ours, theirs, shape = both("2d", "default")
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    x = torch.randn(shape, dtype=torch.float64)
    for layer in (ours, theirs):
        layer(x)
        layer.reset_running_stats()
    assert_same_state(ours, theirs)
    assert int(ours.num_batches_tracked) == 0
    for layer in (ours, theirs):
        layer.reset_parameters()
    assert_same_state(ours, theirs)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        assert getattr(ours, name) == getattr(theirs, name)


# Devices and dtypes


def test_device_and_dtype_as_in_torch() -> None:
    layer = bn.BatchNorm2d(3, 1e-3, 0.2, True, True, "meta", torch.float64)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer.weight.dtype == layer.running_mean.dtype == torch.float64
    y = layer(torch.empty(4, 3, 2, 2, device="meta", dtype=torch.float64))
    assert y.shape == (4, 3, 2, 2)
    assert y.device.type == "meta"
    back = layer.to_empty(device="cpu")
    back.reset_parameters()
    assert back(torch.randn(4, 3, 2, 2, dtype=torch.float64)).isfinite().all()
    half = bn.BatchNorm2d(3, dtype=torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16
    assert half.running_mean.dtype == half.running_var.dtype == torch.float32


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.type(torch.half),
        lambda m: m.half().bfloat16().half(),
        lambda m: nn.Sequential(m).to(dtype=torch.float16)[0],
    ],
)
def test_running_statistics_keep_float32_and_their_digits(cast: Any) -> None:
    layer = bn.BatchNorm2d(3)
    layer(torch.randn(8, 3, 4, 4) * 1.2345678 + 3.1234567)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    half = cast(layer)
    assert half.weight.dtype.itemsize == half.bias.dtype.itemsize == 2
    assert half.running_mean.dtype == half.running_var.dtype == torch.float32
    assert torch.equal(half.running_mean, mean)
    assert torch.equal(half.running_var, var)
    x = torch.randn(8, 3, 4, 4).to(half.weight.dtype)
    assert half(x).dtype == x.dtype
    assert half.running_mean.dtype == torch.float32
    back = half.float()
    assert back.weight.dtype == back.running_mean.dtype == torch.float32


def test_float64_statistics_stay_float64_until_they_are_cast() -> None:
    layer = bn.BatchNorm2d(3).double()
    layer(torch.randn(8, 3, 4, 4, dtype=torch.float64))
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float64
    digits = layer.running_mean.clone()
    layer.half()
    assert layer.running_mean.dtype == torch.float32
    assert torch.equal(layer.running_mean, digits.float())


def test_in_bfloat16_a_running_mean_reaches_what_it_follows() -> None:
    """With buffers in bfloat16 it sticks at 2.03 of 3."""
    layer = bn.BatchNorm1d(2, momentum=0.01).bfloat16()
    x = torch.full((4, 2), 3.0).bfloat16()
    for _ in range(1000):
        layer(x)
    assert_close(
        layer.running_mean, to_float64([3 * (1 - 0.99**1000)] * 2), dtype="float32", quantity="running_mean", scale=100
    )


@pytest.mark.parametrize("assign", [True, False])
def test_a_half_precision_checkpoint_gives_float32_statistics(assign: bool) -> None:
    state = {k: t.bfloat16() if t.is_floating_point() else t for k, t in nn.BatchNorm2d(3).state_dict().items()}
    layer = bn.BatchNorm2d(3)
    layer.load_state_dict(state, assign=assign)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert layer.weight.dtype == (torch.bfloat16 if assign else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_as_in_torch(training: bool, dtype: torch.dtype) -> None:
    ours, theirs, shape = both("2d", "default", torch.float32)
    x = torch.randn(shape).to(dtype)
    for layer in (ours, theirs):
        layer.train(training)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), theirs(x)
    assert a.dtype == b.dtype
    # Both are rounded once, so they may differ by a unit in the last place.
    near = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    assert ((a - b).double().abs() <= near * (b.double().abs() + 1e-3)).all()
    assert ours.running_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_input_with_float32_parameters(dtype: torch.dtype) -> None:
    ours, theirs, shape = both("2d", "default", torch.float32)
    x = torch.randn(shape).to(dtype)
    a, b = ours(x), theirs(x)
    assert a.dtype == b.dtype == dtype
    assert_same_state_nearly(ours, theirs)


def assert_same_state_nearly(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        assert_close(a.float(), to_float64(b), dtype="float32", quantity="y", scale=10, what=name)


@pytest.mark.parametrize("training", [True, False])
def test_the_memory_format_is_kept(training: bool) -> None:
    layer = bn.BatchNorm2d(3, activation="relu").train(training)
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x, residual=torch.randn(4, 3, 5, 5))
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y, x, torch.randn(y.shape))
    assert dx.is_contiguous(memory_format=torch.channels_last)
    layer.to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_a_far_mean_costs_no_digits(mean: float, layout: torch.memory_format) -> None:
    """Issue 2: y within 5e-6 of the float64 result on the same input (torch at 1e4: 3e-4, channels_last 7e-3)."""
    x = (torch.randn(16, 3, 28, 28, dtype=torch.float64) + mean).float().contiguous(memory_format=layout)
    y = bn.BatchNorm2d(3)(x)
    y64 = nn.BatchNorm2d(3).double()(x.double().contiguous())
    assert (y.double() - y64).abs().max() <= 5e-6


# Other people's tools


def test_what_looks_for_batch_norm_finds_it() -> None:
    for layer in (bn.BatchNorm1d(3), bn.BatchNorm2d(3), bn.BatchNorm3d(3), bn.BatchNorm(3)):
        assert isinstance(layer, _BatchNorm)
        assert layer._version == 2
        assert layer.__constants__ == nn.BatchNorm2d.__constants__
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(bn.BatchNorm2d(3)))
    assert isinstance(converted[0], nn.SyncBatchNorm)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_bn_gives_what_it_gives_with_torchs_layers(momentum: float | None) -> None:
    models = [nn.Sequential(nn.Linear(5, 3), by(3, momentum=momentum), nn.Dropout(0.5)) for by in PAIRS["1d flat"][:2]]
    models[0].load_state_dict(models[1].state_dict())
    loader = [torch.randn(8, 5) for _ in range(4)]
    for model in models:
        model.eval()
        torch.optim.swa_utils.update_bn(loader, model)
        assert not model.training
        assert model[1].momentum == momentum
    assert_same_state_nearly(*models)
    assert int(models[0][1].num_batches_tracked) == 4


def test_fuse_conv_bn_eval_takes_it() -> None:
    conv, layer = nn.Conv2d(2, 3, 3).double().eval(), bn.BatchNorm2d(3).double()
    layer(torch.randn(8, 3, 4, 4, dtype=torch.float64))
    layer.eval()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    fused = torch.nn.utils.fuse_conv_bn_eval(conv, layer)
    assert_close(fused(x), to_float64(layer(conv(x))), dtype="float64", quantity="y")


def test_functional_call_and_hooks_work() -> None:
    layer, x = bn.BatchNorm1d(3).eval(), torch.randn(8, 3)
    other = {"weight": torch.full((3,), 2.0), "bias": torch.ones(3)}
    y = torch.func.functional_call(layer, other, (x,))
    assert torch.allclose(y, 2 * layer(x) + 1)
    seen = []
    layer.register_forward_hook(lambda m, args, out: seen.append(out))
    result = layer(x)
    assert seen == [result]


def test_any_rank() -> None:
    layer, x = bn.BatchNorm(3, dtype=torch.float64), torch.randn(2, 3, 2, 2, 2, 2, dtype=torch.float64)
    theirs = nn.BatchNorm3d(3, dtype=torch.float64)
    expected = theirs(x.flatten(4)).view(x.shape)
    assert_close(layer(x), to_float64(expected), dtype="float64", quantity="y")
    assert_same_state(layer, theirs)
