"""Handwritten digits: scikit-learn's, MNIST from OpenML, or a folder with the four IDX files.

Every source ends as a ``Digits``: flat float32 images in [0, 1], int64 labels, a training part and a test part.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.errors import DataError, expected
from batchnorm.experiments import openml
from batchnorm.experiments.idx_folder import TEST_FILES, TRAIN_FILES, Bytes, read_folder

CLASSES = 10
# 480 of the 1,797 images are eight mini-batches of 60, so the test set divides into batches of the training size.
DIGITS_TEST_IMAGES = 480
MNIST_TRAIN_IMAGES = 60_000


@dataclass(frozen=True)
class Digits:
    """Images of digits with their labels.

    Attributes:
        name: what to call the data in a report.
        height, width: of an image, in pixels.
        train_images: float32 in [0, 1], shape (images, height · width).
        train_labels: int64 in 0..9, shape (images,).
        test_images, test_labels: the same for the test set.
    """

    name: str
    height: int
    width: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def pixels(self) -> int:
        return self.height * self.width


def load(source: str) -> Digits:
    """The digits that ``source`` names.

    Args:
        source: ``"digits"`` (scikit-learn's 1,797 images of 8×8; nothing is fetched), ``"mnist"`` (70,000 images of
            28×28, fetched from OpenML by scikit-learn and cached by it), or a folder with the four IDX files
            of MNIST or of a set in its format, gzipped or not. Write ``./mnist`` for a folder of that name.

    Raises:
        DataError: the source is unknown, cannot be fetched, or is not what it claims to be.

    >>> digits = load("digits")
    >>> digits.train_images.shape, digits.test_images.shape
    (torch.Size([1317, 64]), torch.Size([480, 64]))
    """
    if source == "digits":
        return _from_scikit_learn()
    if source == "mnist":
        return _from_openml()
    return _from_folder(Path(source))


def _from_scikit_learn() -> Digits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    # A fixed split: the seeds of the experiment change the weights and the batches, never the test set.
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=DIGITS_TEST_IMAGES, stratify=labels, random_state=0
    )
    brightest = 16.0  # each value counts the set pixels in a block of 4×4 of the scan
    return Digits(
        name="scikit-learn digits",
        height=8,
        width=8,
        train_images=torch.from_numpy((train_images / brightest).astype(np.float32)),
        train_labels=torch.from_numpy(train_labels.astype(np.int64)),
        test_images=torch.from_numpy((test_images / brightest).astype(np.float32)),
        test_labels=torch.from_numpy(test_labels.astype(np.int64)),
    )


def _from_openml() -> Digits:
    return _from_bytes("MNIST (OpenML)", openml.fetch("mnist_784", "MNIST", side=28, train=MNIST_TRAIN_IMAGES))


def _from_folder(folder: Path) -> Digits:
    if not os.path.isdir(folder):  # unlike Path.is_dir(), this does not raise if the name is too long
        raise DataError(
            expected(
                "load",
                '"digits", "mnist" or a folder with the four IDX files',
                repr(str(folder)),
                "There is no such folder. Check the path.",
            )
        )
    found = read_folder(folder)
    for labels, names in ((found.train_labels, TRAIN_FILES), (found.test_labels, TEST_FILES)):
        largest = int(labels.max())
        if largest >= CLASSES:
            raise DataError(
                expected(
                    "load",
                    f"labels from 0 to {CLASSES - 1} in {folder / names[1][0]}",
                    f"{largest} at position {int(labels.argmax())}",
                    "The experiment has ten classes.",
                )
            )
    return _from_bytes(str(folder), found)


def _from_bytes(name: str, found: Bytes) -> Digits:
    height, width = found.train_images.shape[1:]
    return Digits(
        name=name,
        height=height,
        width=width,
        train_images=_scaled(found.train_images),
        train_labels=torch.from_numpy(found.train_labels.astype(np.int64)),
        test_images=_scaled(found.test_images),
        test_labels=torch.from_numpy(found.test_labels.astype(np.int64)),
    )


def _scaled(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / np.float32(255))
