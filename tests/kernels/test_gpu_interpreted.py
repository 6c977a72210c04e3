"""The GPU kernels' tests without a GPU: in a process in which Triton's interpreter runs the kernels on the CPU.

Triton decides when it is imported whether it interprets or compiles, and for all kernels, so it takes a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, timeout: float) -> str:
    """pytest in a new process; its report, and a failure where it has one."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--timeout=0", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def test_the_kernels_in_the_interpreter() -> None:
    assert " passed" in run("-x", "tests/kernels/test_gpu.py", timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_conformance_suite_in_the_interpreter() -> None:
    suites = "tests/test_conformance.py", "tests/kernels/test_groups.py"
    skip_large = "not test_large_inputs and not number_of_threads"  # their sizes are for threads and caches
    report = run(*suites, "-k", f"gpu and {skip_large}", "-m", "slow or not slow", timeout=7000)
    assert " passed" in report


def test_anyone_can_try_it() -> None:
    """use_backend("gpu") serves CPU tensors; without the variable it says why not, and nothing imports Triton."""
    code = """
        import sys, torch, batchnorm as bn
        from batchnorm.errors import BackendError
        x = torch.randn(6, 3)
        try:
            with bn.use_backend("gpu"):
                y = bn.BatchNorm1d(3)(x)
        except BackendError as error:
            print(error)
        else:
            print(torch.allclose(y, torch.nn.BatchNorm1d(3)(x), atol=1e-6))
        print("triton" in sys.modules, bn.explain(x).backend)
    """
    shown = []
    for interpret in ("0", "1"):
        if interpret == "1":
            pytest.importorskip("triton", reason="Triton is not installed")
        environment = {**os.environ, "TRITON_INTERPRET": interpret}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout.splitlines())
    message = (
        "choose: expected a backend that serves this input, got 'gpu': runs on a GPU, the input is on cpu. Name one of"
    )
    assert shown[0][0].startswith(message)
    assert shown[0][1] == "False cpu"
    assert shown[1] == ["True", "True cpu"]
