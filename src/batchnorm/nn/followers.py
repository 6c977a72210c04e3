"""The layers of a model whose running statistics follow its batches."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.errors import ArgumentError, expected
from batchnorm.nn.batchnorm import BatchNorm


def followers(function: str, model: nn.Module, *, resting: bool = False) -> dict[str, BatchNorm]:
    """The model's layers of this library that have running statistics, by their names.

    Arguments:
        function: the name for messages
        resting: also refuse layers of torch.nn that are in eval mode

    Raises:
        ArgumentError: there is no batch normalization layer, one of torch.nn in training mode, or a lazy one without
            channels
    """
    found: dict[str, BatchNorm] = {}
    norms = 0
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        norms += 1
        if module.running_mean is None:
            continue
        shown = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
        if isinstance(module, BatchNorm):
            if is_lazy(module.running_mean):
                got, todo = f"{shown}, which has seen no input", "Run the model once on a batch."
                raise ArgumentError(expected(function, "layers that know their channels", got, todo))
            found[path] = module
        elif module.training or resting:
            got = f"torch.nn's {shown}"
            raise ArgumentError(expected(function, "layers of this library", got, "Call batchnorm.convert(model)."))
    if not norms:
        todo = "Give the model that holds the layers."
        raise ArgumentError(expected(function, "a model with batch normalization layers", "one without", todo))
    return found
