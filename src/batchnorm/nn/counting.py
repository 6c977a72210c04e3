"""How many values a training batch has: too few of them, and the virtual batches it falls into."""

from __future__ import annotations

from torch import Tensor

from batchnorm.checks import EVERYWHERE, Places, can_look, check_places, check_present, least
from batchnorm.errors import ArgumentError, AutogradError, expected
from batchnorm.kernels import plain
from batchnorm.kernels.contract import Groups, count_of, group_counts


def has_too_few(
    function: str, x: Tensor, mask: Tensor | None, sample_weight: Tensor | None, size: int | None = None
) -> bool:
    """True if a channel has one value or less, after masking: the question of ``too_few="running"``.

    ``size`` is the ``virtual_batch_size``: then each virtual batch has to have more. Reads a value where there is a
    mask or a weight; under torch.compile that ends the graph.
    """
    if x.dim() < 2:
        return False
    if x.numel() <= x.shape[1]:
        return True
    if mask is None and sample_weight is None:
        return False
    places = check_places(function, x, mask, sample_weight, by_batch=False)
    groups = None if size is None else groups_of(function, x, size)
    count = count_of(x, *places) if groups is None else group_counts(x, *places, groups)
    if isinstance(count, Tensor) and count.is_meta:
        return False
    try:
        return least(count) <= 1
    except RuntimeError as error:
        invariant = 'a call in which too_few="running" can count the present values'
        got = plain.why_not(input=x, mask=mask, sample_weight=sample_weight)
        todo = 'Use too_few="raise" there, which reads no values.'
        raise AutogradError(expected(function, invariant, got, todo)) from error


def check_size(function: str, size: object) -> None:
    """Raise unless ``size`` can be a ``virtual_batch_size``."""
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        todo = "None is the whole batch."
        raise ArgumentError(expected(function, "a virtual_batch_size of 1 sample or more", repr(size), todo))


def groups_of(function: str, x: Tensor, size: int, places: Places = EVERYWHERE) -> Groups | None:
    """The groups of ``size`` samples that ``x`` falls into; None where the whole batch is one.

    A remainder is a group of its own if it has at least two values a channel, else it joins the last group.

    Raises:
        ArgumentError: a group has one value a channel, or ``places`` leave it one. Masks are looked at only where that
            breaks no graph, as in ``checks.check_places``
    """
    samples, values = x.shape[0], x.numel()
    if isinstance(samples, Tensor):  # type: ignore[unreachable]
        # Under torch.jit.trace, which warns that it keeps them.
        samples, values = int(samples), int(values)  # type: ignore[unreachable]
    if size >= samples or values == 0:
        return None
    in_sample = values // (samples * x.shape[1])  # of a channel
    if size * in_sample < 2:
        got = f"virtual_batch_size={size} for input size {tuple(x.shape)}"
        todo = "Take a larger virtual_batch_size."
        raise ArgumentError(expected(function, "more than 1 value per channel in each virtual batch", got, todo))
    # Without a branch on the remainder: a compiler would need a graph for each.
    needed = 1 if in_sample > 1 else 2  # samples of a remainder that is a group of its own
    number = (samples + size - needed) // size
    if number == 1:
        return None
    groups = Groups(size, number)
    if places != EVERYWHERE and can_look(x, *places):
        check_present(f"{function}, in each virtual batch", group_counts(x, *places, groups))
    return groups
