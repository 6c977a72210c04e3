"""Averaged models: what becomes of the buffers, and what to do."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import batchnorm as bn


def test_an_averaged_model_keeps_an_integer_counter_and_wants_to_be_recalibrated() -> None:
    """Averaged buffers are those of none of the averaged weights."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3, momentum=None))
    batches = [torch.randn(8, 4) for _ in range(6)]
    averages = {
        "average": AveragedModel(model, use_buffers=True),
        "exponential": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
        "weights alone": AveragedModel(model),
    }
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for x in batches:
        model(x).pow(3).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for average in averages.values():
            average.update_parameters(model)
    for name, average in averages.items():
        counter = average.module[1].num_batches_tracked
        assert counter.dtype == torch.int64, name
        assert 0 <= int(counter) <= len(batches), name
        report = bn.recalibrate(average, batches)
        layer = average.module[1]
        found = average.module[0](torch.cat(batches))
        torch.testing.assert_close(layer.running_mean, found.mean(0))
        torch.testing.assert_close(layer.running_var, found.var(0))
        assert int(layer.num_batches_tracked) == report.batches == len(batches)
