"""The images of section 4.2: training, validation and test images of one size with their class labels.

``load`` finds them; ``Images`` gives them out in mini-batches, from memory or (see ``folders``) from files. Pixels are
bytes until ``prepared`` scales them to [-1, 1].
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.errors import DataError, expected
from batchnorm.experiments import openml
from batchnorm.experiments.idx_folder import Bytes, has_all_files, read_folder
from batchnorm.experiments.inception.crops import random_crop

FASHION_MNIST = "fashion-mnist"
_FASHION_MNIST_TRAIN_IMAGES = 60_000
_MOST_VALIDATION_IMAGES = 1_000
_VALIDATION_SHARE = 10  # a tenth of the training images, where that is less


@dataclass(frozen=True)
class Request:
    """One mini-batch.

    Attributes:
        indices: of the images in their ``Images``, int64 of shape (batch,).
        crop_seed: crop and reflect them at random from this seed; None: as they are.
    """

    indices: Tensor
    crop_seed: int | None = None


class Images(Protocol):
    """Images that can be asked for in mini-batches."""

    @property
    def labels(self) -> Tensor:
        """int64, shape (images,)"""

    def batches(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """uint8 tensors of shape (batch, channels, height, width), one for each request and in their order."""


@dataclass(frozen=True)
class ImageSet:
    """What a network is trained, chosen and tested on.

    Attributes:
        name: what to call the data in a report.
        channels, height, width: of an image.
        classes: number of classes.
        train: to train on, without the validation images.
        validation: held out of the training images, the same for every seed.
        test: for the report only.
    """

    name: str
    channels: int
    height: int
    width: int
    classes: int
    train: Images
    validation: Images
    test: Images


@dataclass(frozen=True)
class InMemory:
    """Images of one size, uint8 of shape (images, channels, height, width)."""

    images: Tensor
    labels: Tensor

    def batches(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        for request in requests:
            images = self.images[request.indices]
            if request.crop_seed is not None:
                generator = torch.Generator().manual_seed(request.crop_seed)
                images = torch.stack([random_crop(image, generator) for image in images])
            yield images


@dataclass(frozen=True)
class Subset:
    """Some of the images of another set.

    Attributes:
        whole: the other set.
        chosen: their indices there, int64 of shape (images,).
    """

    whole: Images
    chosen: Tensor

    @property
    def labels(self) -> Tensor:
        return self.whole.labels[self.chosen]

    def batches(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        return self.whole.batches(Request(self.chosen[r.indices], r.crop_seed) for r in requests)


def load(source: str | None, size: int | None = None, workers: int = 0) -> ImageSet:
    """The images that ``source`` names.

    Args:
        source: ``"fashion-mnist"``, where Debian's package ``dataset-fashion-mnist``, Keras or torchvision keep it,
            else fetched from OpenML by scikit-learn and cached by it; a folder with the four IDX files of MNIST's
            format; a folder with ``train/CLASS/…`` and ``val/CLASS/…`` of PNG and JPEG files; or None for Fashion-MNIST
            without fetching anything.
        size: pixels of a side, to which every image is brought; None: as they are.
        workers: processes that decode image files, if there are any; 0: in this one.

    Raises:
        DataError: there are no such images, or they are not what they should be.
    """
    if source is None or source == FASHION_MNIST:
        return _fashion_mnist(size, fetch=source is not None)
    folder = Path(source)
    if not os.path.isdir(folder):  # where Path.is_dir() raises for a name too long, this does not
        raise DataError(
            expected(
                "load",
                f'"{FASHION_MNIST}", a folder with the four IDX files, or one with train/CLASS and val/CLASS',
                repr(source),
                "There is no such folder. Check the path.",
            )
        )
    if os.path.isdir(folder / "train"):
        from batchnorm.experiments.inception.folders import load_folder

        return load_folder(folder, size, workers)
    return _from_bytes(str(folder), read_folder(folder), size)


def fashion_mnist_folders() -> list[Path]:
    """Where Fashion-MNIST may lie: Debian's package, Keras' cache, torchvision's folder below ``data`` or here."""
    keras = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    return [
        Path("/usr/share/datasets/fashion-mnist"),
        keras / "datasets" / "fashion-mnist",
        Path("data/FashionMNIST/raw"),
        Path("FashionMNIST/raw"),
    ]


def prepared(images: Tensor, device: torch.device) -> Tensor:
    """Bytes as float32 in [-1, 1], channels_last, on ``device``."""
    moved = images.to(device, non_blocking=True)
    return moved.to(torch.float32).sub_(127.5).div_(127.5).contiguous(memory_format=torch.channels_last)


def split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of those held out for validation, drawn once for all seeds.

    Raises:
        DataError: there are too few.
    """
    held_out = min(_MOST_VALIDATION_IMAGES, len(labels) // _VALIDATION_SHARE)
    if held_out == 0:
        todo = "A tenth of them is held out for validation."
        raise DataError(expected("load", f"at least {_VALIDATION_SHARE} training images", len(labels), todo))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    # Sorted, so that files are read in their order on the disk.
    return order[held_out:].sort().values, order[:held_out].sort().values


def with_validation(name: str, shape: tuple[int, int, int], classes: int, training: Images, test: Images) -> ImageSet:
    """An ``ImageSet`` whose validation images are held out of ``training``; ``shape`` is (channels, height, width)."""
    kept, held_out = split(training.labels)
    return ImageSet(name, *shape, classes, Subset(training, kept), Subset(training, held_out), test)


def _fashion_mnist(size: int | None, *, fetch: bool) -> ImageSet:
    places = fashion_mnist_folders()
    for folder in places:
        if has_all_files(folder):
            return _from_bytes("Fashion-MNIST", read_folder(folder), size)
    if not fetch:
        raise DataError(
            expected(
                "load",
                f"Fashion-MNIST in one of {', '.join(map(str, places))}",
                "none of them",
                f"Give --data {FASHION_MNIST} to fetch it from OpenML, or --data PATH for images of your own.",
            )
        )
    found = openml.fetch("Fashion-MNIST", "Fashion-MNIST", side=28, train=_FASHION_MNIST_TRAIN_IMAGES)
    return _from_bytes("Fashion-MNIST (OpenML)", found, size)


def _from_bytes(name: str, found: Bytes, size: int | None) -> ImageSet:
    classes = int(found.train_labels.max()) + 1
    present = len(np.unique(found.train_labels))
    if present < 2:
        todo = "There is nothing to tell apart."
        raise DataError(expected("load", f"at least 2 classes among the training labels of {name}", present, todo))
    if found.test_labels.max() >= classes:
        raise DataError(
            expected(
                "load",
                f"test labels from 0 to {classes - 1}, those of the training images of {name}",
                int(found.test_labels.max()),
                "Take all four files from one data set.",
            )
        )
    train, test = (
        _in_memory(*pair, size)
        for pair in ((found.train_images, found.train_labels), (found.test_images, found.test_labels))
    )
    _, channels, height, width = train.images.shape
    return with_validation(name, (channels, height, width), classes, train, test)


def _in_memory(images: np.ndarray, labels: np.ndarray, size: int | None) -> InMemory:
    pixels = torch.from_numpy(images.copy()).unsqueeze(1)
    if size is not None and pixels.shape[2:] != (size, size):
        pieces = [
            F.interpolate(piece.float(), (size, size), mode="bilinear", antialias=True).round().byte()
            for piece in pixels.split(1000)
        ]
        pixels = torch.cat(pieces)
    return InMemory(pixels, torch.from_numpy(labels.astype(np.int64)))
