"""The program behind ``make test-gpu``: the GPU kernels' tests on a GPU, in several processes, within ten minutes.

    python tests/on_gpu.py [--processes N] [--seconds S]

Most of the time goes into compiling some hundred variants, which is why there are several processes. Needs PyTorch,
Triton, NumPy, pytest and hypothesis, and no network. Without a GPU it says so and ends with 0.

As a pytest plugin (``-p on_gpu``) this file keeps every n-th test for one of n processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
FIRST = ("kernels/test_gpu_device.py", "kernels/test_gpu.py", "kernels/test_left_to_torch.py")
THEN = ("test_conformance.py", "kernels/test_groups.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="0/1", help="k/n: the tests k, k + n, k + 2n ... of those that are selected")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    k, n = map(int, config.getoption("--part").split("/"))
    items[:] = items[k::n]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=540, help="the rest is ended and counted as not run")
    options = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        print(
            "test-gpu: skipped, no GPU that PyTorch can use here. `make test` runs the kernels in Triton's interpreter."
        )
        return 0
    print(f"test-gpu: {torch.cuda.get_device_name()}, PyTorch {torch.__version__}", flush=True)
    end = time.monotonic() + options.seconds
    worst = 0
    for tests, processes in ((FIRST, 1), (THEN, options.processes)):
        started = [_start(tests, f"{k}/{processes}") for k in range(processes)]
        for process in started:
            try:
                shown, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
                code = process.returncode
            except subprocess.TimeoutExpired:
                process.kill()
                shown, _ = process.communicate()
                code = 1
                shown += "\ntest-gpu: out of time, the rest of this part did not run"
            print(shown, flush=True)
            worst = max(worst, 0 if code == 5 else abs(code))  # 5: no test in this part
    return worst


def _start(tests: tuple[str, ...], part: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-c", str(TESTS / "on_gpu.ini"), "--part", part, "-m", "not slow"]
    command += ["-k", "gpu or left_to_torch", *(str(TESTS / name) for name in tests)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent / "src"), str(TESTS)))}
    return subprocess.Popen(
        command, cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


if __name__ == "__main__":
    sys.exit(main())
