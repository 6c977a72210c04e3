"""``fold``: a model for inference without its batch norms."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from batchnorm.errors import ArgumentError, MismatchError, expected
from batchnorm.lifecycle.folding.measure import Example, Shown, errors, show, speed
from batchnorm.lifecycle.folding.norms import is_norm
from batchnorm.lifecycle.folding.plan import Plan, apply, layers_of, plan
from batchnorm.lifecycle.folding.record import Record, record
from batchnorm.lifecycle.folding.report import Errors, FoldReport

_MEASURED = (torch.float32, torch.bfloat16)


def fold(
    model: nn.Module,
    /,
    *example_inputs: Any,
    keep: Collection[str] = (),
    measure: bool = True,
    **example_kwargs: Any,
) -> Any:
    r"""A copy of the model in eval mode, with batch normalization folded into the layers around it.

    With :math:`a = \gamma / \sqrt{\mathrm{Var}[x] + \epsilon}` and population statistics, batch norm is
    :math:`a x + (\beta - \mathrm{E}[x]\,a)` for each channel (Ioffe and Szegedy 2015, section 3.1), so that

    - a convolution (1d to 3d, transposed, grouped, dilated), ``Linear``, ``Bilinear`` or ``BatchNormLinear``
      before it takes it: :math:`W' = a W`, :math:`b' = a b + \beta - \mathrm{E}[x]\,a`;
    - else a convolution or ``Linear`` after it, where that is exact: :math:`W' = W a`,
      :math:`b' = b + W(\beta - \mathrm{E}[x]\,a)`. With zero padding it is exact only where there is no shift:
      the padding is 0 in the unfolded model, and no 0 after folding. Padding with the tensor's own values
      (circular, reflect, replicate) is exact;
    - else a batch norm after it;
    - else it stays as a scale and a shift for each channel.

    Where it was stands ``nn.Identity``, or its activation, and its residual where it was given one. All of it is
    computed in float64 and rounded once to the dtype of the weight.

    What is folded is proved by a recorded run of the example: the tensor that one layer gives reaches the
    other whole and unchanged, as a view at most, and nothing else. Dropout and ``Identity`` between them do
    no harm. Refused by name, with the reason, and left as it was: a layer that is used more than once or has
    hooks or parametrizations, weights that others share or read, a result that goes to several places, a norm that
    uses batch statistics in eval mode. A class that we do not know is compared with batch norm first. Then the
    folded model is compared with the unfolded one on the example, in float64.

    As with any trace, it is the example's way through the model that is proved. A model that chooses its way by
    the values or the shape of its input needs an example for the way that matters.

    Works on torch.nn's layers, ours, ``SyncBatchNorm``, their subclasses (timm's, with activation inside) and
    frozen batch norms of torchvision, timm, detectron2 and transformers, known by their buffers.

    Arguments:
        model: not changed; its training flags do not matter
        example_inputs, example_kwargs: arguments of one forward, not changed
        keep: names of norms to leave as they are
        measure: compare in float32 and bfloat16 layer by layer, and time both models, some seconds in all. Without
            it the folded model is still compared once in float64

    Returns:
        a module of the model's class, never run and free of the original's tensors, with the ``FoldReport`` as
        ``.fold_report``. A model that is itself a batch norm comes back as what is left of it.

    Raises:
        ArgumentError: no batch norm in the model, a name in ``keep`` that is none, layers that are not initialized,
            or a scripted model
        MismatchError: the folded model gives something else on the example, or cannot be run
        Whatever the model raises on the example. The model is as it was after any of them.

    >>> import batchnorm as bn, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), bn.BatchNorm2d(8, activation="relu"))
    >>> folded = bn.fold(model, torch.randn(2, 3, 16, 16), measure=False)
    >>> print(folded.fold_report)
    1 of 1 batch norms folded into another layer
    norm  kind         went               float64
    1     BatchNorm2d  into 0, before it  ...
    float64: outputs differ by ...
    >>> folded
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): ReLU(inplace=True)
    )
    """
    _check(model, keep)
    example = Example(example_inputs, example_kwargs)
    copied = _copy(model)
    layers = layers_of(copied)
    with example.alike(model):
        found = record(copied, layers, *example.given())
        made = plan(copied, layers, found, keep)
    del copied, layers
    report = _compared(model, made, example, measure, _notes(found))
    folded = apply(made, _copy(model))
    folded.fold_report = report  # type: ignore[assignment]
    return folded


def _check(model: nn.Module, keep: Collection[str]) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        todo = "Fold the model before it is scripted or traced."
        raise ArgumentError(expected("fold", "an eager module", type(model).__name__, todo))
    lazy = next((path for path, module in model.named_modules() if _is_lazy(module)), None)
    if lazy is not None:
        raise ArgumentError(expected("fold", "initialized layers", f"a lazy one, {lazy}", "Run the model once."))
    norms = [path for path, module in model.named_modules() if is_norm(module)]
    if not norms:
        raise ArgumentError(expected("fold", "a model with batch norm", "one without", "There is nothing to fold."))
    unknown = sorted(set(keep) - set(norms))
    if unknown:
        todo = "model.named_modules() gives the names."
        raise ArgumentError(expected("fold", "names of batch norms in keep", unknown, todo))


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params()


def _copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    copied = copy.deepcopy(model).eval()
    return copied if dtype is None else copied.to(dtype)


def _compared(model: nn.Module, made: Plan, example: Example, measure: bool, notes: tuple[str, ...]) -> FoldReport:
    """The report; an error if the two models do not agree."""
    own = _dtype_of(model)
    places = {each.norm: made.shown_at(each) for each in made.decisions}
    measured: dict[str, Errors] = {}
    not_run: dict[str, str] = {}
    truth: Shown | None = None
    wanted = dict.fromkeys([torch.float64, *(_MEASURED if measure else ()), *([own] if measure else ())])
    for dtype in wanted:
        name = str(dtype).removeprefix("torch.")
        try:
            unfolded = show(_copy(model, dtype), example.to(dtype), places.values())
        except Exception as error:
            not_run[name] = f"the model cannot be run in it ({type(error).__name__}: {_first_line(error)})"
            continue
        folded = _shown_folded(apply(made, _copy(model, dtype)), example.to(dtype), places)
        truth = unfolded if dtype == torch.float64 else truth
        measured[name] = errors(unfolded, folded, truth, places)
        _check_agreement(name, measured[name])
    if not measured:
        unfolded = show(_copy(model), example, places.values())
        folded = _shown_folded(apply(made, _copy(model)), example, places)
        name = str(own).removeprefix("torch.")
        measured[name] = errors(unfolded, folded, None, places)
        _check_agreement(name, measured[name])
    # As a check float64 is not news where it is not the model's own.
    if measure and own != torch.float64:
        measured.pop("float64", None)
    taken = None
    if measure:
        taken = speed(_copy(model), apply(made, _copy(model)), example, time.perf_counter)
    return FoldReport(tuple(made.decisions), made.left, measured, not_run, taken, notes)


def _notes(found: Record) -> tuple[str, ...]:
    notes = []
    if found.normalized_elsewhere:
        times = found.normalized_elsewhere
        notes.append(f"batch norm was called as a function, outside any layer, {times} times: left as it was")
    if found.reads_values:
        notes.append(
            f"the model looks at values of its tensors ({', '.join(sorted(set(found.reads_values))[:3])}): "
            "if they decide its way, only the example's way is proved"
        )
    return tuple(notes)


def _shown_folded(folded: nn.Module, example: Example, places: dict[str, str]) -> Shown:
    try:
        return show(folded, example, places.values())
    except Exception as error:
        got = f"{type(error).__name__}: {_first_line(error)}"
        todo = "The model looks into a norm that was replaced: name it in keep."
        raise MismatchError(expected("fold", "a folded model that runs", got, todo)) from error


def _check_agreement(dtype: str, found: Errors) -> None:
    """Far beyond rounding is wrong, not rounded: half of the digits."""
    allowed = torch.finfo(getattr(torch, dtype)).eps ** 0.5
    if found.outputs <= allowed:
        return
    worst = next((norm for norm, error in found.layers.items() if not error <= allowed), "none of them")
    got = f"{found.outputs:.1e} of the largest output, first seen at the norm {worst}"
    todo = "Name the norm in keep, and report this with the model."
    raise MismatchError(expected("fold", f"the same outputs within {allowed:.1e} in {dtype}", got, todo))


def _dtype_of(model: nn.Module) -> torch.dtype:
    tensors = (*model.parameters(), *model.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
