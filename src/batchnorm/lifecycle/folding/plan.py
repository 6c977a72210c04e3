"""What to do with each batch norm: into the layer before it, into the one after it, or scale and shift in its place."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from batchnorm.lifecycle.folding.affine import Affine, Projection, affine_of, projection_of
from batchnorm.lifecycle.folding.fitness import Fitness, is_projection
from batchnorm.lifecycle.folding.flow import channels_seen, sink_of, source_of
from batchnorm.lifecycle.folding.modules import ResidualActivation, scale_shift
from batchnorm.lifecycle.folding.norms import is_norm, not_finite, rest_of, why_not
from batchnorm.lifecycle.folding.record import Call, Key, Record
from batchnorm.nn import BatchNormLinear

Where = Literal["layer before", "layer after", "norm after", "inside", "scale and shift"]


@dataclass(frozen=True)
class Decision:
    """One batch norm, and the layer it goes into; ``why`` says for scale and shift that neither neighbour took it."""

    norm: str
    kind: str
    where: Where
    into: str
    why: str = ""


@dataclass
class Plan:
    """Everything that folding changes, computed from the model as it was given, in float64."""

    decisions: list[Decision] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    projections: dict[str, Projection] = field(default_factory=dict)
    affines: dict[str, Affine] = field(default_factory=dict)  # what stays as scale and shift
    calls: dict[str, Call] = field(default_factory=dict)  # of the norms that are replaced
    # Where a layer that took norms shows what the unfolded model shows: at the last norm that it took.
    shown: dict[str, str] = field(default_factory=dict)

    def shown_at(self, decision: Decision) -> str:
        """The layer at which the folded and the unfolded model can be compared for this norm."""
        if decision.where == "norm after":
            return self.shown_at(next(each for each in self.decisions if each.norm == decision.into))
        return self.shown.get(decision.into, decision.into)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Batch norms and the layers that can take them, by path; not the norm inside a ``BatchNormLinear``."""
    inner = {id(each.norm) for each in model.modules() if isinstance(each, BatchNormLinear)}
    return {
        path: module
        for path, module in model.named_modules()
        if id(module) not in inner and (is_norm(module) or is_projection(module))
    }


def plan(model: nn.Module, layers: Mapping[str, nn.Module], record: Record, keep: Collection[str]) -> Plan:
    planner = _Planner(model, layers, record, keep)
    for path, module in layers.items():
        if isinstance(module, BatchNormLinear):
            planner.fused_linear(path, module)
    reached = [call.path for call in record.calls if is_norm(layers[call.path])]
    for path in dict.fromkeys([*reached, *(path for path, module in layers.items() if is_norm(module))]):
        planner.norm(path, layers[path])
    return planner.plan


class _Planner:
    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], record: Record, keep: Collection[str]
    ) -> None:
        self.plan = Plan()
        self._layers = layers
        self._record = record
        self._keep = keep
        self._fitness = Fitness(model, record)
        # For a norm that went into the layer before it and left nothing: that layer, and which of the norm's channels
        # each of its output channels is.
        self._flows: dict[str, tuple[str, Tensor]] = {}
        # Affine maps that norms before a norm handed on to it, and the storages that its input is then a view of.
        self._handed: dict[str, Affine] = {}
        self._aliases: dict[str, list[tuple[Key, int]]] = {}

    def fused_linear(self, path: str, module: BatchNormLinear) -> None:
        norm = _norm_in(path)
        why = self._kept(norm) or self._fitness.projection_refusal(path, module) or not_finite(affine_of(module.norm))
        if why:
            self.plan.left[norm] = why
        else:
            self.plan.projections[path] = projection_of(module)
            self.plan.decisions.append(Decision(norm, type(module.norm).__name__, "inside", path))

    def norm(self, path: str, module: nn.Module) -> None:
        why = self._norm_refusal(path, module)
        if why:
            self.plan.left[path] = why
            return
        (call,) = self._record.of(path)
        self.plan.calls[path] = call
        bare = isinstance(rest_of(module, call), nn.Identity)
        affine = affine_of(module)
        if path in self._handed:
            affine = self._handed[path].then(affine)
        before = self._into_before(call, affine, bare)
        if before is None:
            return
        after = self._into_after(call, affine) if bare else "its activation or residual comes before what follows it"
        if after is None:
            return
        self.plan.affines[path] = affine
        self._decide(path, "scale and shift", path, f"{before}; {after}")

    def _decide(self, path: str, where: Where, into: str, why: str = "") -> None:
        self.plan.decisions.append(Decision(path, type(self._layers[path]).__name__, where, into, why))

    def _kept(self, path: str) -> str | None:
        return "it is named in keep" if path in self._keep else None

    def _norm_refusal(self, path: str, module: nn.Module) -> str | None:
        refused = self._kept(path) or self._fitness.refusal(path, module)
        return refused or why_not(module, self._record.of(path)[0])

    def _into_before(self, call: Call, affine: Affine, bare: bool) -> str | None:
        """None when done, else why not."""
        source = source_of(self._record, call)
        if isinstance(source, str):
            return source
        assert call.input is not None and source.output is not None
        module = self._layers[source.path]
        if is_norm(module):
            if source.path not in self._flows:
                return f"its input comes from {source.path}, which has no layer before it to go into"
            target, through = self._flows[source.path]
            seen = channels_seen(call.input, source.output, 1)
            labels = None if seen is None else seen[through]
        else:
            target = source.path
            refused = self._projection_refusal(target)
            if refused:
                return f"{target} before it: {refused}"
            side = self._fitness.output_of(target, module)
            labels = channels_seen(call.input, side.place, side.axis)
        if labels is None:
            return f"{source.path} before it has its channels in another dimension"
        self.plan.projections[target] = self._projection(target).before(affine.at(labels))
        self.plan.shown[target] = call.path
        if bare:
            self._flows[call.path] = (target, labels)
        self._decide(call.path, "layer before", target)
        return None

    def _into_after(self, call: Call, affine: Affine) -> str | None:
        """None when done, else why not."""
        sink = sink_of(self._record, call)
        if isinstance(sink, str):
            return sink
        assert call.input is not None and call.output is not None and sink.input is not None
        # Its input stands in for its output from now on, so it must keep until that is used.
        aliases = [*self._aliases.get(call.path, []), (call.input.key, call.end)]
        for key, begin in aliases:
            written = self._record.written(key, begin, sink.end)
            if written:
                return f"its input is changed by {written.what} before {sink.path} has run"
        module = self._layers[sink.path]
        if is_norm(module):
            refused = self._norm_refusal(sink.path, module)
            seen = channels_seen(call.output, sink.input, 1)
            if refused or seen is None:
                return f"{sink.path} after it: {refused or 'has its channels in another dimension'}"
            self._handed[sink.path] = affine.at(seen)
            self._aliases[sink.path] = aliases
            self._decide(call.path, "norm after", sink.path)
            return None
        refused = self._projection_refusal(sink.path)
        side = refused or self._fitness.input_of(sink.path, module)
        if isinstance(side, str):
            return f"{sink.path} after it: {side}"
        labels = channels_seen(call.output, side.place, side.axis)
        if labels is None:
            return f"{sink.path} after it has its channels in another dimension"
        if affine.shifts and not side.even:
            return f"{sink.path} after it does not see a shift alike at the border (zero padding, or transposed)"
        self.plan.projections[sink.path] = self._projection(sink.path).after(affine.at(labels))
        self._decide(call.path, "layer after", sink.path)
        return None

    def _projection_refusal(self, path: str) -> str | None:
        if path in self.plan.projections:
            return None
        if isinstance(self._layers[path], BatchNormLinear):
            return f"its own norm is left, {self.plan.left[_norm_in(path)]}"
        return self._fitness.projection_refusal(path, self._layers[path])

    def _projection(self, path: str) -> Projection:
        known = self.plan.projections.get(path)
        return projection_of(self._layers[path]) if known is None else known


def _norm_in(path: str) -> str:
    return f"{path}.norm" if path else "norm"


@torch.no_grad()
def apply(plan: Plan, model: nn.Module) -> nn.Module:
    """The plan carried out on a copy of the model that it was made for, rounded once to the copy's dtype."""
    for path, projection in plan.projections.items():
        module = model.get_submodule(path)
        if isinstance(module, BatchNormLinear):
            model = _replace(model, path, _linear(module, projection))
        else:
            _write(module, projection)
    for path, call in plan.calls.items():
        norm = model.get_submodule(path)
        rest = rest_of(norm, call)
        if path in plan.affines:
            first = scale_shift(plan.affines[path], norm)
            if isinstance(rest, ResidualActivation):
                rest.before = first
            else:
                rest = first if isinstance(rest, nn.Identity) else nn.Sequential(first, rest)
        model = _replace(model, path, rest.train(norm.training))
    return model


def _write(module: nn.Module, projection: Projection) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    for name, value in (("weight", projection.weight), ("bias", projection.bias)):
        now = getattr(module, name)
        like = weight.new_empty(value.shape) if now is None else torch.empty_like(now)
        flag = weight.requires_grad if now is None else now.requires_grad
        setattr(module, name, nn.Parameter(like.copy_(value), requires_grad=flag))


def _linear(module: BatchNormLinear, projection: Projection) -> nn.Linear:
    linear = copy.copy(module.linear)
    linear._parameters = dict(linear._parameters)
    _write(linear, projection)
    return linear.train(module.training)


def _replace(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """The model with ``new`` at that path: another model only where the path is the model itself."""
    if not path:
        return new
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = new
    return model
