"""The four files of MNIST's format, written from its description and not by the code under test."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def idx_bytes(values: NDArray[np.uint8]) -> bytes:
    """An IDX file of unsigned bytes."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


def write_idx_folder(folder: Path) -> Path:
    """A folder as MNIST comes, with 70 training and 20 test images of 3×2 random pixels."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 70), ("t10k", 20)):
        images = random.integers(0, 256, (count, 3, 2), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder
