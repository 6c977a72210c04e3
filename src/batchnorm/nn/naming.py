"""The name of a layer inside the model that holds it, for messages."""

from __future__ import annotations

import gc

from torch import nn


def path_of(module: nn.Module) -> str:
    """``layer1.0.bn2`` and the like, found by searching for the modules that contain this one; "" if none does.

    Looks through every live object, so only messages use it.
    """
    parents: dict[int, tuple[nn.Module, str]] = {}
    for candidate in gc.get_objects():
        # Its type, not isinstance: that asks the object for its class, and some objects warn when asked anything.
        if issubclass(type(candidate), nn.Module):
            # One whose __init__ failed has no children, nor a place for them.
            for name, child in candidate.__dict__.get("_modules", {}).items():
                if child is not None:
                    parents.setdefault(id(child), (candidate, name))
    names: list[str] = []
    current, seen = module, {id(module)}
    while id(current) in parents:
        current, name = parents[id(current)]
        if id(current) in seen:
            break
        seen.add(id(current))
        names.append(name)
    return ".".join(reversed(names))


def described(layer: nn.Module) -> str:
    """``layer1.0.bn2 (BatchNorm2d)``, or the class alone where no module holds the layer."""
    path, kind = path_of(layer), type(layer).__name__
    return f"{path} ({kind})" if path else kind
