"""Going through the batches: once for all layers, or once a group of layers in the order of their dependence."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from batchnorm.errors import ArgumentError, expected
from batchnorm.lifecycle.progress import OnProgress
from batchnorm.lifecycle.recalibration.collect import Collected, Estimator, Population
from batchnorm.lifecycle.recalibration.dependence import Dependence
from batchnorm.lifecycle.recalibration.observe import Observation, OnUse, Use
from batchnorm.lifecycle.recalibration.ranks import Meetings
from batchnorm.lifecycle.recalibration.report import counted
from batchnorm.moments import Moments

Forward = Callable[[nn.Module, Any], object]


class Cut(BaseException):
    """Ends a forward from inside; no ``except Exception`` of the model's stops it."""


@dataclass
class Found:
    """What the passes gave."""

    populations: dict[str, Population | None]
    batches: int
    passes: int
    notes: list[str]


@dataclass
class Runner:
    """Runs the observed model over the batches."""

    model: nn.Module
    observation: Observation
    forward: Forward
    estimator: Estimator
    progress: OnProgress
    meetings: Meetings

    def run(self, batch: Any, on_use: OnUse) -> tuple[bool, object]:
        """Whether the forward went to its end, and its result."""
        cut = False

        def guarded(use: Use) -> bool:
            nonlocal cut
            if cut:  # someone caught the exception and goes on: that is no longer the model's forward
                raise Cut
            try:
                return on_use(use)
            except Cut:
                cut = True
                raise

        output = None
        with self.observation.reporting(guarded), contextlib.suppress(Cut):
            output = self.forward(self.model, batch)
        return not cut, output

    def collect(self) -> dict[str, Collected]:
        return {name: Collected(name, self.estimator) for name in self.observation.layers}

    def merge(self, collected: dict[str, Collected]) -> dict[str, Collected]:
        """What all ranks collected."""
        devices = {name: layer.running_mean.device for name, layer in self.observation.layers.items()}  # type: ignore[union-attr]
        return self.meetings.collected(collected, devices)

    def all_notes(self, own: list[str]) -> list[str]:
        """The notes of all ranks on their own batches."""
        every = self.meetings.all(own)
        if len(every) == 1:
            return own
        return [f"rank {rank}: {note}" for rank, notes in enumerate(every) for note in notes]


def joint(runner: Runner, batches: Iterable[Any], total: int | None) -> Found:
    """All layers in one pass, each normalizing by the batch."""
    collected = runner.collect()
    stopped: dict[str, list[int]] = {}
    done = 0

    def on_use(use: Use) -> bool:
        found = collected[use.name].add(use, done + 1)
        if found is not None and _too_few(found):
            stopped.setdefault(use.name, []).append(done + 1)
            raise Cut
        return True

    for batch in batches:
        runner.run(batch, on_use)
        done += 1
        runner.progress(done, total)
    notes = runner.all_notes([_stop_note(name, at, runner.estimator) for name, at in stopped.items()])
    every = runner.meetings.all((done, stopped))
    done = sum(each for each, _ in every)
    stopped = _joined([each for _, each in every])
    collected = runner.merge(collected)
    _refuse_none(done)
    populations = _populations(runner, collected, stopped, done)
    return Found(populations, done, 1, notes + _paper_notes(collected, stopped))


def _joined(every: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    """Lists by layer, one rank's after the other's."""
    return {name: [at for each in every for at in each.get(name, [])] for name in {n: None for e in every for n in e}}


def _populations(
    runner: Runner, collected: dict[str, Collected], stopped: dict[str, list[int]], done: int
) -> dict[str, Population | None]:
    populations = {name: each.population() for name, each in collected.items()}
    unreached = [name for name, found in populations.items() if found is None]
    if unreached and sum(map(len, stopped.values())) == done:
        invariant = 'batches with more than one value a channel under order="joint"'
        got = f"only batches that cannot be normalized by themselves at {_names(stopped)}"
        todo = 'Use larger batches, or order="sequential".'
        raise ArgumentError(expected("recalibrate", invariant, got, todo))
    return populations


@dataclass
class _State:
    """The state of a sequential recalibration between its passes."""

    remaining: list[str]
    depends: dict[str, set[str]]
    # The layers in the order in which they were used, as every batch of the first pass had it; None if they differ
    # or if Python reads values, on which the order may hang.
    order: list[str] | None = None

    def share(self, group: Iterable[str]) -> float:
        """How far into a forward the group's last use comes: 1 where that is not known."""
        stop = self.stop(group)
        return 1.0 if stop is None or self.order is None else stop / len(self.order)

    def stop(self, group: Iterable[str]) -> int | None:
        """How many uses of layers into a forward the group's last one comes; None where that is not known."""
        wanted = set(group)
        return max((i + 1 for i, name in enumerate(self.order or ()) if name in wanted), default=None)


def sequential(runner: Runner, batches: Iterable[Any], max_batches: int | None, length: int | None) -> Found:
    """Group after group, each measured with all that it depends on normalizing by population statistics.

    The first pass goes to the end of every forward and finds out what depends on what; dependence is followed in
    the later passes too, so that a layer is taken as measured only where every use, on every batch, is proved not
    to depend on a layer that still has to be.
    """
    observation = runner.observation
    observation.dependence = Dependence(runner.model)
    names = list(observation.layers)
    state = _State(names, {name: set() for name in names})
    populations: dict[str, Population | None] = dict.fromkeys(names)
    notes: list[str] = []
    first = passes = 0
    worked, total = 0.0, None
    while state.remaining:
        group = groups(state.remaining, state.depends)[0]
        this = _Pass(runner, state, group)
        share = state.share(group)
        done = 0
        for batch in itertools.islice(batches, max_batches):
            this.run(batch)
            done += 1
            if passes == 0 and done == 1 and length is not None:  # the first batch already shows most of the order
                rest = [name for name in this.reached if name not in this.measured()]
                total = length + _ahead(_State(rest, state.depends, this.order), length)
            runner.progress(worked + done * share, total)
        worked += done * share
        stop_notes, total_done = this.meet(done)
        _refuse_none(total_done, passes)
        passes += 1
        if passes == 1:
            first = total_done
            state.order = this.order
        for name in this.measured():
            population = populations[name] = this.collected[name].population()
            if population is not None:
                observation.put(name, population.mean, population.var)
        # A layer that was not reached though nothing stopped a forward before it has nothing to be measured on.
        over = {*this.measured(), *(name for name in group if name not in this.reached)}
        state.remaining = [name for name in state.remaining if name not in over]
        notes += [*this.notes(), *stop_notes, *this.paper_notes()]
        total = worked + _ahead(state, done)
    return Found(populations, first, passes, notes)


class _Pass:
    """One pass of a sequential recalibration."""

    def __init__(self, runner: Runner, state: _State, group: dict[str, frozenset[str]]) -> None:
        self.collected = runner.collect()
        self.reached: set[str] = set()
        self.order: list[str] | None = None
        self._runner = runner
        self._state = state
        self._group = group
        self._stop = state.stop(group)
        self._spoiled: set[str] = set()
        self._stopped: dict[str, list[int]] = {}
        # Of the batch at hand: the layers used, and those whose normalizing by the batch came to an end.
        self._uses: list[str] = []
        self._ended: set[str] = set()
        self._batch = 0

    def run(self, batch: Any) -> None:
        dependence = self._runner.observation.dependence
        assert dependence is not None
        dependence.start(batch)
        self._uses, self._ended = [], set()
        self._batch += 1
        whole, _ = self._runner.run(batch, self._on_use)
        same = whole and not dependence.values_were_read and self.order in (None, self._uses)
        if self._batch == 1 or self.order is not None:
            self.order = self._uses if same else None

    def meet(self, done: int) -> tuple[list[str], int]:
        """Make this pass that of all ranks: the notes on what was stopped, and how many batches there were."""
        runner, state = self._runner, self._state
        every = runner.meetings.all((done, self.reached, self._spoiled, state.depends, self.order, self._stopped))
        for _, reached, spoiled, depends, _, _ in every:
            self.reached |= reached
            self._spoiled |= spoiled
            for name, on in depends.items():
                state.depends[name] |= on
        orders = [order for count, _, _, _, order, _ in every if count]
        self.order = orders[0] if orders and all(order == orders[0] for order in orders) else None
        measured = self.measured()
        own = [_stop_note(name, at, runner.estimator) for name, at in self._stopped.items() if name in measured]
        self._stopped = _joined([stopped for *_, stopped in every])
        self.collected = runner.merge(self.collected)
        return runner.all_notes(own), sum(count for count, *_ in every)

    def measured(self) -> list[str]:
        """The layers whose every use was independent of those that remain."""
        return [name for name in self._group if name in self.reached and name not in self._spoiled]

    def notes(self) -> list[str]:
        """On the layers that have no order among them."""
        measured = self.measured()
        together = sorted({tuple(sorted(self._group[name] | {name})) for name in measured if self._group[name]})
        return [
            f"{_names(names)} {'uses' if len(names) == 1 else 'use'} what "
            f"{'it' if len(names) == 1 else 'they'} gave before: measured normalizing by the batch, as in joint order"
            for names in together
        ]

    def paper_notes(self) -> list[str]:
        measured = self.measured()
        stopped = {name: at for name, at in self._stopped.items() if name in measured}
        return _paper_notes({name: self.collected[name] for name in measured}, stopped)

    def _on_use(self, use: Use) -> bool:
        name, state = use.name, self._state
        self._uses.append(name)
        self.reached.add(name)
        by_batch = False
        if name in state.remaining:
            by_batch = self._measure(use)
        if len(self._uses) == self._stop and self._uses == (state.order or [])[: self._stop]:
            raise Cut
        return by_batch

    def _measure(self, use: Use) -> bool:
        name, state = use.name, self._state
        dependence = self._runner.observation.dependence
        assert dependence is not None
        depends = dependence.of(use.input, use.mask, use.sample_weight) & set(state.remaining)
        state.depends[name] |= depends
        if name not in self._group:
            return False
        if not depends <= self._group[name]:
            self._spoiled.add(name)
        if name in self._spoiled or name in self._ended:
            return False
        found = self.collected[name].add(use, self._batch)
        by_batch = bool(self._group[name])
        if by_batch and found is not None and _too_few(found):
            # The forward goes on by other statistics, for the layers that do not depend on this one.
            self._stopped.setdefault(name, []).append(self._batch)
            self._ended |= self._group[name]
            return False
        return by_batch


def groups(names: list[str], depends: dict[str, set[str]]) -> list[dict[str, frozenset[str]]]:
    """The layers in the order in which they can be measured, those of a group together; each with its mutual ones.

    A layer comes as soon as all that it depends on has come. Layers that depend on each other (or on themselves:
    used again on what they gave) have no order among them and come together.

    >>> groups(["a", "b", "c"], {"a": set(), "b": {"a"}, "c": {"a"}})
    [{'a': frozenset()}, {'b': frozenset(), 'c': frozenset()}]
    """
    closed = {name: depends[name] & set(names) for name in names}
    for via in names:
        for name in names:
            if via in closed[name]:
                closed[name] |= closed[via]
    mutual = {name: frozenset(other for other in closed[name] if name in closed[other]) for name in names}
    level: dict[str, int] = {}
    for name in sorted(names, key=lambda name: len(closed[name] | {name})):  # what a layer depends on has fewer
        before = closed[name] - mutual[name] - {name}
        level[name] = 1 + max((level[other] for other in before), default=-1)
    found: list[dict[str, frozenset[str]]] = [{} for _ in range(1 + max(level.values(), default=-1))]
    for name in names:
        found[level[name]][name] = mutual[name]
    return found


def _ahead(state: _State, batches: int) -> float:
    """The work of the passes to come, in batches, as far as dependence is known."""
    return sum(batches * state.share(group) for group in groups(state.remaining, state.depends))


def _refuse_none(done: int, passes: int = 0) -> None:
    if done == 0:
        got = f"an empty iterable{f' in pass {passes + 1}' if passes else ''}"
        todo = "A generator that was already used up gives none."
        raise ArgumentError(expected("recalibrate", "at least one batch", got, todo))


def _too_few(found: Moments) -> bool:
    return float(found.count.min()) <= 1


def _stop_note(name: str, batches: list[int], estimator: Estimator) -> str:
    plural = len(batches) > 1
    which = f"{counted(len(batches), 'batch')} of one value a channel ({_names(map(str, batches))})"
    if not plural:
        which = f"batch {batches[0]}, of one value a channel,"
    shown = "counted" if estimator == "pooled" else "left out"
    return (
        f"{which} cannot be normalized by {'themselves' if plural else 'itself'}: {shown} at {name or 'the layer'}, "
        "unseen by the layers after it"
    )


def _paper_notes(collected: dict[str, Collected], stopped: dict[str, list[int]]) -> list[str]:
    return [
        f"{counted(each.left_out, 'use')} of a single sample left out at {name or 'the layer'}: "
        'estimator="paper" combines mini-batches of one size'
        for name, each in collected.items()
        if each.left_out and name not in stopped
    ]


def _names(names: Iterable[str]) -> str:
    return ", ".join(name or "the layer" for name in names)
