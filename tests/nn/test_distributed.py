from __future__ import annotations

import torch
from torch import Tensor

import batchnorm as bn


def program() -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(9, 3, 4, dtype=torch.float64)
    rank = torch.distributed.get_rank()
    mine = x[:4] if rank == 0 else x[4:] if rank == 1 else x[:0]
    mine = mine.clone().requires_grad_()
    layer = bn.BatchNorm1d(3, process_group="world", dtype=torch.float64)
    y = layer(mine)
    dy = torch.randn(9, 3, 4, dtype=torch.float64)
    (y * (dy[:4] if rank == 0 else dy[4:] if rank == 1 else dy[:0])).sum().backward()
    return y.detach(), layer.running_var, mine.grad


def test_x(on_ranks):
    torch.manual_seed(1)
    x = torch.randn(9, 3, 4, dtype=torch.float64, requires_grad=True)
    layer = bn.BatchNorm1d(3, dtype=torch.float64)
    y = layer(x)
    dy = torch.randn(9, 3, 4, dtype=torch.float64)
    (y * dy).sum().backward()
    import time

    for n in (2, 3, 4):
        t = time.time()
        r = on_ranks(n, program)
        print(n, time.time() - t)
        assert torch.allclose(torch.cat([a[0] for a in r]), y, rtol=1e-12)
        assert torch.allclose(torch.cat([a[2] for a in r]), x.grad, rtol=1e-10)
        assert all(torch.equal(a[1], r[0][1]) for a in r)
