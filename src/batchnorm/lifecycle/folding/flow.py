"""Who feeds whom: from a record of a run, the proof that what one layer gives goes to another, whole and unchanged."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from batchnorm.lifecycle.folding.record import Call, Place, Record


def source_of(record: Record, sink: Call) -> Call | str:
    """The call whose output is ``sink``'s input and nothing else, or in words why there is none."""
    x = sink.input
    assert x is not None
    found = [
        call
        for call in record.calls
        if call.end < sink.begin and call.output is not None and call.output.key == x.key
        and all(given.key != x.key for given in call.given)
    ]  # fmt: skip
    if not found:
        made = record.made.get(x.key)
        return f"its input comes from {made}" if made else "its input is the model's own, or a constant"
    return _alone(record, found[-1], sink) or found[-1]


def sink_of(record: Record, source: Call) -> Call | str:
    """The call whose input is ``source``'s output, which goes nowhere else, or in words why there is none."""
    z = source.output
    assert z is not None
    found = [call for call in record.calls if call.begin > source.end and call.input and call.input.key == z.key]
    if not found:
        stray = record.stray(z.key, [source], source.begin)
        return f"its output goes to {stray.what}" if stray else "its output is what the model returns, or not used"
    return _alone(record, found[0], source, reverse=True) or found[0]


def _alone(record: Record, first: Call, second: Call, reverse: bool = False) -> str | None:
    """Why the second call's input is not the first one's output alone, or None if it is."""
    source, sink = (second, first) if reverse else (first, second)
    assert source.output is not None
    key, of = source.output.key, "its output" if reverse else f"the output of {source.path}"
    if sum(given.key == key for given in sink.given) > 1:
        return f"{of} is given to {sink.path} more than once"
    stray = record.stray(key, [source, sink], source.begin)
    if stray is not None:
        return f"{of} {'is changed by' if stray.writes else 'also goes to'} {stray.what}"
    if key in record.held:
        return f"{of} outlives the forward: the model returns it or keeps it"
    return None


def channels_seen(base: Place, read: Place, axis: int) -> Tensor | None:
    """For each index of ``read``'s dimension ``axis`` the channel (dimension 1) of ``base`` that it shows.

    Both are views of one storage. None where an index shows more than one channel, or anything outside ``base``.

    >>> base = Place(0, (5, 2, 3), (6, 3, 1), 0)
    >>> channels_seen(base, Place(0, (5, 6), (6, 1), 0), 1)  # flattened
    tensor([0, 0, 0, 1, 1, 1])
    >>> channels_seen(base, Place(0, (5, 3, 2), (6, 1, 3), 0), 1) is None  # transposed: now the positions
    True
    """
    if read.shape[axis] == 0 or not prod(base.shape) or not prod(read.shape):
        return None
    if base == read and axis % len(read.shape) == 1:
        return torch.arange(base.shape[1])
    at, to = _offsets(base), _offsets(read)
    # Each place of the storage says which channel it belongs to.
    storage = torch.full((int(max(at.max(), to.max())) + 1,), -1)
    labels = torch.arange(base.shape[1]).view(-1, *[1] * (len(base.shape) - 2)).expand(base.shape)
    storage[at] = labels
    if not torch.equal(storage[at], labels):  # channels that overlap
        return None
    seen = storage[to].movedim(axis, 0).flatten(1)
    first = seen[:, 0]
    return None if bool((first < 0).any()) or bool((seen != first[:, None]).any()) else first


def _offsets(place: Place) -> Tensor:
    """Where in its storage each element lies."""
    offsets = torch.tensor(place.offset)
    for size, stride in zip(place.shape, place.stride, strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets
