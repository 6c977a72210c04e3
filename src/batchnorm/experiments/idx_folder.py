"""A folder with the four IDX files of MNIST, or of a set in its format, checked against each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import DataError, expected
from batchnorm.experiments import idx

TRAIN_FILES = (
    ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
)
TEST_FILES = (
    ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
    ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
)


@dataclass(frozen=True)
class Bytes:
    """Images of shape (images, height, width) with labels of shape (images,), in two parts."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


def read_folder(folder: Path) -> Bytes:
    """The four files of ``folder``, gzipped or not.

    Raises:
        DataError: a file is missing or damaged, or the files do not belong together.
    """
    train_images, train_labels = _read_pair(folder, TRAIN_FILES)
    test_images, test_labels = _read_pair(folder, TEST_FILES)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            expected(
                "load",
                f"test images of the training images' size {_size(train_images)} in {folder}",
                _size(test_images),
                "Take all four files from one data set.",
            )
        )
    return Bytes(train_images, train_labels, test_images, test_labels)


def has_all_files(folder: Path) -> bool:
    """Whether each of the four is there, under one of its names."""
    return all(_found(folder, names) is not None for names in (*TRAIN_FILES, *TEST_FILES))


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
    return images, labels


def _find(folder: Path, names: tuple[str, ...]) -> Path:
    path = _found(folder, names)
    if path is not None:
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


def _found(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of ``names`` that exists, plain before gzipped."""
    for suffix in ("", ".gz"):
        for name in names:
            if os.path.isfile(path := folder / (name + suffix)):
                return path
    return None


def _size(images: NDArray[np.uint8]) -> str:
    return " x ".join(map(str, images.shape[1:]))
