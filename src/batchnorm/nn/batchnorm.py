"""``BatchNorm1d``, ``BatchNorm2d``, ``BatchNorm3d`` and ``BatchNorm`` for any rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import batchnorm as torch_layers
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import functional
from batchnorm.checks import EVERYWHERE, Places, check, check_places, check_residual
from batchnorm.errors import ArgumentError, expected
from batchnorm.functional import Batch, Population
from batchnorm.kernels.activations import Activation
from batchnorm.kernels.activations import activation as activation_by_name
from batchnorm.kernels.contract import Running
from batchnorm.kernels.seams import PLAIN, Seams
from batchnorm.nn.counting import check_size, groups_of, has_too_few
from batchnorm.nn.distributed import Ranks, TooFewAcrossRanks, exchange
from batchnorm.nn.domains import bring_home
from batchnorm.nn.foreign import Absent
from batchnorm.nn.frozen import has_frozen_statistics
from batchnorm.nn.options import check_options
from batchnorm.nn.renorm import Renorm, fill_in_steps, place_steps, steps_of
from batchnorm.nn.running import Accumulated, Guarded, Stage, Whole, at_least_float32, destination

if TYPE_CHECKING:
    from batchnorm.nn.distributed import GroupLike

_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

TooFew = Literal["raise", "running"]
NonFinite = Literal["propagate", "raise", "skip"]


class BatchNorm(_BatchNorm):
    r"""Batch normalization over an input of any rank from 2 up, channels in dimension 1.

    .. math::
        y = f\Big(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}\,\gamma + \beta\Big)

    Mean and variance are taken per channel over every other dimension (Ioffe and Szegedy 2015,
    Algorithm 1; section 3.2 for convolutions). In training they are the mini-batch's own, with the biased
    variance, and the running statistics follow with the unbiased one:

    .. math:: \text{running} \leftarrow (1 - \text{momentum})\,\text{running} + \text{momentum}\cdot\text{batch}

    In eval mode the running statistics are used and nothing is changed. Takes the place of
    ``torch.nn.BatchNorm1d/2d/3d`` argument for argument; checkpoints load strictly both ways.

    Arguments:
        num_features: channels C of an input of shape (N, C, ...)
        eps: added to the variance, inside the root
        momentum: weight of the NEW batch (Keras, Flax: 1 − theirs). None: the cumulative average of all
            batches since ``reset_running_stats``
        affine: whether there are ``weight`` γ and ``bias`` β, of shape (C,)
        track_running_stats: without it there are no buffers and eval mode uses batch statistics too
        bias: with ``affine``, whether there is a ``bias``
        activation: None, "relu", "leaky_relu", "silu", "gelu", "sigmoid" or "tanh", applied in the same
            kernel. With "relu" backward keeps one tensor where two layers keep two
        negative_slope: of "leaky_relu"
        too_few: what training does with a batch of one value a channel, which has no variance. "raise":
            torch's error. "running": that batch is normalized with the running statistics, as in eval
            mode, and counted nowhere. (No separate "skip" is offered: it would do the same.) What counts are the
            values that mask and sample_weight leave, with a ``process_group`` those of all ranks. Counting what a
            mask leaves reads one number, which under torch.compile ends the graph with "running"; with "raise"
            nothing is read there, and such a batch leaves the running statistics as they are
        nonfinite: what the running statistics do with a batch that holds an Inf or NaN. "propagate":
            follow it, as torch does, and stay NaN. "skip": it leaves statistics and counter as they were;
            its output is what it is. "raise": an error that names layer, channels and batch, with nothing
            changed. Both cost a look at the batch's statistics, on a GPU a synchronization
        process_group: the ranks that a training batch is spread over: a ``torch.distributed`` ProcessGroup, or
            "world", the default group whenever there is one. Mean, variance and running statistics are then those
            of the batch of all ranks together. None (not torch's SyncBatchNorm's default): this process's batch
            alone. Without an initialized group, with one rank and in eval mode nothing is exchanged. See
            docs/distributed.md
        virtual_batch_size: in training, normalize every so many consecutive samples by their own statistics
            (ghost batches, Hoffer et al. 2017). A remainder is a group of its own if it has at least two values
            a channel, else it joins the last group. The running statistics follow once a forward, by the merged
            moments of all groups: they are those of the layer without virtual batches
        renorm: ``batchnorm.Renorm``, batch renormalization

    Running statistics stay float32 when the model is cast to half precision. An empty batch changes nothing, not
    even the counter. A forward inside a backward pass does not move them: it is taken for the second run of an
    activation checkpoint. docs/when_statistics_move.md says how to defer, accumulate or freeze them.

    Tools that build another layer from a layer's attributes know torch's arguments only.
    ``SyncBatchNorm.convert_sync_batchnorm`` raises if there are extras (``batchnorm.convert`` with a process group
    keeps them).
    ``torch.nn.utils.fuse_conv_bn_eval`` and ``torch.utils.mkldnn.to_mkldnn`` give us no way to raise: they drop an
    ``activation`` and the other extras silently. Use ``batchnorm.fold``, or layers without extras.

    Shape:
        input (N, C, ...) and output alike; the dtype is kept, and so is the channels_last memory format

    Raises:
        ArgumentError (a ValueError), MismatchError, DtypeError or NonFiniteError (RuntimeErrors), see
        ``batchnorm.functional.batch_norm``. A failed forward changes nothing, the counter included.

    >>> import torch
    >>> layer = BatchNorm(2, activation="relu")
    >>> layer(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    tensor([[0.0000, 0.0000],
            [1.0000, 0.0000]], grad_fn=<BatchNormFunctionBackward>)
    >>> layer.running_mean, layer.running_var
    (tensor([0.2000, 0.5000]), tensor([1.1000, 0.9000]))
    """

    __jit_unused_properties__ = ["activation", "negative_slope", "renorm", "process_group"]

    # Set on an instance whose batches do not go to its buffers (nn/running.py), or that has domains (nn/domains.py).
    _staged: ClassVar[Stage | None] = None
    _domains: ClassVar[tuple[str, ...]] = ()
    _domain: ClassVar[str | None] = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        too_few: TooFew = "raise",
        nonfinite: NonFinite = "propagate",
        virtual_batch_size: int | None = None,
        renorm: Renorm | None = None,
        process_group: GroupLike = None,
    ) -> None:
        name = type(self).__name__
        _one_of(name, "too_few", too_few, get_args(TooFew))
        _one_of(name, "nonfinite", nonfinite, get_args(NonFinite))
        check_size(name, virtual_batch_size)
        on = {
            'too_few="running"': too_few == "running",
            "track_running_stats=False": not track_running_stats,
            "virtual_batch_size": virtual_batch_size is not None,
            "renorm": renorm is not None,
            "process_group": process_group is not None,
        }
        check_options(name, [option for option, is_on in on.items() if is_on])
        act = activation_by_name(activation, negative_slope)
        ranks = Ranks.of(name, process_group)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self._set_activation(act)
        self.too_few: TooFew = too_few
        self.nonfinite: NonFinite = nonfinite
        self.virtual_batch_size = virtual_batch_size
        self.renorm = renorm
        self._ranks = ranks
        self._exchanges = ranks is not None  # for TorchScript
        be_a_leaf(self)
        self._widen(self._buffers.copy())

    @property
    def activation(self) -> str | None:
        """The name of the function applied after the normalization; may be set."""
        return None if self._activation.name == "identity" else self._activation.name

    @activation.setter
    def activation(self, name: str | None) -> None:
        self._set_activation(activation_by_name(name, self.negative_slope))

    @property
    def renorm(self) -> Renorm | None:
        """Batch renormalization; may be set."""
        return self._renorm

    @renorm.setter
    def renorm(self, renorm: Renorm | None) -> None:
        self._renorm = renorm
        self._renorms = renorm is not None  # for TorchScript
        place_steps(self, renorm)

    def _set_activation(self, activation: Activation) -> None:
        self._activation = activation
        self._function, self._slope = activation.name, activation.negative_slope  # for TorchScript

    @property
    def negative_slope(self) -> float:
        """The slope of "leaky_relu" below zero."""
        return self._activation.negative_slope if self.activation == "leaky_relu" else 0.01

    @property
    def process_group(self) -> object:
        """The group that training exchanges over: None, "world" or a ProcessGroup; may be set.

        A layer that was unpickled where there is no group of that name gives an object that shows name and ranks.
        """
        return None if self._ranks is None else self._ranks.given()

    @process_group.setter
    def process_group(self, process_group: object) -> None:
        name = type(self).__name__
        ranks = Ranks.of(name, process_group)
        if ranks is not None and self.virtual_batch_size is not None:
            check_options(name, ["process_group", "virtual_batch_size"])
        self._ranks = ranks
        self._exchanges = ranks is not None

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,  # not keyword-only, as TorchScript has no such thing
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Normalize ``input``.

        Arguments:
            input: shape (N, C, ...)
            residual: broadcastable to input, added before the activation
            mask, sample_weight: which values count, and how often, see ``batchnorm.functional.batch_norm``
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted(input, residual, mask, sample_weight)
        else:
            self._check_input_dim(input)
            return self._normalize(input, residual, mask, sample_weight)

    @torch.jit.unused
    def _normalize(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None, sample_weight: Tensor | None
    ) -> Tensor:
        try:
            parameters, buffers = self._parameters, self._buffers
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:  # parametrized, pruned, sharded or replicated: plain attributes or properties
            weight, bias, mean, var, batches = (getattr(self, name) for name in _TENSORS)
        training, eps = self.training, self.eps
        by_batch = training or (mean is None and var is None)
        followed = training and self.track_running_stats
        ranks = None
        if self._ranks is not None and training:
            if self.too_few == "running" and torch.compiler.is_compiling():
                # Decided by a value, so the layer runs between two graphs. Imported here, since that takes seconds.
                y: Tensor = torch.compiler.disable(self._normalize)(input, residual, mask, sample_weight)
                return y
            ranks = exchange(self, self._ranks, input, mask, sample_weight)
        over: Whole | None = ranks
        stage: Stage | None = self._staged
        if stage is not None and stage.join is not None and by_batch:
            over = stage.join(self, input, ranks)
        whole = over is None
        name = type(self).__name__
        careful = by_batch and whole and self.too_few == "running" and mean is not None
        if careful and has_too_few(name, input, mask, sample_weight, self.virtual_batch_size):
            by_batch = followed = False
        read = followed or not by_batch
        check(
            name, input, weight, bias, mean if read else None, var if read else None, eps, by_batch=by_batch,
            whole=whole,
        )  # fmt: skip
        places = EVERYWHERE
        if mask is not None or sample_weight is not None:
            places = check_places(name, input, mask, sample_weight, by_batch=by_batch and whole)
        if residual is not None:
            residual = check_residual(name, input, residual)
        statistics: Population | Batch
        steps = None
        if not by_batch:
            assert mean is not None and var is not None
            statistics = Population(mean, var)
        else:
            into: Running | Accumulated | None = None
            values: object = input.numel()
            if followed and (not whole or type(values) is Tensor or values != 0):  # a tensor under torch.jit.trace
                into = destination(self, mean, var, batches)
            sink = into if self.nonfinite == "propagate" else Guarded(self, into, self.nonfinite)
            if self._renorm is None and self.virtual_batch_size is None:
                statistics = Batch(sink)
            else:
                statistics = Batch(sink, self._seams(input, mean, var, places))
                steps = None if self._renorm is None or into is None else steps_of(self)
            if over is not None:
                statistics = over.seen_by(statistics)
        try:
            y = functional.run(input, weight, bias, eps, statistics, self._activation, residual, places)
        except TooFewAcrossRanks:
            if self.too_few == "raise" or mean is None or var is None:
                raise
            population = Population(mean, var)
            return functional.run(input, weight, bias, eps, population, self._activation, residual, places)
        if steps is not None and (ranks is None or not ranks.empty):
            steps.add_(1)
        return y

    def _seams(self, input: Tensor, mean: Tensor | None, var: Tensor | None, places: Places) -> Seams:
        """What comes between statistics and use in training: virtual batches and renormalization."""
        if not self.training:
            return PLAIN
        groups = correct = None
        if self.virtual_batch_size is not None:
            groups = groups_of(type(self).__name__, input, self.virtual_batch_size, places)
        if self._renorm is not None:
            assert mean is not None and var is not None
            correct = self._renorm.correction(mean, var, self.eps, steps_of(self))
        return PLAIN if groups is None and correct is None else Seams(None, correct, groups)

    def _scripted(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None, sample_weight: Tensor | None
    ) -> Tensor:
        """``forward`` in TorchScript, which has no kernels of ours: PyTorch's own operators."""
        if mask is not None or sample_weight is not None:
            raise RuntimeError("batchnorm: TorchScript takes no mask or sample_weight. Call the layer outside of it.")
        if self.nonfinite != "propagate" or self.too_few != "raise":
            raise RuntimeError("batchnorm: TorchScript serves nonfinite='propagate' and too_few='raise' only.")
        if self.training and (self._exchanges or self._renorms or self.virtual_batch_size is not None):
            raise RuntimeError(
                "batchnorm: TorchScript trains without process_group, renorm and virtual_batch_size. "
                "Train the layer outside of it."
            )
        self._check_input_dim(input)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        follow = self.training and self.track_running_stats
        factor = 0.0 if self.momentum is None else self.momentum
        if follow and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        y = F.batch_norm(
            input,
            self.running_mean if follow or not by_batch else None,
            self.running_var if follow or not by_batch else None,
            self.weight,
            self.bias,
            by_batch,
            factor,
            self.eps,
        )
        if residual is not None:
            y = y + residual
        if self._function == "relu":
            y = F.relu(y)
        elif self._function == "leaky_relu":
            y = F.leaky_relu(y, self._slope)
        elif self._function == "silu":
            y = F.silu(y)
        elif self._function == "gelu":
            y = F.gelu(y)
        elif self._function == "sigmoid":
            y = torch.sigmoid(y)
        elif self._function == "tanh":
            y = torch.tanh(y)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ArgumentError(f"expected 2D or higher input (got {input.dim()}D input)")

    def _extras(self) -> dict[str, object]:
        """The arguments that torch's layers do not have, where they are on."""
        extras: dict[str, object] = {}
        if self.activation is not None:
            extras["activation"] = self.activation
        if self.activation == "leaky_relu":
            extras["negative_slope"] = self.negative_slope
        if self.too_few != "raise":
            extras["too_few"] = self.too_few
        if self.nonfinite != "propagate":
            extras["nonfinite"] = self.nonfinite
        if self._ranks is not None:
            extras["process_group"] = self._ranks
        if self._domains:
            extras["domains"] = list(self._domains)
        if has_frozen_statistics(self):
            extras["frozen"] = True
        if self.virtual_batch_size is not None:
            extras["virtual_batch_size"] = self.virtual_batch_size
        if self.renorm is not None:
            extras["renorm"] = self.renorm
        return extras

    def reset_running_stats(self) -> None:
        """Running statistics of 0 and 1, no batch counted; the warm-up of ``renorm`` begins again."""
        super().reset_running_stats()
        if "renorm_steps" in self._buffers:
            steps_of(self).zero_()

    qconfig = Absent()
    parametrizations = Absent()

    def extra_repr(self) -> str:
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return shown + "".join(f", {name}={value!r}" for name, value in self._extras().items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        before = self._buffers.copy()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._widen(before)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        bring_home(self, prefix, destination)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self._domains:
            state_dict = dict(state_dict)
            bring_home(self, prefix, state_dict)
        fill_in_steps(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # assign=True hands over the checkpoint's own tensors, which may be bfloat16.
        self._widen(self._buffers.copy())

    def _widen(self, before: dict[str, Tensor | None]) -> None:
        """Running statistics in no less than float32, with the digits they had ``before`` a cast."""
        for name, now in self._buffers.items():
            then = before[name]
            if name.startswith("running_") and now is not None and then is not None:
                self._buffers[name] = at_least_float32(now, then)


class BatchNorm1d(BatchNorm, torch_layers.BatchNorm1d):
    """Batch normalization over an input of shape (N, C) or (N, C, L), see ``BatchNorm``.

    >>> import torch
    >>> BatchNorm1d(3)(torch.randn(8, 3)).shape
    torch.Size([8, 3])
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 3):
            raise ArgumentError(f"expected 2D or 3D input (got {input.dim()}D input)")


class BatchNorm2d(BatchNorm, torch_layers.BatchNorm2d):
    """Batch normalization over an input of shape (N, C, H, W), see ``BatchNorm``.

    >>> import torch
    >>> BatchNorm2d(3)(torch.randn(8, 3, 5, 5)).shape
    torch.Size([8, 3, 5, 5])
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ArgumentError(f"expected 4D input (got {input.dim()}D input)")


class BatchNorm3d(BatchNorm, torch_layers.BatchNorm3d):
    """Batch normalization over an input of shape (N, C, D, H, W), see ``BatchNorm``.

    >>> import torch
    >>> BatchNorm3d(3)(torch.randn(8, 3, 4, 5, 5)).shape
    torch.Size([8, 3, 4, 5, 5])
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 5:
            raise ArgumentError(f"expected 5D input (got {input.dim()}D input)")


def be_a_leaf(module: nn.Module) -> None:
    """Let the tracers of torch.fx take a module of ours for a leaf, as they do with torch.nn's.

    They ask the instance for ``__module__``. A forward of ours asks questions that no tracer can answer.
    """
    if type(module).__module__.startswith("batchnorm."):
        module.__module__ = "torch.nn"


def _one_of(function: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(expected(function, f"{name} to be one of {known}", repr(value), "Choose one of them."))
