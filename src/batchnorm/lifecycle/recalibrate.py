"""Population statistics from data: the paper's Algorithm 2, lines 8 to 11."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.errors import ArgumentError, expected
from batchnorm.lifecycle.domains import held
from batchnorm.lifecycle.progress import OnProgress, shown
from batchnorm.lifecycle.recalibration.collect import Estimator, Population
from batchnorm.lifecycle.recalibration.gap import Gap
from batchnorm.lifecycle.recalibration.observe import BUFFERS, Observation
from batchnorm.lifecycle.recalibration.passes import Forward, Found, Runner, joint, sequential
from batchnorm.lifecycle.recalibration.ranks import Meetings
from batchnorm.lifecycle.recalibration.report import LayerStatistics, Order, Recalibration, counted
from batchnorm.nn import BatchNorm
from batchnorm.nn.distributed import wire_of
from batchnorm.nn.frozen import has_frozen_statistics

if TYPE_CHECKING:
    from batchnorm.nn.distributed import GroupLike


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Estimator = "pooled",
    order: Order = "joint",
    forward: Forward | None = None,
    max_batches: int | None = None,
    skip_eval: bool = False,
    gap_batches: int = 0,
    progress: bool | OnProgress = False,
    process_group: GroupLike = None,
) -> Recalibration:
    r"""Set the running statistics of every batch normalization layer to those of the given data.

    The model runs in eval mode, dropout included, and nothing is trained. What reaches each layer is measured and
    written into its running statistics by one of two estimators:

    - ``"pooled"``: mean and unbiased variance of all values together, by Chan's formula. Exact for any batch
      sizes in any order, and it counts the variance between batches.
    - ``"paper"``: :math:`\mathrm{E}[x] = \mathrm{E}_B[\mu_B]`, :math:`\mathrm{Var}[x] = \frac{m}{m-1}
      \mathrm{E}_B[\sigma_B^2]` over mini-batches of one size m (Ioffe and Szegedy 2015, Algorithm 2, lines
      8 to 11).

    What reaches a layer depends on how the layers before it normalize:

    - ``order="joint"``: by the batch, as in training. One pass for all layers, and batches of any kind will do.
    - ``order="sequential"``: by the population statistics that they will have in eval mode, so that each layer's
      own are exactly those of its input there, however deep it lies and however small the batches are. One pass
      for each group of layers: which ones depend on which is followed through every operation of the forward,
      and layers that do not depend on each other share a pass. A forward ends as soon as the group was reached,
      where every forward of the first pass used the layers in one order and no values were read by Python, on
      which that order may hang. Layers that are used again on what they gave, or that depend on each other, have
      no order: they are measured together, normalizing by the batch.

    A batch with one value a channel (the last of a loader without ``drop_last``) cannot be normalized by itself.
    In sequential order it need not be, and counts like any other. In joint order it is measured up to the first
    layer where it has one value a channel, that one included, and its forward ends there. Under "paper" a single
    sample is left out beside larger batches. The report says so.

    With ``process_group`` each rank measures its own batches, of any sizes and any number, none included, and all ranks
    merge what they found at the end of each pass: the statistics are those of the batches of all ranks together, with
    the same bits on every rank. Nothing is exchanged during a forward, layers with a process group included: in joint
    order each rank normalizes by its own batch. If a rank fails, all ranks raise and none is changed.

    Works on the layers of this library, those of ``torch.nn``, ``SyncBatchNorm`` and subclasses, however their modules
    reach them: ``lifecycle.recalibration.observe`` says how, and what remains unseen. A layer used several times in a
    forward is measured on every use. ``num_batches_tracked`` becomes the number of uses. Frozen layers
    (``FrozenBatchNorm2d``, ``batchnorm.freeze``) are left alone and reported. Layers with domains are measured in the
    domain in use, which ``forward`` must not change.

    With ``gap_batches``, the train/eval gap is measured on the first so many batches, before and after:

    - of the output: :math:`\|y_\text{eval} - y_\text{batch}\|_2 / \|y_\text{batch}\|_2` over all floating-point
      outputs, where :math:`y_\text{batch}` has the layers normalizing by the batch. A ratio, without a unit.
    - of a layer: with mean μ and variance σ² of its input in eval mode over these batches and running
      statistics r and s, the root mean square over channels of the distance between
      :math:`(x - r)/\sqrt{s + \epsilon}` and :math:`(x - \mu)/\sqrt{\sigma^2 + \epsilon}`. In standard deviations
      of the normalized values.

    Arguments:
        model: changed in place in its running statistics and counters alone
        batches: tensors, or mappings of the model's keyword arguments, or tuples and lists whose first element
            is the input: a tensor, such a mapping, a tuple of positional arguments, or any other object, passed as it
            is; with ``forward``, anything. Sequential order iterates over them several times (a list, a DataLoader)
        estimator, order: see above
        forward: called as ``forward(model, batch)`` instead, for example to move the batch to a device. An
            exception may end it early, see above
        max_batches: stop each pass after so many
        skip_eval: leave layers that are in eval mode (frozen ones) as they are, and let them normalize so
        gap_batches: measure the train/eval gap on so many batches, which are held in memory: three forwards each
        progress: show a bar with the time left on standard error; or a function, called with the work done and
            the work there is (None where that is not known), in batches
        process_group: the ranks that the data is spread over: a ProcessGroup, or "world" for the default group; None
            for this process's batches alone. ``max_batches``, ``progress`` and ``gap_batches`` are those of each rank

    Returns:
        the statistics of each layer before and after; ``print`` shows a table

    Raises:
        ArgumentError: no batches, no layer to recalibrate, mini-batches of unequal size under "paper", values too
            few for a variance, or batches that can be gone through only once in sequential order
        ExchangeError: another rank failed, or did not take part within the group's time-out
        NonFiniteError: an Inf or NaN reached a layer; layer, channel and batch are named
        On any error, Ctrl-C included, the model is left exactly as it was.

    >>> import torch, batchnorm as bn
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), bn.BatchNorm1d(3)).eval()
    >>> report = recalibrate(model, (torch.randn(32, 4) for _ in range(10)))
    >>> report.batches, report.layers["1"].count
    (10, 320)
    """
    _check_arguments(estimator, order, batches, max_batches, gap_batches)
    meetings = Meetings(wire_of("recalibrate", process_group))
    layers, left_alone = _choose(model, skip_eval)
    before = {name: _statistics(layer) for name, layer in layers.items()}
    observation = Observation(model, layers)
    written: list[_Written] = []
    try:
        ours = [layer for layer in layers.values() if isinstance(layer, BatchNorm)]
        with shown("recalibrate", progress) as update, held("recalibrate", ours):
            observation.begin()
            run = _default_forward if forward is None else forward
            runner = Runner(model, observation, run, estimator, update, meetings)
            try:
                found, gaps = _measure(runner, batches, order, max_batches, gap_batches)
                meetings.all(None)  # no rank writes before every rank has something to write
            except Exception as error:
                meetings.failed(error)
                raise
        observation.end()
        report = _report(estimator, order, found, gaps, before, left_alone)
        written.append(_Written(layers))
        _write(layers, found.populations)
        return report
    except BaseException:  # Ctrl-C as well: nothing is left half-changed, and it goes on up
        # Again: the interrupt may have come inside that call.
        observation.end()
        for each in written:
            each.undo()
        raise


def _check_arguments(
    estimator: str, order: str, batches: Iterable[Any], max_batches: int | None, gap_batches: int
) -> None:
    if estimator not in get_args(Estimator):
        invariant = f"an estimator among {get_args(Estimator)}"
        raise ArgumentError(expected("recalibrate", invariant, repr(estimator), "Choose one of them."))
    if order not in get_args(Order):
        invariant = f"an order among {get_args(Order)}"
        raise ArgumentError(expected("recalibrate", invariant, repr(order), "Choose one of them."))
    if max_batches is not None and max_batches < 1:
        raise ArgumentError(expected("recalibrate", "max_batches of 1 or more", max_batches, "Leave it away for all."))
    if gap_batches < 0:
        raise ArgumentError(expected("recalibrate", "gap_batches of 0 or more", gap_batches, "0 measures no gap."))
    if order == "sequential" and isinstance(batches, Iterator):
        invariant = 'batches that can be gone through again for order="sequential"'
        todo = 'Give a list or a DataLoader, or use order="joint".'
        raise ArgumentError(expected("recalibrate", invariant, f"a {type(batches).__name__}", todo))


def _choose(model: nn.Module, skip_eval: bool) -> tuple[dict[str, _BatchNorm], dict[str, str]]:
    """The layers to measure, and those with running statistics that are left alone, with the reason."""
    layers: dict[str, _BatchNorm] = {}
    left_alone: dict[str, str] = {}
    for name, module in model.named_modules():
        buffers = {b: t for b, t in module._buffers.items() if t is not None}
        if not {"running_mean", "running_var"} <= buffers.keys():
            continue
        kind = type(module).__name__
        if not isinstance(module, _BatchNorm):
            frozen = {"weight", "bias"} <= buffers.keys()
            left_alone[name] = f"{kind}, whose parameters are buffers: frozen" if frozen else f"{kind}, another kind"
        elif is_lazy(buffers["running_mean"]):
            got, todo = f"{name} ({kind}), which has seen no input", "Run the model once on a batch."
            raise ArgumentError(expected("recalibrate", "layers that know their channels", got, todo))
        elif has_frozen_statistics(module):
            left_alone[name] = "frozen by batchnorm.freeze"
        elif skip_eval and not module.training:
            left_alone[name] = "in eval mode (skip_eval=True)"
        else:
            layers[name] = module
    if not layers:
        todo = "Layers with track_running_stats=False have nothing to recalibrate."
        raise ArgumentError(expected("recalibrate", "a layer with running statistics", "none", todo))
    return layers, left_alone


# The gap of the output, and that of each layer.
_Gap = tuple[float, dict[str, float]]


def _measure(
    runner: Runner, batches: Iterable[Any], order: Order, max_batches: int | None, gap_batches: int
) -> tuple[Found, tuple[_Gap, _Gap] | None]:
    length = _length(batches)
    if length is not None and max_batches is not None:
        length = min(length, max_batches)
    stream = iter(itertools.islice(batches, max_batches))
    kept = list(itertools.islice(stream, gap_batches))
    gap = Gap(runner, kept) if kept else None
    before = None if gap is None else gap.measure()
    if order == "joint":
        found = joint(runner, itertools.chain(kept, stream), length)
    else:
        found = sequential(runner, batches, max_batches, length)
    if gap is None or before is None:
        return found, None
    for name, population in found.populations.items():
        if population is not None:
            runner.observation.put(name, population.mean, population.var)
    after = gap.measure()
    found.notes.append(f"train/eval gaps were measured on {counted(gap.batches, 'batch')}")
    return found, (before, after)


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a loader over a data set without a length
        return None


def _report(
    estimator: Estimator,
    order: Order,
    found: Found,
    gaps: tuple[_Gap, _Gap] | None,
    before: dict[str, tuple[Tensor, Tensor]],
    left_alone: dict[str, str],
) -> Recalibration:
    layers = {}
    for name, population in found.populations.items():
        then = before[name]
        now, count, uses = then, 0, 0
        if population is not None:
            now, count, uses = (population.mean, population.var), population.count, population.uses
        own = (None, None) if gaps is None else (gaps[0][1].get(name), gaps[1][1].get(name))
        layers[name] = LayerStatistics(count, uses, *then, *now, *own)
    gap_before, gap_after = (None, None) if gaps is None else (gaps[0][0], gaps[1][0])
    return Recalibration(
        estimator=estimator,
        order=order,
        batches=found.batches,
        passes=found.passes,
        layers=layers,
        left_alone=left_alone,
        gap_before=gap_before,
        gap_after=gap_after,
        notes=tuple(found.notes),
    )


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean.detach().double().clone(), layer.running_var.detach().double().clone()


class _Written:
    """The layers' buffers as they were before something was written into them."""

    def __init__(self, layers: dict[str, _BatchNorm]) -> None:
        buffers = [getattr(layer, b) for layer in layers.values() for b in BUFFERS]
        self._kept = [(t, t.clone()) for t in buffers if t is not None]

    @torch.no_grad()
    def undo(self) -> None:
        for t, kept in self._kept:
            t.copy_(kept)


@torch.no_grad()
def _write(layers: dict[str, _BatchNorm], populations: dict[str, Population | None]) -> None:
    for name, layer in layers.items():
        found = populations[name]
        if found is None:
            continue
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(found.mean)
        layer.running_var.copy_(found.var)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(found.uses)


def _default_forward(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    if not isinstance(batch, (tuple, list)):
        return model(batch)
    first = batch[0]
    if isinstance(first, Mapping):
        return model(**first)
    return model(*first) if isinstance(first, tuple) else model(first)
