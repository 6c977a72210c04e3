"""Batch normalization as Ioffe and Szegedy wrote it down (arXiv 1502.03167), in NumPy and float64.

Read this file beside the paper: one function for each line of Algorithm 1, one for each of the six gradients
of section 3, one for Algorithm 2. Nothing here is fast, and nothing is clever. Every kernel of the library is
held against it, so three things are added which the paper does not have: a mask of what is present, frequency
weights, and what networks put behind the normalization, z = batch_norm(x) + residual and y = activation(z).

Names. The paper's μ is `mean`, σ² is `var`, x̂ is `x_hat`, ε is `eps`; γ is `weight` and β is `bias`, as in
PyTorch. The paper's activations x^(k) are the channels of x, in dimension 1: x has shape (N, C) or
(N, C, *spatial). Whatever is one value a channel has shape (C,). Inputs of any real dtype are converted to
float64 first.

Weights. With w_i = 1 everywhere each formula below is the paper's. A weight of 2 means that the sample counts
twice, and m becomes W = Σ w_i. A place that the mask calls absent has w_i = 0, and y, dx and dresidual are
exactly 0 there, whatever x holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Statistics(NamedTuple):
    """The statistics of a mini-batch in Algorithm 1, each of shape (C,).

    The mean is mean + rest: float64 holds a mean of 1e8 only to 1e-8, and `rest` is what its rounding left.
    """

    m: Array  # how many values, or W = Σ w_i with weights
    mean: Array
    var: Array  # biased: divided by m
    rest: Array


class Forward(NamedTuple):
    """The output and the intermediate results. y, z and x_hat have the shape of x."""

    y: Array
    z: Array  # before the activation
    x_hat: Array
    statistics: Statistics


class Gradients(NamedTuple):
    """Gradients of the loss: the first four with respect to the inputs, the others to the paper's intermediates."""

    dx: Array  # shape of x
    dweight: Array  # (C,)
    dbias: Array  # (C,)
    dresidual: Array  # shape of x; it is also the gradient of z
    dx_hat: Array  # shape of x
    dvar: Array  # (C,)
    dmean: Array  # (C,)


class Population(NamedTuple):
    """Mean and variance for inference, each of shape (C,)."""

    mean: Array
    var: Array


# Shapes


def sum_over_batch(values: Array) -> Array:
    """Sum over everything but the channel: (N, C, *spatial) to (C,).

    Section 3.2: the mini-batch of a feature map is all its values over batch and positions, m' = m * p * q.

    >>> sum_over_batch(np.ones((2, 3, 4, 5)))
    array([40., 40., 40.])
    """
    axes = tuple(axis for axis in range(values.ndim) if axis != 1)
    return np.asarray(values.sum(axis=axes))


def per_channel(values: Any, x: Array) -> Array:
    """A view of (C,) that broadcasts against x: (1, C, 1, ...).

    >>> per_channel([1.0, 2.0], np.zeros((5, 2, 3))).shape
    (1, 2, 1)
    """
    return np.asarray(values, dtype=np.float64).reshape(1, -1, *(1,) * (x.ndim - 2))


def places(values: Any, x: Array) -> Array:
    """A mask or weights of shape (N,), (N, *spatial) or the rank of x, broadcast to the shape of x.

    >>> places([1.0, 0.0], np.zeros((2, 3, 4))).shape
    (2, 3, 4)
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != x.ndim:
        if array.shape == x.shape[:1]:
            array = array.reshape(-1, *(1,) * (x.ndim - 1))
        elif array.shape == (x.shape[0], *x.shape[2:]):
            array = np.expand_dims(array, 1)
        else:
            raise ValueError(
                f"places: expected shape (N,), (N, *spatial) or the rank of x {x.shape}, got {array.shape}. "
                f"Reshape the mask or weights."
            )
    return np.broadcast_to(array, x.shape)


def weights_of(x: Array, mask: Any = None, sample_weight: Any = None) -> Array:
    """w_i for every place of x: 1, or the sample's weight, and 0 where the mask is False."""
    w = np.ones(x.shape) if sample_weight is None else places(sample_weight, x)
    return w if mask is None else np.where(places(mask, x) != 0, w, 0.0)


def present_only(values: Any, x: Array, mask: Any = None) -> Array:
    """`values` in float64 with 0 where the mask is False, so that a NaN there does not spread."""
    array = np.array(np.broadcast_to(values, x.shape), dtype=np.float64)
    return array if mask is None else np.where(places(mask, x) != 0, array, 0.0)


# Algorithm 1


def mini_batch_statistics(x: Any, mask: Any = None, sample_weight: Any = None) -> Statistics:
    """Algorithm 1, lines 1 and 2: μ = (1/m) Σ x_i and σ² = (1/m) Σ (x_i − μ)².

    With weights: μ = (1/W) Σ w_i x_i and σ² = (1/W) Σ w_i (x_i − μ)².

    The mean is taken twice, of the values and then of their deviations from the first mean. The first one is
    off by a rounding or two of its own size, which at a mean of 1e8 would be seen in every deviation.

    >>> mini_batch_statistics([[1.0], [2.0], [6.0]])[:3]
    (array([3.]), array([3.]), array([4.66666667]))
    >>> mini_batch_statistics([[1.0], [2.0]], sample_weight=[2.0, 1.0])[:2]  # as of 1, 1, 2
    (array([3.]), array([1.33333333]))
    """
    x = np.asarray(x, dtype=np.float64)
    w = weights_of(x, mask, sample_weight)
    x = present_only(x, x, mask)
    m = sum_over_batch(w)
    if not (m > 0).all():
        raise ValueError(
            f"mini_batch_statistics: expected a positive sum of weights in each channel, got {m.tolist()}. "
            f"Leave the channel or the batch out."
        )
    first = sum_over_batch(w * x) / m
    correction = sum_over_batch(w * (x - per_channel(first, x))) / m
    mean = first + correction
    rest = correction - (mean - first)
    var = sum_over_batch(w * deviations(x, mean, rest) ** 2) / m
    return Statistics(m, mean, var, rest)


def deviations(x: Array, mean: Any, rest: Any = 0.0) -> Array:
    """x − μ. Subtracting a nearby number is exact, so no digits are lost before `rest` is subtracted too."""
    return (x - per_channel(mean, x)) - per_channel(rest, x)


def normalize(x: Array, mean: Any, var: Any, eps: float, rest: Any = 0.0) -> Array:
    """Algorithm 1, line 3: x̂_i = (x_i − μ) / √(σ² + ε).

    >>> normalize(np.array([[1.0], [5.0]]), [3.0], [4.0], 0.0).ravel()
    array([-1.,  1.])
    """
    return deviations(x, mean, rest) / np.sqrt(per_channel(var, x) + eps)


def scale_and_shift(x_hat: Array, weight: Any = None, bias: Any = None) -> Array:
    """Algorithm 1, line 4: y_i = γ x̂_i + β. None stands for γ = 1 and for β = 0.

    >>> scale_and_shift(np.array([[-1.0], [1.0]]), [10.0], [2.0]).ravel()
    array([-8., 12.])
    """
    z = x_hat if weight is None else per_channel(weight, x_hat) * x_hat
    return z if bias is None else z + per_channel(bias, x_hat)


def batch_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    population: Population | None = None,
    residual: Any = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    mask: Any = None,
    sample_weight: Any = None,
) -> Forward:
    """Algorithm 1 over any rank, then residual and activation: y = activation(batch_norm(x) + residual).

    Without `population` this is training: x is normalized with its own statistics. With it this is inference
    (Algorithm 2, line 11), a fixed linear map of x.

    >>> out = batch_norm_forward([[1.0, 10.0], [3.0, 50.0]], weight=[1.0, 2.0], bias=[0.0, 1.0], eps=0.0)
    >>> out.y.tolist()
    [[-1.0, -1.0], [1.0, 3.0]]
    >>> batch_norm_forward([[1.0], [3.0], [np.nan]], eps=0.0, mask=[True, True, False]).y.ravel()
    array([-1.,  1.,  0.])
    >>> fixed = Population(mean=np.array([3.0]), var=np.array([4.0]))
    >>> batch_norm_forward([[1.0], [5.0]], [2.0], [1.0], eps=0.0, population=fixed).y.ravel()
    array([-1.,  3.])
    """
    x = np.asarray(x, dtype=np.float64)
    if population is None:
        statistics = mini_batch_statistics(x, mask, sample_weight)
    else:
        statistics = as_statistics(population)
    x_hat = normalize(present_only(x, x, mask), statistics.mean, statistics.var, eps, statistics.rest)
    z = scale_and_shift(x_hat, weight, bias)
    if residual is not None:
        z = z + present_only(residual, x, mask)
    y = activate(z, activation, negative_slope)
    return Forward(present_only(y, x, mask), z, x_hat, statistics)


def as_statistics(population: Population) -> Statistics:
    """A population's mean and variance in place of a mini-batch's. No value of the batch counts."""
    mean, var = np.asarray(population.mean, dtype=np.float64), np.asarray(population.var, dtype=np.float64)
    return Statistics(np.zeros_like(mean), mean, var, np.zeros_like(mean))


# The six gradients of section 3, in the paper's order. The paper's y is our z, before residual and activation


def gradient_x_hat(dz: Array, weight: Any = None) -> Array:
    """First equation: ∂ℓ/∂x̂_i = ∂ℓ/∂z_i · γ."""
    return dz if weight is None else dz * per_channel(weight, dz)


def gradient_var(dx_hat: Array, deviation: Array, var: Array, eps: float) -> Array:
    """Second equation: ∂ℓ/∂σ² = Σ ∂ℓ/∂x̂_i · (x_i − μ) · (−1/2) (σ² + ε)^(−3/2)."""
    return sum_over_batch(dx_hat * deviation) * -0.5 * (var + eps) ** -1.5


def gradient_mean(dx_hat: Array, dvar: Array, deviation: Array, share: Array, var: Array, eps: float) -> Array:
    """Third equation: ∂ℓ/∂μ = −Σ ∂ℓ/∂x̂_i / √(σ² + ε) + ∂ℓ/∂σ² · Σ −2 (x_i − μ) / m.

    `share` is the paper's 1/m, or w_i/W with weights. The second sum is 0 in a mini-batch, as deviations from
    the mean add up to 0. The paper writes it, and so do we.
    """
    through_x_hat = -sum_over_batch(dx_hat) / np.sqrt(var + eps)
    through_var = dvar * sum_over_batch(-2.0 * deviation * share)
    return through_x_hat + through_var


def gradient_x(
    dx_hat: Array, dvar: Array, dmean: Array, deviation: Array, share: Array, var: Array, eps: float
) -> Array:
    """Fourth equation: ∂ℓ/∂x_i = ∂ℓ/∂x̂_i / √(σ² + ε) + ∂ℓ/∂σ² · 2 (x_i − μ) / m + ∂ℓ/∂μ · 1/m.

    `share`, the paper's 1/m or w_i/W, is how strongly x_i pulls at the mean and at the variance.
    """
    directly = dx_hat / np.sqrt(per_channel(var, dx_hat) + eps)
    through_var = per_channel(dvar, dx_hat) * 2.0 * deviation * share
    through_mean = per_channel(dmean, dx_hat) * share
    return directly + through_var + through_mean


def gradient_weight(dz: Array, x_hat: Array) -> Array:
    """Fifth equation: ∂ℓ/∂γ = Σ ∂ℓ/∂z_i · x̂_i."""
    return sum_over_batch(dz * x_hat)


def gradient_bias(dz: Array) -> Array:
    """Sixth equation: ∂ℓ/∂β = Σ ∂ℓ/∂z_i."""
    return sum_over_batch(dz)


def batch_norm_backward(
    dy: Any,
    x: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    population: Population | None = None,
    residual: Any = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    mask: Any = None,
    sample_weight: Any = None,
) -> Gradients:
    """The gradients of `batch_norm_forward` with the same arguments, where dy is ∂ℓ/∂y.

    In inference the mean and variance are constants: x pulls at neither, every share is 0, and of the fourth
    equation only the direct term is left.

    >>> grad = batch_norm_backward([[1.0], [0.0], [0.0]], [[0.0], [3.0], [6.0]], eps=0.0)
    >>> np.round(grad.dx.ravel(), 4)
    array([ 0.068 , -0.1361,  0.068 ])
    >>> np.round(grad.dweight, 4), grad.dbias
    (array([-1.2247]), array([1.]))
    >>> fixed = Population(mean=np.array([3.0]), var=np.array([4.0]))
    >>> batch_norm_backward([[1.0], [0.0]], [[1.0], [5.0]], [6.0], eps=0.0, population=fixed).dx.ravel()
    array([3., 0.])
    """
    x = np.asarray(x, dtype=np.float64)
    forward = batch_norm_forward(
        x,
        weight,
        bias,
        eps,
        population=population,
        residual=residual,
        activation=activation,
        negative_slope=negative_slope,
        mask=mask,
        sample_weight=sample_weight,
    )
    m, mean, var, rest = forward.statistics
    deviation = deviations(present_only(x, x, mask), mean, rest)
    if population is None:
        share = weights_of(x, mask, sample_weight) / per_channel(m, x)
    else:
        share = np.zeros(x.shape)

    dz = present_only(dy, x, mask) * activation_derivative(forward.z, activation, negative_slope)
    dx_hat = gradient_x_hat(dz, weight)
    dvar = gradient_var(dx_hat, deviation, var, eps)
    dmean = gradient_mean(dx_hat, dvar, deviation, share, var, eps)
    dx = gradient_x(dx_hat, dvar, dmean, deviation, share, var, eps)
    dweight = gradient_weight(dz, forward.x_hat)
    dbias = gradient_bias(dz)
    return Gradients(dx, dweight, dbias, dz, dx_hat, dvar, dmean)


# Algorithm 2 and its alternative


def unbiased_variance(statistics: Statistics) -> Array:
    """m/(m−1) · σ²: the unbiased estimate of a population's variance from a sample of m values.

    With frequency weights m is W, their sum: a weight of 2 is a sample seen twice.

    >>> unbiased_variance(mini_batch_statistics([[1.0], [3.0]]))
    array([2.])
    """
    m = statistics.m
    if not (m > 1).all():
        raise ValueError(
            f"unbiased_variance: expected more than 1 value in each channel, got {m.tolist()}. Use larger mini-batches."
        )
    return m / (m - 1.0) * statistics.var


def population_statistics(batches: Sequence[Statistics], estimator: str = "paper") -> Population:
    """Algorithm 2, lines 8 to 10, from the statistics of many mini-batches.

    "paper": E[x] = E_B[μ_B] and Var[x] = m/(m−1) · E_B[σ_B²], for mini-batches of one size m.
    "pooled": mean and unbiased variance of all the values together, as if they had been one batch. It is
    exact for mini-batches of any sizes: the squares about the common mean μ are those within each mini-batch,
    m_B σ_B², and those of each mean about the common one, m_B (μ_B − μ)².

    >>> batches = [mini_batch_statistics([[1.0], [3.0]]), mini_batch_statistics([[5.0], [7.0]])]
    >>> population_statistics(batches, "paper")
    Population(mean=array([4.]), var=array([2.]))
    >>> population_statistics(batches, "pooled")  # np.var([1, 3, 5, 7], ddof=1) = 20 / 3
    Population(mean=array([4.]), var=array([6.66666667]))
    """
    if len(batches) == 0:
        raise ValueError("population_statistics: expected at least one mini-batch, got none. Give some data.")
    sizes = np.stack([batch.m for batch in batches])
    means = np.stack([batch.mean for batch in batches])
    if estimator == "paper":
        if not (sizes == sizes[0]).all():
            raise ValueError(
                f"population_statistics: expected mini-batches of one size for the paper's estimator, "
                f'got {sorted(set(sizes.ravel().tolist()))}. Use "pooled".'
            )
        variances = np.stack([unbiased_variance(batch) for batch in batches])
        return Population(means.mean(axis=0), variances.mean(axis=0))
    if estimator == "pooled":
        total = sizes.sum(axis=0)
        mean = (sizes * means).sum(axis=0) / total
        within = np.stack([batch.m * batch.var for batch in batches]).sum(axis=0)
        between = (sizes * (means - mean) ** 2).sum(axis=0)
        pooled = Statistics(total, mean, (within + between) / total, np.zeros_like(mean))
        return Population(mean, unbiased_variance(pooled))
    raise ValueError(
        f'population_statistics: expected estimator "paper" or "pooled", got {estimator!r}. Name one of them.'
    )


def running_update(running: Population, batch: Statistics, momentum: float) -> Population:
    """The moving average that section 3.1 names as the alternative: r ← r + momentum · (batch − r).

    `momentum` is the weight of the NEW batch, as in PyTorch (0.1 there). In Keras (0.99), in Flax (0.99) and
    in the note that this library began with (0.95) it is the weight of the OLD value: ours = 1 - theirs.
    The variance that goes in is the unbiased one.

    >>> start = Population(mean=np.array([0.0]), var=np.array([1.0]))
    >>> running_update(start, mini_batch_statistics([[1.0], [3.0]]), momentum=0.1)
    Population(mean=array([0.2]), var=array([1.1]))
    """
    mean, var = np.asarray(running.mean, dtype=np.float64), np.asarray(running.var, dtype=np.float64)
    return Population(mean + momentum * (batch.mean - mean), var + momentum * (unbiased_variance(batch) - var))


def cumulative_update(running: Population, batch: Statistics, batches_with_this_one: int) -> Population:
    """The plain average of all batches so far: momentum is 1/1 for the first, 1/2 for the second, and so on.

    After equal mini-batches it is the paper's estimator.

    >>> running = Population(mean=np.array([0.0]), var=np.array([1.0]))
    >>> running = cumulative_update(running, mini_batch_statistics([[1.0], [3.0]]), 1)
    >>> cumulative_update(running, mini_batch_statistics([[5.0], [9.0]]), 2)
    Population(mean=array([4.5]), var=array([5.]))
    """
    return running_update(running, batch, 1.0 / batches_with_this_one)


# Activations


def activate(z: Array, name: str = "identity", negative_slope: float = 0.01) -> Array:
    """y = activation(z): the g of section 3.2, g(BN(Wu)).

    >>> activate(np.array([-2.0, 3.0]), "leaky_relu", 0.5)
    array([-1.,  3.])
    """
    match name:
        case "identity":
            return z
        case "relu":
            return np.maximum(z, 0.0)
        case "leaky_relu":
            return np.where(z > 0, z, negative_slope * z)
        case "silu":
            return z * sigmoid(z)
        case "gelu":
            return z * normal_cdf(z)
        case "sigmoid":
            return sigmoid(z)
        case "tanh":
            return np.tanh(z)
    raise _unknown("activate", name)


def activation_derivative(z: Array, name: str = "identity", negative_slope: float = 0.01) -> Array:
    """dy/dz. At 0, where relu and leaky_relu have none, it is that of the negative side, as in PyTorch.

    >>> activation_derivative(np.array([-2.0, 0.0, 3.0]), "leaky_relu", 0.5)
    array([0.5, 0.5, 1. ])
    """
    match name:
        case "identity":
            return np.ones_like(z)
        case "relu":
            return np.where(z > 0, 1.0, 0.0)
        case "leaky_relu":
            return np.where(z > 0, 1.0, negative_slope)
        case "silu":
            return sigmoid(z) * (1.0 + z * sigmoid(-z))
        case "gelu":
            return normal_cdf(z) + z * normal_density(z)
        case "sigmoid":
            return sigmoid(z) * sigmoid(-z)
        case "tanh":
            return 1.0 / np.cosh(np.clip(z, -350.0, 350.0)) ** 2
    raise _unknown("activation_derivative", name)


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(−z)), computed from exp(−|z|), which cannot overflow.

    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0]))
    array([0. , 0.5, 1. ])
    """
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)


def normal_cdf(z: Array) -> Array:
    """The probability that a standard normal variable is below z. erfc keeps the digits of a small probability.

    >>> normal_cdf(np.array([0.0, -10.0]))
    array([5.00000000e-01, 7.61985302e-24])
    """
    return 0.5 * np.asarray(np.vectorize(math.erfc, otypes=[np.float64])(-z / math.sqrt(2.0)))


def normal_density(z: Array) -> Array:
    """exp(−z²/2) / √(2π), the derivative of `normal_cdf`."""
    return np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def _unknown(function: str, name: str) -> ValueError:
    known = "identity, relu, leaky_relu, silu, gelu, sigmoid, tanh"
    return ValueError(f"{function}: expected one of {known}, got {name!r}. Name one of them.")
