"""``convert(fuse=True)``: what is joined computes the same, what might not is left, and all of it can be undone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.lifecycle.conversion import fuse as fusing
from batchnorm.lifecycle.conversion.report import Conversion, Fusion
from tolerances import assert_close, to_float64

X = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SCALE = 3.0


class Net(nn.Module):
    """Two convolutions with norms; what is done with them is the forward of each test."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.c2, self.n2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.slope = 0.2
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


def net(forward: Callable[..., Any]) -> nn.Module:
    made = type("Net", (Net,), {"forward": forward})().double()
    torch.manual_seed(1)
    for p in made.parameters():
        nn.init.normal_(p, 0.5)
    return made


def joined(model: nn.Module, x: Any = X) -> dict[str, Fusion]:
    """Convert with ``fuse=True`` and check that the model does what it did, in training and in eval mode."""
    twin, keys = copy.deepcopy(model), list(model.state_dict())
    reports: list[Conversion] = []
    assert bn.convert(model, fuse=True, example_inputs=x, report=reports.append) is model
    assert list(model.state_dict()) == keys
    assert_same(model, twin, x)
    return {fusion.name: fusion for fusion in reports[0].fusions}


def assert_same(model: nn.Module, twin: nn.Module, x: Any) -> None:
    dy = torch.randn(X.shape, dtype=torch.float64)
    for training in (True, False):
        found = []
        for each in (model, twin):
            each.train(training)
            leaf = x.clone().requires_grad_()
            y = each(leaf)
            parameters = list(each.parameters())
            gradients = torch.autograd.grad(y, [leaf, *parameters], dy, allow_unused=True)
            found.append([y, *(g for g in gradients if g is not None), *each.buffers()])
        for a, b in zip(*found, strict=True):
            assert_close(a.double(), to_float64(b), dtype="float64", quantity="y", scale=100.0)


def relu_function(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.n1(self.c1(x)))


def relu_in_place(self: Any, x: Tensor) -> Tensor:
    x = self.n1(self.c1(x))
    return F.relu(x, inplace=True)


def relu_of_torch(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.n1(self.c1(x)))


def relu_method(self: Any, x: Tensor) -> Tensor:
    return self.n1(self.c1(x)).relu()


def relu_method_in_place(self: Any, x: Tensor) -> Tensor:
    return self.n1(self.c1(x)).relu_()


def leaky(self: Any, x: Tensor) -> Tensor:
    return F.leaky_relu(self.n1(self.c1(x)), 0.3)


def gelu(self: Any, x: Tensor) -> Tensor:
    return F.gelu(self.n1(self.c1(x)))


def silu_twice(self: Any, x: Tensor) -> Tensor:
    return F.silu(self.n2(self.c2(F.silu(self.n1(self.c1(x)), inplace=True))))


def sigmoid(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.n1(self.c1(x)))


def tanh(self: Any, x: Tensor) -> Tensor:
    return self.n1(self.c1(x)).tanh()


def through_a_container(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.inner(x))


@pytest.mark.parametrize(
    "forward",
    [
        *(relu_function, relu_in_place, relu_of_torch, relu_method, relu_method_in_place),
        *(leaky, gelu, silu_twice, sigmoid, tanh, through_a_container),
    ],
)
def test_every_form_of_an_activation_in_the_forward_is_taken_out_of_it(forward: Callable[..., Any]) -> None:
    model = net(forward)
    kind, reference = type(model), copy.deepcopy(model)
    found = joined(model)
    assert {fusion.how for fusion in found.values()} == {"taken out of the forward of the model"}
    name = next(iter(found))
    assert model.get_submodule(name).activation is not None
    assert isinstance(model, kind)
    assert type(model).__name__ == "Net"
    bn.revert(model)
    assert type(model) is kind
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert [m.__dict__.keys() for m in model.modules()] == [m.__dict__.keys() for m in reference.modules()]
    model.load_state_dict(reference.state_dict())
    assert_same(model, reference, X)


def sum_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.act(self.n1(self.c1(x)))
    y = self.n2(self.c2(y))
    y += x
    return self.act(y)


def sum_of_two(self: Any, x: Tensor) -> Tensor:
    return F.relu(x + self.n2(self.c2(x)))


def sum_by_function(self: Any, x: Tensor) -> Tensor:
    return torch.add(self.n2(self.c2(x)), x).relu_()


def sum_by_method(self: Any, x: Tensor) -> Tensor:
    return F.leaky_relu(self.n2(self.c2(x)).add_(x), 0.1)


def sum_before_the_shortcut_is_known(self: Any, x: Tensor) -> Tensor:
    y = self.n2(self.c2(x))
    return F.relu(y + self.inner(x))


def sum_of_two_norms(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.n1(self.c1(x)) + self.n2(self.c2(x)))


@pytest.mark.parametrize(
    "forward",
    [
        *(sum_in_place, sum_of_two, sum_by_function, sum_by_method),
        *(sum_before_the_shortcut_is_known, sum_of_two_norms),
    ],
)
def test_every_form_of_an_addition_is_taken_over_as_the_residual(forward: Callable[..., Any]) -> None:
    model = net(forward)
    found = joined(model)
    assert found["n2"].followed_by.startswith("add + ")
    assert found["n2"].how == "taken out of the forward of the model"
    assert model.n2.activation in ("relu", "leaky_relu")
    for other in found.keys() - {"n2"}:
        fusion = found[other]
        assert fusion.reason == "the other norm of the sum takes it" or fusion.how == found["n2"].how
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        assert type(twin) is type(model)
        assert torch.equal(twin.eval()(X), model.eval()(X))


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.3), nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.Tanh()]
)
def test_an_activation_module_becomes_an_identity_in_its_place(act: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), act, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), act).double()
    written = repr(model)
    found = joined(model)
    assert [fusion.how for fusion in found.values()] == ["1 is an identity now"] * 2
    assert isinstance(model[1], nn.Identity)
    assert model[1] is model[4] is act
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(X), model(X))
    for each in (model, twin):
        bn.revert(each)
        assert repr(each) == written


class Importable(Net):
    """A model that pickle finds by its name."""

    def forward(self, image: Tensor, other: Tensor | None = None) -> Tensor:
        y = self.n2(self.c2(F.relu(self.n1(self.c1(image)))))
        y += image
        return self.act(y)


def test_a_rewritten_model_is_pickled_compiled_and_called_by_keyword() -> None:
    model = Importable().double()
    reports: list[Conversion] = []
    bn.convert(model, fuse=True, example_inputs={"image": X}, report=reports.append)
    assert [fusion.reason for fusion in reports[0].fusions] == ["", ""]
    model.eval()
    y = model(image=X)
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin) is type(model)
    assert torch.equal(twin(X), y)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(X), to_float64(y), dtype="float64", quantity="y")
    assert type(bn.revert(twin)) is Importable


def another_use(self: Any, x: Tensor) -> Tensor:
    y = self.n1(self.c1(x))
    return F.relu(y) + 0.1 * y


def returned(self: Any, x: Tensor) -> Tensor:
    self.kept = self.n1(self.c1(x))
    return F.relu(self.kept)


def not_ours(self: Any, x: Tensor) -> Tensor:
    return F.relu6(self.n1(self.c1(x)))


def other_gelu(self: Any, x: Tensor) -> Tensor:
    return F.gelu(self.n1(self.c1(x)), approximate="tanh")


def reads_an_attribute(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.n1(self.c1(x))) * self.slope


def sets_an_attribute(self: Any, x: Tensor) -> Tensor:
    self.calls = 1
    return F.relu(self.n1(self.c1(x)))


def with_block(self: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return F.relu(self.n1(self.c1(x)))


def asks_for_values(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.n1(self.c1(x)))
    return y if x.sum() > 1e9 else 2 * y


def goes_by_the_mode(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.n1(self.c1(x)))
    return 2 * y if self.training else y


def makes_a_tensor(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.n1(self.c1(x))) + torch.rand(1)


def written_into_its_input(self: Any, x: Tensor) -> Tensor:
    y = self.c1(x)
    y += self.n2(x)
    return F.relu(y)


def writes_in_place_beside(self: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x *= 2
    return F.relu(self.n1(self.c1(x)))


def helper(x: Tensor) -> Tensor:
    return 2 * x


def calls_a_helper(self: Any, x: Tensor) -> Tensor:
    return helper(F.relu(self.n1(self.c1(x))))


def broadcast(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.n1(self.c1(x)) + x.mean((2, 3), keepdim=True))


def sum_in_another_forward(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.inner(x) + x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (another_use, "its output has 2 uses"),
        (returned, "it is returned or kept beside what follows"),
        (not_ours, "relu6 is no activation that our layers have"),
        (other_gelu, "gelu is no activation that our layers have"),
        (reads_an_attribute, "its forward may depend on self.slope, which a recording would fix"),
        (sets_an_attribute, "its forward sets calls, which a recording would leave out"),
        (with_block, "its forward has a with block, which a recording would leave out"),
        (
            asks_for_values,
            "its forward cannot be recorded: TraceError: symbolically traced variables cannot be used as inputs to "
            "control flow",
        ),
        (goes_by_the_mode, "its forward goes another way in training than in eval mode"),
        (makes_a_tensor, "its forward makes tensors, which a recording would fix"),
        (written_into_its_input, "it is added in place to a tensor that is not the norm's"),
        (writes_in_place_beside, "its forward has an assignment in place, which a recording would make out of place"),
        (calls_a_helper, "its forward calls helper, which a recording would look through"),
        (broadcast, "its two parts differ in shape"),
        (sum_in_another_forward, "the sum is in another forward, that of the model, and cannot reach it"),
    ],
)
def test_what_cannot_be_proved_is_left_with_the_reason(forward: Callable[..., Any], reason: str) -> None:
    model = net(forward)
    reports: list[Conversion] = []
    bn.convert(model, fuse=True, example_inputs=X, report=reports.append)
    assert [fusion.reason for fusion in reports[0].fusions] == [reason]
    assert all(m.activation is None for m in model.modules() if isinstance(m, bn.BatchNorm2d))
    assert type(model).forward is forward


def test_hooks_that_would_see_other_values_keep_a_norm_and_its_activation_apart() -> None:
    def hook(*args: Any) -> None:
        pass

    def model() -> nn.Sequential:
        return nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), nn.ReLU()).double()

    for register, reason in (
        (lambda m: m[0][0].register_forward_hook(hook), "its hooks would see the activated output"),
        (lambda m: m[0][0].register_full_backward_hook(hook), "its hooks would see the activated output"),
        (lambda m: m[0].register_forward_hook(hook), "Sequential, which has hooks, sees it"),
        (lambda m: m[1].register_forward_pre_hook(hook), "ReLU, which has hooks, sees it"),
    ):
        hooked = model()
        register(hooked)
        assert joined(hooked)["0.0"].reason == reason
    harmless = model()
    harmless[0][0].register_forward_pre_hook(hook)
    assert joined(harmless)["0.0"].how == "1 is an identity now"


def test_an_activation_with_another_use_stays_and_is_taken_out_where_it_can() -> None:
    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.n1(self.act(self.c1(x))))

    model = Shared().double()
    assert joined(model)["n1"].how == "taken out of the forward of the model"
    assert type(model.act) is nn.ReLU
    twice = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)).double()
    twice.append(twice[1])
    assert joined(twice)["2"].reason == "the forward of torch's Sequential is not rewritten"


def test_a_norm_that_has_an_activation_and_one_that_is_not_reached_are_left() -> None:
    model = nn.Sequential(bn.BatchNorm2d(3, activation="tanh"), nn.ReLU()).double()
    model[0].never = nn.BatchNorm1d(3)
    found = joined(model)
    assert {name: fusion.reason for name, fusion in found.items()} == {"0": "it has an activation already, tanh"}


def test_without_an_example_or_with_one_that_fails_nothing_is_joined() -> None:
    for example, reason in (
        (None, "no example_inputs to find out what follows it"),
        (X[0, 0, 0], "the example could not be traced: ArgumentError: expected 4D input (got 1D input)"),
    ):
        reports: list[Conversion] = []
        model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double()
        bn.convert(model, fuse=True, example_inputs=example, report=reports.append)
        assert [(f.name, f.reason) for f in reports[0].fusions] == [("0", reason)]
        assert type(model[1]) is nn.ReLU


def test_a_join_that_computes_something_else_is_found_and_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fusing.with_activation
    monkeypatch.setattr(fusing, "with_activation", lambda layer, name, slope: right(layer, "leaky_relu", 0.001))
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)).double()
    reports: list[Conversion] = []
    bn.convert(model, fuse=True, example_inputs=X, report=reports.append)
    reason = reports[0].fusions[0].reason
    assert reason.endswith("of its size between the joined and the unjoined model")
    assert reports[0].check == ""
    assert (type(model[1]), model[0].activation) == (nn.ReLU, None)


def test_nothing_but_the_layers_changes_in_the_model_by_the_trace_and_the_check() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU()).double()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    bn.convert(model.train(), fuse=True, example_inputs=(X,))
    assert model.training
    assert all(torch.equal(a, state[name]) for name, a in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_layers_built_as_ours_are_joined_and_taken_apart_too() -> None:
    model = nn.Sequential(bn.BatchNorm2d(3), nn.ReLU()).double()
    assert joined(model)["0"].how == "1 is an identity now"
    bn.revert(model)
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.ReLU]
    assert "_converted_from" not in model[0].__dict__
