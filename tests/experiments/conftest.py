"""Digits small enough to train on in a blink, and the four IDX files that hold them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from batchnorm.experiments.digits import Digits, load


def idx_bytes(values: NDArray[np.uint8]) -> bytes:
    """A file in the IDX format, written from its description and not by the code under test."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


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
    random = np.random.default_rng(0)
    folder = tmp_path / "digits in idx"
    folder.mkdir()
    for part, count in (("train", 70), ("t10k", 20)):
        images = random.integers(0, 256, (count, 3, 2), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder


@pytest.fixture(autouse=True)
def one_thread(settings_put_back: None) -> None:
    """As the experiment itself runs: at this size threads only wait for each other."""
    torch.set_num_threads(1)
