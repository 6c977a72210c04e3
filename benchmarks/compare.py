"""``python -m benchmarks.compare OLD NEW``: two checkouts against each other on the same cases.

Each checkout is measured in a process of its own, with its own environment where it has one (``.venv``), else with this
Python. Both are asked in turn, round by round, and each round gives one ratio NEW/OLD: what else the machine does
falls on both. The table shows the median ratio of each case and its spread (the middle half of the rounds), the
geometric mean of each family, and marks cases that got slower by over 5 % even at the near end of their spread. Last
comes the time until the kernels of ResNet-50's first step are there: compiled into an empty cache, and loaded from it.

The exit code is 0 unless a case is marked and ``--strict`` is given (1), or the request cannot be met (2).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from math import exp, log
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from batchnorm.report.command import FAILED, REFUSED, SUCCESS
from batchnorm.report.command import run as run_command
from batchnorm.report.files import write_whole

WORKER = Path(__file__).with_name("compare_worker.py")
SLOWER = 1.05
MODES = ("forward", "forward + backward", "inference")
TAILS = ("plain", "relu", "residual + relu")


class CompareError(Exception):
    """A comparison that cannot be made or go on; the message is for the user."""


@dataclass(frozen=True)
class Case:
    """One layer and what is done with it."""

    shape: tuple[int, ...]
    layout: str
    dtype: str
    mode: str
    tail: str

    @property
    def family(self) -> str:
        return f"{self.layout} {self.dtype} {self.mode} {self.tail}"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.family}"


def cases() -> list[Case]:
    """Shapes of ResNet-50 and MobileNetV2, small and odd ones, in every family."""
    images = (
        (8, 64, 112, 112), (8, 256, 56, 56), (32, 128, 28, 28), (32, 256, 14, 14), (32, 1024, 14, 14), (32, 512, 7, 7),
        (32, 2048, 7, 7), (8, 33, 17, 19),
    )  # fmt: skip
    matrices = ((60, 100), (128, 256), (1024, 1024), (65536, 64))
    more = ((2, 3, 512, 512), (1, 6, 65536))
    found = []
    for mode in MODES:
        for tail in TAILS:
            for layout in ("contiguous", "channels_last"):
                found += [Case(shape, layout, "float32", mode, tail) for shape in images]
            found += [Case(shape, "matrix", "float32", mode, tail) for shape in matrices]
        for dtype in ("bfloat16", "float16", "float64"):
            for layout in ("contiguous", "channels_last"):
                found += [Case(shape, layout, dtype, mode, "plain") for shape in images[1:7:2]]
        found += [Case(shape, "contiguous", "float32", mode, "plain") for shape in more]
    return found


@dataclass
class Result:
    """The rounds of one case: seconds of a call in OLD and in NEW."""

    case: Case
    threads: int
    old: list[float] = field(default_factory=list)
    new: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [new / old for old, new in zip(self.old, self.new, strict=True)]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The middle half of the ratios."""
        if len(self.ratios) < 2:
            return self.ratio, self.ratio
        low, _, high = quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    @property
    def slower(self) -> bool:
        """True if even the near end of the spread is slower by more than 5 %."""
        return self.spread[0] > SLOWER


class Worker:
    """The process that measures one checkout."""

    def __init__(self, checkout: Path, cache: Path | None = None) -> None:
        source = checkout / "src" if (checkout / "src" / "batchnorm").is_dir() else None
        if source is None:
            raise CompareError(f"expected a checkout with src/batchnorm, got {checkout}. Name its folder.")
        own = checkout / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        environment = {**os.environ, "PYTHONPATH": str(source)}
        if cache is not None:
            environment["NUMBA_CACHE_DIR"] = str(cache)
        self.checkout = checkout
        self.process = subprocess.Popen(
            [str(own) if own.exists() else sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment, text=True,
        )  # fmt: skip
        package = Path(self._read()["package"]).resolve()
        if source.resolve() not in package.parents:
            self.close()
            raise CompareError(f"expected {checkout} to import its own package, got {package}. Mend its environment.")

    def seconds(self, question: Mapping[str, Any]) -> float:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._gone()
        return float(self._read()["seconds"])

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._gone()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _gone(self) -> None:
        self.close()
        code = self.process.returncode
        raise CompareError(f"the process that measures {self.checkout} ended with exit code {code}; see above.")

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # a question that nobody took
                    stream.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def worker(checkout: Path, cache: Path | None = None) -> Iterator[Worker]:
    made = Worker(checkout, cache)
    try:
        yield made
    finally:
        made.close()


def measure(old: Worker, new: Worker, case: Case, threads: int, rounds: int, seconds: float, clock: str) -> Result:
    """Both checkouts on one case, in turns; who begins changes from round to round."""
    result = Result(case, threads)
    question = {"case": asdict(case), "threads": threads, "seconds": seconds, "clock": clock}
    for turn in range(rounds):
        pairs = [(old, result.old), (new, result.new)]
        for measured, into in pairs if turn % 2 == 0 else pairs[::-1]:
            into.append(measured.seconds(question))
    return result


def first_steps(old: Path, new: Path, rounds: int = 1) -> dict[str, dict[str, float]]:
    """CPU seconds of ResNet-50's first step: with an empty cache (cold), and with the cache that this left (warm)."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, checkout in (("old", old), ("new", new)):
            with tempfile.TemporaryDirectory() as folder:
                for state in ("cold", "warm"):
                    with worker(checkout, Path(folder)) as measured:
                        seconds = measured.seconds({"first_step": True})
                    found.setdefault(state, {}).setdefault(name, []).append(seconds)
    return {state: {name: min(taken) for name, taken in both.items()} for state, both in found.items()}


def geometric_mean(values: Sequence[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def table(results: Sequence[Result], steps: Mapping[str, Mapping[str, float]]) -> str:
    """Cases by family, families, the worst case and the first step."""
    lines = ["ratio NEW/OLD (below 1 is faster), [middle half of the rounds], OLD and NEW in ms"]
    families: dict[str, list[Result]] = {}
    for result in results:
        families.setdefault(f"{result.case.family}, {result.threads} thr.", []).append(result)
    for family, members in families.items():
        lines += ["", f"{family}: geometric mean {geometric_mean([r.ratio for r in members]):.3f}"]
        for r in members:
            shape = "x".join(map(str, r.case.shape))
            low, high = r.spread
            mark = "  SLOWER" if r.slower else ""
            times = f"{1e3 * median(r.old):9.3f} {1e3 * median(r.new):9.3f}"
            lines.append(f"  {shape:16} {r.ratio:6.3f} [{low:.3f}, {high:.3f}] {times}{mark}")
    if results:
        worst = max(results, key=lambda r: r.ratio)
        slower = sum(r.slower for r in results)
        mean = geometric_mean([r.ratio for r in results])
        lines += ["", f"all {len(results)} cases: geometric mean {mean:.3f}; {slower} slower by over 5 % beyond spread"]
        lines.append(f"worst: {worst.ratio:.3f} {worst.case}, {worst.threads} thr.")
    for state, both in steps.items():
        lines.append(f"ResNet-50's first step, {state}: {both['old']:.1f} s OLD, {both['new']:.1f} s NEW (CPU)")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    chosen = [case for case in cases() if all(word in str(case) for word in options.filter)]
    if not chosen and not options.first_step:
        print(f"compare: no case has {' and '.join(options.filter)} in its name.", file=sys.stderr)
        return REFUSED
    if options.cpu_time and options.threads != 1:
        print("compare: --cpu-time counts one thread. Give --threads 1.", file=sys.stderr)
        return REFUSED
    clock = "cpu" if options.cpu_time else "wall"
    results: list[Result] = []
    steps: dict[str, dict[str, float]] = {}
    interrupted = False
    try:
        if chosen:
            with ExitStack() as stack:
                old, new = (stack.enter_context(worker(path)) for path in (options.old, options.new))
                for number, case in enumerate(chosen, 1):
                    results.append(measure(old, new, case, options.threads, options.rounds, options.seconds, clock))
                    print(f"{number}/{len(chosen)} {results[-1].ratio:.3f} {case}", file=sys.stderr, flush=True)
        if options.first_step:
            steps = first_steps(options.old, options.new)
    except CompareError as error:
        print(f"compare: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        interrupted = True
    if results or steps:
        print(table(results, steps))
    if options.json is not None:
        contents = {"clock": clock, "first_step": steps, "cases": [asdict(result) for result in results]}
        write_whole(options.json.parent, {options.json.name: json.dumps(contents, indent=1).encode()})
    if interrupted:
        raise KeyboardInterrupt
    return FAILED if options.strict and any(result.slower for result in results) else SUCCESS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path, help="a checkout")
    parser.add_argument("new", type=Path, help="another one")
    parser.add_argument("--filter", nargs="+", default=[], metavar="WORD", help="cases with all words in their name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6, help="turns of each case")
    parser.add_argument("--seconds", type=float, default=0.1, help="of one turn")
    parser.add_argument("--cpu-time", action="store_true", help="count this thread's time only: for a machine in use")
    parser.add_argument("--no-first-step", dest="first_step", action="store_false", help="leave compilation out")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a case got slower")
    parser.add_argument("--json", type=Path, help="write all rounds there")
    return parser


if __name__ == "__main__":
    sys.exit(run_command("compare", main))
