"""``python -m benchmarks.run``: the short registry; ``--full``: all of it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from batchnorm.bench.cases import LAYOUTS, parse_threads
from batchnorm.bench.command import carry_out
from batchnorm.bench.measure import FULL, SHORT, Plan
from batchnorm.bench.peers import PEERS
from batchnorm.bench.results import ResNet
from batchnorm.bench.run import Entry
from batchnorm.bench.show import Screen
from batchnorm.errors import BatchNormError
from batchnorm.report.command import REFUSED, SUCCESS
from batchnorm.report.command import run as run_command
from benchmarks import flax_layer, registry, resnet

RESULTS = Path(__file__).parent / "results"
# Seconds are few in the short run, and the step takes about one.
_SHORT_STEPS = Plan(least=0.0, rounds=5, enough=3, budget=12.0)
# With ResNet-50's steps after it, the short run ends within three minutes on two cores.
_SHORT_LIMIT = 130.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    name = "full" if options.full else "short"
    try:
        threads = parse_threads(options.threads)
        entries = registry.full(threads) if options.full else registry.short(threads)
        entries = [entry for entry in entries if matches(entry, options.filter)]
        if options.flax:
            PEERS["flax"] = flax_layer.build
            entries = [replace(entry, peers=(*entry.peers, "flax")) for entry in entries]
        steps = networks(options.full, threads) if matches_network(options.filter) else []
        if options.list:
            print("\n".join(f"{entry.case.family}: {entry.case}" for entry in entries))
            return SUCCESS
        if not entries and not steps:
            print(f"benchmarks: no case has {' and '.join(options.filter)} in its name", file=sys.stderr)
            return REFUSED
        path = options.json or RESULTS / f"{name}.json"
        return carry_out(
            entries, FULL if options.full else SHORT, name, Screen(quiet=options.quiet), networks=steps, json_path=path,
            plot_path=options.plot, limit=math.inf if options.full else _SHORT_LIMIT,
        )  # fmt: skip
    except BatchNormError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return REFUSED


def matches(entry: Entry, words: Sequence[str]) -> bool:
    """Whether each of the words is a part of the case's family or name.

    >>> matches(registry.short((1,))[0], ["resnet50", "float32 contiguous"])
    True
    """
    name = f"{entry.case.family}: {entry.case}".replace("×", ",")
    return all(word.replace("×", ",") in name for word in words)


def matches_network(words: Sequence[str]) -> bool:
    return all(word in "step" for word in words)


def networks(full: bool, threads: tuple[int, ...]) -> list[Callable[[], ResNet]]:
    """ResNet-50's training step: short, in one layout with all threads."""
    if not full:
        return [partial(resnet.measure, threads=threads[-1], plan=_SHORT_STEPS)]
    return [partial(resnet.measure, layout=layout, threads=count) for count in threads for layout in LAYOUTS]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Ratios against PyTorch and a copy.")
    parser.add_argument("--full", action="store_true", help="the whole registry, which takes hours")
    parser.add_argument("--threads", default="1,all", help='numbers of threads, e.g. "1,all" (the default)')
    parser.add_argument(
        "--filter", action="append", default=[], metavar="WORDS",
        help='only cases with this in their name, e.g. "bfloat16 channels_last" or "step" for ResNet-50\'s; repeatable',
    )  # fmt: skip
    parser.add_argument("--flax", action="store_true", help="Flax as one more rival, where it is installed")
    parser.add_argument("--json", type=Path, help="where the JSON goes (benchmarks/results/short.json or full.json)")
    parser.add_argument("--plot", type=Path, help="draw the rows into this .png, .svg or .pdf")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--quiet", action="store_true", help="plain lines even on a terminal")
    return parser


if __name__ == "__main__":
    sys.exit(run_command("benchmarks", main))
