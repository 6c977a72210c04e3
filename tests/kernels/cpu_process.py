"""Run code on CPU kernels in a process of its own, which a time limit ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

_START = """
import sys
sys.path.insert(0, {tests!r})
import torch
from kernels.cpu_call import call, outside_forward, pack
from batchnorm.kernels.cpu import outside, threads

def measure(outer=4, inner=300):
    x = torch.arange(3.0 * outer * inner).reshape(outer, 3, inner) % 7
    moments = torch.empty(3, 3, dtype=torch.float64)
    call(outside.family(outer, inner), "MOMENTS", x, stats=moments)
    assert torch.allclose(moments[1], x.double().mean((0, 2))), "wrong result"
"""


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code after a small kernel was defined as ``measure()``. An empty variable is as if it were not set."""
    source = _START.format(tests=str(Path(__file__).parents[1])) + textwrap.dedent(code)
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value}
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=variables, timeout=250)
