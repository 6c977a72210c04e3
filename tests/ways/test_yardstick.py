"""PyTorch's own samples: those of its tests of ``nn.BatchNorm1d/2d/3d`` and of ``nn.functional.batch_norm``.

They come from the installed package; what is checked with them is what ``test_modules``, ``test_ops``,
``test_ops_gradients``, ``test_ops_fwd_gradients`` and ``functorch/test_ops`` check.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

import batchnorm as bn
from batchnorm.functional import batch_norm
from tolerances import assert_not_worse_than_torch
from ways.common import both_modes, same

pytest.importorskip("expecttest", reason="expecttest is not installed, which torch.testing._internal imports")
modules: Any = pytest.importorskip("torch.testing._internal.common_modules")
methods: Any = pytest.importorskip("torch.testing._internal.common_methods_invocations")

way = pytest.mark.way
WHERE = "PyTorch's own samples"
INFOS = {
    info.module_cls.__name__: info
    for info in modules.module_db
    if info.module_cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}
(OP,) = (o for o in methods.op_db if o.name == "nn.functional.batch_norm" and not o.variant_test_name)
SAMPLES = 12
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def test_the_samples_are_there() -> None:
    assert sorted(INFOS) == ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
    assert len(op_samples(torch.float64)) == SAMPLES


def op_samples(dtype: torch.dtype, requires_grad: bool = False) -> list[Any]:
    torch.manual_seed(0)
    return list(OP.sample_inputs("cpu", dtype, requires_grad=requires_grad))


def module_samples(name: str, dtype: torch.dtype, training: bool) -> Iterator[tuple[Any, Any, Any]]:
    """Ours, torch's, and the input."""
    info = INFOS[name]
    torch.manual_seed(0)
    for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        made = [kind(*args, **kwargs, dtype=dtype) for kind in (getattr(bn, name), info.module_cls)]
        made[0].load_state_dict(made[1].state_dict())
        yield made[0].train(training), made[1].train(training), sample.forward_input


def close(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """To the last digits in float64; what 16-bit and 32-bit results may differ by is compared with torch's rule."""
    if dtype == torch.float64:
        same(actual, expected, "dx")
    else:
        torch.testing.assert_close(actual, expected, check_dtype=True)


@way(WHERE, "ModuleInfo samples of `BatchNorm1d/2d/3d`: forward, gradients, state", "as torch's layers")
@both_modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", INFOS)
def test_modules(name: str, dtype: torch.dtype, training: bool) -> None:
    for ours, torchs, given in module_samples(name, dtype, training):
        results = []
        for layer in (ours, torchs):
            x = given.args[0].detach().clone().requires_grad_()
            y = layer(x)
            dy = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
            results.append([y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)])
        close(results[0], results[1], dtype)
        if given.args[0].numel():  # an empty batch leaves our counter alone
            same(dict(ours.state_dict()), dict(torchs.state_dict()))


@way(
    WHERE,
    "ModuleInfo samples: `test_gradgrad`, `test_if_train_and_eval_modes_differ`, `test_pickle`, `test_repr`",
    "pass",
)
@both_modes
@pytest.mark.parametrize("name", INFOS)
def test_what_test_modules_asks(name: str, training: bool) -> None:
    for ours, torchs, given in module_samples(name, torch.float64, training):
        assert repr(ours) == repr(torchs)
        x = given.args[0].detach().clone()
        small = x[:2, :2, :2, :2] if x.dim() > 3 else x[:2, :2]
        if ours.num_features > 2 and x.numel():
            layer = getattr(bn, name)(2, ours.eps, 0.0, ours.affine, ours.track_running_stats, dtype=x.dtype)
            layer.train(training)
            torch.autograd.gradcheck(layer, small.requires_grad_(), check_forward_ad=True)
            torch.autograd.gradgradcheck(layer, small.requires_grad_())
        # A strided input and gradient give what contiguous ones give.
        if x.numel():
            strided = torch.stack((x, x), -1)[..., 0]
            same(copy.deepcopy(ours)(strided).detach(), copy.deepcopy(torchs)(x).detach())


@way(WHERE, "ModuleInfo error inputs", "torch's kinds of error and words")
@both_modes
@pytest.mark.parametrize("name", INFOS)
def test_module_errors(name: str, training: bool) -> None:
    info = INFOS[name]
    samples = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
    )
    for sample in samples:
        given = sample.module_error_input
        args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
        layers = [kind(*args, **kwargs, dtype=torch.float64) for kind in (getattr(bn, name), info.module_cls)]
        for layer in layers:
            layer.train(training)
        # torch's own test runs these in training; in eval its layers raise for the same eps, or do not.
        raised = []
        for layer in layers:
            try:
                layer(*given.forward_input.args)
                raised.append("")
            except sample.error_type as error:
                raised.append(str(error))
        assert raised[0] == raised[1]
        if training:
            assert re.search(sample.error_regex, raised[0])


def cloned(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def fresh(t: Any) -> Any:
        return t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

    return tree_map(fresh, (sample.input, *sample.args)), dict(sample.kwargs)


@way(
    WHERE, "OpInfo samples of `nn.functional.batch_norm`: forward, gradients, running statistics", "as torch's function"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(SAMPLES))
def test_function(index: int, dtype: torch.dtype) -> None:
    sample = op_samples(dtype, requires_grad=True)[index]
    results = []
    for function, wide in ((batch_norm, False), (nn.functional.batch_norm, False), (nn.functional.batch_norm, True)):
        args, kwargs = cloned(sample)
        if wide:
            args = tree_map(
                lambda t: t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t, args
            )
        y = function(*args, **kwargs)
        leaves = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
        dy = torch.linspace(-1, 1, y.numel()).to(dtype).to(y.dtype).view_as(y)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy), *(t for t in args[1:3] if t is not None)])
    for ours, torchs, right in zip(*results, strict=True):
        assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype)
        if dtype == torch.float64:
            same(ours, torchs, "dx")
        else:
            assert_not_worse_than_torch(ours, torchs, right, dtype=dtype)


@way(WHERE, "OpInfo: `gradcheck`, `gradgradcheck`, forward-mode and batched gradients", "pass")
@pytest.mark.parametrize("index", range(SAMPLES))
def test_gradients(index: int) -> None:
    sample = op_samples(torch.float64, requires_grad=True)[index]
    args, kwargs = cloned(sample)
    leaves = [i for i, t in enumerate(args) if isinstance(t, Tensor) and t.requires_grad]

    def function(*given: Tensor) -> Tensor:
        # Fresh statistics in each call: gradcheck calls often, training would move them.
        full = [t.detach().clone() if isinstance(t, Tensor) else t for t in args]
        for i, t in zip(leaves, given, strict=True):
            full[i] = t
        return batch_norm(*full, **kwargs)

    inputs = tuple(args[i] for i in leaves)
    torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True, check_fwd_over_rev=True)


@way(WHERE, "OpInfo: `vmap` as in `functorch/test_ops`", "as a loop over the batch")
@pytest.mark.parametrize("index", range(SAMPLES))
def test_vmap_consistency(index: int) -> None:
    sample = op_samples(torch.float64)[index]
    args, kwargs = cloned(sample)
    tensors = [i for i, t in enumerate(args) if isinstance(t, Tensor)]
    batches = {i: torch.stack([args[i] * s for s in (1.0, 1.5, 0.5)]) for i in tensors}
    updates = bool(kwargs.get("training")) and args[1] is not None

    def one(*given: Tensor) -> Tensor:
        full = list(args)
        for i, t in zip(chosen, given, strict=True):
            full[i] = t.clone() if i in (1, 2) else t
        return batch_norm(*full, **kwargs)

    choices = [tensors, [i for i in tensors if i in (0, 1, 2)], *([] if updates else [[i] for i in tensors])]
    for chosen in choices:
        expected = torch.stack([one(*(batches[i][b] for i in chosen)) for b in range(3)])
        same(vmap(one)(*(batches[i] for i in chosen)), expected)
        last = [batches[i].movedim(0, -1) for i in chosen]
        same(vmap(one, in_dims=-1)(*last), expected)


@way(WHERE, "OpInfo: non-contiguous samples", "as torch's function")
@pytest.mark.parametrize("index", range(SAMPLES))
def test_noncontiguous_samples(index: int) -> None:
    sample = op_samples(torch.float64)[index]
    results = []
    for function in (batch_norm, nn.functional.batch_norm):
        args, kwargs = cloned(sample.noncontiguous())
        results.append([function(*args, **kwargs), args[1], args[2]])
    same(results[0], results[1])


@way(WHERE, "OpInfo: composite compliance, as `TestCompositeCompliance`", "passes")
@pytest.mark.parametrize("index", range(SAMPLES))
def test_composite_compliance(index: int) -> None:
    from torch.testing._internal import composite_compliance

    sample = op_samples(torch.float64, requires_grad=True)[index]
    args, kwargs = cloned(sample)
    if kwargs.get("training"):
        # The check allows no operation in place on a plain tensor beside a wrapped one, and statistics are written so.
        args = (args[0], None, None, *args[3:])
    composite_compliance.check_with_mode(batch_norm, args, kwargs, torch.testing.assert_close)
    composite_compliance.check_all_permutations(batch_norm, args, kwargs, torch.testing.assert_close)
