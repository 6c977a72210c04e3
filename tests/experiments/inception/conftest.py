"""Small images, in memory and in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchnorm.experiments.inception.images import ImageSet, InMemory, with_validation
from image_files import write_image_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 training and 5 test images of 12×12 pixels in each of two classes."""
    return write_image_folder(tmp_path / "images")


@pytest.fixture
def small_images() -> ImageSet:
    """40 training and 12 test images of 8×8 grey pixels, the class being which half is bright."""

    def some(count: int, seed: int) -> InMemory:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 100, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count) % 2
        images[labels == 0, :, :, :4] += 120
        images[labels == 1, :, :, 4:] += 120
        return InMemory(images, labels)

    return with_validation("halves", (1, 8, 8), 2, some(40, 0), some(12, 1))
