"""The layer that ``torch.nn.SyncBatchNorm`` is converted to: the only user of torch.distributed in nn/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError, expected
from batchnorm.nn.batchnorm import BatchNorm


class SyncBatchNorm(BatchNorm):
    """``BatchNorm`` of any rank that stands where a ``torch.nn.SyncBatchNorm`` stood, with its process group.

    In training over more than one rank the batch is normalized by ``torch.nn.SyncBatchNorm``'s own forward, with
    its exchange and its demands (a GPU), and residual and activation follow as operations of their own. In
    every other case, which is where torch's does not exchange anything either, the layer is ``BatchNorm``.

    Arguments:
        process_group: the group to synchronize over; None is the default group
        others: as of ``BatchNorm``; ``momentum`` is the weight of the NEW batch

    Raises:
        ArgumentError: a mask or sample weight in training over several ranks, which torch's forward does not take

    >>> import torch
    >>> SyncBatchNorm(3)(torch.randn(8, 3, 5, 5)).shape
    torch.Size([8, 3, 5, 5])
    """

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Normalize ``input``, over the ranks of the process group where it is trained on several."""
        if not self.training or ranks(self.process_group) == 1:
            return super().forward(input, residual, mask, sample_weight)
        if mask is not None or sample_weight is not None:
            todo = "Leave them away, or train on one rank."
            raise ArgumentError(expected("SyncBatchNorm", "no mask or sample_weight over several ranks", "one", todo))
        y: Tensor = nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        if residual is not None:
            y = y + residual
        return self._activation(y)


def ranks(process_group: Any) -> int:
    """How many ranks there are in the group; 1 where nothing is distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(process_group)
