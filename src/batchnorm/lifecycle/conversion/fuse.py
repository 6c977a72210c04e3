"""Norms joined with the activation, or addition and activation, that follows them, and taken apart again."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from batchnorm.kernels import use_backend
from batchnorm.lifecycle.conversion.agreement import agreement, random_kept, run
from batchnorm.lifecycle.conversion.dataflow import Activity, Recording, Use, Value
from batchnorm.lifecycle.conversion.layers import (
    MEMORY,
    TORCHS,
    Origin,
    plain_class,
    with_activation,
    without_activation,
)
from batchnorm.lifecycle.conversion.report import Fusion
from batchnorm.lifecycle.conversion.rewrite import Join, Rewrite, class_before, rewrite, rewritten_class
from batchnorm.lifecycle.conversion.transaction import Transaction
from batchnorm.nn.batchnorm import BatchNorm
from batchnorm.nn.frozen import FrozenBatchNorm2d


class JoinedActivation(nn.Identity):
    """Where an activation module stood whose every use was joined with a norm before it."""

    def extra_repr(self) -> str:
        return f"{self.__dict__[MEMORY].kind.__name__}, in the norm before it"


@dataclass
class Plan:
    """What is to be joined, by names in the model."""

    activities: dict[str, Activity] = field(default_factory=dict)
    activations: list[str] = field(default_factory=list)
    rewrites: dict[str, Rewrite] = field(default_factory=dict)

    def without_rewrites(self, rows: dict[str, Fusion]) -> Plan:
        kept = {name: act for name, act in self.activities.items() if rows[name].how.endswith(_IDENTITY)}
        return Plan(kept, self.activations)

    def carry_out(self, changes: Transaction, model: nn.Module) -> None:
        for name, activity in self.activities.items():
            layer = model.get_submodule(name)
            changes.change(layer, gets=with_activation(layer, activity.name, activity.negative_slope))
        for name in self.activations:
            module = model.get_submodule(name)
            changes.change(module, JoinedActivation, {MEMORY: Origin(type(module))})
        for name, rewritten in self.rewrites.items():
            owner = model.get_submodule(name)
            changes.change(owner, rewritten_class(type(owner), rewritten.source))


_IDENTITY = "is an identity now"


@dataclass(frozen=True, eq=False)
class _Candidate:
    """What follows one norm in every use and in both modes."""

    norm: nn.Module
    activity: Activity
    caller: nn.Module
    act: Use
    total: Value | None

    @property
    def label(self) -> str:
        return f"add + {self.activity}" if self.total is not None else str(self.activity)


def fuse(changes: Transaction, model: nn.Module, example_inputs: Any) -> tuple[tuple[Fusion, ...], str]:
    """Join what can be joined in ``model``; what was done, and in words how the result was checked."""
    names = {name: m for name, m in model.named_modules() if _can_join(m)}
    if example_inputs is None:
        return _all_left(names, "no example_inputs to find out what follows it"), ""
    if not names:
        return (), ""
    # Plain operations of PyTorch: what is found out does not hang on the kernel, and none has to be compiled for it.
    with use_backend("composite"):
        return _tried(changes, model, names, example_inputs)


def _tried(
    changes: Transaction, model: nn.Module, names: dict[str, nn.Module], example_inputs: Any
) -> tuple[tuple[Fusion, ...], str]:
    try:
        plan, rows = _planned(copy.deepcopy(model), example_inputs)
    except Exception as error:  # the model's own errors, or a model that cannot be copied
        return _all_left(names, f"the example could not be traced: {_short(error)}"), ""
    for attempt in (plan, plan.without_rewrites(rows)):
        if not attempt.activities:
            break
        trouble, said = _checked(model, attempt, example_inputs)
        if not trouble:
            attempt.carry_out(changes, model)
            return tuple(rows.values()), said
        for name in rows:
            last = attempt.activities.keys() <= plan.without_rewrites(rows).activities.keys()
            if name in attempt.activities and (last or not rows[name].how.endswith(_IDENTITY)):
                rows[name] = Fusion(name, rows[name].followed_by, "", trouble)
    return tuple(rows.values()), ""


def unfuse(changes: Transaction, model: nn.Module) -> tuple[Fusion, ...]:
    """Take apart what ``fuse`` joined."""
    rows = []
    for name, module in model.named_modules():
        memory = module.__dict__.get(MEMORY)
        if isinstance(module, JoinedActivation):
            changes.change(module, memory.kind, loses=(MEMORY,))
        elif isinstance(memory, Origin) and memory.fused:
            joined = getattr(module, "activation", None)
            gets, loses = without_activation(module)
            changes.change(module, gets=gets, loses=loses)
            rows.append(Fusion(name, str(joined), "what followed is in its place again"))
        before = class_before(module)
        if before is not None:
            changes.change(module, before)
    return tuple(rows)


def _can_join(module: nn.Module) -> bool:
    return plain_class(module) in (*TORCHS, BatchNorm, FrozenBatchNorm2d)


def _all_left(names: dict[str, nn.Module], reason: str) -> tuple[Fusion, ...]:
    return tuple(Fusion(name, "?", "", reason) for name in names)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).split(chr(10))[0]}"


def _planned(twin: nn.Module, example_inputs: Any) -> tuple[Plan, dict[str, Fusion]]:
    """What to join, found in a copy of the model, and a row for each norm that something follows."""
    names = {module: name for name, module in twin.named_modules()}
    norms = {module for module in names if _can_join(module)}
    recordings = []
    for training in (True, False):
        with torch.no_grad(), random_kept(twin), Recording(norms) as recording:
            result = run(twin.train(training), example_inputs)
        recording.close()
        del result
        recordings.append(recording)
    rows: dict[str, Fusion] = {}
    candidates = []
    for norm in (module for module in names if module in norms):
        found = _what_follows(norm, [v for r in recordings for v in r.values if norm in v.norms])
        if isinstance(found, _Candidate):
            candidates.append(found)
        elif found:
            rows[names[norm]] = Fusion(names[norm], *found)
    plan = Plan()
    rest = _plan_modules(plan, rows, names, candidates, recordings)
    _plan_rewrites(plan, rows, names, rest)
    return plan, {name: rows[name] for name in names.values() if name in rows}


def _what_follows(norm: nn.Module, values: list[Value]) -> _Candidate | tuple[str, str, str] | None:
    """A candidate; or what follows and why it is left; or None where the norm was not run."""
    own = [value for value in values if not value.is_sum]
    if not own:
        return None
    followed = ", ".join(sorted({use.function for value in own for use in value.uses})) or "nothing"
    if getattr(norm, "activation", None) is not None:
        return followed, "", f"it has an activation already, {norm.activation}"
    if norm._forward_hooks or norm._backward_hooks or norm._backward_pre_hooks:
        return followed, "", "its hooks would see the activated output"
    found = []
    for value in own:
        if value.trouble:
            return followed, "", value.trouble
        if len(value.uses) != 1:
            return followed, "", f"its output has {len(value.uses)} uses"
        use, total = value.uses[0], None
        if use.result is not None:
            total = use.result
            followed = "add, " + (", ".join(sorted({use.function for use in total.uses})) or "nothing")
            if total.trouble:
                return followed, "", total.trouble
            if len(total.uses) != 1:
                return followed, "", f"the sum has {len(total.uses)} uses"
            use = total.uses[0]
        if use.activity is None:
            return followed, "", f"{use.function} is no activation that our layers have"
        found.append(_Candidate(norm, use.activity, value.caller, use, total))
    first = found[0]
    same = all(
        (each.activity, each.caller, each.act.module, each.act.caller, each.total is None)
        == (first.activity, first.caller, first.act.module, first.act.caller, first.total is None)
        for each in found
    )
    return first if same else (followed, "", "its uses differ in what follows, or training from eval mode")


def _plan_modules(
    plan: Plan,
    rows: dict[str, Fusion],
    names: dict[nn.Module, str],
    candidates: list[_Candidate],
    recordings: list[Recording],
) -> list[_Candidate]:
    """Activation modules that follow norms alone become identities; the candidates that remain."""
    alone: Counter[nn.Module] = Counter()
    for candidate in candidates:
        if candidate.total is None and candidate.act.module is not None:
            alone[candidate.act.module] += sum(recording.calls[candidate.norm] for recording in recordings)
    rest = []
    for candidate in candidates:
        module = candidate.act.module
        calls = 0 if module is None else sum(recording.calls[module] for recording in recordings)
        if candidate.total is not None or module is None or calls != alone[module] or "forward" in module.__dict__:
            rest.append(candidate)
            continue
        name, act = names[candidate.norm], names[module]
        plan.activities[name] = candidate.activity
        if act not in plan.activations:
            plan.activations.append(act)
        rows[name] = Fusion(name, candidate.label, f"{act} {_IDENTITY}")
    return rest


def _plan_rewrites(
    plan: Plan, rows: dict[str, Fusion], names: dict[nn.Module, str], candidates: list[_Candidate]
) -> None:
    """What remains is taken out of the forward that calls the norm, where all of it is in that one forward."""
    by_owner: dict[nn.Module, list[_Candidate]] = {}
    sums: set[Value | None] = set()
    left = []
    # Of two norms that are added up the later one takes the sum: it is likely to be where both are known.
    for candidate in reversed(candidates):
        owner, total = candidate.act.caller, candidate.total
        if total is not None and (not candidate.caller is total.caller is owner or total in sums):
            left.append(candidate)
            continue
        by_owner.setdefault(owner, []).insert(0, candidate)
        sums.add(total)
    for candidate in left:
        name, total = names[candidate.norm], candidate.total
        assert total is not None
        reason = "the other norm of the sum takes it"
        if total not in sums:
            reason = f"the sum is in another forward, that of {names[total.caller] or 'the model'}, and cannot reach it"
        rows[name] = Fusion(name, candidate.label, "", reason)
    for owner, each in by_owner.items():
        joins = {_join(owner, candidate): candidate for candidate in each}
        rewritten, reasons = rewrite(owner, list(joins))
        if rewritten is not None:
            plan.rewrites[names[owner]] = rewritten
        for join, candidate in joins.items():
            name, where = names[candidate.norm], names[owner] or "the model"
            if join in reasons:
                rows[name] = Fusion(name, candidate.label, "", reasons[join])
            else:
                plan.activities[name] = candidate.activity
                rows[name] = Fusion(name, candidate.label, f"taken out of the forward of {where}")


def _join(owner: nn.Module, candidate: _Candidate) -> Join:
    inside = {module: name for name, module in owner.named_modules()}
    total = candidate.total
    in_place = total is not None and total.in_place
    module = None if candidate.act.module is None else inside.get(candidate.act.module)
    return Join(inside[candidate.norm], candidate.activity, total is not None, in_place, module)


def _checked(model: nn.Module, plan: Plan, example_inputs: Any) -> tuple[str, str]:
    """Why the joined model does not do as the unjoined one does, "" if it does; and what was found, in words."""

    def joined() -> nn.Module:
        twin = copy.deepcopy(model)
        plan.carry_out(Transaction(), twin)
        return twin

    def plain() -> nn.Module:
        return copy.deepcopy(model)

    return agreement(plain, joined, example_inputs)
