"""``python -m benchmarks.ranks``: what a process group costs, and what merging many ranks' moments loses.

Three parts, each a table:

- A training step of one layer without an exchange, with ours, and with a plain all-gather implementation, which gathers
  the input of all ranks, normalizes it as a whole and keeps its own part: seconds, and bytes that a rank receives.
- A step of a stack of layers, for the cost of the exchange a layer.
- The moments of 1,024 and 65,536 simulated ranks, merged in several orders: the largest relative error against sums
  without rounding (``math.fsum``).

The ranks are processes on this machine, over gloo on 127.0.0.1: a lower bound for the latency of a network.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.moments import Moments, merge_stacked
from batchnorm.nn.distributed import wire_of

SHAPES = ((8, 16, 8, 8), (16, 64, 28, 28), (8, 256, 14, 14), (64, 512))
VARIANTS = ("no exchange", "ours", "plain all-gather")
STACK = 100
RANKS = (1024, 65536)
LIMIT = timedelta(seconds=120)


class GathersAll(nn.Module):
    """The plain implementation: every rank normalizes the batch of all ranks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        # As (values, channels), so that the layer takes any shape. Sizes are equal here.
        values = x.transpose(1, -1).reshape(-1, x.shape[1])
        wire = wire_of("benchmarks.ranks", "world")
        assert wire is not None
        parts = wire.gather(values)
        mine = self.norm(parts.flatten(0, 1)).chunk(len(parts))[dist.get_rank()]
        return mine.reshape(x.transpose(1, -1).shape).transpose(1, -1)


def layer(variant: str, channels: int) -> nn.Module:
    if variant == "plain all-gather":
        return GathersAll(channels)
    return bn.BatchNorm(channels, process_group="world" if variant == "ours" else None)


@contextmanager
def received() -> Iterator[list[int]]:
    """Bytes that this rank receives from the others, collective by collective.

    An all-gather brings (ranks − 1) parts; an all-reduce as a ring brings 2·(ranks − 1)/ranks times its size.
    """
    sizes: list[int] = []
    others = dist.get_world_size() - 1
    names = [n for n in ("all_gather", "all_gather_single", "all_gather_into_tensor", "all_reduce") if hasattr(dist, n)]
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = args[0] if name == "all_reduce" else args[1]
            share = 2 * others / (others + 1) if name == "all_reduce" else others
            sizes.append(round(share * sent.numel() * sent.itemsize))
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield sizes
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def step(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    module(x).backward(dy)


@dataclass(frozen=True)
class Row:
    """One case: the median seconds of a step and the bytes of one, variant by variant."""

    case: str
    seconds: dict[str, float]
    bytes: dict[str, int | None]


def timed(variants: dict[str, nn.Module], shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """The variants take turns, so that what else the machine does falls on all of them."""
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, module in variants.items():
            dist.barrier()
            start = time.perf_counter()
            step(module, x, dy)
            if turn > 1:
                times[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in times.items()}


def rows(rounds: int) -> list[Row]:
    found = []
    for shape in SHAPES:
        variants = {name: layer(name, shape[1]) for name in VARIANTS}
        sizes: dict[str, int | None] = {}
        for name, module in variants.items():
            with received() as each:
                step(module, torch.randn(shape, requires_grad=True), torch.randn(shape))
            sizes[name] = sum(each)
        found.append(Row("x".join(map(str, shape)), timed(variants, shape, rounds), sizes))
    stacks = {n: nn.Sequential(*(layer(n, 64) for _ in range(STACK))) for n in VARIANTS[:2]}
    found.append(Row(f"{STACK} layers of 16x64", timed(stacks, (16, 64), max(3, rounds // 4)), dict.fromkeys(stacks)))
    return found


def _rank(rank: int, ranks: int, store: str, rounds: int, out: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=LIMIT)
    found = rows(rounds)
    if rank == 0:
        out.put(found)
    dist.barrier()
    dist.destroy_process_group()


def measured(ranks: int, rounds: int) -> list[Row]:
    names = [name for _, name in socket.if_nameindex()]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", next((n for n in ("lo", "lo0") if n in names), names[0]))
    out = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'rendezvous'}"
        torch.multiprocessing.spawn(_rank, (ranks, store, rounds, out), nprocs=ranks)
        found: list[Row] = out.get()
    return found


def simulated(ranks: int, channels: int = 8, seed: int = 0) -> Moments:
    """The moments of so many ranks, (ranks, channels) each: 0 to 32 values a rank, means near 1e3."""
    at = torch.Generator().manual_seed(seed)
    count = torch.randint(0, 33, (ranks, channels), generator=at).double()
    mean = 1e3 + torch.randn(ranks, channels, generator=at, dtype=torch.float64)
    m2 = torch.rand(ranks, channels, generator=at, dtype=torch.float64) * count
    parts = object.__new__(Moments)  # of a shape that its check would refuse
    for name, value in (("count", count), ("mean", mean), ("m2", m2 * (count > 1))):
        object.__setattr__(parts, name, value)
    return parts


def exact(parts: Moments) -> Moments:
    """Chan's formula with sums that do not round."""
    columns = []
    for count, mean, m2 in zip(parts.count.T.tolist(), parts.mean.T.tolist(), parts.m2.T.tolist(), strict=True):
        total = math.fsum(count)
        centre = math.fsum(n * u for n, u in zip(count, mean, strict=True)) / total
        squares = math.fsum(n * (u - centre) ** 2 for n, u in zip(count, mean, strict=True))
        columns.append((total, centre, math.fsum(m2) + squares))
    return Moments(*torch.tensor(columns, dtype=torch.float64).T)


def _part(parts: Moments, rank: int) -> Moments:
    return Moments(parts.count[rank], parts.mean[rank], parts.m2[rank])


def in_one(parts: Moments) -> Moments:
    """Ours: all ranks in one sum."""
    return merge_stacked(parts.count, parts.mean, parts.m2)


def shuffled(parts: Moments) -> Moments:
    order = torch.randperm(len(parts.count), generator=torch.Generator().manual_seed(1))
    return merge_stacked(parts.count[order], parts.mean[order], parts.m2[order])


def one_by_one(parts: Moments) -> Moments:
    whole = _part(parts, 0)
    for rank in range(1, len(parts.count)):
        whole = whole.merge(_part(parts, rank))
    return whole


def in_a_tree(parts: Moments) -> Moments:
    count, mean, m2 = parts.count, parts.mean, parts.m2
    channels = count.shape[1]
    while len(count) > 1:  # all pairs of a level at once, as if they were channels
        pairs = (t.view(-1, 2, channels).transpose(0, 1).reshape(2, -1) for t in (count, mean, m2))
        merged = merge_stacked(*pairs)
        count, mean, m2 = (t.view(-1, channels) for t in (merged.count, merged.mean, merged.m2))
    return Moments(count[0], mean[0], m2[0])


def raw_squares(parts: Moments) -> Moments:
    """E[x²] − E[x]² over the ranks, which this library computes nowhere."""
    total = parts.count.sum(0)
    mean = (parts.count * parts.mean).sum(0) / total
    squares = (parts.m2 + parts.count * parts.mean.square()).sum(0)
    return Moments(total, mean, squares - total * mean.square())


MERGES = {
    "ours, in the order of the ranks": in_one,
    "ours, shuffled": shuffled,
    "one rank after the other": one_by_one,
    "pairs, in a tree": in_a_tree,
    "sums of raw squares": raw_squares,
}


def errors(ranks: int) -> dict[str, tuple[float, float]]:
    """The largest relative error of mean and M2, way by way."""
    parts = simulated(ranks)
    right = exact(parts)

    def of(found: Moments) -> tuple[float, float]:
        off = [((getattr(found, n) - getattr(right, n)) / getattr(right, n)).abs().max() for n in ("mean", "m2")]
        return float(off[0]), float(off[1])

    return {name: of(merge(parts)) for name, merge in MERGES.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes (2)")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each variant (30)")
    parser.add_argument("--merge-only", action="store_true", help="only the simulated merges")
    options = parser.parse_args(arguments)
    if not options.merge_only:
        print(f"torch {torch.__version__}, {options.ranks} gloo ranks, one thread each, {os.cpu_count()} cores")
        print(f"{'step (float32)':<24}" + "".join(f"{name:>20}{'bytes':>12}" for name in VARIANTS))
        for row in measured(options.ranks, options.rounds):
            cells = (
                f"{row.seconds[n] * 1e3:>17.3f} ms{'' if row.bytes[n] is None else row.bytes[n]:>12}"
                for n in VARIANTS
                if n in row.seconds
            )
            print(f"{row.case:<24}" + "".join(cells))
        each = (row.seconds["ours"] - row.seconds["no exchange"]) / STACK
        print(f"the exchange costs {each * 1e3:.3f} ms a layer and step, both collectives together")
    for ranks in RANKS:
        print(f"{ranks:,} ranks merged, largest relative error{'mean':>22}{'M2':>12}")
        for name, (mean, m2) in errors(ranks).items():
            print(f"  {name:<50}{mean:>12.1e}{m2:>12.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
