"""How far two models are apart on one input, and how long each takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchnorm.lifecycle.folding.record import tensors_in
from batchnorm.lifecycle.folding.report import Errors, Speed

_BUDGET, _FEWEST, _MOST = 1.0, 5, 50  # seconds for all turns together, and turns


@dataclass(frozen=True)
class Example:
    """The arguments of one forward; a call runs it on copies, with the same random numbers each time."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, model: nn.Module) -> object:
        with self.alike(model):
            args, kwargs = self.given()
            return model(*args, **kwargs)

    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of the arguments, since a model may change them in place."""
        args, kwargs = tree_map(_clone, (self.args, dict(self.kwargs)))
        return args, kwargs

    @contextmanager
    def alike(self, model: nn.Module) -> Iterator[None]:
        """Without gradients, and with random numbers that begin alike and leave the generators as they were."""
        devices = sorted({t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}, key=str)
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(0)
            for device in devices:
                torch.cuda.default_generators[device.index or 0].manual_seed(0)
            yield

    def to(self, dtype: torch.dtype) -> Example:
        """Floating tensors in that dtype."""
        args, kwargs = tree_map(
            lambda value: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value,
            (self.args, dict(self.kwargs)),
        )
        return Example(args, kwargs)


@dataclass(frozen=True)
class Shown:
    """What one forward showed: the model's floating outputs and those of some layers."""

    outputs: list[Tensor]
    layers: dict[str, Tensor]


def show(model: nn.Module, example: Example, paths: Iterable[str]) -> Shown:
    layers: dict[str, Tensor] = {}
    with _hooked(model, paths, layers):
        outputs = tensors_in(example(model))
    return Shown([t for t in outputs if t.is_floating_point()], layers)


@contextmanager
def _hooked(model: nn.Module, paths: Iterable[str], into: dict[str, Tensor]) -> Iterator[None]:
    def keeping(path: str) -> Callable[[nn.Module, Any, object], None]:
        def hook(module: nn.Module, args: Any, output: object) -> None:
            if isinstance(output, Tensor):
                into[path] = output.clone()  # what follows may change it in place

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keeping(path)) for path in set(paths)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def errors(unfolded: Shown, folded: Shown, truth: Shown | None, places: Mapping[str, str]) -> Errors:
    """``places``: for each norm's name the layer that shows it."""
    return Errors(
        apart(unfolded.outputs, folded.outputs),
        {
            norm: apart([unfolded.layers[path]], [folded.layers[path]])
            for norm, path in places.items()
            if path in unfolded.layers and path in folded.layers
        },
        math.nan if truth is None else apart(truth.outputs, unfolded.outputs),
        math.nan if truth is None else apart(truth.outputs, folded.outputs),
    )


def apart(reference: list[Tensor], others: list[Tensor]) -> float:
    """The largest |difference| over the largest |value|. Infinite where shapes or what is finite are not the same.

    >>> apart([torch.tensor([1.0, -4.0])], [torch.tensor([1.0, -3.0])])
    0.25
    """
    if [t.shape for t in reference] != [t.shape for t in others]:
        return math.inf
    largest = 0.0
    for one, other in zip(reference, others, strict=True):
        a, b = one.double(), other.double()
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return math.inf
        a, b = a[finite], b[finite]
        if a.numel():
            difference, size = float((a - b).abs().max()), float(a.abs().max())
            largest = max(largest, difference / size if size else difference)
    return largest


def speed(unfolded: nn.Module, folded: nn.Module, example: Example, clock: Callable[[], float]) -> Speed:
    """In turns, so that what slows the machine for a while slows both; which goes first alternates."""
    models = (unfolded, folded)
    took: tuple[list[float], list[float]] = ([], [])
    tensor = next(iter(tensors_in([list(folded.parameters()), example.args])), torch.empty(0))
    wait = torch.cuda.synchronize if tensor.is_cuda else _nothing
    begun = clock()
    with example.alike(folded):
        for turn in range(-1, _MOST):  # the first one only warms up
            for i in (0, 1) if turn % 2 else (1, 0):
                args, kwargs = example.given()
                wait()
                start = clock()
                models[i](*args, **kwargs)
                wait()
                if turn >= 0:
                    took[i].append(clock() - start)
            if turn + 1 >= _FEWEST and clock() - begun > _BUDGET:
                break
    ratio = median(a / b for a, b in zip(*took, strict=True))
    where = f"{tensor.device}, {str(tensor.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    return Speed(median(took[0]), median(took[1]), ratio, len(took[0]), where)


def _nothing() -> None:
    pass


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
