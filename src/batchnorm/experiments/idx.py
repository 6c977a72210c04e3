"""A reader of the IDX format of the MNIST files that checks everything the header says.

A file is a big-endian header and then one unsigned byte a value:

========  =====================  =====================================
offset    images                 labels
========  =====================  =====================================
0         ``00 00 08 03``        ``00 00 08 01`` (magic number: the type
                                 of a value and the number of dimensions)
4         number of images       number of labels
8         rows                   the labels
12        columns
16        the pixels, row by row
========  =====================  =====================================
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import DataError, expected

IMAGES_MAGIC = 0x00000803
LABELS_MAGIC = 0x00000801

_WHAT = {IMAGES_MAGIC: "images", LABELS_MAGIC: "labels"}
_READ_AGAIN = "Fetch the file again."
_PIECE = 1 << 20


def read(path: Path, magic: int) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes. A file whose name ends in ``.gz`` is decompressed.

    Args:
        path: the file.
        magic: ``IMAGES_MAGIC`` or ``LABELS_MAGIC``, the number that the file has to start with.

    Returns:
        Shape (images, rows, columns) or (labels,).

    Raises:
        DataError: the file cannot be read or unpacked, starts with another magic number, is cut short, or
            holds more than its header says.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "labels"
    >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 1, 9]))
    >>> read(path, LABELS_MAGIC)
    array([7, 1, 9], dtype=uint8)
    """
    dimensions = magic & 0xFF
    header_bytes = 4 * (1 + dimensions)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(header_bytes)
            if len(header) < header_bytes:
                raise _cut_short(path, f"a header of {header_bytes} bytes", f"{len(header)} bytes")
            found, *shape = struct.unpack(f">{1 + dimensions}I", header)
            if found != magic:
                raise DataError(
                    expected(
                        "idx.read",
                        f"magic number 0x{magic:08x} ({_WHAT[magic]}) at the start of {path}",
                        f"0x{found:08x}",
                        f"Check that it is an IDX file of {_WHAT[magic]} and not another of the four.",
                    )
                )
            size = math.prod(shape)
            values = _at_most(file, size + 1)  # one more than promised, to notice a longer file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(expected("idx.read", f"a readable file at {path}", _reason(error), _READ_AGAIN)) from error
    described = f"{' x '.join(map(str, shape))} = {size} values"
    if len(values) < size:
        raise _cut_short(path, described, f"{len(values)}")
    if len(values) > size:
        raise DataError(expected("idx.read", f"{described} in {path}, as its header says", "more", _READ_AGAIN))
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _at_most(file: BufferedIOBase, limit: int) -> bytes:
    """Read up to ``limit`` bytes in pieces, so that a damaged header cannot cause a huge allocation."""
    pieces: list[bytes] = []
    while limit > 0 and (piece := file.read(min(limit, _PIECE))):
        pieces.append(piece)
        limit -= len(piece)
    return b"".join(pieces)


def _cut_short(path: Path, promised: str, found: str) -> DataError:
    return DataError(expected("idx.read", f"{promised} in {path}", found, f"It is cut short. {_READ_AGAIN}"))


def _reason(error: BaseException) -> str:
    """The reason alone: the text of an OSError would repeat the path."""
    return getattr(error, "strerror", None) or str(error)
