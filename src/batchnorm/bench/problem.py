"""The data of a case, and the right answer in float64 to hold each result against before its time counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import torch
from torch import Tensor

from batchnorm.bench.cases import Case

EPS = 1e-5
MOMENTUM = 0.1

# dtype -> (of the value itself, of the largest value): what an honest implementation may be off by. 16-bit results
# are rounded up to three times where torch runs three layers one after the other, and torch.compile rounds even the
# gradients of float32 parameters to the input's dtype. With the data below a missing term
# or a wrong sign shows at 0.1 of the largest value and more.
TOLERANCE = {
    "float64": (0.0, 1e-10),
    "float32": (0.0, 2e-5),
    "float16": (2.0**-9, 2.0**-11),
    "bfloat16": (2.0**-6, 2.0**-8),
}
# Within this of 0, relative to the largest |z|, the sign that ReLU looks at may differ by rounding: dy is 0 there.
_KINK = {"float64": 1e-9, "float32": 1e-4, "float16": 2.0**-8, "bfloat16": 2.0**-5}

_CHUNK = 1 << 19  # elements: the float64 intermediates of one chunk stay small
_SHIFTS = (0, 10007, 20011)  # where x, dy and the residual begin in one stretch of noise


class Problem:
    """Inputs of a case and the float64 result.

    dy follows x̂ in part and has a mean, so that both sums of the backward pass matter; each channel has its own mean
    and spread. The oracle is computed here by the formulas, a few channels at a time, by no peer's code.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)
        n, channels = case.elements, case.channels
        noise = torch.randn(n + _SHIFTS[-1], generator=generator)
        per_channel = torch.randn(4, channels, generator=generator)
        shape = (1, channels) + (1,) * (len(case.shape) - 2)
        centre, spread = per_channel[0].view(shape), per_channel[1].abs().add(0.5).view(shape)
        parts = [noise[s : s + n].view(case.shape) for s in _SHIFTS]
        parameters = torch.float64 if case.dtype == "float64" else torch.float32
        self.x = self._laid_out(parts[0] * spread + centre)
        self.dy = self._laid_out(0.5 * parts[1] + 0.25 * parts[0] + 0.25) if case.training else None
        self.residual = self._laid_out(parts[2]) if case.extra == "residual+relu" else None
        self.weight = per_channel[2].abs().add(0.5).to(parameters)
        self.bias = per_channel[3].to(parameters)
        self.running_mean = centre.flatten().add(0.1).to(parameters)
        self.running_var = spread.flatten().square().mul(1.2).to(parameters)
        self.expected = self._solve()

    def serves(self, case: Case) -> bool:
        """Whether ``case`` differs in nothing that data and result depend on."""
        return _what_matters(case) == _what_matters(self.case)

    def of(self, case: Case) -> Problem:
        """The same data for another mode."""
        other = copy(self)
        other.case = case
        return other

    def _laid_out(self, values: Tensor) -> Tensor:
        return values.to(self.case.torch_dtype).contiguous(memory_format=self.case.memory_format)

    def _solve(self) -> dict[str, Tensor]:
        case, training = self.case, self.case.training
        y = torch.empty_like(self.x, dtype=torch.float64)
        solved = {"y": y}
        per_channel = ("dweight", "dbias", "dweight_scale", "dbias_scale", "running_mean", "running_var")
        if training:
            solved["dx"] = torch.empty_like(y)
            solved |= {name: torch.empty(case.channels, dtype=torch.float64) for name in per_channel}
            if self.residual is not None:
                solved["dresidual"] = torch.empty_like(y)
        for some in _channel_chunks(case):
            self._solve_channels(some, solved)
        return solved

    def _solve_channels(self, some: slice, solved: dict[str, Tensor]) -> None:
        case = self.case
        rest = tuple(d for d in range(len(case.shape)) if d != 1)
        shape = (1, -1) + (1,) * (len(case.shape) - 2)
        x = _float64(self.x[:, some])
        if case.training:
            mean = x.mean(rest)
            centred = x - mean.view(shape)
            var = centred.square().mean(rest)
            count = case.values
            new = (mean, var * count / (count - 1))
            for name, old, batch in zip(
                ("running_mean", "running_var"), (self.running_mean, self.running_var), new, strict=True
            ):
                solved[name][some] = old[some].double() * (1 - MOMENTUM) + batch * MOMENTUM
        else:
            mean, var = self.running_mean[some].double(), self.running_var[some].double()
            centred = x - mean.view(shape)
        inverse = (var + EPS).rsqrt()
        x_hat = centred.mul_(inverse.view(shape))
        weight = self.weight[some].double()
        z = x_hat * weight.view(shape) + self.bias[some].double().view(shape)
        if self.residual is not None:
            z += _float64(self.residual[:, some])
        solved["y"][:, some] = z if case.extra == "plain" else z.relu()
        if self.dy is None:
            return
        if case.extra != "plain":
            largest = z.abs().amax()
            self.dy[:, some].masked_fill_(z.abs() <= _KINK[case.dtype] * largest, 0)
        dz = _float64(self.dy[:, some])
        if case.extra != "plain":
            dz = torch.where(z > 0, dz, 0.0)
        product = dz * x_hat
        sum_dz, sum_product = dz.sum(rest), product.sum(rest)
        solved["dbias"][some], solved["dweight"][some] = sum_dz, sum_product
        solved["dbias_scale"][some], solved["dweight_scale"][some] = dz.abs().sum(rest), product.abs().sum(rest)
        if "dresidual" in solved:
            solved["dresidual"][:, some] = dz
        dx = dz - (sum_dz / case.values).view(shape) - x_hat.mul_((sum_product / case.values).view(shape))
        solved["dx"][:, some] = dx.mul_((weight * inverse).view(shape))

    def check(self, result: Sequence[Tensor], running: tuple[Tensor, Tensor] | None) -> str | None:
        """The first quantity that is off, in words, or None.

        Arguments:
            result: y, then after a backward pass dx, dweight, dbias and, with a residual, its gradient
            running: running mean and variance after one training step
        """
        relative, absolute = TOLERANCE[self.case.dtype]
        exact = TOLERANCE["float64" if self.case.dtype == "float64" else "float32"][1]
        for name, got in zip(("y", "dx", "dweight", "dbias", "dresidual"), result, strict=False):
            want = self.expected[name]
            if name in ("dweight", "dbias"):
                found = _compare(name, got, want, self.expected[f"{name}_scale"] * exact, relative)
            else:
                found = _compare(name, got, want, want.abs().amax() * absolute, relative)
            if found is not None:
                return found
        if running is not None and self.case.training:
            for name, now in zip(("running_mean", "running_var"), running, strict=True):
                want = self.expected[name]
                found = _compare(name, now, want, want.abs() * exact + exact, 0.0)
                if found is not None:
                    return found
        return None


def _compare(name: str, got: Tensor, want: Tensor, absolute: Tensor, relative: float) -> str | None:
    """Where the largest error beyond what is allowed lies, in words."""
    if got.shape != want.shape:
        return f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    worst, said = 0.0, None
    rows = max(1, _CHUNK * len(want) // want.numel()) if want.dim() > 1 else len(want)
    for begin in range(0, len(want), rows):
        part = slice(begin, begin + rows)
        right = want[part]
        error = (got[part].detach().double() - right).abs()
        allowed = right.abs() * relative + (absolute[part] if absolute.dim() else absolute)
        # Written so that a NaN is an excess, and the largest of all.
        excess = torch.where(error <= allowed, 0.0, error).nan_to_num(nan=torch.inf).reshape(-1)
        at = int(excess.argmax())
        if float(excess[at]) > worst:
            worst = float(excess[at])
            off, most = float(error.reshape(-1)[at]), float(allowed.reshape(-1)[at])
            said = f"{name} is off by {off:.3g}, allowed {most:.3g}"
    return said


def _what_matters(case: Case) -> tuple[object, ...]:
    return case.shape, case.dtype, case.layout, case.extra, case.training


def _channel_chunks(case: Case) -> Iterator[slice]:
    width = max(1, _CHUNK // case.values)
    for begin in range(0, case.channels, width):
        yield slice(begin, min(begin + width, case.channels))


def _float64(values: Tensor) -> Tensor:
    return values.to(torch.float64).contiguous()
