"""Folders of image files: classes, sizes, workers, and broken files by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from batchnorm.errors import DataError
from batchnorm.experiments.inception import folders
from batchnorm.experiments.inception.images import ImageSet, Request, load


def refused(source: Path, size: int | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load(str(source), size)
    return str(caught.value)


def test_classes_are_folders_and_val_is_for_the_test(folder: Path) -> None:
    found = load(str(folder))
    assert (found.channels, found.height, found.width, found.classes) == (3, 12, 12, 2)
    assert [len(part.labels) for part in (found.train, found.validation, found.test)] == [36, 4, 10]
    (batch,) = found.test.batches([Request(torch.tensor([0, 9]))])
    left, right = batch.float().mean(dim=(1, 2))
    assert left[:6].mean() > left[6:].mean() + 60
    assert right[6:].mean() > right[:6].mean() + 60
    assert found.test.labels.tolist() == [0] * 5 + [1] * 5


def test_workers_give_the_same_batches_in_the_same_order(folder: Path) -> None:
    def batches(images: ImageSet) -> list[torch.Tensor]:
        return list(images.train.batches(Request(torch.tensor([k, 35 - k]), k) for k in range(6)))

    here, elsewhere = batches(load(str(folder))), batches(load(str(folder), workers=2))
    assert len(here) == len(elsewhere) == 6
    assert all(torch.equal(one, other) for one, other in zip(here, elsewhere, strict=True))


def test_sizes_that_differ_are_named_and_a_size_brings_them_together(folder: Path) -> None:
    odd = folder / "train" / "left" / "7.png"
    Image.new("RGB", (20, 16)).save(odd)
    assert refused(folder) == (
        f"load: expected images of one size, 12 x 12 as in {odd.parent / '0.png'}, got 16 x 20 in {odd}. "
        "Give --size to bring all to one size."
    )
    found = load(str(folder), 10)
    (batch,) = found.train.batches([Request(torch.arange(36))])
    assert batch.shape == (36, 3, 10, 10)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "val" / "right" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    assert refused(folder).startswith(
        f"load: expected an image that Pillow can read in {path}, got image file is truncated"
    )


def test_a_file_that_is_no_image_is_named(folder: Path) -> None:
    path = folder / "train" / "right" / "3.jpg"
    path.write_text("no image")
    assert refused(folder) == (
        f"load: expected an image that Pillow can read in {path}, got no image. Mend or remove the file."
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_later_is_named_too(folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(str(folder), workers=workers)
    path = folder / "val" / "left" / "1.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError) as caught:
        list(found.test.batches([Request(torch.tensor([0, 1]))]))
    assert str(caught.value).startswith(f"load: expected an image that Pillow can read in {path}, got ")


def test_large_folders_are_checked_as_they_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_MOST_CHECKED", 5)
    path = folder / "val" / "right" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    load(str(folder))


def test_parts_and_classes_that_are_missing(folder: Path) -> None:
    shutil.rmtree(folder / "val" / "right")
    load(str(folder))  # the test images may lack a class
    (folder / "val" / "left").rename(folder / "val" / "middle")
    assert refused(folder) == (
        f"load: expected classes of train alone in {folder / 'val'}, got middle. Both parts need the same classes."
    )
    shutil.rmtree(folder / "val")
    assert refused(folder) == (
        f"load: expected a folder {folder / 'val'}, got none. "
        "Images belong in train/CLASS and val/CLASS below one folder."
    )
    shutil.rmtree(folder / "train" / "right")
    assert refused(folder) == (
        f"load: expected at least 2 folders of classes in {folder / 'train'}, got left. There is nothing to tell apart."
    )
    (folder / "train" / "empty").mkdir()
    assert refused(folder) == (
        f"load: expected images (.png, .jpg, .jpeg) in {folder / 'train' / 'empty'}, got none. "
        "Remove the folder, or put images there."
    )
