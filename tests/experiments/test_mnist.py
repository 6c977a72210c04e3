"""Section 4.1: the two networks, how they are trained, and what is measured on them."""

from __future__ import annotations

import copy
import math
from dataclasses import astuple, replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batchnorm import BatchNorm1d, recalibrate
from batchnorm.errors import ArgumentError, DataError
from batchnorm.experiments import mnist
from batchnorm.experiments.digits import Digits, load
from batchnorm.experiments.mnist import Point, Settings, build_networks, recorded_steps, train


def networks(seed: int = 0, pixels: int = 64) -> tuple[nn.Sequential, nn.Sequential]:
    return build_networks(pixels, weight_std=0.1, generator=torch.Generator().manual_seed(seed))


def linears(network: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in network if isinstance(layer, nn.Linear)]


def same_points(one: list[Point], other: list[Point]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for left, right in zip(one, other, strict=True)
        for a, b in zip(astuple(left), astuple(right), strict=True)
    )


def test_the_networks_are_the_papers() -> None:
    plain, normalized = networks()
    kinds = ["Linear", "Sigmoid"] * 3 + ["Linear"]
    assert [type(layer).__name__ for layer in plain] == kinds
    assert [type(layer).__name__ for layer in normalized if not isinstance(layer, BatchNorm1d)] == kinds
    assert [layer.num_features for layer in normalized if isinstance(layer, BatchNorm1d)] == [100, 100, 100]
    assert [isinstance(normalized[k + 1], BatchNorm1d) for k in (0, 3, 6)] == [True] * 3
    assert [tuple(layer.weight.shape) for layer in linears(plain)] == [(100, 64), (100, 100), (100, 100), (10, 100)]


def test_both_networks_start_from_the_same_small_gaussian_weights() -> None:
    plain, normalized = networks()
    for one, other in zip(linears(plain), linears(normalized), strict=True):
        assert torch.equal(one.weight, other.weight)
        assert one.weight.data_ptr() != other.weight.data_ptr()
        # Mean and standard deviation of N(0, 0.1²), within five standard errors.
        assert abs(one.weight.mean()) < 5 * 0.1 / math.sqrt(one.weight.numel())
        assert abs(one.weight.std() - 0.1) < 5 * 0.1 / math.sqrt(2 * one.weight.numel())


def test_biases_start_at_zero_and_none_stands_before_a_normalization() -> None:
    plain, normalized = networks()
    assert all(layer.bias is not None and not layer.bias.any() for layer in linears(plain))
    assert [layer.bias is None for layer in linears(normalized)] == [True, True, True, False]
    assert not linears(normalized)[-1].bias.any()


def test_one_step_is_plain_gradient_descent() -> None:
    random = np.random.default_rng(0)
    weight, images = random.normal(size=(10, 6)), random.normal(size=(4, 6))
    labels = np.array([3, 0, 9, 3])
    layer = nn.Linear(6, 10, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.zero_()
    mnist._descend(nn.Sequential(layer), torch.from_numpy(images), torch.from_numpy(labels), 0.5)
    exponentials = np.exp(images @ weight.T)
    error = exponentials / exponentials.sum(axis=1, keepdims=True)
    error[np.arange(4), labels] -= 1
    np.testing.assert_allclose(layer.weight.detach(), weight - 0.5 * error.T @ images / 4, rtol=1e-12)
    np.testing.assert_allclose(layer.bias.detach(), -0.5 * error.mean(axis=0), rtol=1e-12)


def test_both_networks_see_the_same_mini_batches_of_sixty(
    small_digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[nn.Sequential, Tensor, Tensor, float]] = []
    monkeypatch.setattr(mnist, "_descend", lambda *arguments: seen.append(arguments))
    list(train(Settings(steps=4, learning_rate=0.3), small_digits, 0))
    assert len(seen) == 8
    for (plain, images, labels, rate), (normalized, *others) in zip(seen[::2], seen[1::2], strict=True):
        assert not any(isinstance(layer, BatchNorm1d) for layer in plain)
        assert any(isinstance(layer, BatchNorm1d) for layer in normalized)
        assert others[0] is images
        assert others[1] is labels
        assert images.shape == (60, 64)
        assert rate == others[2] == 0.3
    # Two mini-batches an epoch of 150 images, none of which comes twice.
    epoch = torch.cat([seen[0][1], seen[2][1]])
    assert len(epoch.unique(dim=0)) == len(epoch)
    assert not torch.equal(seen[0][1], seen[4][1])


def test_a_label_stays_with_its_image(small_digits: Digits) -> None:
    known = {
        tuple(image): label
        for image, label in zip(small_digits.train_images.tolist(), small_digits.train_labels.tolist(), strict=True)
    }
    for images, labels in islice(mnist._mini_batches(small_digits, torch.Generator().manual_seed(1)), 5):
        assert [known[tuple(image)] for image in images.tolist()] == labels.tolist()


def test_the_same_seed_gives_the_same_points_whatever_the_callers_random_state(small_digits: Digits) -> None:
    settings = Settings(steps=3)
    first = list(train(settings, small_digits, 7))
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    second = list(train(settings, small_digits, 7))
    assert torch.equal(before, torch.get_rng_state())
    assert same_points(first, second)
    assert not same_points(first, list(train(settings, small_digits, 8)))


def test_training_does_not_hang_on_the_callers_settings(small_digits: Digits) -> None:
    settings = Settings(steps=3)
    wanted = list(train(settings, small_digits, 0))
    torch.set_default_dtype(torch.float64)
    with torch.no_grad():
        assert same_points(wanted, list(train(settings, small_digits, 0)))
        assert not torch.is_grad_enabled()


def test_measuring_more_often_changes_nothing_in_training(small_digits: Digits) -> None:
    # recorded_steps(150) leaves steps out, recorded_steps(12) does not.
    dense = list(train(Settings(steps=12), small_digits, 0))
    sparse = {point.step: point for point in train(Settings(steps=150), small_digits, 0)}
    shared = [point for point in dense if point.step in sparse]
    assert len(shared) >= 10
    assert same_points(shared, [sparse[point.step] for point in shared])


def test_measuring_leaves_the_networks_alone(small_digits: Digits) -> None:
    plain, normalized = networks()
    normalized(small_digits.train_images)
    before = copy.deepcopy((plain.state_dict(), normalized.state_dict()))
    mnist._Evaluation(small_digits).point(0, plain, normalized)
    assert normalized.training
    for old, new in zip(before, (plain.state_dict(), normalized.state_dict()), strict=True):
        assert list(old) == list(new)
        assert all(torch.equal(old[key], new[key]) for key in old)


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def test_percentiles_and_accuracy_of_the_plain_network_are_numpys(small_digits: Digits) -> None:
    plain, normalized = networks()
    with torch.no_grad():
        for layer in linears(plain):
            layer.bias.normal_()
    point = mnist._Evaluation(small_digits).point(0, plain, normalized)
    values = small_digits.test_images.double().numpy()
    for layer in linears(plain)[:3]:
        inputs = values @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        values = sigmoid(inputs)
    np.testing.assert_allclose(point.plain_percentiles, np.percentile(inputs, [15, 50, 85], axis=0), atol=1e-5)
    head = linears(plain)[-1]
    outputs = values @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
    assert point.plain_accuracy == np.mean(outputs.argmax(axis=1) == small_digits.test_labels.numpy())


def test_percentiles_of_the_normalized_network_are_those_of_mini_batches_with_their_own_statistics(
    small_digits: Digits,
) -> None:
    digits = replace(small_digits, test_images=small_digits.test_images[:60], test_labels=small_digits.test_labels[:60])
    plain, normalized = networks()
    with torch.no_grad():
        for layer in normalized:
            if isinstance(layer, BatchNorm1d):
                layer.weight.normal_(1, 0.3)
                layer.bias.normal_()
    point = mnist._Evaluation(digits).point(0, plain, normalized)
    values = digits.test_images.double().numpy()
    for linear, norm in ((0, 1), (3, 4), (6, 7)):
        summed = values @ normalized[linear].weight.detach().double().numpy().T
        centred = (summed - summed.mean(axis=0)) / np.sqrt(summed.var(axis=0) + normalized[norm].eps)
        inputs = centred * normalized[norm].weight.detach().numpy() + normalized[norm].bias.detach().numpy()
        values = sigmoid(inputs)
    np.testing.assert_allclose(point.normalized_percentiles, np.percentile(inputs, [15, 50, 85], axis=0), atol=2e-4)


def test_the_four_ways_to_evaluate_are_what_their_names_say(small_digits: Digits) -> None:
    plain, normalized = networks()
    for images, labels in islice(mnist._mini_batches(small_digits, torch.Generator().manual_seed(1)), 12):
        mnist._descend(normalized, images, labels, 0.5)
    evaluation = mnist._Evaluation(small_digits)
    point = evaluation.point(12, plain, normalized)

    def accuracy(network: nn.Sequential, batches: list[Tensor]) -> float:
        with torch.no_grad():
            outputs = torch.cat([network(images) for images in batches])
        return float((outputs.argmax(dim=1) == evaluation.labels).double().mean())

    assert point.running_accuracy == accuracy(copy.deepcopy(normalized).eval(), [evaluation.images])
    assert point.batch_accuracy == accuracy(copy.deepcopy(normalized).train(), list(evaluation.test_batches))
    for estimator, found in (("paper", point.paper_accuracy), ("pooled", point.pooled_accuracy)):
        network = copy.deepcopy(normalized)
        recalibrate(network, evaluation.calibration_batches, estimator=estimator)
        assert found == accuracy(network.eval(), [evaluation.images])
    assert len({point.running_accuracy, point.batch_accuracy, point.pooled_accuracy}) > 1


def test_no_mini_batch_of_the_test_set_has_a_single_image(small_digits: Digits) -> None:
    assert [len(batch) for batch in mnist._Evaluation(small_digits).test_batches] == [31, 30]


def test_batch_normalization_learns_in_sixty_steps_what_the_plain_network_has_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mnist, "recorded_steps", lambda steps: [0, steps])
    last = list(train(Settings(steps=60), load("digits"), 0))[-1]
    assert last.step == 60
    assert last.running_accuracy > 0.85
    assert last.plain_accuracy < 0.3


@pytest.mark.parametrize("steps", [1, 2, 19, 300, 50_000])
def test_recorded_steps_rise_from_zero_to_the_last_and_never_leave_a_wide_gap(steps: int) -> None:
    recorded = np.array(recorded_steps(steps))
    gaps = np.diff(recorded)
    assert (recorded[0], recorded[-1]) == (0, steps)
    assert (gaps >= 1).all()
    assert (gaps <= np.maximum(recorded[:-1] / 10, 1)).all()
    assert (gaps <= max(steps / 50, 1)).all()


def test_too_few_images(small_digits: Digits) -> None:
    few = replace(small_digits, train_images=small_digits.train_images[:59])
    with pytest.raises(DataError) as caught:
        next(train(Settings(), few, 0))
    assert str(caught.value) == (
        "train: expected at least 60 training images and 2 test images, got 59 and 61. Take a larger set."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 10**9 + 1}, "at most 1000000000 steps, got 1000000001. Take 50000, the paper's, or fewer."),
        ({"seeds": 1001}, "at most 1000 seeds, got 1001. Each seed is one run of both networks."),
        ({"steps": 0}, "steps of at least 1, got 0. Take 50000, the paper's, or fewer."),
        ({"learning_rate": -0.1}, "a learning rate above 0, got -0.1. The default is 0.1."),
        ({"learning_rate": 0.0}, "a learning rate above 0, got 0.0. The default is 0.1."),
        ({"learning_rate": math.nan}, "a learning rate above 0, got nan. The default is 0.1."),
        ({"learning_rate": math.inf}, "a learning rate above 0, got inf. The default is 0.1."),
        ({"weight_std": 0.0}, "a standard deviation of the weights above 0, got 0.0. The default is 0.1."),
        ({"seeds": 0}, "at least 1 seed, got 0. Each seed is one run of both networks."),
        ({"seed": -1}, "a seed from 0 to 4294967294, got -1. Any number in that range will do."),
        ({"seed": 2**32}, "a seed from 0 to 4294967294, got 4294967296. Any number in that range will do."),
    ],
)
def test_settings_with_which_nothing_can_be_trained(change: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Settings(**change)  # type: ignore[arg-type]
    assert str(caught.value) == f"Settings: expected {message}"


@pytest.mark.parametrize("threads", [0, 5])
def test_threads_are_as_many_as_the_machine_has(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    Settings(threads=4)
    with pytest.raises(ArgumentError) as caught:
        Settings(threads=threads)
    assert str(caught.value) == (
        f"Settings: expected threads from 1 to 4, the processors of this machine, got {threads}. "
        "One is fastest for a network of this size."
    )
