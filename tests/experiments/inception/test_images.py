"""Where images come from, how they are given out, and a clear word about bad ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from batchnorm.errors import DataError
from batchnorm.experiments.inception import images as module
from batchnorm.experiments.inception.crops import crop_box, distort
from batchnorm.experiments.inception.images import ImageSet, InMemory, Request, Subset, load, prepared
from idx_files import idx_bytes, write_idx_folder


def refused(source: str | Path | None, size: int | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load(None if source is None else str(source), size)
    return str(caught.value)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """No Fashion-MNIST on this machine, except where a test puts it."""
    places = [tmp_path / "debian", tmp_path / "keras"]
    monkeypatch.setattr(module, "fashion_mnist_folders", lambda: places)
    return places


def test_idx_files_with_a_tenth_of_the_training_images_held_out(tmp_path: Path) -> None:
    found = load(str(write_idx_folder(tmp_path / "idx")))
    assert (found.channels, found.height, found.width, found.classes) == (1, 3, 2, 10)
    assert [len(part.labels) for part in (found.train, found.validation, found.test)] == [63, 7, 20]
    assert isinstance(found.train, Subset) and isinstance(found.validation, Subset)
    assert sorted(torch.cat([found.train.chosen, found.validation.chosen]).tolist()) == list(range(70))


def test_fashion_mnist_is_found_where_others_keep_it(nowhere: list[Path]) -> None:
    write_idx_folder(nowhere[1])
    assert load(None).name == load("fashion-mnist").name == "Fashion-MNIST"


def test_the_places_are_debians_keras_and_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", "somewhere")
    assert [str(path) for path in module.fashion_mnist_folders()] == [
        "/usr/share/datasets/fashion-mnist",
        "somewhere/datasets/fashion-mnist",
        "data/FashionMNIST/raw",
        "FashionMNIST/raw",
    ]


def test_nothing_is_fetched_unless_it_is_asked_for(nowhere: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(name: str, **options: object) -> tuple[np.ndarray, np.ndarray]:
        asked.append(name)
        return np.zeros((70_000, 784)), np.array((["3"] * 6 + ["7"]) * 10_000, dtype=object)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    assert refused(None) == (
        f"load: expected Fashion-MNIST in one of {nowhere[0]}, {nowhere[1]}, got none of them. "
        "Give --data fashion-mnist to fetch it from OpenML, or --data PATH for images of your own."
    )
    assert asked == []
    found = load("fashion-mnist")
    assert asked == ["Fashion-MNIST"]
    assert [len(part.labels) for part in (found.train, found.validation, found.test)] == [59_000, 1_000, 10_000]


def test_neither_a_name_nor_a_folder() -> None:
    assert refused("fashon-mnist") == (
        'load: expected "fashion-mnist", a folder with the four IDX files, or one with train/CLASS and val/CLASS, got '
        "'fashon-mnist'. There is no such folder. Check the path."
    )


def _labels(count: int, of: Callable[[np.ndarray], np.ndarray]) -> bytes:
    return idx_bytes(of(np.arange(count)).astype(np.uint8))


def test_a_single_class_and_a_class_in_the_test_images_alone(tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    (folder / "train-labels-idx1-ubyte").write_bytes(_labels(70, lambda k: k * 0 + 4))
    assert refused(folder) == (
        f"load: expected at least 2 classes among the training labels of {folder}, got 1. "
        "There is nothing to tell apart."
    )
    (folder / "train-labels-idx1-ubyte").write_bytes(_labels(70, lambda k: k % 3))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(_labels(20, lambda k: k % 4))
    assert refused(folder) == (
        f"load: expected test labels from 0 to 2, those of the training images of {folder}, got 3. "
        "Take all four files from one data set."
    )


def test_missing_and_truncated_idx_files(tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(folder) == (
        f"idx.read: expected 70 x 3 x 2 = 420 values in {path}, got 419. It is cut short. Fetch the file again."
    )
    path.unlink()
    assert refused(folder).startswith(
        f"load: expected train-images-idx3-ubyte or train-images-idx3-ubyte.gz in {folder}"
    )


def test_too_few_images_to_hold_some_out(tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((9, 3, 2), dtype=np.uint8)))
    (folder / "train-labels-idx1-ubyte").write_bytes(_labels(9, lambda k: k))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(_labels(20, lambda k: k % 9))
    assert refused(folder) == (
        "load: expected at least 10 training images, got 9. A tenth of them is held out for validation."
    )


def test_images_are_brought_to_a_size(tmp_path: Path) -> None:
    found = load(str(write_idx_folder(tmp_path / "idx")), 6)
    assert (found.height, found.width) == (6, 6)
    (batch,) = found.test.batches([Request(torch.tensor([3, 1]))])
    assert batch.shape == (2, 1, 6, 6) and batch.dtype == torch.uint8


def test_bytes_become_numbers_from_minus_one_to_one() -> None:
    x = prepared(torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1), torch.device("cpu"))
    assert x.flatten().tolist() == [-1, 1]
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_crops_depend_on_their_seed_alone(small_images: ImageSet) -> None:
    whole = small_images.test
    assert isinstance(whole, InMemory)
    chosen = torch.arange(5)
    one, again, other, none = whole.batches(
        [Request(chosen, 1), Request(chosen, 1), Request(chosen, 2), Request(chosen)]
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(none, whole.images[:5])


def test_crop_boxes_lie_inside_and_have_the_areas_and_ratios_of_googlenet() -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width in ((224, 300), (7, 5), (1, 1)):
        boxes = [crop_box(height, width, generator) for _ in range(300)]
        for top, left, tall, wide in boxes:
            assert 0 <= top <= top + tall <= height and 0 <= left <= left + wide <= width
            assert tall >= 1 and wide >= 1
        if height == 224:
            shares = [tall * wide / (height * width) for _, _, tall, wide in boxes]
            assert 0.07 < min(shares) < 0.2 and 0.8 < max(shares) <= 1
            assert all(0.7 < wide / tall < 1.4 for _, _, tall, wide in boxes)


def test_distortion_grows_with_its_strength_and_keeps_the_range() -> None:
    x = torch.rand(8, 3, 5, 5) * 2 - 1
    shifts = []
    for strength in (0.0, 0.2, 0.4):
        y = distort(x, strength, torch.Generator().manual_seed(0))
        assert y.abs().max() <= 1
        shifts.append(float((y - x).abs().mean()))
    assert shifts[0] < 1e-6 < shifts[1] < shifts[2]
