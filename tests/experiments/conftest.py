"""Digits small enough to train on in a blink, and the four IDX files that hold them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchnorm.experiments.digits import Digits, load
from idx_files import write_idx_folder


@pytest.fixture(scope="session")
def small_digits() -> Digits:
    """150 training and 61 test images of scikit-learn's digits: 61 is no multiple of a mini-batch."""
    digits = load("digits")
    return Digits(
        name="a few digits",
        height=8,
        width=8,
        train_images=digits.train_images[:150],
        train_labels=digits.train_labels[:150],
        test_images=digits.test_images[:61],
        test_labels=digits.test_labels[:61],
    )


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A folder as MNIST comes, with 70 training and 20 test images of 3×2 pixels."""
    return write_idx_folder(tmp_path / "digits in idx")


@pytest.fixture(autouse=True)
def one_thread(settings_put_back: None) -> None:
    """As the experiment itself runs: at this size threads only wait for each other."""
    torch.set_num_threads(1)
