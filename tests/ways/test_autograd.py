"""What autograd is told: tensors changed between forward and backward, hooks, graphs kept, gradients of every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.functional import batch_norm
from ways.common import activations, agree, both_modes, data, in_a_fork, pair, same, step

way = pytest.mark.way
WHERE = "autograd"
X, OTHER, DY = data(), data(seed=2), data(seed=3)
MASK = torch.arange(X[:, :1].numel()).view_as(X[:, :1]) % 3 != 0
CHANGED = "modified by an inplace operation"


def gradients(y: Tensor, layer: nn.Module, *leaves: Tensor, dy: Tensor = DY, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(y, [*leaves, *layer.parameters()], dy, **options))


def unless_changed(run: Callable[[], list[Tensor]]) -> list[Tensor] | None:
    """What ``run`` gives, or None where autograd says that a tensor was changed."""
    try:
        return run()
    except RuntimeError as error:
        if CHANGED not in str(error):
            raise
        return None


@way(WHERE, "a mask changed between forward and backward", "an error, by its version counter")
@both_modes
@activations
def test_a_changed_mask_raises(activation: str | None, training: bool) -> None:
    layer = pair(activation, training=training)[0][0]
    leaf, mask = X.clone().requires_grad_(), MASK.clone()
    y = layer(leaf, mask=mask)
    mask.logical_not_()
    with pytest.raises(RuntimeError, match=CHANGED):
        gradients(y, layer, leaf)


@way(WHERE, "the input or weight changed between forward and backward", "an error where torch's layer gives one")
@both_modes
@activations
@pytest.mark.parametrize("what", ["input", "weight"])
def test_changed_operands_raise(what: str, activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        leaf = X.clone().requires_grad_()
        x = leaf * 1
        y = layer(x)
        with torch.no_grad():
            (x if what == "input" else layer[0].weight).add_(1)  # type: ignore[index]
        with pytest.raises(RuntimeError) as caught:
            gradients(y, layer, leaf)
        return CHANGED in str(caught.value)

    agree(scenario, activation, training=training)


@way(WHERE, "a bias changed between forward and backward, not needed there", "right, as with torch's layer")
@both_modes
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_changed_bias(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        leaf = X.clone().requires_grad_()
        y = layer(leaf)
        with torch.no_grad():
            layer[0].bias.add_(1)  # type: ignore[index]
        return gradients(y, layer, leaf)

    if activation == "relu":
        # Ours finds relu's sign again from the input and the bias: either right, or an error as for the weight.
        ours, torchs = pair(activation, training=training)
        expected = scenario(torchs)
        found = unless_changed(lambda: scenario(ours))
        if found is not None:
            same(found, expected, "dx")
        return
    agree(scenario, activation, "dx", training=training)


@way(
    WHERE, "running statistics changed by a training step before the backward of an eval graph", "right; torch's: wrong"
)
@activations
def test_statistics_that_moved_on(activation: str | None) -> None:
    ours, torchs = pair(activation, training=False)
    expected = step(torchs, X, DY)
    leaf = X.clone().requires_grad_()
    y = ours(leaf)
    ours.train()
    ours(OTHER * 3 + 1)
    with torch.no_grad():
        ours[0].running_var.mul_(5)
    same([y.detach(), *gradients(y, ours, leaf)], expected, "dx")


@way(WHERE, "`out=` over a tensor that autograd still needs", "an error in backward, by the version counter")
def test_out_over_a_tensor_that_is_still_needed() -> None:
    leaf = X.clone().requires_grad_()
    kept = leaf.exp()  # exp keeps its result
    buffers = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        batch_norm(OTHER, *buffers, out=kept)
    with pytest.raises(RuntimeError, match=CHANGED):
        kept.backward(DY)
    target = torch.empty_like(X)
    before = target._version
    assert batch_norm(OTHER, *buffers, out=target) is target
    assert target._version > before


@way(WHERE, "running statistics that require grad", "an error or a gradient as with torch, never silence")
@both_modes
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("x_requires_grad", [True, False])
def test_statistics_that_require_grad(x_requires_grad: bool, activation: str | None, training: bool) -> None:
    raised = []
    for function in (nn.functional.batch_norm, batch_norm):
        x = X.clone().requires_grad_(x_requires_grad)
        mean = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        var = torch.ones(3, dtype=torch.float64, requires_grad=True)
        options = {"activation": activation} if function is batch_norm else {}
        try:
            y = function(x, mean, var, training=training, **options)
            torch.autograd.grad(y.sum(), [mean, var])
            raised.append(False)
        except RuntimeError:
            raised.append(True)
    # Where torch raises only in backward, ours may do so at once.
    assert raised[1] == raised[0]


@way(WHERE, "`retain_graph`, backward twice, the graph freed", "as with torch's layer")
@both_modes
@activations
def test_backward_twice(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        leaf = X.clone().requires_grad_()
        y = layer(leaf)
        first = gradients(y, layer, leaf, retain_graph=True)
        second = gradients(y, layer, leaf, dy=OTHER)
        with pytest.raises(RuntimeError) as caught:
            gradients(y, layer, leaf)
        return first, second, str(caught.value)[:60]

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "`detect_anomaly`", "works")
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@both_modes
@activations
def test_anomaly_mode(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        with torch.autograd.detect_anomaly():
            return step(layer, X, DY)

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "hooks on tensors, on nodes and on gradients", "run, and may change what flows")
@both_modes
@activations
def test_hooks(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        leaf = X.clone().requires_grad_()
        seen: list[Tensor] = []
        y = layer(leaf)
        y.register_hook(lambda g: g * 2)
        assert y.grad_fn is not None
        y.grad_fn.register_hook(lambda dx, dy: seen.append(dy[0]))
        layer[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))  # type: ignore[index]
        leaf.register_hook(lambda g: g + 1)
        layer.register_full_backward_hook(lambda m, dx, dy: None)
        y.backward(DY)
        return leaf.grad, seen, [p.grad for p in layer.parameters()]

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "`register_full_backward_hook` on the layer", "works")
@both_modes
@activations
def test_module_hooks(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        seen: list[Any] = []
        layer.register_full_backward_pre_hook(lambda m, dy: (dy[0] * 3,))
        layer.register_full_backward_hook(lambda m, dx, dy: seen.append((dx[0], dy[0])))
        return step(layer, X, DY), seen

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "second derivatives through autograd", "right")
@both_modes
@activations
def test_double_backward(activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        leaf, dy = X.clone().requires_grad_(), DY.clone().requires_grad_()
        first = gradients(layer(leaf), layer, leaf, dy=dy, create_graph=True)
        wanted = [leaf, dy, *layer.parameters()]
        total = sum((g * torch.linspace(1, 2, g.numel(), dtype=g.dtype).view_as(g)).sum() for g in first)
        return torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)

    agree(scenario, activation, "difference", training=training)


GIVEN: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: DY,
    "channels_last": lambda: DY.contiguous(memory_format=torch.channels_last),
    "transposed": lambda: data(2, 5, 3, 4, seed=5).permute(3, 2, 1, 0),
    "sliced": lambda: data(4, 3, 5, 4, seed=5)[..., ::2],
    "expanded": lambda: torch.ones((), dtype=torch.float64).expand(4, 3, 5, 2),
    "expanded over the batch": lambda: DY[:1].expand(4, 3, 5, 2),
    "of a mean": lambda: data(4, 3, 1, 1, seed=5).expand(4, 3, 5, 2),
    "zeros": lambda: torch.zeros(4, 3, 5, 2, dtype=torch.float64),
}


@way(WHERE, "gradients that arrive non-contiguous, expanded, with zero strides", "work")
@both_modes
@activations
@pytest.mark.parametrize("form", GIVEN)
def test_forms_of_the_gradient(form: str, activation: str | None, training: bool) -> None:
    agree(lambda layer: step(layer, X, GIVEN[form]()), activation, "dx", training=training)


@way(WHERE, "gradients that are undefined (a branch that is not used)", "stay undefined, or are zeros, as with torch")
@both_modes
@activations
def test_undefined_gradients(activation: str | None, training: bool) -> None:
    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> None:
            return None

    def scenario(layer: nn.Module) -> Any:
        leaf = X.clone().requires_grad_()
        y = Undefined.apply(layer(leaf))  # type: ignore[no-untyped-call]
        found = torch.autograd.grad(y, [leaf, *layer.parameters()], DY, allow_unused=True)
        return [torch.zeros((), dtype=DY.dtype) if g is None else g.abs().sum() for g in found]

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "parts frozen: each choice of what requires grad", "as with torch's layer")
@both_modes
@activations
@pytest.mark.parametrize("free", [("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias"), ()], ids=str)
def test_frozen_parts(free: tuple[str, ...], activation: str | None, training: bool) -> None:
    def scenario(layer: nn.Module) -> Any:
        norm: Any = layer[0]  # type: ignore[index]
        leaf = X.clone().requires_grad_("x" in free)
        for name in ("weight", "bias"):
            getattr(norm, name).requires_grad_(name in free)
        y = layer(leaf)
        wanted = [t for t in (leaf, norm.weight, norm.bias) if t.requires_grad]
        return y.requires_grad, y.detach(), torch.autograd.grad(y, wanted, DY) if wanted else None

    agree(scenario, activation, "dx", training=training)


@way(WHERE, "the result changed in place before backward", "as with torch's layer: right, or an error")
@both_modes
@activations
def test_the_result_changed_in_place(activation: str | None, training: bool) -> None:
    ours, torchs = pair(activation, training=training)

    def scenario(layer: nn.Module) -> list[Tensor]:
        leaf = X.clone().requires_grad_()
        y = layer(leaf)
        y.add_(1)
        return gradients(y, layer, leaf)

    found, torchs_found = (unless_changed(lambda layer=layer: scenario(layer)) for layer in (ours, torchs))
    if found is not None:
        same(found, step(pair(activation, training=training)[1], X, DY)[1:], "dx")
    else:
        assert torchs_found is None or activation is not None


@way(WHERE, "threads: backward in another thread, two layers at once", "work")
@both_modes
@in_a_fork
def test_backward_in_another_thread(training: bool) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def scenario(layer: nn.Module) -> Any:
        leaf = X.clone().requires_grad_()
        y = layer(leaf)
        with ThreadPoolExecutor(2) as pool:
            return pool.submit(gradients, y, layer, leaf).result()

    agree(scenario, "relu", "dx", training=training)
