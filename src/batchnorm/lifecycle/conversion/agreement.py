"""Whether two models do the same: outputs, gradients and buffers of a training step, outputs in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

# Largest difference that is still rounding, relative to the largest value of the tensor. In float64 a wrong data flow
# shows by a factor of a million, and a ReLU's kink is missed by all but one value in 1e13.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}

Made = Callable[[], nn.Module]


def run(model: nn.Module, example_inputs: Any) -> Any:
    """The model's forward on a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def random_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Random numbers that are drawn within, on the CPU and the model's GPUs, are not missed after it."""
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.is_cuda})
    kept: AbstractContextManager[None] = torch.random.fork_rng(devices)
    return kept


def agreement(plain: Made, other: Made, example_inputs: Any) -> tuple[str, str]:
    """Why the two models differ, "" if they do not, and in words what was compared.

    Each is made anew by its function. Random numbers are the same for both, and those of the caller are left alone.
    """
    try:
        try:
            dtype = torch.float64
            right = _step(plain().double(), example_inputs, dtype)
        except Exception:  # a model that asks for its own dtype
            dtype = next((p.dtype for p in plain().parameters() if p.is_floating_point()), torch.float32)
            right = _step(plain(), example_inputs, None)
    except Exception as error:
        return f"the unjoined model cannot do a training step on the example: {type(error).__name__}: {error}", ""
    try:
        model = other()
        got = _step(model.double() if dtype == torch.float64 else model, example_inputs, dtype)
    except Exception as error:
        return f"the joined model fails on the example: {type(error).__name__}: {error}", ""
    worst = 0.0
    # A gradient that is 0 but for rounding, as that of a bias before a norm, has no size of its own.
    sizes = [float(t.abs().max()) for what, t in right.items() if t is not None and _is_gradient(what, t)]
    floor = 1e-3 * max(sizes, default=0.0)
    for what, a in right.items():
        b = got.get(what)
        if (a is None) != (b is None):
            return f"{what} is there in one of the joined and the unjoined model only", ""
        if a is None or b is None:
            continue
        if a.shape != b.shape:
            return f"{what} has shape {tuple(b.shape)} joined, {tuple(a.shape)} unjoined", ""
        difference = _difference(a, b, floor if _is_gradient(what, a) else 0.0)
        if not difference <= ROUNDING[dtype]:
            return f"{what} differs by {difference:.1e} of its size between the joined and the unjoined model", ""
        worst = max(worst, difference)
    how = f"within {worst:.0e} of their size" if worst else "to the last bit"
    where = str(dtype).removeprefix("torch.")
    return "", f"outputs, gradients and buffers of a training step and outputs in eval mode agree {how}, in {where}"


def _inputs(example_inputs: Any, dtype: torch.dtype | None) -> Any:
    """Floating inputs as leaves that ask for a gradient, in ``dtype`` if given; the rest as it is."""

    def one(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        return leaf.detach().to(dtype or leaf.dtype).clone().requires_grad_()

    return tree_map(one, example_inputs)


def _step(model: nn.Module, example_inputs: Any, dtype: torch.dtype | None) -> dict[str, Tensor | None]:
    """Everything that a training step and a forward in eval mode give, by name."""
    found: dict[str, Tensor | None] = {}
    with random_kept(model), torch.enable_grad():
        torch.manual_seed(0)
        given = _inputs(example_inputs, dtype)
        # Not the leaves themselves: a model may write into its input.
        handed = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, given)
        outputs = [t for t in tree_leaves(run(model.train(), handed)) if isinstance(t, Tensor)]
        leaves: dict[str, Tensor] = {f"the gradient of {n}": p for n, p in model.named_parameters() if p.requires_grad}
        inputs = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.requires_grad]
        leaves |= {f"the gradient of input {i}": t for i, t in enumerate(inputs)}
        ends = [t for t in outputs if t.requires_grad]
        if ends and leaves:
            torch.manual_seed(1)
            weights = [torch.randn_like(t) for t in ends]
            gradients = torch.autograd.grad(ends, list(leaves.values()), weights, allow_unused=True)
            found |= dict(zip(leaves, gradients, strict=True))
        found |= {f"training output {i}": t.detach() for i, t in enumerate(outputs)}
        found |= {f"buffer {name}": b.detach().clone() for name, b in model.named_buffers()}
        torch.manual_seed(2)
        with torch.no_grad():
            outputs = [t for t in tree_leaves(run(model.eval(), _inputs(given, None))) if isinstance(t, Tensor)]
        found |= {f"eval output {i}": t for i, t in enumerate(outputs)}
    return found


def _is_gradient(what: str, t: Tensor) -> bool:
    return what.startswith("the gradient") and t.numel() > 0


def _difference(a: Tensor, b: Tensor, floor: float) -> float:
    """The largest difference relative to the largest value, or to ``floor`` if that is larger; Inf for a lone NaN."""
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return float("inf")
    a, b = torch.nan_to_num(a), torch.nan_to_num(b)
    difference, size = float((a - b).abs().max()), max(float(a.abs().max()), floor)
    return difference / size if size else difference
