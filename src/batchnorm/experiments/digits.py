"""Handwritten digits: scikit-learn's, MNIST from OpenML, or a folder with the four IDX files.

Every source ends as a ``Digits``: flat float32 images in [0, 1], int64 labels, a training part and a test part.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.errors import DataError, expected
from batchnorm.experiments import idx

CLASSES = 10
# 480 of the 1,797 images are eight mini-batches of 60, so the test set divides into batches of the training size.
DIGITS_TEST_IMAGES = 480
MNIST_TRAIN_IMAGES = 60_000

_TRAIN_FILES = (
    ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
)
_TEST_FILES = (
    ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
    ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
)


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
    from importlib.util import find_spec

    from sklearn.datasets import fetch_openml

    try:
        # pandas reads the file in seconds, scikit-learn's own reader in a minute; but pandas is not a dependency.
        parser = "pandas" if find_spec("pandas") else "liac-arff"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each retry; in the end our own error is raised
            images, labels = fetch_openml("mnist_784", version=1, return_X_y=True, as_frame=False, parser=parser)
    except (OSError, ValueError) as error:
        raise DataError(
            expected(
                "load",
                "MNIST from OpenML, or in scikit-learn's cache",
                f"{type(error).__name__}: {error}",
                "Check the connection, or give a folder with the four IDX files.",
            )
        ) from error
    pixels = np.asarray(images).astype(np.uint8).reshape(-1, 28, 28)
    classes = np.asarray(labels).astype(np.uint8)
    train, test = slice(None, MNIST_TRAIN_IMAGES), slice(MNIST_TRAIN_IMAGES, None)
    return _from_bytes("MNIST (OpenML)", pixels[train], classes[train], pixels[test], classes[test])


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
    train_images, train_labels = _read_pair(folder, _TRAIN_FILES)
    test_images, test_labels = _read_pair(folder, _TEST_FILES)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            expected(
                "load",
                f"test images of the training images' size {_size(train_images)} in {folder}",
                _size(test_images),
                "Take all four files from one data set.",
            )
        )
    return _from_bytes(str(folder), train_images, train_labels, test_images, test_labels)


def _read_pair(
    folder: Path, names: tuple[tuple[str, ...], tuple[str, ...]]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images and their labels, checked against each other."""
    images_path, labels_path = _find(folder, names[0]), _find(folder, names[1])
    images = idx.read(images_path, idx.IMAGES_MAGIC)
    labels = idx.read(labels_path, idx.LABELS_MAGIC)
    if len(images) != len(labels):
        raise DataError(
            expected(
                "load",
                f"as many labels as images ({len(images)} in {images_path.name})",
                f"{len(labels)} in {labels_path.name}",
                "Take both files from one data set.",
            )
        )
    if images.size == 0:
        raise DataError(
            expected(
                "load",
                f"at least one pixel in {images_path}",
                f"none in {len(images)} images of {_size(images)}",
                "The file is empty.",
            )
        )
    largest = int(labels.max())
    if largest >= CLASSES:
        raise DataError(
            expected(
                "load",
                f"labels from 0 to {CLASSES - 1} in {labels_path}",
                f"{largest} at position {int(labels.argmax())}",
                "The experiment has ten classes.",
            )
        )
    return images, labels


def _find(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of ``names`` that exists, uncompressed before gzipped."""
    for suffix in ("", ".gz"):
        for name in names:
            if os.path.isfile(path := folder / (name + suffix)):
                return path
    raise DataError(
        expected(
            "load",
            f"{names[0]} or {names[0]}.gz in {folder}",
            "neither",
            "The folder needs the four IDX files: train-images-idx3-ubyte, train-labels-idx1-ubyte, "
            "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte.",
        )
    )


def _from_bytes(
    name: str,
    train_images: NDArray[np.uint8],
    train_labels: NDArray[np.uint8],
    test_images: NDArray[np.uint8],
    test_labels: NDArray[np.uint8],
) -> Digits:
    height, width = train_images.shape[1:]
    return Digits(
        name=name,
        height=height,
        width=width,
        train_images=_scaled(train_images),
        train_labels=torch.from_numpy(train_labels.astype(np.int64)),
        test_images=_scaled(test_images),
        test_labels=torch.from_numpy(test_labels.astype(np.int64)),
    )


def _scaled(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / np.float32(255))


def _size(images: NDArray[np.uint8]) -> str:
    return " x ".join(map(str, images.shape[1:]))
