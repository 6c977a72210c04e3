"""The IDX parser: every promise of a header is checked, and each failure says what is wrong with which file."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from batchnorm.errors import DataError
from batchnorm.experiments import idx

PIXELS = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
HEADER = struct.pack(">IIII", 0x803, 4, 3, 2)


def refused(path: Path, magic: int = idx.IMAGES_MAGIC) -> str:
    with pytest.raises(DataError) as caught:
        idx.read(path, magic)
    return str(caught.value)


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_images_come_back_row_by_row(tmp_path: Path, name: str) -> None:
    content = HEADER + bytes(range(24))
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    images = idx.read(path, idx.IMAGES_MAGIC)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, PIXELS)


def test_labels_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_bytes(struct.pack(">II", 0x801, 3) + bytes([7, 0, 255]))
    np.testing.assert_array_equal(idx.read(path, idx.LABELS_MAGIC), [7, 0, 255])


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none"
    assert refused(path) == (
        f"idx.read: expected a readable file at {path}, got No such file or directory. Fetch the file again."
    )


def test_labels_in_the_place_of_images(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_bytes(struct.pack(">II", 0x801, 12) + bytes(12))
    assert refused(path) == (
        f"idx.read: expected magic number 0x00000803 (images) at the start of {path}, got 0x00000801. "
        "Check that it is an IDX file of images and not another of the four."
    )


@pytest.mark.parametrize("length", [0, 3, 15])
def test_header_cut_short(tmp_path: Path, length: int) -> None:
    path = tmp_path / "images"
    path.write_bytes(HEADER[:length])
    assert refused(path) == (
        f"idx.read: expected a header of 16 bytes in {path}, got {length} bytes. It is cut short. Fetch the file again."
    )


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_pixels_cut_short(tmp_path: Path, name: str) -> None:
    content = HEADER + bytes(23)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert refused(path) == (
        f"idx.read: expected 4 x 3 x 2 = 24 values in {path}, got 23. It is cut short. Fetch the file again."
    )


def test_more_than_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(HEADER + bytes(25))
    assert refused(path) == (
        f"idx.read: expected 4 x 3 x 2 = 24 values in {path}, as its header says, got more. Fetch the file again."
    )


def test_a_header_of_absurd_sizes_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(struct.pack(">IIII", 0x803, *[2**32 - 1] * 3) + bytes(5))
    size = (2**32 - 1) ** 3
    assert refused(path) == (
        f"idx.read: expected {' x '.join(['4294967295'] * 3)} = {size} values in {path}, got 5. "
        "It is cut short. Fetch the file again."
    )


def test_gzip_stream_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(HEADER + bytes(range(24)))[:-12])
    assert refused(path) == (
        f"idx.read: expected a readable file at {path}, got Compressed file ended before the end-of-stream "
        "marker was reached. Fetch the file again."
    )


def test_no_gzip_under_a_gzip_name(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(HEADER + bytes(24))
    assert refused(path) == (
        rf"idx.read: expected a readable file at {path}, got Not a gzipped file (b'\x00\x00'). Fetch the file again."
    )


def test_gzip_stream_damaged(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    packed = bytearray(gzip.compress(HEADER + np.random.default_rng(0).bytes(24)))
    packed[12] ^= 0xFF
    path.write_bytes(packed)
    assert refused(path).startswith("idx.read: expected ")


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    assert refused(tmp_path) == (
        f"idx.read: expected a readable file at {tmp_path}, got Is a directory. Fetch the file again."
    )
