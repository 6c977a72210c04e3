"""On what and with what a benchmark ran."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("batchnorm", "torch", "numpy", "numba", "jax", "flax")


def describe() -> dict[str, Any]:
    """Processor, caches, threads, load and versions; what cannot be found out is None.

    Keys: ``processor``; ``cores`` (logical) and ``usable`` (by this process); ``caches`` (name and size as the system
    gives it); ``capability`` (the vector instructions for which PyTorch chooses its kernels); ``threads`` (PyTorch's
    own choice); ``load`` (over the last minute); ``system``; ``versions``; ``commit`` (of this library's repository,
    with ``+`` where files differ from it; None outside one).
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _LIBRARIES},
        "commit": _commit(),
    }


def _processor() -> str | None:
    """Its name and, since virtual machines often shorten that, family and model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or None
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or None
    if name and "cpu family" in fields and "model" in fields:
        name += f", family {fields['cpu family']} model {fields['model']}"
    return name


def _caches() -> dict[str, str] | None:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found or None


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    head = _git(here, "rev-parse", "--short=12", "HEAD")
    # The repository that holds an environment, or a user's own project around it, is not ours.
    if head is None or _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no", "--", "..") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
            timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
