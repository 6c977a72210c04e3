"""Which layers may be changed at all, and where the channels of a projection lie. A refusal is a reason in words."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from batchnorm.lifecycle.folding.record import Call, Key, Place, Record, place_of
from batchnorm.nn import BatchNormLinear

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_projection(module: nn.Module) -> bool:
    """A layer that can take a batch norm before or after it."""
    return isinstance(module, (_ConvNd, nn.Linear, nn.Bilinear, BatchNormLinear))


@dataclass(frozen=True)
class Side:
    """Where the channels of a projection lie: ``place``'s dimension ``axis``.

    ``even``: a shift of the input is a bias of the output, see ``record.Convolution``.
    """

    place: Place
    axis: int
    even: bool = True


class Fitness:
    """Of the layers of one model in one recorded run."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        self._record = record
        self._paths: dict[int, list[str]] = defaultdict(list)
        self._owners: dict[Key, set[tuple[int, str]]] = defaultdict(set)
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths[id(module)].append(path or type(module).__name__)
            for name, tensor in _tensors(module, recurse=False):
                place = place_of(tensor)
                if place is not None:
                    self._owners[place.key].add((id(module), name))

    def refusal(self, path: str, module: nn.Module) -> str | None:
        """Why this layer cannot be replaced or given other weights, or None if it can."""
        places = self._paths[id(module)]
        if len(places) > 1:
            return f"it is registered in {len(places)} places ({' and '.join(places)})"
        for each in module.modules() if isinstance(module, BatchNormLinear) else [module]:
            if any(getattr(each, hooks) for hooks in _HOOKS):
                return "it has hooks"
            if parametrize.is_parametrized(each):
                return "it is parametrized"
            if "forward" in vars(each):
                return "its forward was replaced"
        calls = self._record.of(path)
        if len(calls) != 1:
            return f"it is called {len(calls)} times" if calls else "the example does not call it as a module"
        for name, tensor in _tensors(module, recurse=isinstance(module, BatchNormLinear)):
            refused = self._tensor_refusal(name, tensor, module, calls[0])
            if refused:
                return refused
        return None

    def _tensor_refusal(self, name: str, tensor: Tensor, module: nn.Module, call: Call) -> str | None:
        place = place_of(tensor)
        if place is None or type(tensor.data) is not Tensor:
            return f"its {name} is a {type(tensor).__name__}"
        inside = {id(each) for each in module.modules()}
        others = [(self._paths[owner][0], other) for owner, other in self._owners[place.key] if owner not in inside]
        if others:
            return f"its {name} shares memory with {'.'.join(min(others))}"
        stray = self._record.stray(place.key, [call])
        return f"its {name} is also used by {stray.what}" if stray else None

    def projection_refusal(self, path: str, module: nn.Module) -> str | None:
        """As ``refusal``, for a convolution, ``Linear``, ``Bilinear`` or ``BatchNormLinear``."""
        refused = self.refusal(path, module)
        if refused:
            return refused
        (call,) = self._record.of(path)
        kind = type(module).__name__
        if isinstance(module, BatchNormLinear):
            return "it is called with inference=" if call.options else None
        if not isinstance(module.weight, Tensor) or not module.weight.dtype.is_floating_point:
            return "its weight is not of a floating dtype"
        if isinstance(module, _ConvNd):
            return self._convolution_refusal(module, call)
        if type(module).forward not in (nn.Linear.forward, nn.Bilinear.forward):
            return f"{kind} has a forward of its own"
        return None

    def _convolution_refusal(self, module: _ConvNd, call: Call) -> str | None:
        """A subclass may do what it likes around one convolution by its own weight and bias."""
        if len(call.convolutions) != 1:
            return f"it runs {len(call.convolutions)} convolutions in one call"
        (done,) = call.convolutions
        bias = None if module.bias is None else place_of(module.bias)
        if done.weight != place_of(module.weight) or done.bias != bias:
            return "its weight or bias is changed before the convolution"
        key = done.output.key
        inside = [t for t in self._record.touches.get(key, ()) if call.begin <= t.moment <= call.end]
        if call.output is None or call.output.key != key or inside:
            return "the convolution's result is changed inside it"
        return None

    def output_of(self, path: str, module: nn.Module) -> Side:
        """Where a fit projection's output channels lie."""
        (call,) = self._record.of(path)
        if call.convolutions and isinstance(module, _ConvNd):
            return Side(call.convolutions[0].output, 1)  # also where the input had no batch dimension
        assert call.output is not None
        return Side(call.output, -1)

    def input_of(self, path: str, module: nn.Module) -> Side | str:
        """Where a fit projection's input channels lie, or why nothing can be folded into it from before."""
        (call,) = self._record.of(path)
        assert call.input is not None
        if isinstance(module, nn.Bilinear):
            return "it has two inputs"
        if not isinstance(module, _ConvNd):
            return Side(call.input, -1)
        done = call.convolutions[0]
        if done.input.key == call.input.key:
            return Side(done.input, 1, done.even)
        if module.padding_mode != "zeros" and _is_plain(module):
            # Padded with its own values, which are scaled and shifted as they are.
            return Side(call.input, -len(module.kernel_size) - 1, done.even)
        return "it pads its input before the convolution"


def _is_plain(module: _ConvNd) -> bool:
    plain = {nn.Conv1d, nn.Conv2d, nn.Conv3d}
    return any(
        type(module).forward is each.forward and type(module)._conv_forward is each._conv_forward for each in plain
    )


def _tensors(module: nn.Module, recurse: bool) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=recurse, remove_duplicate=False), *module.named_buffers(recurse=recurse)]
