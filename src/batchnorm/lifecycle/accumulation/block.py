"""One block of a chain, run on one micro-batch at a time as if all of them were one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from batchnorm.errors import ArgumentError, expected
from batchnorm.functional import Batch
from batchnorm.moments import Moments
from batchnorm.nn import BatchNorm
from batchnorm.nn.distributed import Exchange
from batchnorm.nn.naming import described

Grads = list[Tensor | None]
"""The gradients of the tensors in a value, in the order of its leaves."""


class Cut(BaseException):
    """Ends a run at the norm that it was for. Not an Exception, which a block may catch."""


@dataclass
class Use:
    """One normalization in a block; a layer that is called twice has two."""

    layer: BatchNorm
    exchange: Exchange | None
    moments: Moments
    """Of the whole batch."""
    sums: Tensor | None = None
    """Σdz and Σdz·x̂ over the whole batch, (2, channels)."""


class Block:
    """A block, and what is known of the batch in it: first of its norms' moments, then of their sums.

    Arguments:
        function: the block
        seeds: of its random numbers, one a micro-batch
        generators: that give them, of each device
        first: of the chain: only there the inputs say themselves whether they require grad
    """

    def __init__(
        self, function: Callable[[Any], Any], seeds: list[int], generators: list[torch.Generator], *, first: bool
    ) -> None:
        self.uses: list[Use] = []
        self._function = function
        self._first = first
        self._seeds = seeds
        self._generators = generators
        self._inputs: list[Any] = []
        self._reads_only = False
        # Of the run at hand: the norms reached, their inputs, and what was found where it was cut.
        self._reached: list[tuple[BatchNorm, Tensor, Exchange | None]] = []
        self._moments: Moments | None = None
        self._sums: Tensor | None = None

    def forward(self, inputs: list[Any]) -> list[Any]:
        """The outputs. Each norm is measured in a run of its own, as what reaches it depends on those before."""
        self._inputs = inputs
        while True:
            outputs, found = [], []
            for i, value in enumerate(inputs):
                try:
                    with torch.no_grad():
                        outputs.append(self._run(i, value))
                except Cut:
                    assert self._moments is not None
                    found.append(self._moments)
            if not found:
                return outputs
            if outputs:
                self._refuse_other_way("one that another micro-batch does not reach", self._reached[-1][0])
            layer, _, exchange = self._reached[-1]
            whole = found[0].merge(*found[1:])
            if exchange is not None:
                whole = exchange.moments(whole)
            elif bool((whole.count <= 1).any()):
                got = f"{float(whole.count.min()):g} at {described(layer)}"
                invariant = "more than 1 value per channel in all micro-batches together"
                raise ArgumentError(expected("exact_accumulation", invariant, got, "Give more samples."))
            self.uses.append(Use(layer, exchange, whole))

    def backward(self, grads: list[Grads]) -> list[Grads]:
        """The gradients of the inputs from those of the outputs; those of the parameters are added to ``.grad``."""
        if all(g is None for each in grads for g in each):
            return [[None] * len(tree_flatten(value)[0]) for value in self._inputs]
        for index in reversed(range(len(self.uses))):
            self._sum_up(index, grads)
        found = [self._gradients(i, each) for i, each in enumerate(grads)]
        self._inputs = []
        return found

    def on_use(self, layer: BatchNorm, x: Tensor, exchange: Exchange | None) -> Part:
        """Called by a layer that is about to normalize by the batch."""
        if torch._C._current_graph_task_id() != -1:
            invariant = "blocks without activation checkpoints"
            todo = "Leave them away: what is inside a block is computed again in any case."
            raise ArgumentError(expected("exact_accumulation", invariant, f"one around {described(layer)}", todo))
        index = len(self._reached)
        if index < len(self.uses):
            if self.uses[index].layer is not layer:
                self._refuse_other_way(f"one that uses {described(self.uses[index].layer)} in its place", layer)
        elif torch.is_grad_enabled():
            self._refuse_other_way("one that does not, without a graph", layer)
        self._reached.append((layer, x, exchange))
        return Part(self, index)

    def found_moments(self, index: int, local: Moments) -> Moments:
        """What a norm gets for the moments of its micro-batch: those of the whole batch, if they are known."""
        if index < len(self.uses):
            return self.uses[index].moments
        self._moments = local
        raise Cut

    def found_sums(self, index: int, local: Tensor) -> Tensor:
        """The same for its sums."""
        whole = self.uses[index].sums
        if whole is not None:
            return whole
        self._sums = local
        raise Cut

    # Each micro-batch in a call of its own, at whose end its graph is gone.

    def _gradients(self, i: int, grads: Grads) -> Grads:
        """Those of a micro-batch's input; those of the parameters are added to ``.grad``."""
        leaves, outputs = self._differentiable_run(i)
        reached = _reached(outputs, grads)
        if reached:
            torch.autograd.backward([y for y, _ in reached], [dy for _, dy in reached])
        self._reached = []
        return [t.grad if isinstance(t, Tensor) else None for t in leaves]

    def _sum_up(self, index: int, grads: list[Grads]) -> None:
        """Find the sums of one norm; those of the norms after it are known."""
        use, total = self.uses[index], None
        for i, each in enumerate(grads):
            local = self._local_sums(index, i, each)
            if local is not None:
                total = local if total is None else total + local
        if total is not None:
            use.sums = total if use.exchange is None else use.exchange.sums(total)

    def _local_sums(self, index: int, i: int, grads: Grads) -> Tensor | None:
        """Those of a micro-batch; None where the norm's input needs no gradient."""
        _, outputs = self._differentiable_run(i)
        x = self._reached[index][1]
        self._reached = []
        reached = _reached(outputs, grads)
        if x.requires_grad and reached:
            try:
                torch.autograd.grad([y for y, _ in reached], [x], [dy for _, dy in reached], allow_unused=True)
            except Cut:
                return self._sums
        return None

    def _differentiable_run(self, i: int) -> tuple[list[Any], list[Any]]:
        """The leaves of the input, cut off from what made them, and those of the output."""
        given, structure = tree_flatten(self._inputs[i])
        leaves = [t.detach() if isinstance(t, Tensor) else t for t in given]
        for leaf, t in zip(leaves, given, strict=True):
            if isinstance(t, Tensor) and (t.requires_grad if self._first else t.is_floating_point()):
                leaf.requires_grad_()
        return leaves, tree_flatten(self._run(i, tree_unflatten(leaves, structure)))[0]

    def _run(self, i: int, value: Any) -> Any:
        self._reached, self._moments, self._sums = [], None, None
        for generator in self._generators:  # not torch.manual_seed, which takes milliseconds
            generator.manual_seed(self._seeds[i])
        torch.clear_autocast_cache()  # a weight that was cast without a graph has none
        if self._reads_only:
            output = self._function(value)
        else:
            # The input is needed again. A block that writes on it, as an activation in place does, gets copies.
            leaves, structure = tree_flatten(value)
            copies = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
            before = [t._version for t in copies if isinstance(t, Tensor)]
            output = self._function(tree_unflatten(copies, structure))
            self._reads_only = [t._version for t in copies if isinstance(t, Tensor)] == before
        if len(self._reached) < len(self.uses):
            self._refuse_other_way("one that does not", self.uses[len(self._reached)].layer)
        return output

    def _refuse_other_way(self, got: str, layer: BatchNorm) -> None:
        invariant = f"a block that uses the same layers for every micro-batch and each time, {described(layer)} next"
        todo = "Let nothing but the input's values depend on the micro-batch."
        raise ArgumentError(expected("exact_accumulation", invariant, got, todo))


def _reached(outputs: list[Any], grads: Grads) -> list[tuple[Tensor, Tensor]]:
    """The outputs that a gradient flows back from, with it."""
    return [(y, dy) for y, dy in zip(outputs, grads, strict=True) if dy is not None and y.requires_grad]


class Part:
    """The reducer of one use in one run, see ``kernels.seams.Reducer``: from a micro-batch to the whole batch."""

    def __init__(self, block: Block, index: int) -> None:
        self._block = block
        self._index = index

    def seen_by(self, statistics: Batch) -> Batch:
        """The statistics of a training forward, taken over all micro-batches."""
        return statistics._replace(seams=statistics.seams._replace(reducer=self))

    def moments(self, local: Moments) -> Moments:
        """Those of the whole batch."""
        parts = (local.count, local.mean, local.m2)
        if torch.is_grad_enabled() and any(t.requires_grad for t in parts):
            joined: tuple[Tensor, Tensor, Tensor] = _join(*parts, self)
            return Moments(*joined)
        return self._block.found_moments(self._index, local)

    def sums(self, local: Tensor) -> Tensor:
        """Those of the whole batch."""
        return self._block.found_sums(self._index, local)


class _Joined(torch.autograd.Function):
    """Count, mean and M2 of the whole batch as functions of those of one micro-batch, the others being constant.

    n = Σnᵢ, μ = Σnᵢμᵢ/n, M2 = Σ(M2ᵢ + nᵢ(μᵢ − μ)²). What flows back is summed over the micro-batches first.
    """

    @staticmethod
    def forward(ctx: Any, count: Tensor, mean: Tensor, m2: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        whole = part._block.found_moments(part._index, Moments(count, mean, m2))
        ctx.save_for_backward(count, mean, whole.count, whole.mean)
        ctx.part = part
        return whole.count.clone(), whole.mean.clone(), whole.m2.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, mean, n, whole = ctx.saved_tensors
        dcount, dmean, dm2 = ctx.part.sums(torch.stack(grads))
        distance = mean - whole
        return (
            dcount + dmean * distance / n + dm2 * distance.square(),
            (dmean / n + 2 * dm2 * distance) * count,
            dm2,
            None,
        )


_join: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Joined.apply
