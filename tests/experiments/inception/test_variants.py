"""The table of settings against the paper's sentences."""

from __future__ import annotations

import pytest

from batchnorm.experiments.inception.variants import (
    BASELINE,
    BASES,
    CHANGES,
    PLAIN,
    PLAIN_SIGMOID,
    VARIANTS,
    X5,
    X5_SIGMOID,
    X30,
    Recipe,
    Variant,
    recipe,
)


def paper(variant: Variant) -> Recipe:
    return recipe(variant, "paper", BASES["paper"])


def small(variant: Variant) -> Recipe:
    return recipe(variant, "small", BASES["small"])


def differences(one: Recipe, other: Recipe) -> set[str]:
    return {name for name in vars(one) if getattr(one, name) != getattr(other, name)}


@pytest.mark.parametrize(("variant", "rate"), [(PLAIN, 0.0015), (BASELINE, 0.0015), (X5, 0.0075), (X30, 0.045)])
def test_the_papers_learning_rates(variant: Variant, rate: float) -> None:
    assert paper(variant).learning_rate == pytest.approx(rate)
    if variant is not BASELINE:  # "Same as Inception"
        assert f"{rate:g}" in variant.sentence


def test_the_baseline_differs_in_normalization_alone() -> None:
    assert differences(paper(PLAIN), paper(BASELINE)) == {"normalize"}
    assert differences(small(PLAIN), small(BASELINE)) == {"normalize"}


def test_the_changes_of_section_4_2_1() -> None:
    before, after = paper(BASELINE), paper(X5)
    assert (before.dropout, after.dropout) == (0.4, 0)
    assert after.l2_weight == pytest.approx(before.l2_weight / 5)
    assert after.decay == pytest.approx(before.decay**6)
    assert (before.local_response, after.local_response) == (True, False)
    assert (before.fresh_batches, after.fresh_batches) == (False, True)
    assert after.distortion < before.distortion


def test_likes_differ_in_what_their_sentence_says() -> None:
    for of in (paper, small):
        assert differences(of(X5), of(X30)) == {"learning_rate"}
        assert differences(of(X5), of(X5_SIGMOID)) == {"nonlinearity"}
        assert differences(of(PLAIN), of(PLAIN_SIGMOID)) == {"nonlinearity"}
        assert of(X30).learning_rate == pytest.approx(30 * of(PLAIN).learning_rate)


def test_another_value_at_the_small_scale_has_its_reason() -> None:
    for change in CHANGES.values():
        assert (change.small is None) == (not change.why)
        assert change.sentence.endswith(".")


def test_the_learning_rate_falls_exponentially() -> None:
    settings = small(PLAIN)
    assert settings.rate_at(0, 100) == settings.learning_rate
    assert settings.rate_at(100, 100) == pytest.approx(settings.learning_rate / settings.decay)
    ratio = settings.rate_at(51, 100) / settings.rate_at(50, 100)
    assert settings.rate_at(8, 100) / settings.rate_at(7, 100) == pytest.approx(ratio)
    # "6 times faster": six steps of the plain network's fall in one.
    slow, fast = paper(PLAIN), paper(X5)
    assert fast.rate_at(1, 100) / fast.rate_at(0, 100) == pytest.approx(
        (slow.rate_at(1, 100) / slow.rate_at(0, 100)) ** 6
    )


def test_the_variants_have_names_of_their_own() -> None:
    assert len({variant.key for variant in VARIANTS}) == len({variant.name for variant in VARIANTS}) == 6
