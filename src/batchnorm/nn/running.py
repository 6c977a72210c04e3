"""How running statistics follow the batches: their weight, their precision, and which batches they skip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from batchnorm.checks import finite_channels, nonfinite_channels, raise_nonfinite
from batchnorm.errors import AutogradError, StateError, expected
from batchnorm.functional import Batch
from batchnorm.kernels import plain
from batchnorm.kernels.contract import Running, enough
from batchnorm.moments import Moments
from batchnorm.nn.naming import described


def following(
    mean: Tensor | None, var: Tensor | None, momentum: float | None, batches: Tensor | None
) -> Running | None:
    """The running statistics with the weight that the next batch gets; None where there are none to update.

    With a momentum, that is the weight (an exponential average). With ``momentum=None`` the k-th batch has weight 1/k,
    so that all batches count equally (a cumulative average). Without a counter the weight is then 0, as in torch.
    """
    if mean is None or var is None:
        return None
    if momentum is not None:
        return Running(mean, var, momentum, batches)
    if batches is None:
        return Running(mean, var, 0.0)
    if torch.compiler.is_compiling() or not plain.is_plain(batches):
        # A tensor, not its value: reading that would end the graph here.
        return Running(mean, var, 1.0 / (batches + 1).to(mean.dtype), batches)
    return Running(mean, var, 1.0 / (int(batches) + 1), batches)


if TYPE_CHECKING:
    from batchnorm.nn.distributed import Exchange

_graph_task = torch._C._current_graph_task_id
_is_tracing = torch.compiler.is_dynamo_compiling

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Buffers(NamedTuple):
    """One set of running statistics: tensors of shape (channels,), and the counter."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None

    def sink(self, momentum: float | None) -> Running:
        """What the next batch is written to."""
        running = following(self.mean, self.var, momentum, self.batches)
        assert running is not None
        return running

    def copy(self) -> Buffers:
        """Buffers of their own with the same values."""
        return Buffers(*(None if t is None else t.detach().clone() for t in self))  # type: ignore[arg-type]

    @torch.no_grad()
    def assign(self, values: Buffers) -> None:
        """Take over the values of a copy."""
        for t, value in zip(self, values, strict=True):
            if t is not None and value is not None:
                t.copy_(value)

    def differs_from(self, values: Buffers) -> Tensor:
        """A bool of shape (): whether any value is another, NaN being equal to NaN."""
        differs = torch.zeros((), dtype=torch.bool, device=self.mean.device)
        for t, value in zip(self, values, strict=True):
            if t is not None and value is not None:
                differs = differs | ((t != value) & ((t == t) | (value == value))).any()
        return differs


class Accumulated:
    """The merged moments of several batches, to be written as one.

    Its tensors stay the same objects and are written in place, so that a compiled forward can write them too.
    """

    def __init__(self, buffers: Buffers) -> None:
        found = Moments.empty(buffers.mean.shape[0], buffers.mean.device)
        self._count, self._mean, self._m2 = found.count, found.mean, found.m2
        self._buffers = buffers

    @property
    def running(self) -> Running:
        """The statistics that the moments are for, to look at their dtype and counter."""
        return Running(self._buffers.mean, self._buffers.var, 0.0, self._buffers.batches)

    @property
    def moments(self) -> Moments:
        """Of all batches so far."""
        return Moments(self._count, self._mean, self._m2)

    def sink(self, momentum: float | None) -> Accumulated:
        """Itself: with which weight the moments will count is decided when they are written."""
        return self

    @torch.no_grad()
    def update(self, batch: Moments, where: Tensor | None = None) -> None:
        """Merge a batch; not at all where the bool ``where`` is False."""
        if where is not None:
            count, mean, m2 = (torch.where(where, t, torch.zeros_like(t)) for t in _tensors_of(batch))
            batch = Moments(count, mean, m2)
        for mine, value in zip(self._tensors(), _tensors_of(self.moments.merge(batch.detach())), strict=True):
            mine.copy_(value)

    def take(self, found: Moments, where: Tensor | None = None) -> None:
        """Merge a batch."""
        self.update(found, where)

    def copy(self) -> Accumulated:
        """The same moments in tensors of their own."""
        other = Accumulated(self._buffers)
        other.assign(self)
        return other

    @torch.no_grad()
    def assign(self, values: Accumulated) -> None:
        """Take over the moments of a copy."""
        for mine, value in zip(self._tensors(), values._tensors(), strict=True):
            mine.copy_(value)

    def differs_from(self, values: Accumulated) -> Tensor:
        """A bool of shape (): whether any value is another, NaN being equal to NaN."""
        pairs = zip(self._tensors(), values._tensors(), strict=True)
        return torch.stack([((t != v) & ((t == t) | (v == v))).any() for t, v in pairs]).any()

    def _tensors(self) -> tuple[Tensor, ...]:
        return self._count, self._mean, self._m2


class Deferred:
    """A copy of another destination, to which batches go until it is committed.

    It is brought up to date at the first batch, as buffers may have changed by then: DistributedDataParallel sends
    those of the first rank to the others in front of each forward.
    """

    def __init__(self, target: Destination) -> None:
        self._target = target
        self._before, self._values = target.copy(), target.copy()
        self.used = False
        """Whether a batch has come since the beginning, or since the last commit."""

    def sink(self, momentum: float | None) -> Running | Accumulated:
        """What the next batch is written to."""
        self._begin()
        return self._values.sink(momentum)

    def _begin(self) -> None:
        if self.used:
            return
        target = self._target
        if isinstance(target, Deferred):
            target._begin()
            target = target._values
        self._before.assign(target)  # type: ignore[arg-type]
        self._values.assign(target)  # type: ignore[arg-type]
        self.used = True

    def is_outdated(self) -> Tensor:
        """A bool of shape (): whether the target is no longer what the copy was made from."""
        return self._target.differs_from(self._before)  # type: ignore[arg-type]

    def commit(self) -> None:
        """Write the values to the target."""
        self._target.assign(self._values)  # type: ignore[arg-type]

    def copy(self) -> Buffers | Accumulated:
        """The same values in tensors of their own."""
        return self._values.copy()

    def assign(self, values: Buffers | Accumulated) -> None:
        """Take over the values of a copy."""
        self._values.assign(values)  # type: ignore[arg-type]

    def differs_from(self, values: Buffers | Accumulated) -> Tensor:
        """A bool of shape (): whether any value is another, NaN being equal to NaN."""
        return self._values.differs_from(values)  # type: ignore[arg-type]


Destination = Buffers | Accumulated | Deferred
"""What a layer's batches go to. ``copy`` gives another one, ``assign`` takes a copy's values over."""


class Whole(Protocol):
    """A batch of which one forward sees only a part."""

    def seen_by(self, statistics: Batch) -> Batch:
        """The statistics of a training forward, taken over the whole batch."""


Join = Callable[[Any, Tensor, "Exchange | None"], Whole]
"""From a layer, its input and what joins it with other ranks to the batch that the input is a part of."""


class Stage:
    """Where a layer's batches go inside a block: a destination for each set of statistics.

    With ``join``, each input is part of a larger batch and is normalized by the statistics of that batch.

    It is the layer's ``_staged``. A copy of the layer made inside the block does not belong to the block: its
    ``_staged`` is None.
    """

    def __init__(self, slots: dict[str | None, Destination], join: Join | None = None) -> None:
        self.slots = slots
        self.join = join

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def destination(
    layer: Any, mean: Tensor | None, var: Tensor | None, batches: Tensor | None
) -> Running | Accumulated | None:
    """Where the moments of the layer's next batch go; None if nowhere.

    Nowhere inside a backward pass: a forward there is the second run of an activation checkpoint, and its batch was
    counted in the first. ``torch.compile`` decides it at run time, see ``operators.train``.
    """
    # Each look-up counts here, as in all that a forward of a small batch goes through.
    if not _is_tracing() and _graph_task() != -1:
        return _recomputed(layer, mean, var, batches)
    stage: Stage | None = layer._staged
    if stage is None:
        momentum = layer.momentum
        if momentum is None or mean is None or var is None:
            return following(mean, var, momentum, batches)
        return Running(mean, var, momentum, batches)
    slot = stage.slots.get(layer._domain)
    return None if slot is None else slot.sink(layer.momentum)


def _recomputed(layer: Any, mean: Tensor | None, var: Tensor | None, batches: Tensor | None) -> Running | None:
    """None, or under a dispatch mode statistics that are thrown away.

    Selective checkpointing numbers the operations of the first forward and replays their results by number, so the
    same operations have to run again.

    Raises:
        StateError: the layer renormalizes by running statistics, which the first forward has moved
    """
    if layer._renorm is not None and not layer._renorm.is_plain and layer._staged is None:
        invariant = "the running statistics of the first forward, for renorm in an activation checkpoint"
        got, todo = "later ones", "Run forward and backward inside `with defer_updates(model):`, and commit after it."
        raise StateError(expected(described(layer), invariant, got, todo))
    if mean is None or var is None or not torch._C._len_torch_dispatch_stack():
        return None
    with _disable_current_modes():
        mean, var, batches = mean.clone(), var.clone(), None if batches is None else batches.clone()
    return following(mean, var, layer.momentum, batches)


@dataclass(frozen=True)
class Guarded:
    """Running statistics that batches with an Inf or NaN do not reach: the sink of ``nonfinite``."""

    layer: nn.Module
    into: Running | Accumulated | None
    policy: Literal["raise", "skip"]

    @property
    def running(self) -> Running | None:
        """The statistics that the batch is for."""
        return self.into.running if isinstance(self.into, Accumulated) else self.into

    def take(self, found: Moments, where: Tensor | None = None) -> None:
        """Follow the batch if it is finite, else leave everything as it is or raise.

        Not where the bool ``where`` is False. A batch whose mask left too few values, which was not checked under a
        compiler, is not followed either.
        """
        counted = enough(found) if where is None else enough(found) & where
        if self.policy == "skip":
            if self.into is not None:
                self.into.update(found, where=finite_channels(found, self.running).all() & counted)
            return
        bad = self._nonfinite(found)
        if bad:
            running = self.running
            batches = None if running is None else running.batches
            raise_nonfinite(described(self.layer), bad, None if batches is None else int(batches) + 1)
        if self.into is not None:
            self.into.update(found, where=counted)

    def _nonfinite(self, found: Moments) -> list[int]:
        if found.mean.is_meta:
            return []
        if torch.compiler.is_compiling() or plain.is_plain(found.mean):
            return nonfinite_channels(found, self.running)
        try:
            return nonfinite_channels(found, self.running)
        except RuntimeError as error:
            invariant = 'a call in which nonfinite="raise" can look at values'
            got = plain.why_not(found=found.mean)
            todo = 'Use nonfinite="skip", which needs no look.'
            raise AutogradError(expected(type(self.layer).__name__, invariant, got, todo)) from error


def at_least_float32(buffer: Tensor, before: Tensor) -> Tensor:
    """``buffer`` as a cast of ``before`` left it, but in no less than float32.

    In bfloat16 with momentum 0.01 a running mean whose true value is 3 sticks at 2.03: the steps get smaller
    than half a unit in the last place. The digits come from ``before``, which the cast did not round.
    """
    if buffer.dtype not in (torch.bfloat16, torch.float16):
        return buffer
    if buffer.is_meta or before.is_meta:
        return buffer.to(torch.float32)
    return before.to(device=buffer.device, dtype=torch.float32)


def _tensors_of(found: Moments) -> tuple[Tensor, Tensor, Tensor]:
    return found.count, found.mean, found.m2
