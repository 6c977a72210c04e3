"""How much memory this process may use, and whether idle memory of its own can make an allocation fail."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    _MAPPING_LIMITS: tuple[int, ...] = ()
else:
    _MAPPING_LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def address_space_is_limited() -> bool:
    """True if this process has a limit on its mappings (``ulimit -v``, ``ulimit -d``).

    Under such a limit every mapping counts, whether there is memory behind it or not, and the system reclaims nothing
    to make room: the next allocation fails. The limit can change at any time, so it is read each time.
    """
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in _MAPPING_LIMITS)


def memory() -> int | None:
    """Bytes that this process may use: the machine's memory or a cgroup's limit, None if neither is known."""
    limits = [physical_memory(), cgroup_limit()]
    return min((limit for limit in limits if limit is not None), default=None)


def physical_memory() -> int | None:
    """Bytes of memory that the machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def cgroup_limit(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int | None:
    """The lowest memory limit of this process's cgroup and its ancestors, None if there is none.

    Arguments:
        cgroups: where version 2 is mounted, with version 1 in ``memory`` under it
        own: the file that names this process's cgroups, one line ``hierarchy:controllers:path`` for each hierarchy
    """
    found = []
    for line in _read(own).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = Path(path.lstrip("/"))
        # In a container the path may be that of the host: then only the root is mounted.
        for part in (folder, *folder.parents):
            value = _read(root / part / name).strip()
            if value.isdecimal():
                found.append(int(value))
    return min(found, default=None)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
