"""Clear errors for PyTorch tools that cannot handle our layers, and would otherwise fail obscurely or drop something.

``SyncBatchNorm.convert_sync_batchnorm`` copies the arguments that it knows and drops our extras. ``fuse_modules`` of
torch.ao.quantization looks for exact types and does not find ours. Neither has a hook. But each reads an attribute that
the layer may lack, and that read can raise an error with a clear message.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from batchnorm.errors import ArgumentError, expected

SYNC = ("torch.nn.modules.batchnorm", "convert_sync_batchnorm")
FUSE = ("torch.ao.quantization.fuse_modules", "fuse_known_modules")

FRAMES = 4
"""How many stack frames to search for the tool: ``fuse_known_modules`` reads through two functions and a generator."""


class Absent:
    """An attribute that a layer does not have. It detects which tool reads it.

    Every other reader gets an AttributeError, as for any missing attribute. Not a data descriptor, so an attribute of
    that name on the instance comes first, and a submodule of that name after it.
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
    """Module and function of each caller."""
    found = set()
    frame = sys._getframe(2)
    for _ in range(FRAMES):
        found.add((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        if frame.f_back is None:
            break
        frame = frame.f_back
    return found
