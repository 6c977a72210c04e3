"""Print the oldest versions that pyproject.toml allows of what users install, as pip reads them: ``name==version``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lower_bounds(text: str) -> list[str]:
    """``name==version`` for each ``"name>=version"`` of the project's dependencies and of the extra ``tools``.

    Python 3.10 has no parser for TOML, and the lists hold nothing but such strings.
    """
    lists = re.findall(r"^(?:dependencies|tools) = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    if len(lists) != 2:
        raise SystemExit(
            f"lower_bounds: expected dependencies and tools in {PYPROJECT.name}, found {len(lists)} lists."
        )
    return [f"{name}=={version}" for each in lists for name, version in re.findall(r'"([\w-]+)>=([\w.]+)"', each)]


if __name__ == "__main__":
    sys.stdout.write("\n".join(lower_bounds(PYPROJECT.read_text(encoding="utf-8"))) + "\n")
