"""``convert`` and ``revert``: every kind of layer, and nothing of it lost."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from batchnorm.errors import ArgumentError
from batchnorm.lifecycle.conversion.report import Conversion
from tolerances import assert_close, to_float64

PAIRS: dict[str, tuple[type[nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d, bn.BatchNorm1d, (6, 3)),
    "2d": (nn.BatchNorm2d, bn.BatchNorm2d, (4, 3, 5, 2)),
    "3d": (nn.BatchNorm3d, bn.BatchNorm3d, (2, 3, 3, 2, 2)),
    "sync": (nn.SyncBatchNorm, bn.BatchNorm, (4, 3, 5)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "cumulative": {"momentum": None, "eps": 1e-3},
    "no affine": {"affine": False},
    "no tracking": {"track_running_stats": False},
    "no bias": {"bias": False},
}


class Named(nn.BatchNorm2d):
    """A subclass that only has a name."""


class Louder(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def seen(*args: Any) -> None:
    """A hook that can be pickled."""


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def identity_of_state(layer: nn.Module) -> dict[str, Any]:
    """The very objects that make up a layer's state, in their order."""
    return {
        "parameters": [(name, id(p)) for name, p in layer._parameters.items()],
        "buffers": [(name, id(b)) for name, b in layer._buffers.items()],
        "attributes": sorted(layer.__dict__),
        "requires_grad": [p.requires_grad for p in layer.parameters()],
        "training": layer.training,
        "type": type(layer),
        "hooks": {k: list(v.items()) for k, v in layer.__dict__.items() if "hooks" in k and isinstance(v, dict)},
    }


def reported(model: nn.Module, **options: Any) -> tuple[nn.Module, Conversion]:
    reports: list[Conversion] = []
    model = bn.convert(model, report=reports.append, **options)
    return model, reports[0]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_layer_becomes_ours_and_comes_back_the_very_same(pair: str, options: str) -> None:
    theirs, ours, shape = PAIRS[pair]
    if pair == "sync" and "bias" in OPTIONS[options]:
        pytest.skip("torch.nn.SyncBatchNorm takes no bias=")
    layer = theirs(3, **OPTIONS[options], dtype=torch.float64).train(options != "cumulative")
    twin, x = copy.deepcopy(layer), torch.randn(shape, dtype=torch.float64)
    model = nn.Sequential(nn.Identity(), layer)
    before, keys = identity_of_state(layer), list(model.state_dict())
    assert bn.convert(model) is model
    assert type(model[1]) is ours
    assert identity_of_state(layer)["parameters"] == before["parameters"]
    assert identity_of_state(layer)["buffers"] == before["buffers"]
    assert list(model.state_dict()) == keys
    assert_close(model(x), to_float64(twin(x)), dtype="float64", quantity="y", scale=10.0)
    built_as_ours = ours(3, **OPTIONS[options])
    assert set(layer.__dict__) - {"_converted_from"} == set(built_as_ours.__dict__)
    assert bn.revert(model) is model
    assert identity_of_state(layer) == before
    assert repr(layer) == repr(twin)


def test_the_hooks_of_every_kind_go_on_running_and_their_handles_remove_them() -> None:
    model, heard = nn.Sequential(nn.BatchNorm1d(3)), []

    def hears(name: str) -> Any:
        return lambda *args: heard.append(name)

    layer = model[0]
    handles = [
        layer.register_forward_pre_hook(hears("pre")),
        layer.register_forward_pre_hook(hears("pre with kwargs"), with_kwargs=True),
        layer.register_forward_hook(hears("post")),
        layer.register_forward_hook(hears("always"), always_call=True, with_kwargs=True),
        layer.register_full_backward_pre_hook(hears("backward pre")),
        layer.register_full_backward_hook(hears("backward")),
        layer.register_state_dict_pre_hook(hears("state")),
        layer.register_state_dict_post_hook(hears("state post")),
        layer.register_load_state_dict_pre_hook(hears("load")),
        layer.register_load_state_dict_post_hook(hears("load post")),
    ]
    names = ["pre", "pre with kwargs", "post", "always", "backward pre", "backward"]
    names += ["state", "state post", "load", "load post"]

    def everything() -> list[str]:
        heard.clear()
        model(torch.randn(4, 3, requires_grad=True)).square().sum().backward()
        model.load_state_dict(model.state_dict())
        return heard

    before = list(everything())
    assert before == names
    bn.convert(model)
    assert everything() == names
    with pytest.raises(ValueError):
        model(torch.randn(4))
    assert heard[-1] == "always"
    bn.revert(model)
    assert everything() == names
    bn.convert(model)
    for handle in handles:
        handle.remove()
    assert everything() == []


def test_an_optimizer_made_before_goes_on_training_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for change in (lambda m: m, bn.convert, bn.revert):
        change(model)
        before = model[1].weight.detach().clone()
        optimizer.zero_grad()
        (model(torch.randn(8, 4)) * torch.randn(8, 3)).sum().backward()
        optimizer.step()
        assert not torch.equal(model[1].weight, before)


def test_a_layer_in_two_places_stays_one_layer_and_is_reported_once() -> None:
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.Linear(3, 3), shared)})
    _, report = reported(model)
    assert model["a"] is model["b"][1] is shared
    assert [(each.name, each.after) for each in report.layers] == [("a, b.1", "BatchNorm1d")]
    bn.revert(model)
    assert model["a"] is model["b"][1] is shared
    assert type(shared) is nn.BatchNorm1d


def test_freezing_modes_and_attributes_stay() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).bfloat16()
    model[0].eval()
    model[0].weight.requires_grad_(False)
    model[0].note = "from the user"
    model[0].momentum = None
    model[1].extra = nn.Linear(2, 2)
    bn.convert(model)
    assert (model[0].training, model[1].training) == (False, True)
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (False, True)
    assert model[0].note == "from the user"
    assert model[0].momentum is None
    assert isinstance(model[1].extra, nn.Linear)
    assert model[0].running_mean.dtype == torch.bfloat16


def test_deepcopy_and_pickle_of_what_was_converted_can_be_reverted() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3), Named(3)).eval()
    model[0].register_forward_hook(seen)
    x = torch.randn(4, 3, 2, 2)
    bn.convert(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin] == [type(m) for m in model]
        assert torch.equal(twin(x), model(x))
        bn.revert(twin)
        assert [type(m) for m in twin] == [nn.BatchNorm2d, nn.SyncBatchNorm, Named]
        assert list(twin[0]._forward_hooks.values()) == [seen]
        assert not any("_converted_from" in m.__dict__ for m in twin)


def test_a_parametrized_layer_stays_parametrized() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    twin, keys = copy.deepcopy(model), list(model.state_dict())
    original = model[0].parametrizations.weight.original
    bn.convert(model)
    assert isinstance(model[0], bn.BatchNorm1d)
    assert parametrize.is_parametrized(model[0], "weight")
    assert model[0].parametrizations.weight.original is original
    assert torch.equal(model[0].weight, 2 * original)
    assert list(model.state_dict()) == keys
    x = torch.randn(8, 3)
    assert_close(model(x), twin.double()(x.double()), dtype="float32", quantity="y")
    copied = copy.deepcopy(model)
    assert isinstance(copied[0], bn.BatchNorm1d)
    assert torch.equal(copied[0].weight, model[0].weight)
    bn.revert(model)
    assert type(model[0]).__bases__ == (nn.BatchNorm1d,)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.BatchNorm1d


def test_a_pruned_layer_stays_pruned() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    prune.custom_from_mask(model[0], "weight", torch.tensor([1.0, 0.0, 1.0]))
    x = torch.randn(8, 3, dtype=torch.float64)
    model.double()
    y = model(x)
    bn.convert(model)
    assert_close(model(x), to_float64(y), dtype="float64", quantity="y")
    bn.revert(model)
    prune.remove(model[0], "weight")
    assert type(model[0]) is nn.BatchNorm1d


def test_lazy_layers_become_our_lazy_layers_and_then_our_layers() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.LazyBatchNorm2d(eps=1e-3), nn.Flatten(), nn.LazyBatchNorm1d(affine=False))

    model = network()
    bn.convert(model)
    assert [type(m) for m in model] == [bn.LazyBatchNorm2d, nn.Flatten, bn.LazyBatchNorm1d]
    untouched = bn.revert(bn.convert(network()))
    assert [type(m) for m in untouched] == [nn.LazyBatchNorm2d, nn.Flatten, nn.LazyBatchNorm1d]
    untouched(torch.randn(4, 3, 2, 2))
    assert [type(m) for m in untouched] == [nn.BatchNorm2d, nn.Flatten, nn.BatchNorm1d]
    model(torch.randn(4, 3, 2, 2))
    assert [type(m) for m in model] == [bn.BatchNorm2d, nn.Flatten, bn.BatchNorm1d]
    assert (model[0].num_features, model[0].eps, model[2].num_features, model[2].affine) == (3, 1e-3, 12, False)
    bn.revert(model)
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.Flatten, nn.BatchNorm1d]
    materialized = nn.Sequential(nn.LazyBatchNorm1d())
    materialized(torch.randn(4, 3))
    assert type(bn.convert(materialized)[0]) is bn.BatchNorm1d


@pytest.mark.parametrize("lazy", [False, True])
def test_a_model_that_is_a_layer_comes_back_new_with_the_same_tensors_and_hooks(lazy: bool) -> None:
    layer: nn.Module = nn.LazyBatchNorm1d() if lazy else nn.BatchNorm1d(3)
    heard: list[nn.Module] = []
    handle = layer.register_forward_hook(lambda module, args, y: heard.append(module))
    layer.register_load_state_dict_pre_hook(lambda module, *args: heard.append(module))
    new = bn.convert(layer)
    assert new is not layer
    assert type(layer) is (nn.LazyBatchNorm1d if lazy else nn.BatchNorm1d)
    assert type(new) is (bn.LazyBatchNorm1d if lazy else bn.BatchNorm1d)
    assert new.weight is layer.weight and new.running_mean is layer.running_mean
    new(torch.randn(4, 3))
    new.load_state_dict(new.state_dict())
    assert heard == [new, new]
    back = bn.revert(new)
    assert back is not new
    assert type(back) is nn.BatchNorm1d
    assert back.weight is layer.weight
    handle.remove()
    heard.clear()
    back(torch.randn(4, 3))
    assert heard == []
    if not lazy:
        layer(torch.randn(4, 3))
        assert heard == [layer]


def test_what_is_left_as_it_was_is_named_with_the_reason() -> None:
    replaced, clashing, spoilt = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    replaced.forward = lambda input: input  # type: ignore[method-assign]
    clashing.activation = "mine"  # type: ignore[assignment]
    del spoilt.num_batches_tracked
    model = nn.Sequential(Louder(3), replaced, clashing, spoilt, bn.BatchNorm2d(3), Named(3))
    before = [identity_of_state(layer) for layer in model]
    _, report = reported(model)
    assert str(report).splitlines() == [
        "convert: 1 layers changed, 5 left as they were",
        "  0  Louder       left:  Louder is a subclass of torch.nn.BatchNorm2d with forward of its own",
        "  1  BatchNorm2d  left:  its forward was replaced on the instance",
        "  2  BatchNorm2d  left:  it has an attribute of its own where ours has one: activation",
        "  3  BatchNorm2d  left:  it has no num_batches_tracked",
        "  4  BatchNorm2d  left:  is ours already",
        "  5  Named        ->     BatchNorm2d",
    ]
    assert [identity_of_state(layer) for layer in model][:5] == before[:5]
    bn.revert(model)
    assert type(model[5]) is Named


def test_what_revert_leaves_is_named_with_the_reason() -> None:
    class Ours(bn.BatchNorm2d):
        pass

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bn.BatchNorm2d(3, activation="relu")

    model = nn.Sequential(
        bn.BatchNorm(3), bn.BatchNorm2d(3, too_few="running"), Ours(3), Holder(), bn.FrozenBatchNorm2d(3)
    )
    before = [identity_of_state(m) for m in model.modules()]
    reports: list[Conversion] = []
    bn.revert(model, report=reports.append)
    assert [(each.name, each.reason) for each in reports[0].left] == [
        ("0", "BatchNorm takes an input of any rank, and torch.nn has no such layer"),
        ("1", "torch.nn.BatchNorm2d has nothing for too_few='running'"),
        ("2", "Ours is a subclass of batchnorm.BatchNorm2d"),
        ("3.norm", "its activation relu has no place as a module: it does not stand in an nn.Sequential"),
        ("4", "torch.nn has no frozen layer, and this one was built as ours"),
    ]
    assert [identity_of_state(m) for m in model.modules()] == before


def test_layers_built_as_ours_become_torchs_with_the_activation_after_them() -> None:
    model = nn.Sequential(
        bn.BatchNorm2d(3, activation="leaky_relu", negative_slope=0.3), nn.Conv2d(3, 2, 1), bn.BatchNorm2d(2, eps=0.1)
    ).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    x, keys, parameters = torch.randn(2, 3, 4, 4), list(model.state_dict()), list(model.parameters())
    y = model(x)
    bn.revert(model)
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.LeakyReLU, nn.Conv2d, nn.BatchNorm2d]
    assert model[1].negative_slope == 0.3
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_close(model(x), to_float64(y), dtype="float32", quantity="y")


def test_an_interruption_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d(), nn.BatchNorm1d(3))
    layer = nn.BatchNorm1d(3)
    layer.register_forward_hook(seen)
    layer.register_forward_pre_hook(layer.__class__.extra_repr.__get__(layer))
    layer.register_load_state_dict_pre_hook(seen)

    def interrupt(report: Conversion) -> None:
        raise KeyboardInterrupt

    for subject in (model, layer):
        for function in (bn.convert, bn.revert):
            before = [identity_of_state(m) for m in subject.modules()]
            with pytest.raises(KeyboardInterrupt):
                function(subject, report=interrupt)
            assert [identity_of_state(m) for m in subject.modules()] == before
            subject = bn.convert(subject)


def test_what_is_no_model_and_inputs_without_fuse_are_refused() -> None:
    with pytest.raises(ArgumentError) as error:
        bn.convert([nn.BatchNorm1d(3)])  # type: ignore[arg-type]
    assert (
        str(error.value) == "convert: expected a torch.nn.Module, got list. Hand over the module that holds the layers."
    )
    with pytest.raises(ArgumentError) as error:
        bn.revert(3)  # type: ignore[arg-type]
    assert (
        str(error.value) == "revert: expected a torch.nn.Module, got int. Hand over the module that holds the layers."
    )
    with pytest.raises(ArgumentError) as error:
        bn.convert(nn.BatchNorm1d(3), example_inputs=torch.randn(2, 3))
    assert str(error.value) == (
        "convert: expected example_inputs with fuse=True alone, got fuse=False. "
        "They are for finding out what can be joined: add fuse=True."
    )


def test_converting_twice_and_joining_later_is_taken_back_as_a_whole() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    before = [identity_of_state(m) for m in model.modules()]
    bn.convert(bn.convert(model))
    bn.convert(model, fuse=True, example_inputs=torch.randn(2, 3, 4, 4))
    bn.convert(model, fuse=True, example_inputs=torch.randn(2, 3, 4, 4))
    assert model[0].activation == "relu"
    bn.revert(bn.revert(model))
    assert [identity_of_state(m) for m in model.modules()] == before


def test_every_layer_gets_the_process_group_and_revert_takes_it_away() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), bn.BatchNorm1d(3), nn.SyncBatchNorm(3), bn.FrozenBatchNorm2d(3))
    kept = list(model)
    done: list[Conversion] = []
    convert = bn.convert(model, process_group="world", report=done.append)
    assert convert is model
    assert [getattr(layer, "process_group", None) for layer in model] == ["world", "world", "world", None]
    assert [type(layer) for layer in model] == [bn.BatchNorm2d, bn.BatchNorm1d, bn.BatchNorm, bn.FrozenBatchNorm2d]
    assert [layer.reason for layer in done[0].left] == ["is ours already"]
    assert all(a is b for a, b in zip(kept, model, strict=True))
    assert [layer.process_group for layer in pickle.loads(pickle.dumps(model))[:3]] == ["world"] * 3
    bn.convert(model)
    assert model[0].process_group == "world"
    bn.revert(model)
    assert [type(layer) for layer in model[:3]] == [nn.BatchNorm2d, nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert [layer.process_group for layer in model[1:3]] == [None, None]
    assert not any(name.startswith("_ranks") for layer in model for name in vars(layer))


def test_a_group_taken_away_does_not_come_back_with_revert() -> None:
    model = nn.Sequential(bn.BatchNorm(3, process_group="world"), nn.SyncBatchNorm(3))
    bn.convert(model, process_group=None)
    assert [layer.process_group for layer in model] == [None, None]
    done: list[Conversion] = []
    bn.revert(model, report=done.append)
    assert [layer.reason for layer in done[0].left] == [
        "BatchNorm takes an input of any rank, and torch.nn has no such layer",
        "it lost its process group since, and torch.nn.SyncBatchNorm always has one",
    ]


def test_what_is_no_process_group_changes_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ArgumentError) as error:
        bn.convert(model, process_group="everyone")  # type: ignore[arg-type]
    assert str(error.value) == (
        'convert: expected a process_group of None, "world" or a ProcessGroup that this rank belongs to, got '
        "'everyone'. "
        'torch.distributed.new_group returns one; "world" is the default group.'
    )
    assert type(model[0]) is nn.BatchNorm2d


def test_a_lazy_layer_takes_its_group_along() -> None:
    model = bn.convert(nn.Sequential(nn.LazyBatchNorm1d()), process_group="world")
    model(torch.randn(4, 3))
    assert (type(model[0]), model[0].process_group) == (bn.BatchNorm1d, "world")
    bn.revert(model)
    assert type(model[0]) is nn.BatchNorm1d
