"""Every program under docs/examples runs, says something, and holds what it asserts."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def test_there_are_examples() -> None:
    assert {"drop_in.py", "masks.py", "momentum.py", "recalibration.py"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs_as_a_reader_would_run_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        runpy.run_path(str(path), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_the_data_parallel_example_runs_under_torchrun() -> None:
    """As its page shows it, with a port of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    interface = "lo0" if sys.platform == "darwin" else "lo"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1", "BATCHNORM_BACKEND": "eager"}
    done = subprocess.run(
        [*command, str(FOLDER / "data_parallel.py")], env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"2 ranks, batches of 23 and 37 images", done.stdout), done.stdout
    assert re.search(r"largest difference from one process: \d\.\de-1\d", done.stdout), done.stdout
