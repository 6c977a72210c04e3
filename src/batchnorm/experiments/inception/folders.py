"""Image files in ``train/CLASS`` and ``val/CLASS``, decoded by Pillow in the workers of a ``DataLoader``.

An image of another size than the wanted one is cut to the middle seven eighths of its shorter side, which is how 224
pixels come out of 256, and brought to the size. In training with crops, the crop is random instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from batchnorm.errors import DataError, expected
from batchnorm.experiments.inception.crops import crop_box, reflected
from batchnorm.experiments.inception.images import ImageSet, Request, with_validation

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = (".png", ".jpg", ".jpeg")
_CHANNELS = 3
_MIDDLE = 7 / 8
# Up to so many files are decoded once before training, which takes seconds; more are found out as they come.
_MOST_CHECKED = 10_000


@dataclass(frozen=True)
class Files:
    """Image files with their classes, brought to ``size`` × ``size`` pixels; see ``images.Images``."""

    paths: Sequence[Path]
    labels: Tensor
    size: tuple[int, int]  # height and width
    workers: int

    def batches(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        # One item of the loader is a whole mini-batch: the sampler gives requests.
        loader = DataLoader(
            _Decoding(self.paths, self.size),
            batch_size=None,
            sampler=requests,
            num_workers=self.workers,
            generator=torch.Generator(),  # the loader draws a seed that nothing here uses
            collate_fn=_unchanged,  # the default would build a copy
        )
        for found in loader:
            if isinstance(found, DataError):
                raise found
            yield found


class _Decoding(Dataset[Tensor | DataError]):
    """Mini-batches by ``Request``. An error comes back as a value: the loader would bury it in a traceback."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]) -> None:
        self.paths = paths
        self.size = size

    def __getitem__(self, request: Request) -> Tensor | DataError:
        generator = None if request.crop_seed is None else torch.Generator().manual_seed(request.crop_seed)
        try:
            return torch.stack([decoded(self.paths[k], self.size, generator) for k in request.indices.tolist()])
        except DataError as error:
            return error


def decoded(path: Path, size: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """One image, uint8 of shape (3, height, width).

    Raises:
        DataError: Pillow cannot read it; the file is named.
    """
    from PIL import Image

    height, width = size
    image = _read(path)
    if generator is not None:
        top, left, tall, wide = crop_box(image.height, image.width, generator)
        image = image.resize((width, height), Image.Resampling.BILINEAR, (left, top, left + wide, top + tall))
        if reflected(generator):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    elif image.size != (width, height):
        side = _MIDDLE * min(image.size)
        x, y = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((width, height), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def load_folder(folder: Path, size: int | None, workers: int) -> ImageSet:
    """The images below ``folder``; those of ``val`` are the test images.

    Args:
        folder: with ``train/CLASS`` and ``val/CLASS``.
        size: pixels of a side; None: all images must be of one size, which is kept.
        workers: processes that decode.

    Raises:
        DataError: a part, a class or an image is missing or broken, or sizes differ.
    """
    train_paths, train_labels, classes = _listed(folder / "train", None)
    test_paths, test_labels, _ = _listed(folder / "val", classes)
    every = [*train_paths, *test_paths]
    shape = (size, size) if size is not None else _common_size(every)
    if len(every) <= _MOST_CHECKED:
        for path in every:
            _read(path)
    training = Files(train_paths, train_labels, shape, workers)
    test = Files(test_paths, test_labels, shape, workers)
    return with_validation(str(folder), (_CHANNELS, *shape), len(classes), training, test)


def _listed(part: Path, classes: Sequence[str] | None) -> tuple[list[Path], Tensor, list[str]]:
    """Files, labels and names of the classes of a part; ``classes`` are those that it may have."""
    if not part.is_dir():
        raise DataError(
            expected("load", f"a folder {part}", "none", "Images belong in train/CLASS and val/CLASS below one folder.")
        )
    names = sorted(path.name for path in part.iterdir() if path.is_dir() and not path.name.startswith("."))
    if classes is None and len(names) < 2:
        found = ", ".join(names) or "none"
        raise DataError(
            expected("load", f"at least 2 folders of classes in {part}", found, "There is nothing to tell apart.")
        )
    known = names if classes is None else list(classes)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        got = ", ".join(unknown) or "none"
        raise DataError(expected("load", f"classes of train alone in {part}", got, "Both parts need the same classes."))
    paths: list[Path] = []
    labels: list[int] = []
    for name in names:
        found_here = sorted(path for path in (part / name).iterdir() if path.suffix.lower() in _SUFFIXES)
        if not found_here:
            wanted = f"images ({', '.join(_SUFFIXES)}) in {part / name}"
            raise DataError(expected("load", wanted, "none", "Remove the folder, or put images there."))
        paths += found_here
        labels += [known.index(name)] * len(found_here)
    return paths, torch.tensor(labels, dtype=torch.int64), known


def _common_size(paths: Sequence[Path]) -> tuple[int, int]:
    """Height and width of all images, from their headers."""
    first: tuple[int, int] | None = None
    for path in paths:
        with _opened(path) as image:
            width, height = image.size
        if first is None:
            first = (height, width)
        elif first != (height, width):
            raise DataError(
                expected(
                    "load",
                    f"images of one size, {first[0]} x {first[1]} as in {paths[0]}",
                    f"{height} x {width} in {path}",
                    "Give --size to bring all to one size.",
                )
            )
    assert first is not None
    return first


def _read(path: Path) -> Image:
    """The whole image, as RGB."""
    with _opened(path) as image:
        return image.convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """The image, of which only the header is read yet. What Pillow raises in the body names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError as error:
        raise _broken(path, "no image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # its decoders raise all of these
        raise _broken(path, getattr(error, "strerror", None) or str(error)) from error


def _broken(path: Path, reason: str) -> DataError:
    return DataError(expected("load", f"an image that Pillow can read in {path}", reason, "Mend or remove the file."))


def _unchanged(found: Any) -> Any:
    return found
