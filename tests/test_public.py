"""The public names: all of them, no others, each with its documentation."""

from __future__ import annotations

import inspect
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

import batchnorm as bn

NAMES = {
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "BatchNormLinear",
    "FrozenBatchNorm2d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "accumulate_statistics",
    "convert",
    "defer_updates",
    "domains",
    "exact_accumulation",
    "explain",
    "freeze",
    "functional",
    "keep_domain",
    "recalibrate",
    "revert",
    "unfreeze",
    "use_backend",
    "use_domain",
    "warmup",
}
# An error has nothing to show, and compiling every kernel takes longer than an example may.
WITHOUT_EXAMPLE = {"BatchNormError", "warmup"}
CALLABLES = sorted(name for name in bn.__all__ if callable(getattr(bn, name)))


def test_the_names_that_are_promised_are_there() -> None:
    assert set(bn.__all__) >= NAMES
    assert list(bn.__all__) == sorted(bn.__all__)
    for name in bn.__all__:
        assert getattr(bn, name) is not None


def test_star_gives_these_and_no_others() -> None:
    given: dict[str, object] = {}
    exec("from batchnorm import *", given)
    assert set(given) - {"__builtins__"} == set(bn.__all__)


def test_the_version_is_that_of_the_package() -> None:
    assert bn.__version__ == metadata.version("batchnorm")


def test_the_version_stands_in_one_place() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r"^version =", text, re.MULTILINE) is None
    assert '[tool.hatch.version]\npath = "src/batchnorm/__init__.py"\n' in text


@pytest.mark.parametrize("name", CALLABLES)
def test_each_is_documented(name: str) -> None:
    thing = getattr(bn, name)
    doc = inspect.getdoc(thing)
    assert doc, f"{name} has no docstring"
    assert len(doc.split("\n\n")[0]) < 400, f"{name} does not begin with a summary"
    if name not in WITHOUT_EXAMPLE:
        assert ">>>" in doc, f"{name} has no example"


@pytest.mark.parametrize("name", CALLABLES)
def test_each_public_method_is_documented_and_typed(name: str) -> None:
    thing = getattr(bn, name)
    methods = [thing] if inspect.isfunction(thing) else [
        m for n, m in vars(thing).items() if inspect.isfunction(m) and not n.startswith("_") and n != "extra_repr"
    ]  # fmt: skip
    for method in methods:
        assert inspect.getdoc(method), f"{name}.{method.__name__} has no docstring"
        for parameter in inspect.signature(method).parameters.values():
            if parameter.name != "self":
                assert parameter.annotation is not inspect.Parameter.empty, f"{name}.{method.__name__}: {parameter}"


def test_a_momentum_is_said_to_be_that_of_the_new_batch() -> None:
    for thing in (bn.BatchNorm, bn.BatchNormLinear, bn.functional.batch_norm):
        assert "weight of the NEW batch" in (inspect.getdoc(thing) or "")


def test_the_layers_take_what_torchs_take_in_the_same_order() -> None:
    torchs = list(inspect.signature(torch.nn.BatchNorm2d.__init__).parameters)
    for layer in (bn.BatchNorm, bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d):
        parameters = inspect.signature(layer.__init__).parameters
        positional = [n for n, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert positional == [n for n in torchs if n in positional]
        assert set(torchs) <= set(parameters)
    functional = list(inspect.signature(bn.functional.batch_norm).parameters)
    assert functional[:8] == list(inspect.signature(torch.nn.functional.batch_norm).parameters)


def test_errors_are_caught_by_their_built_in_kind() -> None:
    from batchnorm import errors

    assert issubclass(errors.ArgumentError, ValueError)
    assert issubclass(errors.DataError, ValueError)
    for kind in (errors.MismatchError, errors.DtypeError, errors.BackendError, errors.NonFiniteError):
        assert issubclass(kind, RuntimeError)
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        assert issubclass(kind, bn.BatchNormError)
        assert inspect.getdoc(kind)
