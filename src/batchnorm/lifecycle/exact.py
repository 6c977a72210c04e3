"""``exact_accumulation``: the gradients of a large batch, one micro-batch and one block at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_unflatten

from batchnorm.errors import ArgumentError, expected
from batchnorm.lifecycle.accumulation.block import Block, Grads, Part, Use
from batchnorm.lifecycle.recalibration.observe import without_compiled_graphs
from batchnorm.lifecycle.updates import Place, Staging
from batchnorm.nn import BatchNorm
from batchnorm.nn.distributed import Exchange
from batchnorm.nn.naming import described
from batchnorm.nn.running import Destination, Guarded

Reduction = Literal["mean", "sum"]


def exact_accumulation(
    model: nn.Sequential | Sequence[Callable[[Any], Any]],
    micro_batches: Iterable[Any],
    loss_fn: Callable[..., Tensor],
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Add the gradients of one large batch, given in micro-batches, to ``.grad``, and return its loss.

    Every batch normalization normalizes by the mean and variance of the large batch, and the gradient flows through
    both, so that the result is that of ``loss_fn(model(whole), ...).backward()`` up to rounding. What is alive at a
    time is the input of each block for the whole batch, and the activations inside one block for one micro-batch.

    A block with k batch norms is run k + 1 times forward, to measure them one after the other (each run but the last
    ends at the norm that it measures), and k + 1 times forward and backward, to find Σdz and Σdz·x̂ of each, the last
    one first. So the time depends on where the model is cut: best into many blocks with few norms. A block that
    begins with its norm runs nothing to measure it.

    Running statistics move once, as with the large batch, at the end, or in the block of ``defer_updates`` or
    ``accumulate_statistics`` around it.

    Arguments:
        model: a ``Sequential``, whose children are the blocks, or a list of callables. A block takes and gives a
            tensor, or tuples, lists and dicts of them. It must do the same each time that it is called on the same
            input; random numbers (dropout) are drawn from a seed for each block and micro-batch. Its hooks run each
            time. Other state that a forward changes, as the power iteration of spectral norm, changes more than once
        micro_batches: tensors, or tuples and lists whose first element is the input, of any sizes
        loss_fn: called as ``loss_fn(output, *rest_of_the_micro_batch)``, a scalar
        reduction: how the loss of the large batch follows from those of the micro-batches: "mean" weights them by their
            number of samples (dimension 0), "sum" adds them

    Returns:
        the loss of the large batch, without a graph

    Raises:
        ArgumentError: a model that is no chain of blocks, no micro-batches, layers of torch.nn in training mode, a
            block that uses other layers for another micro-batch, an activation checkpoint inside a block, or a loss
            that is no scalar
        On any error, Ctrl-C included, the model's ``.grad`` and statistics are as they were.

    With a process group the moments and sums of all micro-batches are exchanged once each.

    >>> import torch, batchnorm as bn
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), bn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double()
    >>> x, target = torch.randn(12, 4).double(), torch.randn(12, 1).double()
    >>> loss = exact_accumulation(model, zip(x.split(5), target.split(5)), torch.nn.functional.mse_loss)
    >>> small = model[0].weight.grad.clone()
    >>> model.zero_grad()
    >>> torch.nn.functional.mse_loss(model(x), target).backward()
    >>> torch.allclose(small, model[0].weight.grad)
    True

    Source: the two sums are those of Ioffe and Szegedy 2015, section 3.
    """
    functions = _blocks(model)
    if reduction not in get_args(Reduction):
        invariant = f"reduction to be one of {get_args(Reduction)}"
        raise ArgumentError(expected("exact_accumulation", invariant, repr(reduction), "Choose one of them."))
    batches = [_parts(batch) for batch in micro_batches]
    if not batches:
        todo = "A generator that was already used up gives none."
        raise ArgumentError(expected("exact_accumulation", "at least one micro-batch", "none", todo))
    modules = [f for f in (*functions, loss_fn) if isinstance(f, nn.Module)]
    layers = _layers([f for f in functions if isinstance(f, nn.Module)])
    weights = _weights([inputs for inputs, _ in batches], reduction)
    devices = _devices(modules, batches)
    chain = _Chain(functions, len(batches), devices)
    staging = Staging("exact_accumulation", layers)
    with _Gradients(modules) as gradients:
        with (
            without_compiled_graphs(), torch.enable_grad(), _no_strangers(set(layers)),
            torch.random.fork_rng(devices),
        ):  # fmt: skip
            try:
                staging.begin({}, chain.on_use)
                loss, grads = chain.run(batches, loss_fn, weights)
            finally:
                staging.end()
        for (inputs, _), dx in zip(batches, grads, strict=True):
            _go_on(inputs, dx)
        gradients.add_up()
        staging.write(lambda place, target: _move(chain, place, target))
    return loss


class _Chain:
    """The blocks, one after the other."""

    def __init__(self, functions: list[Callable[[Any], Any]], micro_batches: int, devices: list[int]) -> None:
        seeds = torch.randint(0, 2**62, (len(functions), micro_batches), device="cpu").tolist()
        generators = [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]
        self._blocks = [
            Block(f, each, generators, first=i == 0) for i, (f, each) in enumerate(zip(functions, seeds, strict=True))
        ]
        self._current = self._blocks[0]

    def on_use(self, layer: BatchNorm, x: Tensor, over: Exchange | None) -> Part:
        return self._current.on_use(layer, x, over)

    def uses(self) -> list[Use]:
        return [use for block in self._blocks for use in block.uses]

    def run(
        self, batches: list[tuple[Any, tuple[Any, ...]]], loss_fn: Callable[..., Tensor], weights: list[float]
    ) -> tuple[Tensor, list[Grads]]:
        """The loss, and the gradients of the inputs."""
        values = [inputs for inputs, _ in batches]
        for block in self._blocks:
            self._current = block
            values = block.forward(values)
        total, grads = None, []
        for (_, rest), weight in zip(batches, weights, strict=True):
            loss, dy = _loss(loss_fn, values.pop(0), rest, weight)
            total = loss if total is None else total + loss
            grads.append(dy)
        assert total is not None
        for block in reversed(self._blocks):
            self._current = block
            grads = block.backward(grads)
        return total, grads


def _loss(loss_fn: Callable[..., Tensor], output: Any, rest: tuple[Any, ...], weight: float) -> tuple[Tensor, Grads]:
    """A micro-batch's part in the loss, and the gradients of the output."""
    given, structure = tree_flatten(output)
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]
    loss = loss_fn(tree_unflatten(leaves, structure), *rest)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        todo = "Let the loss function average or add up."
        raise ArgumentError(expected("exact_accumulation", "a loss of one value", got, todo))
    loss = loss.reshape(()) * weight
    loss.backward()
    return loss.detach(), [t.grad if isinstance(t, Tensor) else None for t in leaves]


class _Gradients:
    """Sets ``.grad`` of the parameters aside, and puts it back, added up if all went well."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._before = {p: p.grad for module in modules for p in module.parameters()}
        self._done = False

    def __enter__(self) -> _Gradients:
        for p in self._before:
            p.grad = None
        return self

    @torch.no_grad()
    def add_up(self) -> None:
        for p, before in self._before.items():
            if before is not None:
                p.grad = before if p.grad is None else p.grad.add_(before)
        self._done = True

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is not None or not self._done:
            for p, before in self._before.items():
                p.grad = before


def _blocks(model: object) -> list[Callable[[Any], Any]]:
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        if any(getattr(model, name) for name in _HOOKS):
            todo = "Remove them, or give list(model)."
            raise ArgumentError(expected("exact_accumulation", "a Sequential without hooks", "one with hooks", todo))
        blocks: list[Any] = list(model)
    elif isinstance(model, (list, tuple)):
        blocks = list(model)
    else:
        todo = "Give its blocks as a list, in the order in which they are called."
        got = f"a {type(model).__name__}"
        raise ArgumentError(expected("exact_accumulation", "a torch.nn.Sequential or a list of callables", got, todo))
    strange = [block for block in blocks if not callable(block)]
    if strange or not blocks:
        got = f"a {type(strange[0]).__name__}" if strange else "an empty chain"
        raise ArgumentError(expected("exact_accumulation", "blocks that can be called", got, "Give modules."))
    return blocks


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _layers(modules: list[nn.Module]) -> list[BatchNorm]:
    """The layers that normalize by the batch."""
    found: dict[BatchNorm, None] = {}
    for module in modules:
        for layer in module.modules():
            if _by_batch(layer):
                if not isinstance(layer, BatchNorm):
                    got, todo = f"torch.nn's {described(layer)}", "Call batchnorm.convert(model)."
                    raise ArgumentError(expected("exact_accumulation", "layers of this library", got, todo))
                refused = sorted(_REFUSED & layer._extras().keys())
                if refused:
                    got, todo = f"{described(layer)} with {refused[0]}", "Leave it away."
                    invariant = "layers that normalize by the statistics of the whole batch"
                    raise ArgumentError(expected("exact_accumulation", invariant, got, todo))
                found[layer] = None
    return list(found)


_REFUSED = {"virtual_batch_size", "renorm"}
"""Options by which a batch is not normalized by its own statistics alone."""


def _by_batch(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)


@contextmanager
def _no_strangers(layers: set[BatchNorm]) -> Iterator[None]:
    """A batch norm that none of the blocks holds, as one inside a lambda, would go by its micro-batch unnoticed."""
    thread = threading.get_ident()

    def look(module: nn.Module, args: object) -> None:
        if threading.get_ident() == thread and _by_batch(module) and module not in layers:
            todo = "Give the module itself as a block, not a function that calls it."
            got = f"{described(module)}, which none of the blocks holds"
            raise ArgumentError(expected("exact_accumulation", "batch norms that the blocks hold", got, todo))

    hook = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def _devices(modules: list[nn.Module], batches: list[Any]) -> list[int]:
    """The GPUs that are used."""
    tensors = [*(p for module in modules for p in module.parameters()), *tree_flatten(batches)[0]]
    return sorted({t.get_device() for t in tensors if isinstance(t, Tensor) and t.is_cuda})


def _parts(batch: Any) -> tuple[Any, tuple[Any, ...]]:
    return (batch[0], tuple(batch[1:])) if isinstance(batch, (tuple, list)) else (batch, ())


def _weights(inputs: list[Any], reduction: Reduction) -> list[float]:
    if reduction == "sum":
        return [1.0] * len(inputs)
    sizes = []
    for value in inputs:
        tensors = [t for t in tree_flatten(value)[0] if isinstance(t, Tensor) and t.dim()]
        if not tensors:
            todo = 'Use reduction="sum".'
            raise ArgumentError(expected("exact_accumulation", "inputs that have samples", "one without", todo))
        sizes.append(len(tensors[0]))
    return [size / max(1, sum(sizes)) for size in sizes]


def _go_on(inputs: Any, grads: Grads) -> None:
    """Backward through what made the inputs, where something did."""
    pairs = [(t, g) for t, g in zip(tree_flatten(inputs)[0], grads, strict=True) if g is not None]
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


def _move(chain: _Chain, place: Place, target: Destination) -> None:
    """The running statistics follow every use of the layer, as with the large batch."""
    layer, domain = place
    if not (layer.training and layer.track_running_stats and domain == layer._domain):
        return
    for use in chain.uses():
        if use.layer is layer:
            into = target.sink(layer.momentum)
            if layer.nonfinite == "propagate":
                into.update(use.moments)
            else:
                Guarded(layer, into, layer.nonfinite).take(use.moments)
