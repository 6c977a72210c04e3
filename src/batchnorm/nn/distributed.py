"""A batch spread over the ranks of a process group: the only user of torch.distributed.

Forward: one all-gather of each rank's count, mean and M2, merged by Chan's formula in the order of the ranks. Every
rank merges the same numbers in the same way, so all of them get the same bits. Backward: one all-reduce of the two sums
that dx needs. The gradients of weight and bias come from the local sums and cost no exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError, AutogradError, ExchangeError, expected
from batchnorm.functional import Batch, Sink
from batchnorm.kernels.contract import Running, enough
from batchnorm.moments import Moments, merge_stacked
from batchnorm.nn.naming import described

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    GroupLike = ProcessGroup | Literal["world"] | None

WORLD: Literal["world"] = "world"

T = TypeVar("T")

PER_CHANNEL = -1.0
"""In the place of the count: the counts differ from channel to channel and follow in an exchange of their own."""


class TooFewAcrossRanks(ArgumentError):
    """One value a channel on all ranks together."""


class Ranks:
    """What a layer keeps of its process group: the group itself, and the name and ranks to find it by.

    A ProcessGroup can be neither copied nor pickled. A copy of this holds the same group. A pickle holds the name and
    ranks only, and finds the group of that name in the process that reads it.
    """

    __slots__ = ("_group", "name", "ranks")

    def __init__(self, name: str, ranks: tuple[int, ...] = (), group: ProcessGroup | None = None) -> None:
        self.name = name
        self.ranks = ranks
        self._group = group

    @staticmethod
    def of(function: str, process_group: object) -> Ranks | None:
        """``process_group`` as users give it; ``function`` is the name in the error."""
        if process_group is None or isinstance(process_group, Ranks):
            return process_group
        if isinstance(process_group, str) and process_group == WORLD:
            return Ranks(WORLD)
        if torch.distributed.is_available() and isinstance(process_group, torch.distributed.ProcessGroup):
            if process_group is torch.distributed.group.WORLD:
                return Ranks(WORLD)  # by its role: it is found again after a restart
            ranks = tuple(torch.distributed.get_process_group_ranks(process_group))
            return Ranks(process_group.group_name, ranks, process_group)
        invariant = 'a process_group of None, "world" or a ProcessGroup that this rank belongs to'
        todo = 'torch.distributed.new_group returns one; "world" is the default group.'
        raise ArgumentError(expected(function, invariant, repr(process_group), todo))

    def given(self) -> object:
        """What the user gave: "world" or the ProcessGroup; this object itself where there is no such group here."""
        return WORLD if self.name == WORLD else (self._find() or self)

    def group(self, who: Callable[[], str]) -> ProcessGroup | None:
        """The group to exchange over; None where nothing is distributed or there is one rank.

        Arguments:
            who: called for the name in an error

        Raises:
            ExchangeError: the layer came with a group that this process does not have
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        found = torch.distributed.group.WORLD if self.name == WORLD else self._find()
        if found is None:
            todo = "Create the group before the first forward, or set layer.process_group."
            invariant = f"the process group {self.name!r} of ranks {list(self.ranks)}, which the layer was built with"
            raise ExchangeError(expected(who(), invariant, "no such group in this process", todo))
        return found if found.size() > 1 else None

    def _find(self) -> ProcessGroup | None:
        """The group, unless it was destroyed; else one of that name and those ranks; else None."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self._group
        if self._group is None or not self._is(self._group):
            found = _by_name(self.name)
            self._group = found if found is not None and self._is(found) else None
        return self._group

    def _is(self, group: ProcessGroup) -> bool:
        try:
            return tuple(torch.distributed.get_process_group_ranks(group)) == self.ranks
        except (KeyError, ValueError):  # destroyed
            return False

    def __repr__(self) -> str:
        return repr(WORLD) if self.name == WORLD else f"<process group {self.name!r} of ranks {list(self.ranks)}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranks) and (self.name, self.ranks) == (other.name, other.ranks)

    def __hash__(self) -> int:
        return hash((self.name, self.ranks))

    def __copy__(self) -> Ranks:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> tuple[Callable[..., Ranks], tuple[str, tuple[int, ...]]]:
        return Ranks, (self.name, self.ranks)


class Wire:
    """Collectives over one group whose failures name who asked for them.

    Arguments:
        ranks, group: what they go over
        who: called for the name in an error, only then: finding a layer's path is slow
    """

    def __init__(self, ranks: Ranks, group: ProcessGroup, who: Callable[[], str]) -> None:
        self.group = group
        self._ranks = ranks
        self._who = who

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def name(self) -> str:
        return "the default process group" if self._ranks.name == WORLD else f"process group {self._ranks.name!r}"

    @property
    def who(self) -> str:
        return self._who()

    def gather(self, local: Tensor) -> Tensor:
        """``local`` of every rank, stacked in the order of the ranks; differentiable any number of times."""
        if torch.compiler.is_compiling():
            return _traced_gather(local, self.group)
        graph = torch.is_grad_enabled() and local.requires_grad
        if graph or torch._C._are_functorch_transforms_active():
            result: Tensor = _apply_gather(local, self)
            return result
        return self.gather_values(local)

    def gather_values(self, local: Tensor) -> Tensor:
        """``gather`` without a graph."""
        local = local.contiguous()
        result = local.new_empty(self.size * local.numel())
        # Renamed in torch 2.13, where the old name warns.
        collective = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
        with self._named():
            collective(result, local.view(-1), group=self.group)
        return result.view(self.size, *local.shape)

    def sum_values(self, local: Tensor) -> Tensor:
        """The sum of ``local`` over the ranks, without a graph."""
        total = local.detach().clone(memory_format=torch.contiguous_format)
        with self._named():
            torch.distributed.all_reduce(total, group=self.group)
        return total

    def gather_objects(self, own: T) -> list[T]:
        """``own`` of every rank, of any size, in the order of the ranks; pickled, so without tensors on a GPU."""
        result: list[Any] = [None] * self.size
        with self._named():
            torch.distributed.all_gather_object(result, own, group=self.group)
        return result

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            invariant = f"all {self.size} ranks of {self.name} in the exchange"
            got = f"on rank {self.group.rank()}: {str(error).splitlines()[0].rstrip('. ')}"
            todo = (
                "A rank that ends its loop early, fails, or takes another way through the model stops all others: look "
                "at the output of each. For uneven numbers of batches use torch's Join with "
                "throw_on_early_termination=True."
            )
            raise ExchangeError(expected(self.who, invariant, got, todo)) from error


class Exchange:
    """The reducer of one forward and its backward, see ``kernels.seams.Reducer``.

    Arguments:
        wire: what it goes over
        per_channel: whether this rank's counts differ from channel to channel
        look: whether to look at the merged count: this rank alone may have too few values
    """

    def __init__(self, wire: Wire, *, per_channel: bool, look: bool) -> None:
        self._wire = wire
        self._per_channel = per_channel
        self._look = look
        self.empty = False
        """Whether there was no value on any rank."""

    def moments(self, local: Moments) -> Moments:
        """The moments of the values on all ranks; differentiable any number of times.

        2·channels + 1 values from each rank. Where some rank's counts differ by channel, an exchange of the counts
        follows: on all ranks, since each sees the mark. (On a GPU a look waits for the GPU, and under a compiler it
        ends the graph, so there only the rank's own mask decides: give one by channel on every rank or on none.)

        Raises:
            TooFewAcrossRanks: one value a channel on all ranks together; raised on every rank
            ExchangeError: a rank did not take part
        """
        wire, channels = self._wire, local.channels
        count = torch.full_like(local.mean[:1], PER_CHANNEL) if self._per_channel else local.count[:1]
        parts = wire.gather(torch.cat((count, local.mean, local.m2)))
        counts = parts[:, :1].expand(-1, channels)
        if self._counts_differ(parts.detach()[:, 0]):
            counts = wire.gather(local.count)
        whole = merge_stacked(counts, parts[:, 1 : channels + 1], parts[:, channels + 1 :])
        if self._look and not torch.compiler.is_compiling():
            self._judge(whole.count.detach())
        return whole

    def _counts_differ(self, counts: Tensor) -> bool:
        """Whether some rank has counts by channel, as far as this rank can know without waiting."""
        if torch.compiler.is_compiling() or (counts.is_cuda and not self._per_channel):
            return self._per_channel
        return bool((counts < 0).any())

    def sums(self, local: Tensor) -> Tensor:
        """The sums over all ranks.

        Raises:
            ExchangeError: a rank did not take part
        """
        return self._wire.sum_values(local)

    def seen_by(self, statistics: Batch) -> Batch:
        """The statistics of a training forward, taken over all ranks."""
        sink, seams = statistics
        if sink is not None and self._look:
            sink = UnlessEmpty(self, sink)
        return Batch(sink, seams._replace(reducer=self))

    def _judge(self, count: Tensor) -> None:
        least = float(count.min())
        self.empty = least == 0 and not bool((count > 0).any())
        if least <= 1 and not self.empty:
            # It begins with torch's own message, on which libraries match.
            raise TooFewAcrossRanks(
                f"Expected more than 1 value per channel when training, got {least:g} over the {self._wire.size} ranks "
                f"of {self._wire.name} at {self._wire.who}"
            )


class UnlessEmpty:
    """A sink that a batch without values on any rank does not reach: such a batch changes nothing.

    Under a compiler no value is looked at, and a batch of one value a channel on all ranks changes nothing either.
    """

    def __init__(self, exchange: Exchange, sink: Running | Sink) -> None:
        self._exchange = exchange
        self._sink = sink

    @property
    def running(self) -> Running | None:
        return self._sink if isinstance(self._sink, Running) else self._sink.running

    def take(self, found: Moments, where: Tensor | None = None) -> None:
        if torch.compiler.is_compiling():
            where = enough(found) if where is None else enough(found) & where
        elif self._exchange.empty:
            return
        if isinstance(self._sink, Running):
            self._sink.update(found, where)
        else:
            self._sink.take(found, where)


def exchange(
    layer: nn.Module, ranks: Ranks, x: Tensor, mask: Tensor | None, sample_weight: Tensor | None
) -> Exchange | None:
    """The exchange of a training forward; None where there is nobody to exchange with."""
    group = ranks.group(lambda: described(layer))
    if group is None or x.dim() < 2 or x.shape[1] == 0:
        return None
    weights = [t for t in (mask, sample_weight) if t is not None]
    per_channel = any(t.dim() == x.dim() and t.shape[1] > 1 for t in weights)
    wire = Wire(ranks, group, lambda: described(layer))
    return Exchange(wire, per_channel=per_channel, look=bool(weights) or x.numel() <= x.shape[1])


def wire_of(function: str, process_group: GroupLike) -> Wire | None:
    """What ``function`` goes over; None where there is nobody to exchange with."""
    ranks = Ranks.of(function, process_group)
    group = None if ranks is None else ranks.group(lambda: function)
    return None if ranks is None or group is None else Wire(ranks, group, lambda: function)


def _traced_gather(local: Tensor, group: ProcessGroup) -> Tensor:
    """``Wire.gather`` in operations that torch.compile records: functional collectives, differentiable."""
    from torch.distributed import _functional_collectives as collectives

    # Renamed in torch 2.13, where the old name warns.
    gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
    result: Tensor = gather(local, 0, group)
    return result.view(-1, local.shape[0])


class _Gather(torch.autograd.Function):
    """local -> (ranks, *local), by all-gather. Its adjoint is ``_Scatter``."""

    @staticmethod
    def forward(local: Tensor, wire: Wire) -> Tensor:
        return wire.gather_values(local)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Wire], output: Tensor) -> None:
        ctx.wire = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _apply_scatter(grad, ctx.wire), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, local: Tensor, wire: Wire) -> Any:
        return _refuse_vmap(wire)


class _Scatter(torch.autograd.Function):
    """(ranks, *local) -> the sum over the ranks of the part that belongs to this one. Its adjoint is ``_Gather``."""

    @staticmethod
    def forward(whole: Tensor, wire: Wire) -> Tensor:
        # An all-reduce, since gloo has no reduce-scatter in every version that we serve.
        return wire.sum_values(whole)[wire.group.rank()]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Wire], output: Tensor) -> None:
        ctx.wire = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _apply_gather(grad, ctx.wire), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, whole: Tensor, wire: Wire) -> Any:
        return _refuse_vmap(wire)


def _refuse_vmap(wire: Wire) -> NoReturn:
    todo = "Call the layer outside of vmap, or in eval mode."
    raise AutogradError(expected(wire.who, "an exchange outside of vmap", "a batched tensor", todo))


_apply_gather: Callable[[Tensor, Wire], Tensor] = _Gather.apply
_apply_scatter: Callable[[Tensor, Wire], Tensor] = _Scatter.apply


def _by_name(name: str) -> ProcessGroup | None:
    """The group of that name in this process; None where there is none."""
    find = getattr(torch.distributed.distributed_c10d, "_resolve_process_group")  # noqa: B009  (it is not exported)
    try:
        group: ProcessGroup = find(name)
    except (KeyError, RuntimeError, ValueError):
        return None
    return group
