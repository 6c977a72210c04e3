"""Packages that users build networks with, where they are installed; a test that needs one skips where it is not."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import pytest
import torch


@cache
def _torchvision_operators() -> object:
    """PyPI's torchvision is built for the GPU build of torch. With another build its operators do not load, and it
    cannot be imported for want of two names. Nothing here calls them."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def package(name: str) -> ModuleType:
    """``timm`` or ``transformers``, imported without their warnings about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _torchvision_operators()
        return pytest.importorskip(name)
