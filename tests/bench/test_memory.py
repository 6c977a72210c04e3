"""Bytes that can be counted by hand."""

from __future__ import annotations

import torch
from torch import nn

from batchnorm.bench import memory
from batchnorm.bench.cases import Case
from batchnorm.bench.peers import PEERS
from batchnorm.bench.problem import Problem


def test_kept_counts_each_storage_once_and_no_parameter() -> None:
    x = torch.randn(100, 8, requires_grad=True)
    layer = nn.Linear(8, 8)

    def step() -> None:
        layer(x)
        layer(x[:50])  # a view of the same storage

    assert memory.kept(step, layer) == 100 * 8 * 4


def test_peak_is_the_highest_and_not_the_end() -> None:
    def step() -> torch.Tensor:
        a = torch.zeros(1000, dtype=torch.float64)
        b = torch.zeros(3000, dtype=torch.float64)
        del a
        c = torch.zeros(500, dtype=torch.float64)
        del b
        return c

    assert memory.peak(step) == 4000 * 8


def test_with_relu_ours_keeps_one_tensor_where_torch_keeps_two() -> None:
    problem = Problem(Case((4, 6, 20, 20), extra="relu"))
    size = problem.case.bytes
    kept = {}
    for name in ("ours", "torch"):
        program = PEERS[name](problem)
        program.run()
        assert program.layer is not None
        found = memory.measure(program.run, program.layer)
        kept[name] = found["kept"]
        assert found["peak"] >= 2 * size  # y and dx at least
    # Beside them a few values a channel.
    assert size <= kept["ours"] < 1.1 * size
    assert 2 * size <= kept["torch"] < 2.1 * size
