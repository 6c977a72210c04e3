"""The GPU kernels against PyTorch, torch.compile and a device copy: ``python -m benchmarks.gpu``.

Needs PyTorch, Triton and this checkout, nothing else, and no network. It ends within ten minutes: cases are measured in
order of importance, and those that the time did not allow are named. Without a GPU it says so and ends with 0.

Every case is measured in one process, the rivals in turns, round by round, with the second-level cache emptied in
front of each; the medians count. A case whose result is off against float64 reports no speed. "% of copy" is the time
in which a copy moves the fewest bytes that the case can move, over the time that it took.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn

# (channels, side, how many layers of ResNet-50 have that shape), 53 layers in all.
RESNET50 = (
    (64, 112, 1), (64, 56, 6), (256, 56, 4), (128, 56, 1), (128, 28, 7), (512, 28, 5), (256, 28, 1), (256, 14, 11),
    (1024, 14, 7), (512, 14, 1), (512, 7, 5), (2048, 7, 4),
)  # fmt: skip
MOBILENETV2 = ((32, 112, 1), (96, 112, 1), (144, 56, 1), (192, 28, 1), (576, 14, 1), (960, 7, 1), (1280, 7, 1))
MATRICES = ((60, 100), (128, 256), (1024, 1024), (8192, 4096), (65536, 64))
EXTREMES = ((8, 3, 512, 512), (6, 65536), (32, 256, 1, 1), (32, 256, 7, 7), (32, 37, 13, 13), (4, 32, 16, 56, 56))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Fewest tensor-size passes: input, result; then gradient, input, its gradient. A residual adds one and two.
PASSES = {"inference": 2, "forward": 2, "forward+backward": 5}
RESIDUAL_PASSES = {"inference": 1, "forward": 1, "forward+backward": 2}
# Results may be off by this much of the largest value, as one rounding of the dtype and the noise before it.
ALLOWED = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 1e-5}
DEVICE = "cuda"
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    channels_last: bool = True
    mode: str = "forward+backward"
    extra: str = "relu"
    family: str = ""
    layers: int = 1  # of the network that have this shape
    compiled: bool = False  # whether torch.compile is measured too

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {layout} {self.mode} {self.extra}"

    @property
    def bytes(self) -> int:
        passes = PASSES[self.mode] + (RESIDUAL_PASSES[self.mode] if "residual" in self.extra else 0)
        return passes * math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass
class Row:
    """Milliseconds of each rival; none where a result is wrong."""

    case: Case
    times: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    percent_of_copy: float | None = None


def cases() -> Iterator[Case]:
    """In order of importance."""
    for batch in (64, 256, 32):
        for last in (True, False):
            for c, side, layers in RESNET50:
                yield Case(
                    (batch, c, side, side), channels_last=last, layers=layers, compiled=batch == 64,
                    family=f"ResNet-50 N={batch} {'channels_last' if last else 'contiguous'}",
                )  # fmt: skip
    for shape in MATRICES + EXTREMES:
        for dtype in ("bfloat16", "float32"):
            for mode in PASSES:
                yield Case(shape, dtype, False, mode, "plain", "matrices" if len(shape) == 2 else "extremes")
    for batch in (32, 64, 256):
        for c, side, layers in MOBILENETV2:
            yield Case((batch, c, side, side), family=f"MobileNetV2 N={batch}", layers=layers)
    for dtype in DTYPES:
        for extra in ("plain", "relu", "residual+relu"):
            for mode in PASSES:
                for last in (True, False):
                    for c, side in ((64, 56), (512, 28), (1024, 14), (2048, 7)):
                        yield Case((64, c, side, side), dtype, last, mode, extra, "options")


class Rival(nn.Module):
    """A layer and what follows it, as torch's user writes it or as ours."""

    def __init__(self, case: Case, ours: bool) -> None:
        super().__init__()
        self.ours, self.relu = ours, case.extra != "plain"
        dims = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}[len(case.shape)]
        kind = getattr(bn if ours else nn, f"BatchNorm{dims}")
        self.norm = kind(case.shape[1], **({"activation": "relu"} if ours and self.relu else {}))
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.ours:
            y: Tensor = self.norm(x) if residual is None else self.norm(x, residual=residual)
            return y
        y = self.norm(x)
        if residual is not None:
            y = y + residual
        return torch.relu(y) if self.relu else y


class Setup:
    """The tensors and rivals of a case on the device."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        form = FORMATS.get(len(case.shape)) if case.channels_last else None

        def tensor() -> Tensor:
            t = torch.randn(case.shape, device=DEVICE).to(DTYPES[case.dtype])
            return t.contiguous(memory_format=form) if form is not None else t

        self.x, self.dy = tensor(), tensor()
        self.residual = tensor() if "residual" in case.extra else None
        self.destination = torch.empty_like(self.x)
        ours, torchs = Rival(case, True).to(DEVICE), Rival(case, False).to(DEVICE)
        torchs.load_state_dict(ours.state_dict())
        self.rivals: dict[str, Callable[..., Tensor]] = {"ours": ours, "torch": torchs}
        for module in (ours, torchs):
            module.train(case.mode != "inference")
        if case.compiled:
            torch.compiler.reset()  # it compiles one function for a few shapes only, and then no more
            self.rivals["compile"] = torch.compile(torchs, mode="max-autotune-no-cudagraphs", dynamic=False)
        self.exact_module = Rival(case, False).to(DEVICE).double()
        self.exact_module.load_state_dict(ours.state_dict())
        self.exact_module.train(case.mode != "inference")

    def once(self, rival: Callable[..., Tensor], x: Tensor, dy: Tensor, residual: Tensor | None) -> list[Tensor]:
        """What the case's mode computes: y, and dx (and the residual's gradient) where it goes backward."""
        if self.case.mode == "inference":
            with torch.no_grad():
                return [rival(x, residual)]
        leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
        y = rival(*leaves)
        if self.case.mode == "forward":
            return [y.detach()]
        y.backward(dy)
        return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]

    def call(self, name: str) -> Callable[[], Any]:
        if name == "copy":
            return lambda: self.destination.copy_(self.x)
        return lambda: self.once(self.rivals[name], self.x, self.dy, self.residual)

    def wrong(self) -> list[str]:
        """The rivals whose y or dx is off. Where z is near ReLU's kink the gradient may be either one."""
        wide = None if self.residual is None else self.residual.double()
        exact = self.once(self.exact_module, self.x.double(), self.dy.double(), wide)
        near = exact[0].abs() < 0.02 * exact[0].abs().max() if self.case.extra != "plain" else None
        off = []
        for name, rival in self.rivals.items():
            for index, (found, true) in enumerate(
                zip(self.once(rival, self.x, self.dy, self.residual), exact, strict=True)
            ):
                error = (found.double() - true).abs()
                if near is not None and index > 0:
                    error = error.masked_fill(near & ((found == 0) | (true == 0)), 0.0)
                if not float(error.max()) <= 4 * ALLOWED[self.case.dtype] * float(true.abs().max()):  # NaN is off too
                    off.append(name)
                    break
        return off


def measure(case: Case, rounds: int, flush: Tensor) -> Row:
    setup = Setup(case)
    row = Row(case, wrong=setup.wrong())
    calls = {name: setup.call(name) for name in (*setup.rivals, "copy")}
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, flush))
    row.times = {name: median(found) for name, found in times.items() if name not in row.wrong}
    if "ours" in row.times:
        one_way = 2 * math.prod(case.shape) * DTYPES[case.dtype].itemsize
        row.percent_of_copy = 100 * row.times["copy"] * case.bytes / one_way / row.times["ours"]
    return row


def timed(call: Callable[[], Any], flush: Tensor) -> float:
    """Milliseconds on the device. Emptying the cache also gives the CPU time to get ahead of it."""
    flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def overhead(calls: int = 300) -> dict[str, float]:
    """Microseconds of the CPU for a training step on the smallest case, the device kept out of the way."""
    setup = Setup(Case((60, 100), "float32", False, "forward+backward", "plain"))
    found = {}
    for name in ("ours", "torch"):
        call = setup.call(name)
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        found[name] = 1e6 * (time.perf_counter() - begin) / calls
    return found


# A ResNet-50 training step


class Bottleneck(nn.Module):
    def __init__(self, norm: Callable[[int, bool], nn.Module], width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(width_in, width, 1, bias=False),
                nn.Conv2d(width, width, 3, stride, 1, bias=False),
                nn.Conv2d(width, 4 * width, 1, bias=False),
            ]
        )
        self.norms = nn.ModuleList([norm(width, True), norm(width, True), norm(4 * width, True)])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != 4 * width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, 4 * width, 1, stride, bias=False), norm(4 * width, False))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv, norm in zip(self.convs[:2], self.norms[:2], strict=True):
            h = norm(conv(h))
        last: Tensor = self.norms[2](self.convs[2](h), self.shortcut(x))
        return last


class Norm(nn.Module):
    """A batch norm and what follows it: ``kind`` is "torch", "ours" or "fused"."""

    def __init__(self, kind: str, channels: int, relu: bool) -> None:
        super().__init__()
        self.fused, self.relu = kind == "fused", relu
        layer = nn.BatchNorm2d if kind == "torch" else bn.BatchNorm2d
        self.norm = layer(channels, **({"activation": "relu"} if self.fused and relu else {}))  # type: ignore[arg-type]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.fused:
            y: Tensor = self.norm(x) if residual is None else self.norm(x, residual=residual)
            return y
        y = self.norm(x)
        y = y if residual is None else y + residual
        return torch.relu_(y) if self.relu else y


def resnet50(kind: str) -> nn.Module:
    def norm(channels: int, relu: bool) -> nn.Module:
        return Norm(kind, channels, relu)

    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64, True), nn.MaxPool2d(3, 2, 1)]
    width_in = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(norm, width_in, width, stride if block == 0 else 1))
            width_in = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def step_times(batch: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a step in bfloat16 (autocast), channels_last, 224x224, SGD; by kind of layer."""
    x = torch.randn(batch, 3, 224, 224, device=DEVICE).contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (batch,), device=DEVICE)
    steps: dict[str, Callable[[], None]] = {}
    for kind in ("torch", "ours", "fused"):
        network: Any = resnet50(kind).to(DEVICE).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

        def step(network: Any = network, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(network(x), target)
            loss.backward()
            optimizer.step()

        steps[kind] = step
        for _ in range(5):
            step()
    nothing = torch.zeros(1, device=DEVICE)
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(rounds):
        for kind, call in steps.items():
            times[kind].append(timed(call, nothing))
    return {kind: median(found) for kind, found in times.items()}


# The report


def line(row: Row) -> str:
    times = row.times
    shown = f"{row.case!s:64}"
    if "ours" in row.wrong:
        return shown + " WRONG: no speed is reported"
    shown += f" {times['ours']:8.3f} ms {row.percent_of_copy:6.1f} % of copy"
    for name in ("torch", "compile"):
        if name in times:
            shown += f"  {name} {times[name] / times['ours']:5.2f}x"
        elif name in row.wrong:
            shown += f"  {name} wrong"
    return shown


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """For each family: the time of its network's layers, geometric mean and worst of the ratios to each rival."""
    found = []
    for family in dict.fromkeys(row.case.family for row in rows):
        own = [row for row in rows if row.case.family == family and "ours" in row.times]
        if not own:
            continue
        floor = sum(r.case.layers * r.times["ours"] * (r.percent_of_copy or 0) / 100 for r in own)
        total = sum(r.case.layers * r.times["ours"] for r in own)
        entry: dict[str, Any] = {
            "family": family, "layers": sum(r.case.layers for r in own), "ms": total, "times the floor": total / floor,
        }  # fmt: skip
        for name in ("torch", "compile"):
            ratios = [(r.times[name] / r.times["ours"], str(r.case)) for r in own if name in r.times]
            if ratios:
                entry[name] = {
                    "geometric mean": math.exp(sum(math.log(q) for q, _ in ratios) / len(ratios)),
                    "worst": min(ratios)[0],
                    "worst case": min(ratios)[1],
                    "whole": sum(r.case.layers * r.times[name] for r in own if name in r.times)
                    / sum(r.case.layers * r.times["ours"] for r in own if name in r.times),
                }
        found.append(entry)
    return found


def machine() -> dict[str, Any]:
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count, "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(), "commit": commit.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def copy_bandwidth(flush: Tensor) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    a = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * 2**30 / (1e-3 * median(timed(lambda: b.copy_(a), flush) for _ in range(10)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=560, help="the whole run takes no longer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--filter", default="", help="only cases with this in their family or name")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu: skipped, no GPU that PyTorch can use here. Nothing was measured.")
        return 0
    end = time.monotonic() + options.seconds
    torch.backends.cudnn.benchmark = True
    reason = bn.explain(torch.ones(2, 2, device=DEVICE))
    if reason.backend != "gpu":
        print(f"bench-gpu: the GPU kernels do not run here\n{reason}")
        return 1
    found = machine()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    found["copy_bytes_per_second"] = copy_bandwidth(flush)
    speed = f"copy {found['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    print(f"{found['gpu']}, PyTorch {found['torch']}, Triton {found['triton']}, {speed}", flush=True)
    wanted = [case for case in cases() if options.filter in f"{case.family} {case}"]
    steps = {}
    if not options.filter:
        found["overhead_us"] = overhead()
        print("CPU time of a step on 60x100, us:", found["overhead_us"], flush=True)
        steps = {str(batch): step_times(batch, 10) for batch in (64,)}
        for batch, by_kind in steps.items():
            ratios = ", ".join(f"{kind} {ms:.1f} ms ({by_kind['torch'] / ms:.2f}x)" for kind, ms in by_kind.items())
            print(f"ResNet-50 step, N={batch}, bfloat16, channels_last: {ratios}", flush=True)
    rows: list[Row] = []
    left = 0
    for case in wanted:
        if time.monotonic() > end - 20:
            left += 1
            continue
        try:
            rows.append(measure(case, options.rounds, flush))
        except torch.cuda.OutOfMemoryError:
            print(f"{case!s:64} does not fit into memory")
            continue
        print(line(rows[-1]), flush=True)
    whole = summary(rows)
    for entry in whole:
        print(json.dumps(entry))
    if left:
        print(f"{left} of {len(wanted)} cases were not measured: out of time")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": found, "steps_ms": steps, "summary": whole, "rows": [asdict(row) for row in rows]}
    options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"written to {options.json}")
    return 1 if any("ours" in row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
