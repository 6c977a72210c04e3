"""When running statistics move: with the optimizer's step, or once for several batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from batchnorm.errors import ArgumentError, StateError, expected
from batchnorm.moments import Moments
from batchnorm.nn import BatchNorm
from batchnorm.nn.domains import buffers_of
from batchnorm.nn.followers import followers
from batchnorm.nn.running import Accumulated, Deferred, Destination, Join, Stage

Place = tuple[BatchNorm, str | None]
"""A layer and one of its domains; None where it has no domains."""


class DeferredUpdates:
    """What the batches of a ``defer_updates`` block would make of the running statistics.

    Made by ``defer_updates``, which says how to use it.
    """

    def __init__(self, model: nn.Module, optimizers: tuple[Optimizer, ...] = ()) -> None:
        self._layers = followers("defer_updates", model)
        self._optimizers = optimizers
        self._stepped: dict[int, list[Tensor | None]] = {id(optimizer): [] for optimizer in optimizers}
        self._hooks: list[Any] = []
        self._staging: Staging | None = None
        self._deferred: dict[Place, Deferred] = {}
        self._state = "not begun"

    def __enter__(self) -> DeferredUpdates:
        if self._state != "not begun":
            todo = "Call defer_updates again for the next step."
            raise StateError(expected("defer_updates", "a block that is entered once", f"one {self._state}", todo))
        self._staging = staging = Staging("defer_updates", self._layers.values())
        self._deferred = {place: Deferred(target) for place, target in staging.targets.items()}
        try:
            for optimizer in self._optimizers:
                self._hooks.append(optimizer.register_step_post_hook(self._on_step))
            staging.begin(self._deferred)
        except BaseException:
            self._remove_hooks()
            staging.end()
            raise
        self._state = "open"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._staging is not None
        self._remove_hooks()
        if kind is not None:
            self._drop("discarded, as its block ended in an error")
            self._staging.end()
            return
        if self._state == "open":
            self._state = "pending"
        self._staging.end()
        if self._optimizers and self._state == "pending":
            if self.stepped:
                self.commit()
            else:
                self.discard()

    @property
    def stepped(self) -> bool:
        """Whether every one of the optimizers has made a step in the block; True where none was given.

        Reading it waits for the device where a fused optimizer decides there whether it steps.
        """
        return all(any(found is None or not bool(found) for found in steps) for steps in self._stepped.values())

    def commit(self) -> None:
        """Write what the batches have made of the statistics so far, all layers or none.

        In the block or after it. In the block later batches go on from there, and can be committed again.

        Raises:
            StateError: there is nothing to commit any more, or the statistics have changed in the meantime by something
                other than these updates, which would be lost
        """
        self._check_open("commit")
        assert self._staging is not None
        self._staging.check_targets("commit")
        used = {place: each for place, each in self._deferred.items() if each.used}
        outdated = [each.is_outdated() for each in used.values()]
        if outdated and bool(torch.stack([t.to(outdated[0].device) for t in outdated]).any()):
            todo = "Discard them, or let the block be the only thing that changes the statistics."
            raise StateError(expected("commit", "statistics as they were when the block began", "others", todo))
        self._staging.write(lambda place, _: used[place].commit() if place in used else None)
        self._begin_again()

    def discard(self) -> None:
        """Forget the updates so far. In the block later batches begin again from the statistics as they are.

        Raises:
            StateError: there is nothing to discard any more
        """
        self._check_open("discard")
        self._begin_again("discarded already")

    def _begin_again(self, state: str = "committed already") -> None:
        """In the block the next batch begins from the statistics as they are; after it nothing is left."""
        for each in self._deferred.values():
            each.used = False
        if self._state == "pending":
            self._drop(state)

    def _drop(self, state: str) -> None:
        self._state = state
        self._deferred = {}

    def _check_open(self, function: str) -> None:
        if self._state not in ("open", "pending"):
            got = f"updates that were {self._state}" if self._staging is not None else "a block that was not entered"
            todo = "Write `with defer_updates(model) as updates:` for each step, and end it once."
            raise StateError(expected(function, "updates that wait to be committed", got, todo))

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer is called by the scaler in any case, and decides on the device whether it steps.
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        self._stepped[id(optimizer)].append(None if found is None else found.detach().clone())

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def defer_updates(model: nn.Module, *optimizers: Optimizer) -> DeferredUpdates:
    """A block whose batches do not move the running statistics until they are committed.

    Inside ``with defer_updates(model) as updates:`` the layers normalize by the batch as always. The buffers stay as
    they are, the counter included, and eval mode and ``state_dict()`` see them so. ``updates.commit()`` writes what
    the batches would have made of them, in the block or after it; ``updates.discard()`` forgets it. A block that ends
    in an exception has nothing to commit. Updates that are neither committed nor discarded are forgotten.

    With optimizers, the end of the block does it: it commits if each of them has made its step in the block, and
    discards otherwise. That is the form for ``torch.amp.GradScaler``, which skips the step where a gradient is Inf or
    NaN and does not say so. The optimizers are asked by a hook on their step (a fused optimizer by its
    ``found_inf``), so it does not matter when ``scaler.unscale_``, ``step`` and ``update`` are called, whether the
    scale drops, or whether there is a scaler at all. With several, one skipped step is enough to discard.

    Arguments:
        model: holds layers of this library. Layers of torch.nn that would move are refused
        optimizers: whose steps decide at the end of the block

    Raises:
        ArgumentError: no batch normalization layer in the model, or layers of torch.nn in training mode
        StateError: ``commit`` or ``discard`` where nothing waits, or ``commit`` after something else has changed the
            statistics. Nothing is changed then

    It costs three copies of the statistics for each layer, and no pass over the data. Blocks can be nested, also with
    ``accumulate_statistics``: the inner block commits to the outer one.

    >>> import torch, batchnorm as bn
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), bn.BatchNorm1d(3))
    >>> with defer_updates(model) as updates:
    ...     y = model(torch.randn(8, 4))
    >>> int(model[1].num_batches_tracked)
    0
    >>> updates.commit()
    >>> int(model[1].num_batches_tracked)
    1
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> scaler = torch.amp.GradScaler("cpu", init_scale=1e38)  # too large: the gradients overflow
    >>> with defer_updates(model, optimizer):
    ...     scaler.scale(model(torch.randn(8, 4)).square().sum() * 100).backward()
    ...     scaler.step(optimizer)
    ...     scaler.update()
    >>> int(model[1].num_batches_tracked)
    1
    """
    given: tuple[object, ...] = optimizers
    for other in given:
        if not isinstance(other, Optimizer):
            todo = "A scaler is not needed: give the optimizers that it steps."
            raise ArgumentError(expected("defer_updates", "torch.optim.Optimizers", type(other).__name__, todo))
    return DeferredUpdates(model, optimizers)


@contextmanager
def accumulate_statistics(model: nn.Module) -> Iterator[None]:
    """A block whose batches move the running statistics once, at its end, as one batch.

    For the micro-batches of one optimizer step. Each layer merges the moments of all its batches by Chan's formula, so
    that the one update, with the layer's momentum and the unbiased variance, is that of the whole batch, for any sizes
    in any order, and the counter goes up by one. Only the statistics are merged: each micro-batch is still normalized
    by its own mean and variance (``exact_accumulation`` normalizes by those of the whole). The moments are those that
    reach the layer, so from the second layer on they depend on how the first has normalized.

    A layer that is used several times in a forward gets one update for all of its uses. A layer that saw no values,
    or is in eval mode or frozen, gets none. A block that ends in an exception changes nothing.

    Arguments:
        model: holds layers of this library. Layers of torch.nn that would move are refused

    Raises:
        ArgumentError: no batch normalization layer in the model, or layers of torch.nn in training mode

    >>> import torch, batchnorm as bn
    >>> layer, whole = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    >>> x = torch.randn(12, 3)
    >>> with accumulate_statistics(layer):
    ...     for micro_batch in x.split([5, 4, 3]):
    ...         y = layer(micro_batch)
    >>> y = whole(x)
    >>> torch.allclose(layer.running_var, whole.running_var), int(layer.num_batches_tracked)
    (True, 1)
    """
    staging = Staging("accumulate_statistics", followers("accumulate_statistics", model).values())
    collected = {place: Accumulated(buffers) for place, buffers in staging.buffers.items()}
    try:
        staging.begin(collected)
        yield
    finally:
        staging.end()
    staging.write(lambda place, target: write_once(collected[place].moments, place, target))


def write_once(whole: Moments, place: Place, target: Destination) -> None:
    """Let the moments of several batches count as one batch; not at all where there were no values."""
    layer, _ = place
    target.sink(layer.momentum).update(whole, where=(whole.count > 0).any())


class Staging:
    """Layers whose batches go to other destinations for a while."""

    def __init__(self, function: str, layers: Iterable[BatchNorm]) -> None:
        self._function = function
        self._before = {layer: layer._staged for layer in layers}
        self._stages: dict[BatchNorm, Stage] = {}
        self.buffers = {(layer, domain): b for layer in self._before for domain, b in buffers_of(layer).items()}
        """The layers' own."""
        self.targets: dict[Place, Destination] = {}
        """Where the layers' batches went before: to the buffers, or to what a block around this one has set."""
        for (layer, domain), buffers in self.buffers.items():
            outer = self._before[layer]
            self.targets[layer, domain] = buffers if outer is None else outer.slots[domain]

    def begin(self, destinations: Mapping[Place, Destination], join: Join | None = None) -> None:
        for layer in self._before:
            slots = {domain: to for (of, domain), to in destinations.items() if of is layer}
            self._stages[layer] = layer.__dict__["_staged"] = Stage(slots, join)

    def end(self) -> None:
        """The destinations of before; may be called again."""
        stages, self._stages = self._stages, {}
        late = False
        for layer, stage in stages.items():
            if layer.__dict__.get("_staged") is not stage:
                late = True
            elif (before := self._before[layer]) is None:
                del layer.__dict__["_staged"]
            else:
                layer.__dict__["_staged"] = before
        if late:
            todo = "Use them as `with` blocks, the inner one ending first."
            raise StateError(expected(self._function, "blocks that are nested", "one that ends out of order", todo))

    def check_targets(self, function: str) -> None:
        """Raise if a block around this one, to which its updates go, has ended before them."""
        for layer, outer in self._before.items():
            now: Stage | None = self._stages.get(layer, layer._staged)
            if outer is not None and not self._stages and now is not outer:
                todo = "Commit before the outer block ends."
                invariant = "a call before the end of the block around this one"
                raise StateError(expected(function, invariant, "one after it", todo))

    def write(self, change: Callable[[Place, Destination], object]) -> None:
        """Call ``change(place, target)`` for every target: for all of them, or after an interrupt for none."""
        before = {place: target.copy() for place, target in self.targets.items()}
        try:
            for place, target in self.targets.items():
                change(place, target)
        except BaseException:
            for place, target in self.targets.items():
                target.assign(before[place])  # type: ignore[arg-type]
            raise
