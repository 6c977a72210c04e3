"""The house's import order, what importing the package costs and touches, and what files may not contain."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from import_rules import violations

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "batchnorm"

LAZY = ("numba", "llvmlite", "triton", "matplotlib", "rich", "typer", "jinja2", "sklearn")
IMPORT_SECONDS = 0.15


def test_no_arrow_runs_the_wrong_way() -> None:
    found = violations(PACKAGE)
    assert not found, "\n".join(found)


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        (
            "moments.py",
            "import math\nfrom batchnorm.nn import BatchNorm\n",
            "batchnorm/moments.py:2: moments → nn: nn comes after moments",
        ),
        (
            "kernels/layout.py",
            "from .. import autograd\n",
            "batchnorm/kernels/layout.py:1: kernels → autograd: autograd comes after kernels",
        ),
        (
            "nn/running.py",
            "from batchnorm import BatchNorm2d\n",
            "batchnorm/nn/running.py:1: nn → batchnorm: batchnorm comes after nn",
        ),
        (
            "functional.py",
            "def f():\n    from .lifecycle.fold import fold\n",
            "batchnorm/functional.py:2: functional → lifecycle: lifecycle comes after functional",
        ),
        (
            "kernels/__init__.py",
            "import importlib\nimportlib.import_module('batchnorm.nn')\n",
            "batchnorm/kernels/__init__.py:2: kernels → nn: nn comes after kernels",
        ),
        (
            "reference.py",
            "import torch\n",
            "batchnorm/reference.py:1: reference → torch: reference.py imports NumPy alone",
        ),
        (
            "reference.py",
            "from batchnorm import errors\n",
            "batchnorm/reference.py:1: reference → errors: reference.py imports NumPy alone",
        ),
        (
            "nn/batchnorm.py",
            "from batchnorm.reference import forward\n",
            "batchnorm/nn/batchnorm.py:1: nn → reference: only experiments may import it",
        ),
        (
            "kernels/eager.py",
            "import numba\n",
            "batchnorm/kernels/eager.py:1: kernels → numba: numba belongs in kernels/cpu/ only",
        ),
        (
            "kernels/cpu/rows.py",
            "import triton.language as tl\n",
            "batchnorm/kernels/cpu/rows.py:1: kernels → triton: triton belongs in kernels/gpu/ only",
        ),
        (
            "lifecycle/watch.py",
            "from matplotlib import pyplot\n",
            "batchnorm/lifecycle/watch.py:1: lifecycle → matplotlib: "
            "matplotlib belongs in report/, experiments/, bench/, cli.py only",
        ),
        (
            "nn/running.py",
            "from torch import distributed\n",
            "batchnorm/nn/running.py:1: nn → torch.distributed: torch.distributed belongs in nn/distributed.py only",
        ),
        (
            "nn/running.py",
            "import torch\nranks = torch.distributed.get_world_size()\n",
            "batchnorm/nn/running.py:2: nn → torch.distributed: torch.distributed belongs in nn/distributed.py only",
        ),
        (
            "report/page.py",
            "import pandas\n",
            "batchnorm/report/page.py:1: report → pandas: pandas is not a dependency of this package",
        ),
    ],
)
def test_the_checker_finds_a_planted_arrow(tmp_path: Path, file: str, source: str, expected: str) -> None:
    package = small_house(tmp_path)
    assert violations(package) == []
    planted = package / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(source, encoding="utf-8")
    assert violations(package) == [expected]


def test_the_checker_finds_a_file_outside_every_room(tmp_path: Path) -> None:
    package = small_house(tmp_path)
    (package / "utils.py").write_text("", encoding="utf-8")
    (found,) = violations(package)
    assert found.startswith("batchnorm/utils.py:1: no room has this name; the rooms are errors, moments, ")


def small_house(folder: Path) -> Path:
    """A package that keeps every rule, with arrows of each permitted kind."""
    package = folder / "batchnorm"
    files = {
        "__init__.py": "from .nn import BatchNorm\nfrom batchnorm.moments import Moments\n",
        "__main__.py": "from batchnorm.cli import main\n",
        "errors.py": "",
        "moments.py": "import torch\nfrom batchnorm import errors\n",
        "reference.py": "from __future__ import annotations\nimport math\nimport numpy as np\n",
        "autograd.py": "from .kernels import choose\n",
        "functional.py": "",
        "kernels/__init__.py": "from . import layout\nfrom .cpu import run\n",
        "kernels/layout.py": "from ..errors import expected\n",
        "kernels/cpu/__init__.py": "import numba\nfrom .. import layout\nfrom ...moments import Moments\n",
        "nn/__init__.py": "from ..functional import batch_norm\n",
        "nn/distributed.py": "import torch.distributed as dist\nfrom torch import distributed\n",
        "lifecycle/__init__.py": "",
        "experiments/__init__.py": "import sklearn\nimport batchnorm\nfrom batchnorm import reference\n",
        "cli.py": "import typer\nfrom batchnorm import BatchNorm, experiments\n",
    }
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_is_quiet_and_loads_no_compiler_and_no_tool() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import batchnorm
print(sorted((set(sys.modules) - before) & set({LAZY})))
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_importing_is_quick() -> None:
    # Processor time, the best of three: what other work on the machine takes does not count.
    code = "import torch, numpy, time; t = time.process_time(); import batchnorm; print(time.process_time() - t)"
    seconds = min(float(run_python(code).stdout) for _ in range(3))
    assert seconds < IMPORT_SECONDS


def test_importing_patches_nothing_and_sets_no_flag() -> None:
    code = """
import json, torch
from torch.nn.modules import batchnorm as layers

homes = [torch, torch.nn, torch.nn.functional, layers, torch.nn.Module, torch.Tensor, layers._BatchNorm]
before = [dict(vars(home)) for home in homes]

def flags():
    asked = [torch.get_default_dtype, torch.get_num_threads, torch.is_grad_enabled, torch.initial_seed,
             torch.are_deterministic_algorithms_enabled, torch.get_float32_matmul_precision]
    kept = [torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark]
    return [str(ask()) for ask in asked] + kept

old = flags()
import batchnorm
changed = [f"{home.__name__}.{name}" for home, names in zip(homes, before)
           for name, value in names.items() if vars(home).get(name) is not value]
print(json.dumps([changed, flags() == old]))
"""
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("[[], true]\n", "")


def tracked_files() -> list[Path]:
    """The files under version control, or those of the source distribution where there is no repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if listed.returncode == 0 and listed.stdout:
        names = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        names = [path for top in ("src", "tests", "docs", "benchmarks") for path in (ROOT / top).rglob("*")]
    return [path for path in names if path.is_file() and "__pycache__" not in path.parts]


# Written in parts, so that this file passes its own test.
MACHINE_PATH = re.compile(r"(?<![\w./-])/" + r"(?:work|root|home|Users|opt)/" + r"\w")
REGISTRIES = (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"), ("anaconda", "org"))
REGISTRY_HOST = re.compile("|".join(r"\.".join(parts) for parts in REGISTRIES))


def test_no_file_names_a_machine_path_or_a_registry_host() -> None:
    files = tracked_files()
    assert PACKAGE / "py.typed" in files
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line) or REGISTRY_HOST.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["see /" + "work/main", '"/' + 'home/me/x"', "https://files.python" + "hosted.org/x"])
def test_the_forbidden_patterns_match_what_they_should(text: str) -> None:
    assert MACHINE_PATH.search(text) or REGISTRY_HOST.search(text)


@pytest.mark.parametrize("text", ["a network/work/queue", "src/home/page", "https://arxiv.org/abs/1502.03167"])
def test_the_forbidden_patterns_leave_other_text_alone(text: str) -> None:
    assert not MACHINE_PATH.search(text)
    assert not REGISTRY_HOST.search(text)
