"""What tools of PyTorch that cannot handle a layer of ours are told, where they would fail obscurely or lose something.

``SyncBatchNorm.convert_sync_batchnorm`` copies the arguments that it knows, and drops our extras. ``fuse_modules`` of
torch.ao.quantization looks for exact types, and does not find ours. Neither can be asked to look closer. But each asks
the layer for an attribute that may be absent, and the answer can be an error with words to it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from batchnorm.errors import ArgumentError, expected

SYNC = ("torch.nn.modules.batchnorm", "convert_sync_batchnorm")
FUSE = ("torch.ao.quantization.fuse_modules", "fuse_known_modules")

FRAMES = 4
"""How far up the stack the tool may stand: ``fuse_known_modules`` asks through two functions and a generator."""


class Absent:
    """An attribute that a layer does not have, and by which it learns who asks.

    Everyone but the two tools gets an AttributeError, as for any attribute that is absent. Not a data descriptor: an
    attribute of that name on the instance is found first, and a submodule of that name after it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: Any, owner: type) -> object:
        if layer is not None and not torch.compiler.is_compiling():
            callers = _callers()
            extras = layer._extras()
            if SYNC in callers and extras:
                shown = ", ".join(f"{name}={value!r}" for name, value in extras.items())
                got = f"{owner.__name__}({shown})"
                todo = (
                    'They would be lost. Call batchnorm.convert(model, process_group="world"), which keeps them, or '
                    "batchnorm.revert(model) first."
                )
                raise ArgumentError(expected("convert_sync_batchnorm", "a layer without extras", got, todo))
            if FUSE in callers:
                got, todo = f"batchnorm.{owner.__name__}", "Call batchnorm.revert(model) first."
                raise ArgumentError(
                    expected("fuse_modules", "torch.nn's own layers, which it knows by type", got, todo)
                )
        raise AttributeError(self._name)


def _callers() -> set[tuple[str, str]]:
    """Module and function of those who called for the attribute."""
    found = set()
    frame = sys._getframe(2)
    for _ in range(FRAMES):
        found.add((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        if frame.f_back is None:
            break
        frame = frame.f_back
    return found
