"""How much memory a process may have, as the system says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.kernels.cpu import limits


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def test_version_2_takes_the_tightest_of_the_groups_above(tmp_path: Path) -> None:
    write(tmp_path / "own", "0::/a/b\n")
    write(tmp_path / "a/b/memory.max", "max\n")
    write(tmp_path / "a/memory.max", "3000\n")
    write(tmp_path / "memory.max", "5000\n")
    assert limits.cgroup_limit(tmp_path, tmp_path / "own") == 3000


def test_version_1_looks_at_the_memory_controller(tmp_path: Path) -> None:
    write(tmp_path / "own", "9:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    write(tmp_path / "memory/a/memory.limit_in_bytes", "700\n")
    write(tmp_path / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path / "cpu/a/memory.limit_in_bytes", "1\n")
    assert limits.cgroup_limit(tmp_path, tmp_path / "own") == 700


def test_in_a_container_the_path_may_be_the_hosts(tmp_path: Path) -> None:
    write(tmp_path / "own", "0::/host/path\n")
    write(tmp_path / "memory.max", "123\n")
    assert limits.cgroup_limit(tmp_path, tmp_path / "own") == 123


@pytest.mark.parametrize("own", [None, "", "0::/\n", "no line of the kind\n"])
def test_no_limit(own: str | None, tmp_path: Path) -> None:
    if own is not None:
        write(tmp_path / "own", own)
    assert limits.cgroup_limit(tmp_path, tmp_path / "own") is None


def test_the_smaller_of_the_machine_and_the_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    for physical, cgroup, found in ((5, 7, 5), (9, 7, 7), (5, None, 5), (None, 7, 7), (None, None, None)):
        monkeypatch.setattr(limits, "physical_memory", lambda value=physical: value)
        monkeypatch.setattr(limits, "cgroup_limit", lambda value=cgroup: value)
        assert limits.memory() == found


def test_physical_memory_is_that_of_the_machine() -> None:
    file = Path("/proc/meminfo")
    if not file.exists():
        pytest.skip("no /proc/meminfo to compare with")
    kib = int(file.read_text(encoding="utf-8").split()[1])
    assert limits.physical_memory() == 1024 * kib


@pytest.mark.parametrize("limit", [None, "RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_on_mappings_are_seen_when_they_are_set(limit: str | None) -> None:
    resource = pytest.importorskip("resource", reason="no limits on mappings on this platform")
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        pytest.skip("the tests themselves run under such a limit")
    code = "import resource\nfrom batchnorm.kernels.cpu import limits\nprint(limits.address_space_is_limited())\n"
    if limit is not None:
        code += f"resource.setrlimit(resource.{limit}, (1 << 40, 1 << 40))\nprint(limits.address_space_is_limited())\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=dict(os.environ)
    )
    assert done.stdout.split() == (["False"] if limit is None else ["False", "True"])
