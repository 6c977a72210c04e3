"""Population statistics from data: the paper's Algorithm 2, lines 8 to 11."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.checks import check_batch_size, nonfinite_channels, raise_nonfinite
from batchnorm.errors import ArgumentError, expected
from batchnorm.functional import batch_moments
from batchnorm.moments import Moments

Estimator = Literal["pooled", "paper"]
Forward = Callable[[nn.Module, Any], object]


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """One layer before and after; tensors of shape (channels,), float64.

    Arguments:
        count: values a channel that were measured, over all batches; 0 where no batch reached the layer,
            whose statistics then stay as they were
        uses: how often the layer was run
        mean_before, var_before, mean_after, var_after: its running statistics
    """

    count: int
    uses: int
    mean_before: Tensor
    var_before: Tensor
    mean_after: Tensor
    var_after: Tensor

    @property
    def mean_shift(self) -> float:
        """The largest move of a channel's mean, in units of its standard deviation after."""
        shift = (self.mean_after - self.mean_before).abs() / self.var_after.sqrt()
        return float(torch.nan_to_num(shift).max()) if shift.numel() else 0.0

    @property
    def variance_ratio(self) -> tuple[float, float]:
        """The smallest and the largest factor by which a channel's variance changed."""
        ratio = self.var_after / self.var_before
        return (float(ratio.min()), float(ratio.max())) if ratio.numel() else (1.0, 1.0)


@dataclass(frozen=True)
class Recalibration:
    """What ``recalibrate`` did: how many batches it saw, and each layer's statistics by name."""

    estimator: Estimator
    batches: int
    layers: dict[str, LayerStatistics]

    def __str__(self) -> str:
        width = max([5, *(len(name) for name in self.layers)])
        lines = [
            f"{self.batches} batches, estimator {self.estimator!r}",
            f"{'layer':<{width}}  {'values':>12}  {'mean moved by':>14}  variance times",
        ]
        for name, layer in self.layers.items():
            if layer.count == 0:
                lines.append(f"{name:<{width}}  {0:>12}  not reached by any batch, left as it was")
                continue
            low, high = layer.variance_ratio
            lines.append(f"{name:<{width}}  {layer.count:>12}  {layer.mean_shift:>10.3g} std  {low:.3g} to {high:.3g}")
        return "\n".join(lines)


@dataclass
class _Collected:
    """What one layer has been shown."""

    pooled: Moments | None = None
    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Estimator = "pooled",
    forward: Forward | None = None,
    max_batches: int | None = None,
    skip_eval: bool = False,
    progress: bool = False,
) -> Recalibration:
    r"""Set the running statistics of every batch normalization layer to those of the given data.

    The layers normalize with batch statistics, as in training; everything else, dropout included, runs in
    eval mode; nothing is trained. What reaches each layer is measured and written into its running statistics:

    - ``"pooled"``: mean and unbiased variance of all values together, by Chan's formula. Exact for any batch
      sizes in any order, and it counts the variance between batches.
    - ``"paper"``: :math:`\mathrm{E}[x] = \mathrm{E}_B[\mu_B]`, :math:`\mathrm{Var}[x] = \frac{m}{m-1}
      \mathrm{E}_B[\sigma_B^2]` over mini-batches of one size m (Ioffe and Szegedy 2015, Algorithm 2, lines
      8 to 11).

    Works on the layers of this library and on those of ``torch.nn``. A layer that is used several times in a
    forward is shown every use. ``num_batches_tracked`` becomes the number of batches a layer was shown.

    Arguments:
        model: changed in place in its running statistics and counters alone
        batches: tensors, tuples or lists whose first element is the model's input, or dicts of its keyword
            arguments; with ``forward``, anything
        forward: called as ``forward(model, batch)`` instead, for example to move the batch to a device
        max_batches: stop after so many
        skip_eval: leave layers that are in eval mode (frozen ones) as they are, and let them normalize so
        progress: write the number of batches to standard error as they are done

    Returns:
        the statistics of each layer before and after; ``print`` shows a table

    Raises:
        ArgumentError: no batches, no layer to recalibrate, mini-batches of unequal size under "paper", or one
            value a channel in a batch
        NonFiniteError: an Inf or NaN reached a layer; layer, channel and batch are named
        On any error, Ctrl-C included, the model is left exactly as it was.

    >>> import torch, batchnorm as bn
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), bn.BatchNorm1d(3)).eval()
    >>> report = recalibrate(model, (torch.randn(32, 4) for _ in range(10)))
    >>> report.batches, report.layers["1"].count
    (10, 320)
    """
    if estimator not in get_args(Estimator):
        invariant = f"an estimator among {get_args(Estimator)}"
        raise ArgumentError(expected("recalibrate", invariant, repr(estimator), "Choose one of them."))
    if max_batches is not None and max_batches < 1:
        raise ArgumentError(expected("recalibrate", "max_batches of 1 or more", max_batches, "Leave it away for all."))
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and not (skip_eval and not module.training)
    }
    if not layers:
        todo = "Layers with track_running_stats=False have nothing to recalibrate."
        raise ArgumentError(expected("recalibrate", "a layer with running statistics", "none", todo))
    collected = {name: _Collected() for name in layers}
    run = _default_forward if forward is None else forward
    done = 0
    with _collecting(model, layers, collected, estimator, lambda: done + 1), torch.no_grad():
        for batch in itertools.islice(batches, max_batches):
            run(model, batch)
            done += 1
            if progress:
                print(f"\rrecalibrate: {done} batches", end="", file=sys.stderr, flush=True)
    if progress and done:
        print(file=sys.stderr)
    if done == 0:
        todo = "A generator that was already used up gives none."
        raise ArgumentError(expected("recalibrate", "at least one batch", "an empty iterable", todo))
    report = {name: _statistics(name, layer, collected[name], estimator) for name, layer in layers.items()}
    _write(layers, report)
    return Recalibration(estimator, done, report)


@contextmanager
def _collecting(
    model: nn.Module,
    layers: dict[str, _BatchNorm],
    collected: dict[str, _Collected],
    estimator: Estimator,
    batch: Callable[[], int],
) -> Iterator[None]:
    """The model in eval mode, the layers on batch statistics without updates, each input measured on its way."""
    modes = [(module, module.training) for module in model.modules()]
    tracking = [(layer, layer.track_running_stats) for layer in layers.values()]
    hooks = []
    try:
        model.eval()
        for name, layer in layers.items():
            layer.training = True
            layer.track_running_stats = False
            hook = _measure(name, collected[name], estimator, batch)
            hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for layer, tracked in tracking:
            layer.track_running_stats = tracked
        for module, mode in modes:
            module.training = mode


def _measure(
    name: str, into: _Collected, estimator: Estimator, batch: Callable[[], int]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        # Asked here too: a layer with too_few="running" would let such a batch pass.
        check_batch_size(x)
        found = batch_moments(x.detach())
        bad = nonfinite_channels(found, None) if x.numel() else []
        if bad:
            raise_nonfinite(f"recalibrate: {name} ({type(module).__name__})", bad, batch())
        into.pooled = found if into.pooled is None else into.pooled.merge(found)
        into.sizes.append(x.numel() // max(1, x.shape[1]))
        if estimator == "paper":
            into.means.append(found.mean)
            into.variances.append(found.variance(biased=False))

    return hook


def _statistics(name: str, layer: _BatchNorm, seen: _Collected, estimator: Estimator) -> LayerStatistics:
    assert layer.running_mean is not None and layer.running_var is not None
    before = (layer.running_mean.double().clone(), layer.running_var.double().clone())
    if seen.pooled is None or sum(seen.sizes) == 0:
        return LayerStatistics(0, len(seen.sizes), *before, *before)
    after = (seen.pooled.mean, seen.pooled.variance(biased=False))
    if estimator == "paper":
        if len(set(seen.sizes)) > 1:
            invariant = f'mini-batches of one size for {name or "the layer"} under estimator="paper"'
            got = f"values a channel from {min(seen.sizes)} to {max(seen.sizes)}"
            raise ArgumentError(
                expected("recalibrate", invariant, got, 'Drop the last batch, or use estimator="pooled".')
            )
        after = (torch.stack(seen.means).mean(0), torch.stack(seen.variances).mean(0))
    return LayerStatistics(sum(seen.sizes), len(seen.sizes), *before, *after)


def _write(layers: dict[str, _BatchNorm], report: dict[str, LayerStatistics]) -> None:
    """All of the layers or, if interrupted, none."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    kept = {name: {b: _clone(getattr(layer, b)) for b in buffers} for name, layer in layers.items()}
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                found = report[name]
                if found.count == 0:
                    continue
                assert layer.running_mean is not None and layer.running_var is not None
                layer.running_mean.copy_(found.mean_after)
                layer.running_var.copy_(found.var_after)
                if layer.num_batches_tracked is not None:
                    layer.num_batches_tracked.fill_(found.uses)
    except BaseException:  # Ctrl-C as well: nothing is left half-changed, and it goes on up
        with torch.no_grad():
            for name, layer in layers.items():
                for b in buffers:
                    if kept[name][b] is not None:
                        getattr(layer, b).copy_(kept[name][b])
        raise


def _clone(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.clone()


def _default_forward(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        batch = batch[0]
    return model(batch)
