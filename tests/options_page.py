"""Writes the table of options into docs/which_values_count.md.

``python tests/options_page.py`` takes it from ``batchnorm.nn.options``; a test says whether the page is up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from batchnorm.nn.options import table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "which_values_count.md"
PART = re.compile(r"(<!-- options: [^\n]* -->\n).*?(<!-- end of options -->)", re.DOTALL)


def page(text: str) -> str:
    """``text`` with the table as it is now."""
    found, times = PART.subn(lambda match: f"{match[1]}\n{table()}\n{match[2]}", text)
    if times != 1:
        raise ValueError(f"expected one part for the options in {PAGE.name}, got {times}")
    return found


def main() -> int:
    written = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        return int(written != page(written))
    PAGE.write_text(page(written), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
