"""Flax's batch normalization under ``jax.jit``, where it is installed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.bench.peers import Program, Result, Unavailable
from batchnorm.bench.problem import EPS, MOMENTUM, Problem


def build(problem: Problem) -> Program:
    """The step of the problem's mode; JAX has its own threads, as many as there are cores.

    Raises:
        Unavailable: JAX or Flax is missing, or fewer threads are asked for than it would take
    """
    try:
        jax: Any = importlib.import_module("jax")
        linen: Any = importlib.import_module("flax.linen")
    except ImportError as error:
        raise Unavailable(f"not installed: {error.name}") from None
    case = problem.case
    if torch.get_num_threads() != os.cpu_count():
        raise Unavailable("JAX's number of threads cannot be chosen")
    if case.dtype == "float64":
        raise Unavailable("JAX computes in float64 only where all of it is switched to it")
    inside = case.layout == "channels_last"

    def array(t: Tensor) -> Any:
        """The same memory; with channels_last the dimensions are named as they lie."""
        t = t.movedim(1, -1) if inside and t.dim() > 1 else t
        return jax.numpy.array(jax.dlpack.from_dlpack(t.contiguous()))

    dtype = array(problem.x).dtype
    norm = linen.BatchNorm(
        use_running_average=not case.training,
        axis=-1 if inside or len(case.shape) == 2 else 1,
        momentum=1 - MOMENTUM,
        epsilon=EPS,
        dtype=dtype,
        param_dtype=jax.numpy.float32,
    )
    parameters = {"scale": array(problem.weight), "bias": array(problem.bias)}
    statistics = {"mean": array(problem.running_mean), "var": array(problem.running_var)}
    x = array(problem.x)
    residual = None if problem.residual is None else array(problem.residual)
    dy = None if problem.dy is None else array(problem.dy)

    def forward(parameters: Any, x: Any, residual: Any, statistics: Any) -> tuple[Any, Any]:
        variables = {"params": parameters, "batch_stats": statistics}
        y, changed = norm.apply(variables, x, mutable=["batch_stats"])
        if residual is not None:
            y = y + residual
        return (y if case.extra == "plain" else jax.nn.relu(y)), changed

    def both(parameters: Any, x: Any, residual: Any, statistics: Any, dy: Any) -> tuple[Any, Any, Any]:
        y, back, changed = jax.vjp(lambda p, x, r: forward(p, x, r, statistics), parameters, x, residual, has_aux=True)
        return y, back(dy), changed

    if case.mode == "forward+backward":
        step = jax.jit(both)

        def run() -> Result:
            y, (d_parameters, dx, d_residual), _ = jax.block_until_ready(step(parameters, x, residual, statistics, dy))
            gradients = (dx, d_parameters["scale"], d_parameters["bias"])
            return (y, *gradients) if d_residual is None else (y, *gradients, d_residual)

    else:
        step = jax.jit(forward)

        def run() -> Result:
            return (jax.block_until_ready(step(parameters, x, residual, statistics))[0],)

    def read(result: Result) -> Sequence[Tensor]:
        tensors = [torch.from_dlpack(each) for each in result]  # type: ignore[attr-defined]
        return [t.movedim(-1, 1) if inside and t.dim() > 1 else t for t in tensors]

    return Program(run, read=read)
