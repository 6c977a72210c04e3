"""``BatchNormLinear``: normalize, then project."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError, expected
from batchnorm.nn.batchnorm import BatchNorm, TooFew, be_a_leaf
from batchnorm.nn.frozen import has_frozen_statistics

if TYPE_CHECKING:
    from batchnorm.nn.distributed import GroupLike


class BatchNormLinear(nn.Module):
    r"""Batch normalization of the features, then one linear projection.

    .. math:: y = W \hat x + b, \qquad \hat x = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}

    The scale γ and the shift β of batch normalization are part of W and b (W·diag(γ) and W·β + b are again a
    matrix and a vector), so there are none by default.

    Arguments:
        in_features: features of each sample
        out_features: features after the projection
        eps: added to the variance, inside the root
        momentum: weight of the NEW batch in the running statistics: the 0.95 of the old value that the block
            was first written with is 0.05 here
        affine: whether the normalization has a γ and β of its own
        bias: whether the projection has a bias
        too_few, process_group: what training does with a single sample, and the ranks that a batch is spread over,
            see ``BatchNorm``

    Shape:
        input (..., in_features), output (..., out_features); every position before the last dimension is a
        sample

    Raises:
        ArgumentError: an input whose last dimension is not in_features, or a single sample in training

    >>> import torch
    >>> layer = BatchNormLinear(6, 3)
    >>> layer(torch.rand(4, 6)).shape
    torch.Size([4, 3])
    >>> layer(torch.rand(1, 6), inference=True).shape
    torch.Size([1, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-3,
        momentum: float | None = 0.05,
        *,
        affine: bool = False,
        bias: bool = True,
        too_few: TooFew = "raise",
        process_group: GroupLike = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.norm = BatchNorm(
            in_features, eps, momentum, affine, device=device, dtype=dtype, too_few=too_few, process_group=process_group
        )
        self.linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        be_a_leaf(self)

    def forward(self, x: Tensor, inference: bool | None = None) -> Tensor:
        """Normalize and project.

        Arguments:
            x: shape (..., in_features)
            inference: True uses the running statistics for this call, False the batch's (and updates the
                running ones), None does as ``.training`` says. A norm with frozen statistics uses them in any case
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if inference is not None:
                raise RuntimeError("batchnorm: TorchScript takes no inference=. Call eval() or train() instead.")
            y: Tensor = self.linear(self.norm(x.reshape(-1, self.in_features)).view(x.shape))
            return y
        else:
            if x.dim() < 2 or x.shape[-1] != self.in_features:
                invariant = f"an input of shape (..., {self.in_features}) with at least 2 dimensions"
                todo = "Add the batch dimension, or build the layer for these features."
                raise ArgumentError(expected("BatchNormLinear", invariant, tuple(x.shape), todo))
            samples = x.reshape(-1, self.in_features)
            y = self.linear(self._normalized(samples, inference).view(x.shape))
            return y

    def _normalized(self, samples: Tensor, inference: bool | None) -> Tensor:
        """Call the norm as a module, so that its hooks run, in the requested mode."""
        norm = self.norm
        before = norm.training
        y: Tensor
        if inference is None or inference != before or has_frozen_statistics(norm):
            y = norm(samples)
            return y
        norm.train(not inference)
        try:
            y = norm(samples)
        finally:
            norm.train(before)
        return y

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The single ``nn.Linear`` that equals this block in eval mode.

        Its weight is W·diag(a) and its bias b + W·(β − E[x]·a), with a = γ/√(Var[x] + ε). Computed in float64 and
        rounded once. The layer itself is not changed.

        >>> import torch
        >>> layer = BatchNormLinear(6, 3).eval()
        >>> x = torch.rand(4, 6)
        >>> torch.allclose(layer.fold()(x), layer(x), atol=1e-6)
        True
        """
        norm, linear = self.norm, self.linear
        assert norm.running_mean is not None and norm.running_var is not None
        a = torch.rsqrt(norm.running_var.double() + norm.eps)
        shift = torch.zeros_like(a)
        if norm.weight is not None:
            a = a * norm.weight.double()
            shift = norm.bias.double()
        weight = linear.weight.double()
        folded = nn.Linear(self.in_features, self.out_features, device=linear.weight.device, dtype=linear.weight.dtype)
        folded.weight.copy_(weight * a)
        offset = weight @ (shift - norm.running_mean.double() * a)
        folded.bias.copy_(offset if linear.bias is None else linear.bias.double() + offset)
        return folded.train(self.training)
