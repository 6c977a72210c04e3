"""A folder of small image files in two classes that anyone can tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image_folder(folder: Path, *, train: int = 20, val: int = 5, side: int = 12) -> Path:
    """``train`` and ``val`` images of each class: bright on the left, as PNG, or on the right, as JPEG."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name, suffix in (("left", "png"), ("right", "jpg")):
            place = folder / part / name
            place.mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 100, (side, side, 3), dtype=np.uint8)
                half = slice(None, side // 2) if name == "left" else slice(side // 2, None)
                pixels[:, half] += 120
                Image.fromarray(pixels).save(place / f"{k}.{suffix}")
    return folder
