"""Which modules are batch norms with population statistics, whatever their class, and what they do beside."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.lifecycle.folding.affine import Affine, affine_of, tensor_of
from batchnorm.lifecycle.folding.modules import ResidualActivation, activation_module
from batchnorm.lifecycle.folding.record import Call
from batchnorm.nn import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

OURS = (BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d)
_TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FROZEN = {"weight", "bias", "running_mean", "running_var"}


def is_norm(module: nn.Module) -> bool:
    """torch.nn's batch norms, ours, their subclasses, and frozen ones, which have the same four tensors as buffers."""
    if isinstance(module, (_BatchNorm, *OURS)):
        return True
    names = {name for name, buffer in module.named_buffers(recurse=False)} - {"num_batches_tracked"}
    return names == _FROZEN and not list(module.parameters())


def why_not(module: nn.Module, call: Call) -> str | None:
    """Why this call of a norm is more than a scale and shift a channel, or None if it is no more."""
    if call.training:
        return "it stays in training mode after eval()"
    mean, var = module.running_mean, module.running_var
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return "it has no running statistics (track_running_stats=False), so eval mode normalizes by the batch too"
    if call.input is None or call.output is None or call.input.shape != call.output.shape or len(call.input.shape) < 2:
        return "it is not called with one tensor that has channels, to give one of the same shape"
    others = [name for name in call.options if not (isinstance(module, OURS) and name == "residual")]
    if others:
        return f"it is called with {' and '.join(others)}"
    affine = affine_of(module)
    if not_finite(affine):
        return not_finite(affine)
    if type(module) in _TORCHS or type(module) in OURS:
        return None
    return _not_an_affine(module, affine, call.input.shape)


def not_finite(affine: Affine) -> str | None:
    """Says so and names the first such channel, if a scale or a shift is an Inf or NaN."""
    bad = ~(affine.scale.isfinite() & affine.shift.isfinite())
    return f"its scale or shift is not finite in channel {int(bad.nonzero()[0])}" if bad.any() else None


def rest_of(module: nn.Module, call: Call) -> nn.Module:
    """What the norm does after scale and shift: ``Identity``, its activation, the residual and the activation."""
    if isinstance(module, OURS):
        activation = activation_module(module.activation, module.negative_slope)
        return ResidualActivation(nn.Identity(), activation) if "residual" in call.options else activation
    rest = [child for child in module.children() if not isinstance(child, nn.Identity)]
    if len(rest) == 1:
        return rest[0]
    return nn.Sequential(*rest) if rest else nn.Identity()


@torch.no_grad()
def _not_an_affine(module: nn.Module, affine: Affine, shape: tuple[int, ...]) -> str | None:
    """A class that we do not know is asked, in float64, whether it does scale, shift and then its children."""
    kind = type(module).__name__
    probe = copy.deepcopy(module).double()
    spread = [-1, *[1] * (len(shape) - 2)]
    scale, shift = affine.scale.view(spread), affine.shift.view(spread)
    x = torch.randn(shape, dtype=torch.float64, device=scale.device)
    mean, var = tensor_of(probe, "running_mean"), tensor_of(probe, "running_var")
    assert mean is not None and var is not None
    x = x * var.sqrt().view(spread) + mean.view(spread)
    expected = nn.Sequential(*copy.deepcopy(list(probe.children())))(x * scale + shift)
    try:
        got = probe(x)
    except Exception as error:
        return f"{kind} could not be compared with batch norm ({type(error).__name__}: {error})"
    if torch.allclose(got, expected, rtol=1e-9, atol=1e-9):
        return None
    return f"{kind} gives something other than batch norm and then its children"
