"""The counter goes up with the running statistics, whoever raises it."""

from __future__ import annotations

import pytest
import torch

from batchnorm import BatchNorm, BatchNorm1d
from batchnorm.kernels import use_backend


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_of_any_dtype(backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    """A counter that is no int64 (after ``module.double()`` on an old checkpoint's buffer, say) counts as well."""
    layer = BatchNorm1d(3)
    layer.num_batches_tracked = torch.zeros((), dtype=dtype)
    x = torch.randn(4, 3, 5)
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    with use_backend(backend):
        for batch in (1, 2, 3):
            layer(x)
            assert layer.num_batches_tracked == batch
            assert layer.num_batches_tracked.dtype == dtype
        layer.eval()(x)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 40, 40), (2, 3, 300, 300)])
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_once_a_batch_on_any_number_of_threads(shape: tuple[int, ...], momentum: float | None) -> None:
    layer = BatchNorm(3, momentum=momentum)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            layer(torch.randn(shape))
            assert layer.num_batches_tracked == threads
    finally:
        torch.set_num_threads(before)


def test_none_at_all() -> None:
    layer = BatchNorm1d(3)
    layer.num_batches_tracked = None
    layer(torch.randn(8, 3))
    assert layer.running_mean is not None
    assert bool((layer.running_mean != 0).all())
