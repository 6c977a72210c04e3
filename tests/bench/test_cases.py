"""What a case may be, and what is said of one that cannot be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from batchnorm.bench.cases import EXTRAS, LAYOUTS, MODES, Case, parse_shape, parse_threads, product
from batchnorm.errors import ArgumentError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: parse_shape("32,x"),
            "bench: expected a shape of whole numbers and commas, got '32,x'. "
            "Give it as N,C or N,C,H,W, e.g. 32,64,56,56.",
        ),
        (
            lambda: Case((5,)),
            "bench: expected a shape of 2 to 5 sizes, channels second, got 5. "
            "Give it as N,C or N,C,H,W, e.g. 32,64,56,56.",
        ),
        (lambda: Case((4, 0, 3)), "bench: expected sizes of 1 or more, got 4,0,3. Correct the shape."),
        (
            lambda: Case((4, 3), dtype="int8"),
            "bench: expected dtype among float32, bfloat16, float16, float64, got 'int8'. Choose one of them.",
        ),
        (
            lambda: Case((4, 3), layout="nhwc"),
            "bench: expected layout among contiguous, channels_last, got 'nhwc'. Choose one of them.",
        ),
        (
            lambda: Case((4, 3), mode="train"),
            "bench: expected mode among forward, forward+backward, inference, got 'train'. Choose one of them.",
        ),
        (
            lambda: Case((4, 3), extra="gelu"),
            "bench: expected extra among plain, relu, residual+relu, got 'gelu'. Choose one of them.",
        ),
        (
            lambda: Case((4, 3, 9), layout="channels_last"),
            "bench: expected 4 or 5 sizes for the layout channels_last, got 4,3,9. Take the contiguous layout.",
        ),
        (
            lambda: Case((1, 4)),
            "bench: expected more than 1 value per channel in training, got 1,4. "
            "Take a larger batch, or the mode inference.",
        ),
        (
            lambda: parse_threads("1,0"),
            'bench: expected threads from 1 to 1024, or "all", got \'1,0\'. Give e.g. "1,all".',
        ),
        (
            lambda: parse_threads("two"),
            'bench: expected threads from 1 to 1024, or "all", got \'two\'. Give e.g. "1,all".',
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        make()
    assert str(raised.value) == message


def test_one_value_a_channel_can_be_inferred() -> None:
    assert Case((1, 4), mode="inference").values == 1


def test_all_threads_are_those_of_pytorch_and_none_is_named_twice() -> None:
    torch.set_num_threads(3)
    assert parse_threads("1,all,3") == (1, 3)


def test_sizes_of_a_case() -> None:
    case = Case((2, 3, 4, 5), "bfloat16")
    assert (case.channels, case.values, case.elements, case.bytes) == (3, 40, 120, 240)


def test_a_product_leaves_out_only_the_layout_that_a_rank_lacks() -> None:
    extras_and_modes = len(EXTRAS) * len(MODES)
    assert len(product([(2, 3)], layouts=LAYOUTS, extras=EXTRAS, family="x")) == extras_and_modes
    assert len(product([(2, 3, 4, 5)], layouts=LAYOUTS, extras=EXTRAS, family="x")) == 2 * extras_and_modes


def test_the_cases_of_a_product_that_share_their_data_follow_each_other() -> None:
    modes = [case.mode for case in product([(2, 3), (4, 5)], family="x")]
    assert modes == [*MODES, *MODES]
