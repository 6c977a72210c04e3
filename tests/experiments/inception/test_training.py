"""Training and measuring one network, and going on from its state bit for bit."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from batchnorm.errors import ArgumentError, DataError
from batchnorm.experiments.inception.images import ImageSet, Subset
from batchnorm.experiments.inception.settings import Settings, recorded_steps, settings_for
from batchnorm.experiments.inception.training import Job, Training, accuracy_of

SETTINGS = Settings(steps=6, seeds=1, ensemble=0, batch_size=8, width=1 / 32)


@pytest.fixture(autouse=True)
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHNORM_BACKEND", "eager")


def training(images: ImageSet, variant: str = "bn-x5", settings: Settings = SETTINGS, seed: int = 0) -> Training:
    return Training(Job(variant, seed, settings.base.learning_rate, settings.base.decay), settings, images)


def written_and_read(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit; a NaN equals itself."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other or (one != one and other != other)


def without_times(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if "seconds" not in name}


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("variant", ["inception", "bn-x5"])
def test_training_that_goes_on_ends_with_the_same_bits(small_images: ImageSet, variant: str, scale: Any) -> None:
    """At the paper's scale with crops, distortions, dropout and local response normalization as well."""
    settings = replace(SETTINGS, scale=scale)
    whole = training(small_images, variant, settings)
    list(whole.run())
    assert whole.finished
    first = training(small_images, variant, settings)
    for point in first.run():
        if point.step == 3:
            break
    torch.manual_seed(123)  # what others draw is of no account
    second = training(small_images, variant, settings)
    second.restore(written_and_read(first.state()))
    assert [point.step for point in second.run()] == [4, 5, 6]
    assert same(without_times(second.state()), without_times(whole.state()))
    again = training(small_images, variant, settings)
    again.restore(written_and_read(whole.state()))
    assert again.finished and list(again.run()) == []


def test_the_callers_random_state_is_left_alone(small_images: ImageSet) -> None:
    before = torch.get_rng_state()
    list(training(small_images, settings=replace(SETTINGS, scale="paper")).run())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_learns_what_can_be_learned(small_images: ImageSet) -> None:
    learner = training(small_images, settings=replace(SETTINGS, steps=40, width=1 / 16))
    points = list(learner.run())
    assert learner.tested is not None
    assert learner.tested.recalibrated == 1
    assert math.isnan(points[0].loss) and points[-1].loss < 0.3
    assert torch.allclose(learner.tested.probabilities.sum(dim=1), torch.ones(12))


def test_seeds_differ_and_repeat(small_images: ImageSet) -> None:
    states = []
    for seed in (0, 0, 1):
        one = training(small_images, seed=seed)
        list(one.run())
        states.append(one.state()["network"])
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_validation_and_test_images_are_never_trained_on(small_images: ImageSet) -> None:
    learner = training(small_images)
    seen = torch.cat([labels for _, labels in learner._mini_batches(0)])
    assert len(seen) == 6 * 8
    assert isinstance(small_images.train, Subset) and isinstance(small_images.validation, Subset)
    assert not set(small_images.train.chosen.tolist()) & set(small_images.validation.chosen.tolist())


def test_fixed_batches_keep_their_images_together_and_fresh_ones_do_not(small_images: ImageSet) -> None:
    from batchnorm.experiments.inception.training import _Order

    def batches(fresh: bool, epoch: int) -> set[frozenset[int]]:
        order = _Order(5, 32, 4, fresh)
        return {frozenset(order.batch(8 * epoch + k).tolist()) for k in range(8)}

    assert batches(False, 0) == batches(False, 1)
    assert batches(True, 0) != batches(True, 1)
    for fresh in (False, True):
        assert sorted(k for batch in batches(fresh, 1) for k in batch) == list(range(32))
    fixed = _Order(5, 32, 4, False)
    assert [fixed.batch(k).tolist() for k in range(8)] != [fixed.batch(8 + k).tolist() for k in range(8)]


def test_diverged_training_counts_as_nothing_recognized(small_images: ImageSet) -> None:
    settings = replace(SETTINGS, learning_rate=1e30)
    for variant in ("inception", "bn-x5"):
        learner = training(small_images, variant, settings)
        last = list(learner.run())[-1]
        assert last.accuracy == 0
        assert last.recalibrated == (None if variant == "inception" else 0)
    assert accuracy_of(torch.tensor([[math.nan, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])) == 0.5


def test_the_sweep_never_sees_the_test_images(small_images: ImageSet) -> None:
    sweeping = Training(Job("inception", 0, 0.1, 10.0, True), SETTINGS, small_images)
    list(sweeping.run())
    assert sweeping.finished and sweeping.tested is None


def test_too_few_images_for_a_mini_batch(small_images: ImageSet) -> None:
    with pytest.raises(DataError) as caught:
        training(small_images, settings=replace(SETTINGS, batch_size=64))
    assert str(caught.value) == (
        "train: expected at least 64 training images, one mini-batch, beside those for validation, got 36. "
        "Take a larger set."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps from 1 to 1000000000, got 0. The default is 1600."),
        ({"width": math.nan}, "a width from 0.01 to 16.0, got nan. 1 is the paper's, 0.125 the default."),
        ({"learning_rate": -1.0}, "a learning rate above 0, got -1.0. The default is 0.02."),
        ({"decay": 0.5}, "a decay of at least 1, got 0.5. It is the factor by which the learning rate falls; 1 leaves "
         "it as it is."),
        ({"scale": "large"}, "a scale among small, paper, got 'large'. Choose one of them."),
        ({"batch_size": 1}, "a batch size from 2 to 1000000000, got 1. The paper's is 32."),
    ],
)  # fmt: skip
def test_settings_with_which_nothing_can_be_trained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Settings(**options)
    assert str(caught.value) == f"Settings: expected {message}"


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ArgumentError) as caught:
        Settings(device="warp")
    assert str(caught.value).startswith("Settings: expected a device of this machine, got 'warp' (")
    assert str(caught.value).endswith("). Leave --device away.")


def test_quick_fills_in_what_is_not_given() -> None:
    none: dict[str, Any] = dict.fromkeys(("steps", "seeds", "ensemble", "processes"))
    quick = settings_for(quick=True, **none, device="cpu")
    assert (quick.steps, quick.seeds, quick.ensemble) == (500, 1, 2)
    mixed = settings_for(quick=True, **{**none, "steps": 7, "processes": 1}, device="cpu")
    assert (mixed.steps, mixed.seeds, mixed.processes) == (7, 1, 1)


def test_evaluations_are_at_the_same_steps_for_all() -> None:
    assert recorded_steps(2000) == list(range(0, 2001, 100))
    assert recorded_steps(30)[-1] == 30 and len(recorded_steps(30)) == 21
