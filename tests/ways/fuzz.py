"""Random calls: kinds of tensors, layouts, devices, modes and transforms, drawn together.

``python -m ways.fuzz SEED COUNT`` (in ``tests/``) runs that many. A call must give what torch's function gives in
float64 for the same numbers, or raise a Python exception. Each call is printed before it runs, so that the last line
tells which one ended the process.
"""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.functional import batch_norm
from tolerances import assert_close, dtype_name, to_float64
from ways.wrappers import Logging, Plain, Wrapper

EPS = 1e-3


class PassingDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class PassingFunction(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def negated(t: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(t), -t).conj().imag if t.dtype.itemsize >= 4 else torch._neg_view(-t)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t.clone(memory_format=torch.preserve_format),
    "subclass": lambda t: t.clone().as_subclass(Plain),
    "wrapper": lambda t: Wrapper(t.clone()),
    "logging": lambda t: Logging(t.clone()),
    "negated": negated,
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "expanded": lambda t: t[:1].expand(t.shape),
    "meta": lambda t: t.to("meta"),
    "mkldnn": lambda t: t.float().contiguous().to_mkldnn(),
    "sparse": lambda t: t.to_sparse(),
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "offset": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "reversed": lambda t: t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1]),
    "sliced": lambda t: torch.stack((t, t), -1)[..., 0],
    "every other channel": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}
MODES: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "dispatch": PassingDispatch,
    "function": PassingFunction,
    "meta device": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "dual level": forward_ad.dual_level,
    "two dispatch modes": lambda: _two(),
}
TRANSFORMS = ("none", "none", "backward", "backward", "grad", "vjp", "jvp", "vmap", "vmap of grad", "functionalize",
              "make_fx", "checkpoint", "batched gradients", "double backward", "dual", "fake", "linearize")  # fmt: skip


@contextlib.contextmanager
def _two() -> Iterator[None]:
    with PassingDispatch(), PassingDispatch():
        yield


@dataclass(frozen=True)
class Call:
    """What is drawn."""

    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    training: bool
    activation: str | None
    x: str
    weight: str
    bias: str
    mean: str
    residual: str
    dy: str
    mask: str
    mode: str
    transform: str
    by_layer: bool


def draw(rng: random.Random) -> Call:
    def sometimes(kinds: Any, usual: str, chance: float) -> str:
        return rng.choice(list(kinds)) if rng.random() < chance else usual

    rank = rng.randint(2, 5)
    shape = tuple(rng.choice((1, 2, 3, 5)) for _ in range(rank))
    if shape[0] == 1 and all(n == 1 for n in shape[2:]):
        shape = (4, *shape[1:])
    strange = rng.random() < 0.5
    training = rng.random() < 0.5
    # Training over statistics that share one place in memory has no right result.
    statistics = [kind for kind in KINDS if not (training and kind == "expanded")]
    call = Call(
        shape=shape,
        layout=rng.choice(list(LAYOUTS)),
        dtype=rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)),
        training=training,
        activation=rng.choice((None, None, "relu", "leaky_relu", "gelu", "silu")),
        x=sometimes(KINDS, "plain", 0.5 * strange),
        weight=sometimes([*KINDS, "none"], "plain", 0.2),
        bias=sometimes([*KINDS, "none"], "plain", 0.2),
        mean=sometimes(statistics, "plain", 0.2 * strange),
        residual=sometimes(KINDS, "none", 0.25),
        dy=sometimes(KINDS, "plain", 0.3 * strange),
        mask=sometimes(("plain", "wrapper", "subclass", "meta"), "none", 0.15),
        mode=sometimes(MODES, "none", 0.4),
        transform=rng.choice(TRANSFORMS),
        by_layer=rng.random() < 0.4,
    )
    strange_ones = {"wrapper", "logging", "zero", "meta", "negated"} & {
        call.x,
        call.weight,
        call.bias,
        call.mask,
        call.residual,
    }
    if call.transform == "linearize" and (strange_ones or call.mode != "none"):
        # torch's linearize gives uninitialized memory for these, with torch's own layer too.
        return replace(call, transform="jvp")
    return call


def activated(z: Tensor, name: str | None) -> Tensor:
    if name is None:
        return z
    return F.leaky_relu(z, 0.01) if name == "leaky_relu" else getattr(F, name)(z)


class Problem:
    """The numbers of a call, and the call on ours and on torch's function."""

    def __init__(self, call: Call) -> None:
        self.call = call
        g = torch.Generator().manual_seed(5)
        c = call.shape[1]
        wide = torch.float64 if call.dtype == torch.float64 else torch.float32

        def normal(*shape: int, dtype: torch.dtype = call.dtype) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

        self.plain: dict[str, Tensor | None] = {
            "x": LAYOUTS[call.layout](normal(*call.shape)),
            "weight": None if call.weight == "none" else normal(c, dtype=wide),
            "bias": None if call.bias == "none" else normal(c, dtype=wide),
            "mean": normal(c, dtype=wide),
            "var": (normal(c, dtype=wide) ** 2 + 0.5),
            "residual": None if call.residual == "none" else normal(*call.shape),
            "dy": normal(*call.shape),
            "mask": None if call.mask == "none" else (torch.rand(call.shape[0], 1, *call.shape[2:], generator=g) > 0.2),
        }
        kinds = {**{f.name: getattr(call, f.name) for f in fields(call)}, "var": "plain"}
        # What each strange tensor holds, for the reference: a zero tensor holds zeros.
        self.meta = "meta" in (call.x, call.weight, call.bias, call.mean, call.residual, call.mask)
        self.given = {n: None if t is None else KINDS[kinds[n]](t) for n, t in self.plain.items()}
        for name, t in self.plain.items():
            if t is not None and kinds[name] == "zero":
                self.plain[name] = torch.zeros_like(t)
            elif t is not None and kinds[name] == "expanded":
                self.plain[name] = t[:1].expand(t.shape)

    def ours(self, x: Any, mean: Any, var: Any) -> Any:
        call, given = self.call, self.given
        if call.by_layer:
            kind = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}[x.dim()]
            layer = kind(call.shape[1], EPS, 0.3, activation=call.activation, device="cpu").train(call.training)
            del layer.weight, layer.bias
            layer.weight, layer.bias = given["weight"], given["bias"]  # type: ignore[assignment]
            layer.running_mean, layer.running_var = mean, var
            return layer(x, residual=given["residual"], mask=given["mask"])
        return batch_norm(
            x, mean, var, given["weight"], given["bias"], call.training, 0.3, EPS,
            activation=call.activation, residual=given["residual"], mask=given["mask"],
        )  # fmt: skip

    def torchs(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """The reference: float64, plain, by torch's function; written out where a mask takes part."""
        given = {n: t.double() if t is not None and n != "mask" else t for n, t in self.plain.items()}
        weight, bias, residual, mask = (given[n] for n in ("weight", "bias", "residual", "mask"))
        if mask is None:
            z = F.batch_norm(x, mean, var, weight, bias, self.call.training, 0.3, EPS)
            return activated(z if residual is None else z + residual, self.call.activation)
        dims = [d for d in range(x.dim()) if d != 1]
        present = mask.expand(x.shape).double()
        center, spread = (t.clone().view(-1, *[1] * (x.dim() - 2)) for t in (mean, var))
        if self.call.training:
            count = present.sum(dims, keepdim=True)
            center = (x * present).sum(dims, keepdim=True) / count
            spread = ((x - center).square() * present).sum(dims, keepdim=True) / count
            with torch.no_grad():
                enough = (count > 1).all()  # else, where the mask cannot be looked at, nothing moves
                unbiased = (spread.detach() * count / (count - 1)).flatten()
                for running, batch in ((mean, center.detach().flatten()), (var, unbiased)):
                    running.copy_(torch.where(enough, 0.7 * running + 0.3 * batch, running))
        z = (x - center) / torch.sqrt(spread + EPS)
        for t, combine in ((weight, torch.mul), (bias, torch.add)):
            z = z if t is None else combine(z, t.view(-1, *[1] * (x.dim() - 2)))
        return activated(z if residual is None else z + residual, self.call.activation) * present

    def run(self, function: Any, tensors: dict[str, Any], strange: bool) -> list[Any]:
        """The call by its transform; ``strange`` is False for the reference."""
        x, dy, transform = tensors["x"], tensors["dy"], self.call.transform

        def of(x: Any) -> Any:
            return function(x, tensors["mean"].clone(), tensors["var"].clone())

        def scalar(x: Any) -> Any:
            return (of(x) * dy).sum()

        if transform == "none":
            mean, var = tensors["mean"], tensors["var"]
            return [function(x, mean, var), mean, var]
        if transform in ("backward", "checkpoint", "batched gradients", "double backward"):
            leaf = x.detach().requires_grad_()
            y = checkpoint(of, leaf, use_reentrant=False) if transform == "checkpoint" else of(leaf)
            if transform == "batched gradients":
                return [y, *torch.autograd.grad(y, leaf, torch.stack((dy, dy * 2)), is_grads_batched=True)]
            again = transform == "double backward"
            (dx,) = torch.autograd.grad(y, leaf, dy, create_graph=again)
            if not again:
                return [y, dx]
            if not dx.requires_grad:  # linear in the input
                return [y, dx, torch.zeros_like(dx)]
            return [y, dx, *torch.autograd.grad((dx * dy).sum(), leaf, allow_unused=True, materialize_grads=True)]
        if transform == "dual":
            with forward_ad.dual_level():
                return list(forward_ad.unpack_dual(of(forward_ad.make_dual(x, dy))))
        if transform == "fake" and strange:
            from torch._subclasses.fake_tensor import FakeTensorMode

            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                return [of(mode.from_tensor(x))]
        if transform == "fake":
            return [of(x)]
        two = torch.stack((x, x * 2)) if transform.startswith("vmap") else None
        applied: dict[str, Callable[[], Any]] = {
            "grad": lambda: torch.func.grad(scalar)(x),
            "vjp": lambda: torch.func.vjp(of, x)[1](dy),
            "jvp": lambda: torch.func.jvp(of, (x,), (dy,)),
            "vmap": lambda: torch.func.vmap(of)(two),
            "vmap of grad": lambda: torch.func.vmap(torch.func.grad(scalar))(two),
            "functionalize": lambda: torch.func.functionalize(of)(x),
            "make_fx": lambda: make_fx(of)(x)(x),
            "linearize": lambda: torch.func.linearize(of, x)[1](dy),
        }
        found = applied[transform]()
        return list(found) if isinstance(found, (tuple, list)) else [found]


def bare(t: Any) -> Any:
    while isinstance(t, (Wrapper, Logging)):
        t = t.inner
    t = t.detach().as_subclass(Tensor)
    return t.to_dense() if t.layout is not torch.strided else t.clone()


def check(call: Call) -> bool:
    """Whether the call gave a result, which is then right; False where it raised."""
    problem = Problem(call)
    try:
        with MODES[call.mode]():
            found = problem.run(problem.ours, problem.given, strange=True)
        found = [bare(t) for t in found]
    except Exception:
        return False
    wide = {n: t.double() if t is not None and n != "mask" else t for n, t in problem.plain.items()}
    expected = [t.detach() for t in problem.run(problem.torchs, wide, strange=False)]
    assert len(found) == len(expected)
    for got, right in zip(found, expected, strict=True):
        assert got.shape == right.shape, f"shape {tuple(got.shape)} for {tuple(right.shape)}"
        if got.device.type == "meta" or isinstance(got, torch._subclasses.FakeTensor):
            assert call.transform == "fake" or problem.meta or call.dy == "meta", "a meta tensor for a real one"
            continue
        rounded = call.dtype.itemsize == 2 or call.mode == "autocast"
        if rounded and call.training and call.transform != "none":
            # The composite path rounds each operation to 16 bits, and batches of few values are badly conditioned.
            assert not bool(got.isnan().any())
        elif bool(torch.isfinite(right).all()):
            close(got, right, call)
    return True


def close(got: Tensor, right: Tensor, call: Call) -> None:
    size = 10.0 * max(1.0, float(right.abs().max()) if right.numel() else 1.0)
    # Derivatives of a batch of few values are as large as 1/√eps, those of second order 1/eps.
    size *= 1 / EPS if call.training and call.transform != "none" else 1.0
    name = dtype_name(got.dtype)
    if call.dtype.itemsize == 2 or call.mode == "autocast":
        name, got = "bfloat16", got.bfloat16()
        size *= 4e3
    elif call.x == "mkldnn":
        name, got = "float32", got.float()
    assert_close(got, to_float64(right), dtype=name, quantity="dx", scale=size)


def main(seed: int, count: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng = random.Random(seed)
    agreed, wrong = 0, 0
    for i in range(count):
        call = draw(rng)
        print(i, call, flush=True)
        try:
            agreed += check(call)
        except AssertionError as error:
            wrong += 1
            print(f"wrong: {error}")
    print(f"agreed {agreed} of {count}, wrong {wrong}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
