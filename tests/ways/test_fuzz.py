"""No call can end the process, and none is wrong without a word: random calls, many in each of a few processes."""

from __future__ import annotations

import re

import pytest

from ways.common import alone, more

way = pytest.mark.way


@way("everything together", "random kinds of tensors, layouts, modes and transforms",
     "agree with torch's function in float64, or raise; none ends the process")  # fmt: skip
@pytest.mark.parametrize("seed", [1, 2, *more(*range(3, 23))])
def test_random_calls(seed: int) -> None:
    said = alone(f"from ways.fuzz import main\nmain({seed}, 400)", timeout=280)
    agreed = re.match(r"agreed (\d+) of 400, wrong 0", said.splitlines()[-1])
    assert agreed is not None
    # Most calls are such that torch's own function gives a result; a fuzz of errors alone would show nothing.
    assert int(agreed[1]) >= 200, said.splitlines()[-1]
