"""One set of running statistics for each domain."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import ArgumentError, StateError
from model_state import everything

NAMES = ["source", "target", "other"]
KEYS = ("running_mean", "running_var", "num_batches_tracked")


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 3, 2), bn.BatchNorm2d(3, **options), nn.Flatten(1), bn.BatchNorm1d(27, **options))


def data(shift: float = 0.0) -> Tensor:
    return torch.randn(6, 2, 4, 4) + shift


def statistics(model: nn.Module) -> list[Tensor]:
    return [getattr(layer, key).clone() for layer in (model[1], model[3]) for key in KEYS]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_each_domain_is_a_model_of_its_own_but_for_weight_and_bias(momentum: float | None) -> None:
    shared = bn.domains(network(momentum=momentum), NAMES)
    alone = {name: network(momentum=momentum) for name in NAMES}
    for name, shift in (("target", 5.0), ("source", 0.0), ("target", 6.0), ("other", -3.0)):
        x = data(shift)
        with bn.use_domain(shared, name):
            assert torch.equal(shared(x), alone[name](x))
    for name in NAMES:
        with bn.use_domain(shared, name):
            assert same(statistics(shared), statistics(alone[name]))
            x = data()
            assert torch.equal(shared.eval()(x), alone[name].eval()(x))
        shared.train()
    assert len(list(shared.parameters())) == len(list(alone["source"].parameters()))


def test_the_first_is_in_use_outside_of_blocks_and_all_begin_with_what_the_layer_had() -> None:
    model = network()
    model(data(2.0))
    before = statistics(model)
    bn.domains(model, NAMES)
    for name in NAMES:
        with bn.use_domain(model, name):
            assert same(statistics(model), before)
    model(data())
    assert model[1].num_batches_tracked == 2
    assert model[1].num_batches_tracked__target == 1


def test_blocks_nest_and_an_exception_brings_back_the_domain_before() -> None:
    model = bn.domains(network(), NAMES)

    def fails() -> None:
        with bn.use_domain(model, "other"):
            model(data())
            raise KeyboardInterrupt

    with bn.use_domain(model, "target"):
        with pytest.raises(KeyboardInterrupt):
            fails()
        model(data())
        with bn.use_domain(model[1], "source"):
            model(data())
    model(data())
    counts = {key: int(t) for key, t in model.state_dict().items() if "batches" in key}
    assert counts == {
        "1.num_batches_tracked": 2,
        "1.num_batches_tracked__target": 1,
        "1.num_batches_tracked__other": 1,
        "3.num_batches_tracked": 1,
        "3.num_batches_tracked__target": 2,
        "3.num_batches_tracked__other": 1,
    }


@pytest.mark.parametrize("inside", [None, "target", "other"])
@pytest.mark.parametrize("assign", [False, True])
def test_the_state_dict_is_the_same_whatever_domain_is_in_use(inside: str | None, assign: bool) -> None:
    model, twin = bn.domains(network(), NAMES), bn.domains(network(), NAMES)
    for shift, name in enumerate(NAMES):
        with bn.use_domain(model, name):
            model(data(shift))
    state = {key: t.clone() for key, t in model.state_dict().items()}
    with bn.use_domain(model, inside or "source"):
        now = model.state_dict()
        assert now.keys() == state.keys()
        assert all(torch.equal(now[key], state[key]) for key in state)
    with bn.use_domain(twin, inside or "source"):
        twin.load_state_dict(copy.deepcopy(state), assign=assign)
    for name in NAMES:
        with bn.use_domain(model, name), bn.use_domain(twin, name):
            assert same(statistics(model), statistics(twin))
    # The first domain's keys are those of a model without domains.
    missing, unexpected = network().load_state_dict(state, strict=False)
    assert missing == []
    assert all("__" in key for key in unexpected)
    with pytest.raises(RuntimeError):
        twin.load_state_dict(network().state_dict())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_the_domains_and_the_one_in_use(how: Any) -> None:
    model = bn.domains(network(), NAMES)
    with bn.use_domain(model, "target"):
        model(data(3.0))
        twin = how(model)
        inside = statistics(model)
    assert same(statistics(twin), inside)
    with bn.use_domain(twin, "source"):
        assert same(statistics(twin), statistics(model))
    twin(data())
    assert model[1].num_batches_tracked__target == 1


def test_half_precision_keeps_every_domains_statistics() -> None:
    model = bn.domains(bn.BatchNorm1d(3), ["source", "target"])
    with bn.use_domain(model, "target"):
        model(torch.randn(8, 3) + 1 / 3)
    before = model.running_mean__target.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.running_mean__target, before)
    assert model.weight.dtype == torch.bfloat16


def test_recalibrate_and_fold_work_on_the_domain_in_use() -> None:
    model, plain = bn.domains(network(), ["source", "target"]), network()
    batches = [data(4.0), data(5.0)]
    bn.recalibrate(plain, batches)
    before = statistics(model)
    with bn.use_domain(model, "target"):
        bn.recalibrate(model, batches)
        assert same(statistics(model), statistics(plain))
        folded = bn.fold(model, data(), measure=False)
        x = data()
        torch.testing.assert_close(folded(x), plain.eval()(x), rtol=1e-5, atol=1e-5)
    assert same(statistics(model), before)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with bn.use_domain(model, "target"):
            return model(x)

    whole = everything(model)
    with pytest.raises(StateError) as caught:
        bn.recalibrate(model, batches, forward=forward)
    assert str(caught.value) == (
        "use_domain: expected a model whose domain nobody else holds, got one inside recalibrate. "
        "Choose it around recalibrate, and give each thread a copy of the model."
    )
    assert everything(model) == whole


def test_keep_domain_makes_a_plain_model_that_revert_takes() -> None:
    model, plain = bn.domains(network(), NAMES), network()
    x = data(3.0)
    with bn.use_domain(model, "target"):
        model(x)
    plain(x)
    rows: list[Any] = []
    assert isinstance(bn.revert(model, report=rows.append)[1], bn.BatchNorm2d)
    assert "torch.nn.BatchNorm2d has nothing for domains=['source', 'target', 'other']" in str(rows[0])
    bn.keep_domain(model, "target")
    assert same(statistics(model), statistics(plain))
    assert everything(model)["attributes"] == everything(plain)["attributes"]
    assert type(bn.revert(model)[1]) is nn.BatchNorm2d


def test_deferred_and_accumulated_updates_go_to_their_domain() -> None:
    model, alone = bn.domains(network(), ["source", "target"]), {n: network() for n in ("source", "target")}
    batches = [("source", data()), ("target", data(4.0)), ("target", data(5.0))]
    before = copy.deepcopy(model.state_dict())
    with bn.defer_updates(model) as updates:
        for name, x in batches:
            with bn.use_domain(model, name):
                model(x)
                alone[name](x)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    with bn.use_domain(model, "target"):
        updates.commit()
    for name in ("source", "target"):
        with bn.use_domain(model, name):
            assert same(statistics(model), statistics(alone[name]))
    with bn.use_domain(model, "target"), bn.accumulate_statistics(model):
        for _, x in batches[1:]:
            model(x)
    with bn.accumulate_statistics(alone["target"]):
        for _, x in batches[1:]:
            alone["target"](x)
    with bn.use_domain(model, "target"):
        assert same(statistics(model), statistics(alone["target"]))
    assert model[1].num_batches_tracked == 1


def test_another_thread_sees_the_domain_and_may_not_choose_another() -> None:
    model = bn.domains(network(), ["source", "target"])
    seen: list[Any] = []

    def other() -> None:
        model(data())
        try:
            with bn.use_domain(model, "source"):
                pass
        except StateError as error:
            seen.append(str(error))

    with bn.use_domain(model, "target"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert model[1].num_batches_tracked__target == 1
    assert seen == [
        "use_domain: expected a model whose domain nobody else holds, got one in the use_domain of another thread. "
        "Choose it around recalibrate, and give each thread a copy of the model."
    ]
    other()
    assert len(seen) == 1


def test_torchs_tools_that_would_lose_the_domains_are_told() -> None:
    model = bn.domains(network(), ["source", "target"])
    assert "domains=['source', 'target']" in repr(model)
    with pytest.raises(ArgumentError):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


@pytest.mark.parametrize(
    ("names", "got"),
    [
        ("target", "domains: expected a list of different names, got 'target'. "),
        ([], "domains: expected a list of different names, got []. "),
        (["a", "a"], "domains: expected a list of different names, got ['a', 'a']. "),
        (["a", "b.c"], "domains: expected names that are Python identifiers, got 'b.c'. "),
    ],
)
def test_names_that_make_no_keys_are_refused(names: Any, got: str) -> None:
    model = network()
    before = everything(model)
    with pytest.raises(ArgumentError) as caught:
        bn.domains(model, names)
    assert str(caught.value).startswith(got)
    assert everything(model) == before


def test_each_misuse_has_its_message_and_changes_nothing() -> None:
    model = network()
    with pytest.raises(ArgumentError) as caught, bn.use_domain(model, "target"):
        pass
    assert str(caught.value) == (
        'use_domain: expected a model with domains, got one without. Call domains(model, ["source", "target"]) first.'
    )
    with pytest.raises(ArgumentError) as caught:
        bn.domains(nn.Sequential(bn.BatchNorm1d(3), nn.BatchNorm1d(3).eval()), ["a"])
    assert str(caught.value) == (
        "domains: expected layers of this library, got torch.nn's BatchNorm1d at '1'. Call batchnorm.convert(model)."
    )
    bn.domains(model, ["source", "target"])
    before = everything(model)
    with pytest.raises(ArgumentError) as caught:
        bn.domains(model, ["a"])
    assert str(caught.value) == (
        "domains: expected layers without domains, got 1 with ['source', 'target']. "
        "Call keep_domain(model, name) first."
    )
    with pytest.raises(ArgumentError) as caught, bn.use_domain(model, "targte"):
        pass
    assert str(caught.value) == (
        "use_domain: expected one of the domains ['source', 'target'], got 'targte'. Correct the name."
    )
    with bn.use_domain(model, "target"), pytest.raises(StateError) as state:
        bn.keep_domain(model, "target")
    assert str(state.value) == (
        "keep_domain: expected a call outside of use_domain, got one inside. Leave the block first."
    )
    with bn.accumulate_statistics(model), pytest.raises(StateError) as state:
        bn.keep_domain(model, "target")
    assert str(state.value) == (
        "keep_domain: expected a call outside of defer_updates and accumulate_statistics, got one inside. "
        "Leave the block first."
    )
    assert everything(model) == before


@pytest.mark.slow
def test_compiled_models_follow_the_domain() -> None:
    model, plain = bn.domains(network(), ["source", "target"]), bn.domains(network(), ["source", "target"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in ("source", "target", "target", "source"):
        x = data()
        with bn.use_domain(model, name), bn.use_domain(plain, name):
            torch.testing.assert_close(compiled(x), plain(x))
    for key, t in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], t)
