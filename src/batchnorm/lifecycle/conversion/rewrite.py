"""A module's forward without the activations and additions that its norms have taken over."""

from __future__ import annotations

import dis
import math
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn import functional as F
from torch.nn.utils import parametrize

from batchnorm.lifecycle.conversion.dataflow import ADDITIONS, Activity, activation_of

_FUNCTIONS = {F.relu, torch.relu, torch.relu_, F.leaky_relu, F.leaky_relu_, F.silu, F.gelu, F.sigmoid, F.tanh}
_FUNCTIONS |= {torch.sigmoid, torch.sigmoid_, torch.tanh, torch.tanh_, F.relu_}
# What a recorded forward may name. A function of someone else's could not be pickled by name for certain.
_NAMES: dict[str, Any] = {
    "torch": torch,
    "device": torch.device,
    "inf": math.inf,
    "nan": math.nan,
    "NoneType": type(None),
}
# Libraries whose functions give the same for the same arguments, or say that they draw random numbers.
_LIBRARIES = ("torch", "math", "operator")
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_CONSTANT = (bool, int, float, complex, str, bytes, torch.Tensor)


@dataclass(frozen=True)
class Join:
    """A norm, by its name in the module, and what the module's forward applies to the norm's output."""

    norm: str
    activity: Activity
    with_sum: bool
    in_place_sum: bool
    module: str | None = None


@dataclass(frozen=True)
class Rewrite:
    """The source of the new forward, and which joins it makes."""

    source: str
    joined: tuple[Join, ...]


def rewrite(owner: nn.Module, joins: list[Join]) -> tuple[Rewrite | None, dict[Join, str]]:
    """The forward of ``owner`` with the joins made, and for each that could not be made the reason.

    ``owner`` is a copy that may be put into training and eval mode.
    """
    reason = _hindrance(owner, sum(1 for join in joins if join.in_place_sum))
    if reason:
        return None, dict.fromkeys(joins, reason)
    sources, reasons = [], {}
    for training in (True, False):
        try:
            graph = _traced(owner.train(training))
        except Exception as error:  # a forward of someone else's, under a tracer: anything can be raised
            text = str(error).split("\n")[0]
            return None, dict.fromkeys(joins, f"its forward cannot be recorded: {type(error).__name__}: {text}")
        if any(n.op == "get_attr" and str(n.target).startswith("_tensor_constant") for n in graph.nodes):
            return None, dict.fromkeys(joins, "its forward makes tensors, which a recording would fix")
        reasons = {join: why for join in joins if (why := _join(graph, owner, join))}
        for node in graph.nodes:
            node.type = None
        graph.lint()
        code = graph.python_code("self")
        if any(name not in _NAMES for name in code.globals if name not in ("fx_pytree", "pytree")):
            return None, dict.fromkeys(joins, "its forward names functions that could not be pickled")
        sources.append(code.src)
    if sources[0] != sources[1]:
        return None, dict.fromkeys(joins, "its forward goes another way in training than in eval mode")
    joined = tuple(join for join in joins if join not in reasons)
    return (Rewrite(sources[0], joined) if joined else None), reasons


def rewritten_class(base: type[nn.Module], source: str) -> type[nn.Module]:
    """``base`` with that forward: a subclass of the same name, one for each pair, that is pickled by the pair."""
    key = (base, source)
    if key not in _CLASSES:
        names = dict(_NAMES)
        exec(compile(source, f"<forward of {base.__qualname__}, joined by batchnorm.convert>", "exec"), names)
        members = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce,
            "forward": names["forward"],
            _KEY: key,
        }
        _CLASSES[key] = type(base.__name__, (base,), members)
    return _CLASSES[key]


def class_before(module: nn.Module) -> type[nn.Module] | None:
    """The class that a rewritten one was made from; None where there was no rewriting."""
    key = vars(type(module)).get(_KEY)
    return None if key is None else key[0]


_KEY = "_batchnorm_joined"
_CLASSES: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    return _again, vars(type(self))[_KEY], self.__getstate__()


def _again(base: type[nn.Module], source: str) -> nn.Module:
    made: nn.Module = object.__new__(rewritten_class(base, source))
    return made


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced(owner: nn.Module) -> fx.Graph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _ChildrenAreLeaves().trace(owner)


def _join(graph: fx.Graph, owner: nn.Module, join: Join) -> str:
    """Make the join in the graph, or say why not, with the graph as it was."""
    calls = [n for n in graph.nodes if n.op == "call_module" and _gives(str(n.target), join)]
    if not calls:
        return "the recorded forward does not call it"
    found: list[tuple[Node, Node | None, Node]] = []
    for node in calls:
        followers = _followers(owner, node, join)
        if isinstance(followers, str):
            return followers
        found.append((node, *followers))
    for node, total, act in found:
        if total is not None:
            # The norm and the identities after it, to where both summands are known. None of them draws random
            # numbers, so nothing else notices.
            chain = _with_identities(owner, node)
            other = next(a for a in total.all_input_nodes if a is not chain[-1])
            for link in chain:
                total.prepend(link)
            node.kwargs = {**node.kwargs, "residual": other}
            total.replace_all_uses_with(chain[-1])
            graph.erase_node(total)
        act.replace_all_uses_with(act.all_input_nodes[0])
        graph.erase_node(act)
    return ""


def _gives(called: str, join: Join) -> bool:
    """Whether the module is the norm or, where no residual has to reach it, holds the norm and hands its output on."""
    return called == join.norm or (not join.with_sum and join.norm.startswith(f"{called}."))


def _followers(owner: nn.Module, node: Node, join: Join) -> tuple[Node | None, Node] | str:
    """The addition, if there is to be one, and the activation that follow the norm."""
    at, total = _with_identities(owner, node)[-1], None
    if len(at.users) != 1:
        return "its output has another use in the recorded forward"
    if join.with_sum:
        total = next(iter(at.users))
        if _function_name(total) not in ADDITIONS or len(total.args) != 2 or len(total.all_input_nodes) != 2:
            return "the recorded forward shows no addition after it"
        at = _with_identities(owner, total)[-1]
        if len(at.users) != 1:
            return "the sum has another use in the recorded forward"
    act = next(iter(at.users))
    if _activity(act, join) != join.activity:
        return f"the recorded forward shows no {join.activity} after it"
    return total, act


def _activity(node: Node, join: Join) -> Activity | None:
    if node.op == "call_module":
        return join.activity if node.target == join.module else None
    if node.op == "call_function" and node.target not in _FUNCTIONS:
        return None
    return activation_of(_function_name(node), node.args, node.kwargs)


def _function_name(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _with_identities(owner: nn.Module, node: Node) -> list[Node]:
    """The node, and the ``nn.Identity`` after ``nn.Identity`` that hands its value on."""
    chain = [node]
    while len(chain[-1].users) == 1:
        user = next(iter(chain[-1].users))
        if user.op != "call_module" or type(owner.get_submodule(str(user.target))) is not nn.Identity:
            break
        chain.append(user)
    return chain


def _hindrance(owner: nn.Module, in_place_sums: int) -> str:
    """Why a recording of the forward would not be the forward; "" where it would."""
    base = type(owner)
    if base.__module__.startswith("torch."):
        return f"the forward of torch's {base.__name__} is not rewritten"
    if parametrize.is_parametrized(owner):
        return f"{base.__name__} has parametrizations"
    if (
        base.__reduce_ex__ is not object.__reduce_ex__
        or base.__reduce__ is not object.__reduce__
        or hasattr(base, "__deepcopy__")
    ):
        return f"{base.__name__} is copied or pickled in a way of its own"
    forward = base.forward
    if "forward" in owner.__dict__:
        return f"the forward of {base.__name__} was replaced on the instance"
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return f"the forward of {base.__name__} is wrapped in a decorator"
    seen: set[types.CodeType] = set()
    in_place = 0
    methods: set[str] = set()
    for function in _functions(owner, forward, seen):
        if isinstance(function, str):
            return function
        for code in _codes(function.__code__):
            methods |= set(code.co_names)
            for step in dis.get_instructions(code):
                if step.opname in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL"):
                    return f"its forward sets {step.argval}, which a recording would leave out"
                if "WITH" in step.opname or step.opname == "LOAD_SPECIAL":
                    return "its forward has a with block, which a recording would leave out"
                in_place += step.opname.startswith("INPLACE_") or (
                    step.opname == "BINARY_OP" and step.argrepr.endswith("=")
                )
    # The sums that are joined may be in place; `add_` by name is recorded as it is.
    if in_place > (0 if "add_" in methods else in_place_sums):
        return "its forward has an assignment in place, which a recording would make out of place"
    return ""


def _functions(
    owner: nn.Module, function: types.FunctionType, seen: set[types.CodeType]
) -> Iterator[types.FunctionType | str]:
    """The functions that make up the forward, or a reason where one of them depends on more than its arguments."""
    if function.__code__ in seen:
        return
    seen.add(function.__code__)
    yield function
    if function.__closure__:
        yield "its forward uses variables of the function that it was defined in"
    steps = [step for code in _codes(function.__code__) for step in dis.get_instructions(code)]
    global_names = {str(step.argval) for step in steps if step.opname == "LOAD_GLOBAL"}
    usual = set(nn.Module().__dict__)
    for name in {str(step.argval) for step in steps if step.opname in _ATTRIBUTE}:
        if owner.__dict__.get(name) is not None and name not in usual:
            yield f"its forward may depend on self.{name}, which a recording would fix"
        member = next((vars(c)[name] for c in type(owner).__mro__ if name in vars(c)), None)
        if isinstance(member, property):
            yield f"its forward may depend on the property {name}, which a recording would fix"
        if isinstance(member, types.FunctionType) and not hasattr(nn.Module, name):
            yield from _functions(owner, member, seen)
    for name in global_names:
        value = function.__globals__.get(name)
        if isinstance(value, _CONSTANT):
            yield f"its forward depends on the global {name}, which a recording would fix"
        elif isinstance(value, types.ModuleType):
            if value.__name__.split(".")[0] not in _LIBRARIES:
                yield f"its forward calls into {value.__name__}, which a recording would look through"
        elif isinstance(value, types.FunctionType) and value.__module__.split(".")[0] not in _LIBRARIES:
            yield f"its forward calls {name}, which a recording would look through"


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
