"""Where digits come from: one shape for all sources, and a clear word about a bad one."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from batchnorm.errors import DataError
from batchnorm.experiments import idx
from batchnorm.experiments.digits import Digits, load

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def refused(source: str | Path) -> str:
    with pytest.raises(DataError) as caught:
        load(str(source))
    return str(caught.value)


def alter(path: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def same(one: Digits, other: Digits) -> bool:
    fields = ("train_images", "train_labels", "test_images", "test_labels")
    return all(torch.equal(getattr(one, field), getattr(other, field)) for field in fields)


def test_scikit_learns_digits_are_split_the_same_way_each_time() -> None:
    digits = load("digits")
    assert (digits.height, digits.width, digits.pixels) == (8, 8, 64)
    assert digits.train_images.shape == (1317, 64)
    assert digits.test_images.shape == (480, 64)
    assert same(digits, load("digits"))


def test_scikit_learns_digits_are_all_there_once_and_scaled() -> None:
    from sklearn.datasets import load_digits

    digits = load("digits")
    images = torch.cat([digits.train_images, digits.test_images])
    assert images.dtype == torch.float32
    ours = np.sort((images * 16).numpy().astype(np.int64).view([("", np.int64)] * 64), axis=0)
    theirs = np.sort(load_digits().data.astype(np.int64).view([("", np.int64)] * 64), axis=0)
    np.testing.assert_array_equal(ours, theirs)


def test_the_split_of_scikit_learns_digits_keeps_the_share_of_each_class() -> None:
    digits = load("digits")
    train = torch.bincount(digits.train_labels, minlength=10) / 1317
    test = torch.bincount(digits.test_labels, minlength=10) / 480
    assert digits.train_labels.dtype == torch.int64
    assert (train - test).abs().max() < 1 / 480


def test_a_folder_of_idx_files(idx_folder: Path) -> None:
    digits = load(str(idx_folder))
    assert (digits.name, digits.height, digits.width) == (str(idx_folder), 3, 2)
    assert digits.train_images.shape == (70, 6)
    assert digits.test_images.shape == (20, 6)
    raw = idx.read(idx_folder / TEST_IMAGES, idx.IMAGES_MAGIC).reshape(20, 6)
    np.testing.assert_allclose(digits.test_images.numpy(), raw / 255, rtol=1e-7)
    np.testing.assert_array_equal(digits.test_labels.numpy(), idx.read(idx_folder / TEST_LABELS, idx.LABELS_MAGIC))


def test_gzipped_files_and_names_with_a_dot_give_the_same(idx_folder: Path) -> None:
    plain = load(str(idx_folder))
    for path in list(idx_folder.iterdir()):
        name = path.name.replace("-idx", ".idx") if "labels" in path.name else path.name
        (idx_folder / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert same(plain, load(str(idx_folder)))


def test_neither_a_known_name_nor_a_folder(tmp_path: Path) -> None:
    assert refused("mnits") == (
        'load: expected "digits", "mnist" or a folder with the four IDX files, got \'mnits\'. '
        "There is no such folder. Check the path."
    )


def test_a_file_is_missing(idx_folder: Path) -> None:
    (idx_folder / TEST_LABELS).unlink()
    assert refused(idx_folder) == (
        f"load: expected t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz in {idx_folder}, got neither. "
        "The folder needs the four IDX files: train-images-idx3-ubyte, train-labels-idx1-ubyte, "
        "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte."
    )


def test_images_and_labels_disagree_in_number(idx_folder: Path) -> None:
    (idx_folder / TRAIN_LABELS).write_bytes((idx_folder / TEST_LABELS).read_bytes())
    assert refused(idx_folder) == (
        f"load: expected as many labels as images (70 in {TRAIN_IMAGES}), got 20 in {TRAIN_LABELS}. "
        "Take both files from one data set."
    )


def test_training_and_test_images_disagree_in_size(idx_folder: Path) -> None:
    def transpose(content: bytearray) -> None:
        content[8:16] = bytes([0, 0, 0, 2, 0, 0, 0, 3])

    alter(idx_folder / TEST_IMAGES, transpose)
    assert refused(idx_folder) == (
        f"load: expected test images of the training images' size 3 x 2 in {idx_folder}, got 2 x 3. "
        "Take all four files from one data set."
    )


def test_a_label_that_is_no_digit(idx_folder: Path) -> None:
    def set_label(content: bytearray) -> None:
        content[8 + 5] = 10

    alter(idx_folder / TRAIN_LABELS, set_label)
    assert refused(idx_folder) == (
        f"load: expected labels from 0 to 9 in {idx_folder / TRAIN_LABELS}, got 10 at position 5. "
        "The experiment has ten classes."
    )


def test_no_images_at_all(idx_folder: Path) -> None:
    (idx_folder / TEST_IMAGES).write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 2]))
    (idx_folder / TEST_LABELS).write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 0]))
    assert refused(idx_folder) == (
        f"load: expected at least one pixel in {idx_folder / TEST_IMAGES}, got none in 0 images of 3 x 2. "
        "The file is empty."
    )


def test_mnist_is_divided_as_it_always_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def fetch(name: str, **options: object) -> tuple[np.ndarray, np.ndarray]:
        asked.update(options, name=name)
        images = np.zeros((70_000, 784))
        images[60_000, 5] = 255
        return images, np.array(["3"] * 60_000 + ["7"] * 10_000, dtype=object)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    digits = load("mnist")
    assert (asked["name"], asked["version"], asked["return_X_y"]) == ("mnist_784", 1, True)
    assert (digits.height, digits.width) == (28, 28)
    assert digits.train_images.shape == (60_000, 784)
    assert digits.test_images[0, 5] == 1
    assert digits.test_images.sum() == 1
    assert digits.train_labels.eq(3).all()
    assert digits.test_labels.eq(7).all()


def test_mnist_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fail)
    assert refused("mnist") == (
        "load: expected MNIST from OpenML, or in scikit-learn's cache, got URLError: <urlopen error no route to "
        "host>. Check the connection, or give a folder with the four IDX files."
    )
