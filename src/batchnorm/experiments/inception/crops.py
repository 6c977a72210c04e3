"""Random crops, reflections and photometric distortions of training images."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# GoogLeNet's: crops of 8 % to 100 % of the area, with sides in a ratio from 3:4 to 4:3.
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)


def crop_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop of an image of this size."""
    area, ratio, top, left = torch.rand(4, generator=generator).tolist()
    wanted = height * width * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
    shape = math.exp(math.log(_RATIO[0]) + ratio * (math.log(_RATIO[1]) - math.log(_RATIO[0])))
    tall = max(1, min(height, round(math.sqrt(wanted / shape))))
    wide = max(1, min(width, round(math.sqrt(wanted * shape))))
    return round(top * (height - tall)), round(left * (width - wide)), tall, wide


def reflected(generator: torch.Generator) -> bool:
    """Left and right exchanged, for one image of two."""
    return bool(torch.rand(1, generator=generator) < 0.5)


def random_crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of a uint8 image (channels, height, width), at its size again, reflected or not."""
    _, height, width = image.shape
    top, left, tall, wide = crop_box(height, width, generator)
    piece = image[None, :, top : top + tall, left : left + wide].float()
    found = F.interpolate(piece, (height, width), mode="bilinear", antialias=True)[0].round().byte()
    return found.flip(2) if reflected(generator) else found


def distort(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation of each image times a random factor from 1 - strength to 1 + strength.

    Args:
        images: in [-1, 1], shape (batch, channels, height, width).
        strength: from 0 to 1.
        generator: of the CPU.
    """
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, generator=generator) - 1)
    brightness, contrast, saturation = factors.to(images.device)
    bright = ((images + 1) * brightness).sub(1)
    mean = bright.mean(dim=(1, 2, 3), keepdim=True)
    contrasted = mean + (bright - mean) * contrast
    grey = contrasted.mean(dim=1, keepdim=True)
    found: Tensor = (grey + (contrasted - grey) * saturation).clamp(-1, 1)
    return found
