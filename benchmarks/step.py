"""``python -m benchmarks.step``: what batch normalization costs a training step of ResNet-50, part by part.

A kernel timed alone flatters: nobody needs its output soon, and its rival pays for fresh memory that it would not pay
for within a network. So whole steps are timed (forward, loss, backward, optimizer) of networks that differ in their
normalization layers alone. Each variant adds one part of the cost:

==============  ======================================================================================================
without         no layer at all; the yardstick
parameters      a layer with weight and bias, and gradients for them, that returns its input: their optimizer
allocating      an autograd function in Python that allocates what a normalization returns and computes nothing
skipped         our layers with the launch of their kernels left out: all of our Python, and our memory pool
ours            our layers
fused           our layers with ReLU and residual in the same kernel
torch           PyTorch's layers
==============  ======================================================================================================

All of them run in one process, one step each a round. The cost of a variant is its time minus that of "without" in the
same round. ReLUs and additions are in place wherever they can be. On one thread the clock is the CPU time of that
thread, so that other processes count little; on more it is the wall's.

Then each kind of layer runs six steps in a process of its own, for the peak of resident memory, and one more for the
bytes that autograd keeps for backward. The tables go to standard output, all figures to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.bench import machine, memory
from batchnorm.bench.cases import parse_threads
from batchnorm.bench.measure import Samples
from batchnorm.bench.run import threads as with_threads
from batchnorm.errors import BatchNormError
from batchnorm.report.command import REFUSED
from batchnorm.report.command import run as run_command
from batchnorm.report.files import require_writable, write_whole
from benchmarks.resnet import ResNet50

RESULTS = Path(__file__).parent / "results" / "step.json"
SCHEMA = 1

WITHOUT, TORCH = "without", "torch"
VARIANTS = (WITHOUT, "parameters", "allocating", "skipped", "ours", "fused", TORCH)
LAYERS = (WITHOUT, TORCH, "ours", "fused")
"""The variants whose results mean something: these are compared, and measured for memory."""

STEPS_FOR_MEMORY = 6
TIME_FOR_STEPS = 0.8
"""The rest is left to the processes that measure memory."""

LEAST_ROUNDS = 3
"""However long they take."""


class Parameters(nn.Module):
    """Weight and bias, which ``step`` gives gradients, and no arithmetic."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Allocating(Parameters):
    """The tensors of a normalization, unwritten. What is per channel holds zeros, so that parameters stay finite."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Allocate.apply(x, self.weight, self.bias)
        return y


class _Allocate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = ctx.saved_tensors
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)


def network(variant: str) -> nn.Module:
    """ResNet-50 with the layers of a variant, the same convolutions in each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if variant not in ("parameters", "allocating"):
            return ResNet50("ours" if variant == "skipped" else variant)
        model = ResNet50(TORCH)
    make = Parameters if variant == "parameters" else Allocating
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, make(child.num_features))
    return model


def training_step(variant: str, model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """Forward, loss, backward and the optimizer's step; returns the loss.

    The learning rate is 0, which changes none of the work: weights stay what they are, and so does the work.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    # Gradients that no backward makes: those of layers that give back their input.
    given = [
        (p, torch.zeros_like(p)) for m in model.modules() if type(m) is Parameters for p in (m.weight, m.bias)
    ]  # fmt: skip

    def step() -> float:
        optimizer.zero_grad()
        for p, gradient in given:
            p.grad = gradient
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    if variant != "skipped":
        return step

    def skipped() -> float:
        with kernels_skipped():
            return step()

    return skipped


@contextmanager
def kernels_skipped() -> Iterator[None]:
    """Inside the block the compiled CPU kernels are called with all that belongs to it, but do not run."""
    from batchnorm.kernels.cpu import plan

    with mock.patch.object(plan, "launch", _launch_nothing):
        yield


def _launch_nothing(kernel: object, block: bytes, threads: int) -> None:
    """Not a ``Mock``: that takes longer than a launch."""


def problem(batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images, torch.randint(1000, (batch,), generator=generator)


def steps(
    images: Tensor,
    labels: Tensor,
    layout: str,
    make: Callable[[str], nn.Module] = network,
    variants: Sequence[str] = VARIANTS,
) -> dict[str, Callable[[], float]]:
    """A training step of each variant, run twice: compiled, and all memory touched.

    Raises:
        SystemExit: the networks with real layers do not have the same loss
    """
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    images = images.contiguous(memory_format=form)
    found, losses = {}, {}
    for variant in variants:
        model = make(variant).to(memory_format=form)  # type: ignore[call-overload]
        found[variant] = training_step(variant, model, images, labels)
        found[variant]()
        losses[variant] = found[variant]()
    for variant in variants:
        if variant in LAYERS[2:] and abs(losses[variant] - losses[TORCH]) > 1e-3 * abs(losses[TORCH]):
            sys.exit(
                f"benchmarks.step: the loss is {losses[variant]:.6g} with {variant}, {losses[TORCH]:.6g} with torch"
            )
    return found


def breakdown(samples: dict[str, Samples]) -> dict[str, dict[str, float]]:
    """Of each variant: seconds a step, seconds over "without", their share of the step, and that share over torch's.

    Differences and shares are taken round by round, and are medians over the rounds; p10 and p90 are of the step.

    >>> of = lambda *seconds: Samples(seconds, 1)
    >>> found = breakdown({"without": of(2.0, 4.0, 3.0), "torch": of(4.0, 8.0, 6.0), "ours": of(2.5, 5.0, 3.75)})
    >>> found["torch"]["share"], found["ours"]["cost"], round(found["ours"]["of_torch"], 9)
    (0.5, 0.75, 0.4)
    """
    without = samples[WITHOUT].seconds
    found = {}
    for variant, of_one in samples.items():
        pairs = list(zip(of_one.seconds, without, strict=True))
        found[variant] = {
            "median": of_one.median,
            "p10": of_one.quantile(0.1),
            "p90": of_one.quantile(0.9),
            "cost": median(a - b for a, b in pairs),
            "share": median(1 - b / a for a, b in pairs),
        }
    for of_one in found.values():
        of_one["of_torch"] = of_one["share"] / found[TORCH]["share"]
    return found


def time_steps(
    threads: int,
    seconds: float,
    images: Tensor,
    labels: Tensor,
    layout: str,
    make: Callable[[str], nn.Module] = network,
) -> dict[str, Any]:
    """The breakdown on a number of threads, in about so many seconds."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    with with_threads(threads):
        begun = time.perf_counter()
        each = steps(images, labels, layout, make)
        left = seconds - (time.perf_counter() - begun)
        samples = rounds(each, left, clock)
    return {
        "threads": threads,
        "clock": "CPU time of the thread" if threads == 1 else "wall",
        "rounds": len(samples[WITHOUT].seconds),
        "variants": breakdown(samples),
    }


def rounds(
    functions: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, Samples]:
    """One call of each function a round, each time beginning with another one, for about so many seconds (wall)."""
    names = list(functions)
    found: dict[str, list[float]] = {name: [] for name in names}
    begun = time.perf_counter()
    turn = 0
    # The next round would take as long as the average so far.
    while turn < LEAST_ROUNDS or (time.perf_counter() - begun) * (turn + 1) / turn <= seconds:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            before = clock()
            functions[name]()
            found[name].append(clock() - before)
        turn += 1
    return {name: Samples(tuple(each), 1) for name, each in found.items()}


def memory_of(variant: str, images: Tensor, labels: Tensor, layout: str) -> dict[str, int | None]:
    """Memory of this process, whose own the variant has to be, over six steps; bytes.

    Keys: ``peak``, the most that was resident; ``loaded``, what was resident before the first step; ``private``, the
    part of what is resident at the end that is no file's (files that are mapped, as libraries are, cost no memory that
    the system could not take back); ``kept`` for backward. None where the system does not tell.
    """
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    images = images.contiguous(memory_format=form)
    model = network(variant).to(memory_format=form)  # type: ignore[call-overload]
    step = training_step(variant, model, images, labels)
    loaded = _status("VmRSS")
    for _ in range(STEPS_FOR_MEMORY):
        step()
    peak, private = _status("VmHWM"), _status("RssAnon")
    return {"peak": peak, "loaded": loaded, "private": private, "kept": memory.kept(step, model)}


def _status(key: str) -> int | None:
    """A figure from the system's report on this process, in bytes. Not ``getrusage``: that begins with the parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), None)


def in_own_process(variant: str, options: argparse.Namespace, threads: int) -> dict[str, int | None]:
    """``memory_of`` in a new process."""
    command = [
        sys.executable, "-m", "benchmarks.step", "--memory-of", variant, "--threads", str(threads),
        "--batch", str(options.batch), "--size", str(options.size), "--layout", options.layout,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        sys.exit(f"benchmarks.step: {variant} in a process of its own ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, int | None] = json.loads(done.stdout)
    return found


def time_lines(timed: dict[str, Any]) -> list[str]:
    """The table of one number of threads."""
    threads = timed["threads"]
    head = f"{threads} thread{'s' * (threads > 1)}, {timed['clock']}{' time' * (timed['clock'] == 'wall')}"
    head = f"{head}, {timed['rounds']} rounds"
    lines = [f"{head:46} ms a step  (p10 to p90)   cost, ms  share of step  of torch's"]
    for name, of_one in timed["variants"].items():
        ms = {key: 1e3 * of_one[key] for key in ("median", "p10", "p90", "cost")}
        lines.append(
            f"{name:46} {ms['median']:9.1f}  {ms['p10']:4.0f} to {ms['p90']:4.0f} {ms['cost']:10.1f} "
            f"{100 * of_one['share']:11.1f} % {of_one['of_torch']:11.2f}"
        )
    return lines


def memory_lines(found: dict[str, dict[str, int | None]]) -> list[str]:
    """The table of memory; "–" for what the system does not tell."""
    lines = ["memory, MiB                   peak resident     before step 1  at the end, of no file  kept for backward"]
    for name, of_one in found.items():
        peak, loaded, private, kept = (
            "–" if value is None else f"{value / (1 << 20):.0f}"
            for value in (of_one["peak"], of_one["loaded"], of_one["private"], of_one["kept"])
        )
        lines.append(f"{name:30}{peak:>13}{loaded:>18}{private:>24}{kept:>19}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # The values of unwritten memory must not slow the convolutions down.
    torch.set_flush_denormal(True)
    try:
        if options.memory_of is None:
            require_writable(options.json.parent, [options.json.name])
        return run(options)
    except (BatchNormError, OSError) as error:
        print(f"benchmarks.step: {error}", file=sys.stderr)
        return REFUSED
    finally:
        torch.set_flush_denormal(False)


def run(options: argparse.Namespace) -> int:
    """Measure, print and write what the options ask for."""
    images, labels = problem(options.batch, options.size)
    counts = parse_threads(options.threads)
    if options.memory_of is not None:
        with with_threads(counts[-1]):
            print(json.dumps(memory_of(options.memory_of, images, labels, options.layout)))
        return 0
    begun = time.perf_counter()
    network_text = f"ResNet-50, {options.batch}×3×{options.size}×{options.size}, float32, {options.layout}"
    print(
        f"{network_text}; torch {torch.__version__}; {os.cpu_count()} cores; load {os.getloadavg()[0]:.2f}", flush=True
    )
    report: dict[str, Any] = {
        "schema": SCHEMA, "machine": machine.describe(), "batch": options.batch, "size": options.size,
        "layout": options.layout, "memory": {}, "times": [],
    }  # fmt: skip
    seconds = 60 * options.minutes * (1.0 if options.no_memory else TIME_FOR_STEPS)
    for place, threads in enumerate(counts):
        left = seconds - (time.perf_counter() - begun)
        report["times"].append(time_steps(threads, left / (len(counts) - place), images, labels, options.layout))
        print("\n" + "\n".join(time_lines(report["times"][-1])), flush=True)
    if not options.no_memory:
        # Last, when all kernels are in the cache on disk: compiling one takes more memory than the step.
        report["memory"] = {name: in_own_process(name, options, counts[-1]) for name in LAYERS}
        print("\n" + "\n".join(memory_lines(report["memory"])), flush=True)
    content = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (path,) = write_whole(options.json.parent, {options.json.name: content.encode()})
    print(f"\nAll figures: {path}; {time.perf_counter() - begun:.0f} s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description="What batch normalization costs a training step of ResNet-50."
    )
    parser.add_argument("--batch", type=partial(_at_least, 2), default=16, help="images a step (16)")
    parser.add_argument("--size", type=partial(_at_least, 32), default=112, help="their side in pixels (112)")
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="contiguous")
    parser.add_argument("--threads", default="1,all", help='numbers of threads, e.g. "1,all" (the default)')
    parser.add_argument("--minutes", type=float, default=5.0, help="about how long to measure (5)")
    parser.add_argument(
        "--json", type=Path, default=RESULTS, help="where all figures go (benchmarks/results/step.json)"
    )
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser


def _at_least(least: int, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.step", main))
